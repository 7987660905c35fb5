"""The benchmarks: what is asked and how, what ends an answer, what makes it right, and what the authors used and got.

Prompts, prefixes and stops are those of the authors' evaluation (method section 4 has the samplers' settings); the
description of gpqa is our own, and hellaswag, whose answers are chosen by likelihood, is not among theirs. Each is a
task of lm-evaluation-harness, made as a dict when it is run. Documents have the fields of the data set on the hub,
wherever they come from.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from refusion_jax.evaluation import scoring

Document = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
      text: of the user's turn, from a document.
      fields: that a document must have.
      verdict: what was understood and the score, from a document and an answer's text; of code a `program` instead.
      options: of a likelihood task: the answers, of which the most probable one is the model's; nothing is generated.
      prepared: a document as `text` and `verdict` take it, from one of the hub's and its number.
      hub: (data set, configuration, split).
      settings: of plan-and-infill, as the authors had them.
      published: accuracy in percent and tokens/s of the authors' ReFusion 8B and of Qwen3-8B (method section 6).
    """

    name: str
    text: Callable[[Document], str]
    fields: tuple[str, ...]
    verdict: Callable[[Document, str], scoring.Verdict] | None = None
    program: Callable[[Document, str], str] | None = None
    options: Callable[[Document], list[str]] | None = None
    prepared: Callable[[Document, int], Document] = lambda document, index: document
    description: str = ""
    prefix: str = ""
    until: tuple[str, ...] = ()
    hub: tuple[str, str, str] = ("", "", "")
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    published: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


def authors(slot_threshold: float, token_threshold: float, slot_size: int, block: int) -> dict[str, Any]:
    """Their settings of a task; gen_length 512, temperature 0."""
    return {
        "gen_length": 512,
        "temperature": 0.0,
        "slot_size": slot_size,
        "blocks": 512 // block,
        "slot_threshold": slot_threshold,
        "token_threshold": token_threshold,
    }


def published(refusion: tuple[float, float], qwen3: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return {"ReFusion 8B": refusion, "Qwen3-8B": qwen3}


# --- Prompts.


def gsm8k_text(document: Document) -> str:
    return (
        "Solve the following math problem. You need to think step-by-step, show your detailed reasoning, and end with "
        f'"The answer is [result]," where [result] is the final number.\n\n{document["question"]}'
    )


def lettered(options: list[str], form: str) -> str:
    """A line for each option, such as "A. text"."""
    return "\n".join(form.format(chr(ord("A") + i), option.strip()) for i, option in enumerate(options))


def mmlu_pro_text(document: Document) -> str:
    options = lettered(document["options"], "{}. {}")
    return f"Question:\n{document['question']}\nOptions:\n{options}\nAnswer: Let's think step by step."


def arc_text(document: Document) -> str:
    return (
        "Given the following question and four candidate answers (A, B, C and D), choose the best answer.\n"
        f"Question: {document['question'].strip()}\n{lettered(document['choices']['text'], '{}. {}')}\n"
        'Your response should end with "The best answer is [the_answer_letter]" where the [the_answer_letter] is one '
        "of A, B, C or D."
    )


def arc_prepared(document: Document, index: int) -> Document:
    """Some of its answers are numbered."""
    key = document["answerKey"]
    return document | {"answerKey": "ABCDE"[int(key) - 1] if key.isdigit() else key}


def gpqa_prepared(document: Document, index: int) -> Document:
    """Options shuffled, for each document in its own way."""
    wrong = [document[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3)]
    options = [document["Correct Answer"].strip(), *wrong]
    order = random.Random(index).sample(range(4), 4)
    right = chr(ord("A") + order.index(0))
    return {"question": document["Question"], "options": [options[i] for i in order], "answer": right}


def gpqa_text(document: Document) -> str:
    return f"Question: {document['question']}\nChoices:\n{lettered(document['options'], '({}) {}')}\nAnswer:"


def humaneval_text(document: Document) -> str:
    return (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f"```python\n{document['prompt']}\n```\n"
    )


def mbpp_text(document: Document) -> str:
    tests = "\n".join(document["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {document['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "gsm8k",
            gsm8k_text,
            ("question", "answer"),
            scoring.number,
            hub=("openai/gsm8k", "main", "test"),
            settings=authors(0.9, 0.4, 32, 128),
            published=published((84.91, 81), (81.96, 31)),
        ),
        Benchmark(
            "math",
            lambda document: f"Problem:\n{document['problem']}\n\nSolution:",
            ("problem", "solution"),
            scoring.mathematics,
            until=("Problem:",),
            hub=("EleutherAI/hendrycks_math", "*", "test"),
            settings=authors(0.8, 0.6, 32, 64),
            published=published((54.22, 82), (83.28, 30)),
        ),
        Benchmark(
            "mmlu_pro",
            mmlu_pro_text,
            ("question", "options", "answer"),
            scoring.letter_after_answer_is,
            description=(
                "The following are multiple choice questions (with answers). Think step by step and then finish your "
                'answer with "the answer is (X)" where X is the correct letter choice.\n'
            ),
            until=("Question:",),
            hub=("TIGER-Lab/MMLU-Pro", "", "test"),
            settings=authors(0.9, 0.4, 16, 128),
            published=published((45.94, 53), (67.25, 31)),
        ),
        Benchmark(
            "arc_challenge",
            arc_text,
            ("question", "choices", "answerKey"),
            scoring.letter_alone,
            prepared=arc_prepared,
            prefix="The best answer is",
            until=("\n\n", "."),
            hub=("allenai/ai2_arc", "ARC-Challenge", "test"),
            settings=authors(0.8, 0.1, 8, 8),
            published=published((89.76, 32), (90.36, 43)),
        ),
        Benchmark(
            "gpqa",
            gpqa_text,
            ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
            scoring.letter_in_parentheses,
            prepared=gpqa_prepared,
            description="Answer the question. Think step by step and end with the letter you choose, such as (A).\n",
            until=("Question:",),
            hub=("Idavidrein/gpqa", "gpqa_main", "train"),
            settings=authors(0.8, 0.2, 8, 16),
            published=published((35.49, 64), (39.06, 30)),
        ),
        Benchmark(
            "humaneval",
            humaneval_text,
            ("prompt", "entry_point", "test"),
            program=scoring.humaneval_program,
            prefix="```python\n",
            until=("\nassert", "\n# Test"),
            hub=("openai/openai_humaneval", "", "test"),
            settings=authors(0.9, 0.4, 32, 128),
            published=published((78.66, 104), (87.80, 31)),
        ),
        Benchmark(
            "mbpp",
            mbpp_text,
            ("text", "test_list"),
            program=scoring.mbpp_program,
            until=("[DONE]",),
            hub=("google-research-datasets/mbpp", "full", "test"),
            settings=authors(0.9, 0.3, 32, 128),
            published=published((68.20, 92), (63.80, 30)),
        ),
        Benchmark(
            "hellaswag",
            lambda document: document["ctx"].strip(),
            ("ctx", "endings", "label"),
            scoring.ending,
            options=lambda document: document["endings"],
            hub=("Rowan/hellaswag", "", "validation"),
        ),
    )
}
PAPER = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.published)


def procedural(name: str) -> Benchmark:
    """A task of a `data.examples.Source`: its documents are queries, and it scores answers itself."""
    return Benchmark(name, lambda document: document["query"], ("query",), scoring.final_answer)
