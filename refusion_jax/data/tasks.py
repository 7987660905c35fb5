"""Procedural reasoning tasks from the reasoning-gym library: unlimited verifiable examples from a seed, no download.

Short enough for a byte-level CPU model: basic_arithmetic, chain_sum, spell_backward, gcd, products. `gsm_symbolic`
gives grade-school word problems with a worked solution.
"""

import re
from collections.abc import Mapping
from typing import Any

from refusion_jax.errors import UserError

ANSWER_MARK = "####"  # stands between a worked solution and its final answer


def final_answer(text: str) -> str:
    """What follows the last `####` of a worked solution; the whole text without one."""
    return text.rpartition(ANSWER_MARK)[2].strip()


class Task:
    """Random access to the examples of one task; example i depends on (seed, i) and the options only.

    Args:
      name: a reasoning-gym data set, such as "chain_sum".
      size: number of examples.
      seed: seed of the examples. reasoning-gym draws example i from seed + i, so nearby seeds share examples: hold data
        out by a source's `start` and `stop`, not by another seed.
      options: the data set's own parameters, such as {"max_terms": 2}; and query_pattern, a regular expression whose
        first group, found in the question, is the query: leaves out instructions that are the same in every question.

    Raises:
      UserError: reasoning-gym is not installed, or it does not know the name or an option, or query_pattern is no
        regular expression with a group.
    """

    def __init__(self, name: str, size: int, seed: int = 0, options: Mapping[str, Any] = {}):
        try:
            import reasoning_gym
        except ImportError as error:
            raise UserError(
                f"the procedural task {name!r} needs the reasoning-gym library ({error}). Install it: "
                "pip install 'refusion_jax[demo]'."
            ) from error
        options = dict(options)
        self._pattern = _compiled(options.pop("query_pattern", "(?s)(.*)"), name)
        try:
            self._data = reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
        except Exception as error:  # of whatever kind its check of the options, or its use of them, raises
            raise UserError(
                f"reasoning-gym cannot make the task {name!r} with options {options}: {error}. Use one of its "
                "data set names (basic_arithmetic, chain_sum, spell_backward, gsm_symbolic, ...) and that set's "
                "options."
            ) from error
        self._what, self._size = f"the task {name!r} with options {options}", size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> tuple[str, str]:
        """Returns (query, response); the response is the worked solution where the task has one, else the answer."""
        try:
            entry = self._data[i]
        except Exception as error:  # not all options are checked before they are used
            raise UserError(
                f"reasoning-gym cannot make example {i} of {self._what}: {error}. Mend the options."
            ) from error
        query = self._pattern.search(entry["question"])
        if query is None or query.group(1) is None:
            raise UserError(
                f"query_pattern {self._pattern.pattern!r} is not found in the question {entry['question'][:100]!r}, or "
                "its group is not. Mend the option."
            )
        return query.group(1), entry["metadata"].get("answer_cot", entry["answer"])

    def score(self, i: int, generated: str) -> float:
        """reasoning-gym's score of a generated response to example i: 1 for a correct final answer, else less."""
        return float(self._data.score_answer(final_answer(generated), self._data[i]))


def _compiled(pattern: Any, name: str) -> re.Pattern:
    """The option query_pattern of a task, made once.

    Raises:
      UserError: it is no regular expression, or has no group.
    """
    try:
        found = re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        reason = str(error)
    else:
        if found.groups:
            return found
        reason = "it has no group"
    raise UserError(
        f"query_pattern of the task {name!r} is {pattern!r}, which cannot find the query: {reason}. Give a regular "
        "expression whose first group is the query, as ': (.*) ='."
    )
