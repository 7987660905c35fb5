"""Whether an answer is right: a function for each kind, (document, text) -> what was understood, and the score."""

import re
from typing import Any

from refusion_jax.evaluation import sandbox

Verdict = tuple[str, float]  # what was taken for the answer, or the reason why it is wrong; 1.0 for a right one

NUMBER = r"-?[\d,]*\.?\d+"


def number(document: dict[str, Any], text: str) -> Verdict:
    """The number behind the last "answer is", else the last one in the text, equals the one behind "####"."""
    said = re.findall(rf"answer is:?[^\d\-.]{{0,20}}({NUMBER})", text) or re.findall(NUMBER, text)
    right = re.findall(NUMBER, document["answer"].rpartition("####")[2])[-1]
    found = said[-1] if said else ""
    return found, float(bool(found) and _value(found) == _value(right))


def _value(text: str) -> float:
    return float(text.replace(",", ""))


def mathematics(document: dict[str, Any], text: str) -> Verdict:
    """The last formula of the text equals the solution's boxed one, by math-verify."""
    from math_verify import parse, verify

    found = parse(text)
    return str(found[-1]) if found else "", float(verify(parse(document["solution"]), found))


def letter_after_answer_is(document: dict[str, Any], text: str) -> Verdict:
    """The first letter behind "answer is", in parentheses or not."""
    found = re.search(r"answer is \(?([A-J])\)?", text)
    return (found.group(1) if found else ""), float(bool(found) and found.group(1) == document["answer"])


def letter_alone(document: dict[str, Any], text: str) -> Verdict:
    """The text, but for white space and punctuation, is the letter."""
    found = re.sub(r"[\W_]", "", text).upper()
    return found, float(found == document["answerKey"])


def letter_in_parentheses(document: dict[str, Any], text: str) -> Verdict:
    """The last letter in parentheses."""
    found = (re.findall(r"\(([A-Z])\)", text.upper()) or [""])[-1]
    return found, float(found == document["answer"])


def ending(document: dict[str, Any], text: str) -> Verdict:
    """The text is the right one of the endings."""
    return text, float(text == document["endings"][int(document["label"])])


def final_answer(document: dict[str, Any], text: str) -> Verdict:
    """The source's own score of the whole text (`data.examples.Source.score`)."""
    return text, float(document["source"].score(document["index"], text) == 1.0)


# --- Programs; what is run is scored by the sandbox.


def humaneval_program(document: dict[str, Any], text: str) -> str:
    """The Python block that the answer began with, and the tests; the prompt's function where only its body came."""
    code = text.partition("```")[0]
    name = document["entry_point"]
    before = re.split(rf"^def {name}\b", document["prompt"], flags=re.M)[0]  # imports and helpers
    program = before + code if re.search(rf"^def {name}\b", code, re.M) else document["prompt"] + code
    return f"{program}\n{document['test']}\ncheck({name})\n"


def mbpp_program(document: dict[str, Any], text: str) -> str:
    """The answer up to [DONE], out of its fence if it has one, and the tests."""
    code = text.partition("[DONE]")[0]
    fenced = re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", code, re.S)
    tests = [document.get("test_setup_code") or "", *document["test_list"]]
    return "\n".join([fenced.group(1) if fenced else code, *tests]) + "\n"


def run_programs(programs: list[str]) -> list[Verdict]:
    """Verdicts on programs, several run at a time."""
    return [(outcome.reason, float(outcome.passed)) for outcome in sandbox.run_all(programs)]
