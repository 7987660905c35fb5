"""One task, from documents to scored samples: lm-evaluation-harness asks, a model answers, the scoring judges."""

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

from refusion_jax.evaluation import scoring
from refusion_jax.evaluation.journal import Record, totals
from refusion_jax.evaluation.tasks import Benchmark, Document

os.environ.setdefault("TQDM_DISABLE", "1")  # progress lines are the project's own
import datasets  # noqa: E402
import lm_eval  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

logging.getLogger("lm_eval").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A document, its answer and the verdict.

    Attributes:
      number: of the document in its task.
      prompt: the user's turn.
      text: of the answer, cut before the first stop string.
      understood: what was taken for the answer; of a program, why it is wrong.
      score: 1.0 for a right answer.
    """

    number: int
    prompt: str
    text: str
    understood: str
    score: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What is said of a task.

    Attributes:
      accuracy: mean of the scores; a prompt that failed counts as wrong.
      error: its standard error.
      failed: prompts without an answer, and why.
      tokens: of the answers up to the EOS or the stop string; forwards: that wrote them, the prompts' own too.
      seconds: of decoding, without compilation.
    """

    task: str
    method: str
    examples: int
    accuracy: float
    error: float
    failed: dict[int, str]
    tokens: int
    forwards: int
    seconds: float

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(self.forwards, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def config_of(benchmark: Benchmark, documents: Sequence[Document]) -> dict[str, Any]:
    """The benchmark as lm-evaluation-harness's config of a task, whose documents are the numbers of ours."""

    def judge(document: dict[str, int], results: list[Any]) -> dict[str, float]:
        of = documents[document["number"]]
        return {"exact_match": verdicts(benchmark, [of], [text_of(benchmark, of, results)])[0][1]}

    numbers = datasets.Dataset.from_dict({"number": list(range(len(documents)))})
    options = benchmark.options
    asked = {"output_type": "generate_until"}
    if options:
        asked = {
            "output_type": "multiple_choice",
            "doc_to_choice": lambda document: options(documents[document["number"]]),
            "target_delimiter": "",
        }
    return asked | {
        "task": benchmark.name,
        "custom_dataset": lambda **_: {"test": numbers},
        "test_split": "test",
        "description": benchmark.description,
        "doc_to_text": lambda document: benchmark.text(documents[document["number"]]),
        "doc_to_target": lambda document: 0 if options else "",
        "gen_prefix": benchmark.prefix or None,
        "process_results": judge,
        "generation_kwargs": {"until": list(benchmark.until), "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "unsafe_code": benchmark.program is not None,
        "num_fewshot": 0,
    }


def text_of(benchmark: Benchmark, document: Document, responses: Sequence[Any]) -> str:
    """The answer: what was generated, or of the options the one with the highest log probability per character."""
    if not benchmark.options:
        return responses[0]
    pairs = zip(benchmark.options(document), responses, strict=True)
    return max(((value / max(len(option), 1), option) for option, (value, _) in pairs), key=lambda pair: pair[0])[1]


def verdicts(benchmark: Benchmark, documents: Sequence[Document], texts: Sequence[str]) -> list[scoring.Verdict]:
    """What each answer was understood as, and its score; of code, programs are run."""
    if benchmark.program:
        return scoring.run_programs([benchmark.program(*pair) for pair in zip(documents, texts, strict=True)])
    return [benchmark.verdict(*pair) for pair in zip(documents, texts, strict=True)]


def texts_of(lm: LM, benchmark: Benchmark, documents: Sequence[Document]) -> list[str]:
    """The model's answers. With several processes all call this together, and all get all answers."""
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=[config_of(benchmark, documents)],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        predict_only=True,  # answers are scored together, programs several at a time
        confirm_run_unsafe_code=True,
    )
    samples = sorted(found["samples"][benchmark.name], key=lambda sample: sample["doc_id"])
    answers = [[response[0] for response in sample["resps"]] for sample in samples]
    return [text_of(benchmark, document, found) for document, found in zip(documents, answers, strict=True)]


def samples_of(benchmark: Benchmark, documents: Sequence[Document], texts: Sequence[str]) -> list[Sample]:
    """The answers, scored."""
    found = zip(documents, texts, verdicts(benchmark, documents, texts), strict=True)
    return [Sample(i, benchmark.text(of), text, *verdict) for i, (of, text, verdict) in enumerate(found)]


def result_of(name: str, method: str, samples: Sequence[Sample], records: Sequence[Record]) -> Result:
    """The figures of a task.

    Args:
      records: of the samples' answers, in their order.
    """
    count = len(samples)
    mean = sum(sample.score for sample in samples) / count
    variance = sum((sample.score - mean) ** 2 for sample in samples) / max(count - 1, 1)
    tokens, forwards, seconds = totals(records)
    return Result(
        task=name,
        method=method,
        examples=count,
        accuracy=mean,
        error=math.sqrt(variance / count),
        failed={number: record.failure for number, record in enumerate(records) if record.failure},
        tokens=tokens,
        forwards=forwards,
        seconds=seconds,
    )
