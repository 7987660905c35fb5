"""Texts with holes: what is given stays as it is, before and behind a hole, and the holes are filled.

A hole has room for so many tokens (of plan-and-infill: whole slots), and what is behind it stands so far behind. A
filling may be shorter: the end-of-sequence or pad token inside a hole closes it. A text whose last part is given ends
there, with the end-of-sequence token.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from refusion_jax.data.tokenizers import Tokenizer, check_text
from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling import Generation, Prompt, SamplerConfig


@dataclasses.dataclass(frozen=True)
class Hole:
    """Room for so many tokens."""

    tokens: int


@dataclasses.dataclass(frozen=True)
class Template:
    """A text with holes.

    Attributes:
      parts: texts and holes in order.
      prompt: what the text answers, one user turn before it; empty: the text stands by itself.
    """

    parts: Sequence[str | Hole]
    prompt: str = ""

    @property
    def sizes(self) -> list[int]:
        """Tokens of each hole."""
        return [part.tokens for part in self.parts if isinstance(part, Hole)]

    def check(self) -> None:
        """Raises a UserError where there is nothing to fill, or nothing to fill it from."""
        for part in self.parts:
            if not isinstance(part, (str, Hole)):
                raise UserError(f"A part of the template is {part!r}; it must be a text or a Hole(tokens).")
            if isinstance(part, str):
                check_text(part, f"The part {part[:20]!r} of the template")
        for index, size in enumerate(self.sizes):
            if size < 1:
                raise UserError(f"Hole {index} has {size} tokens; it needs at least one.")
        if not self.sizes:
            raise UserError(
                "The template has no hole, so there is nothing to fill; put a Hole(tokens) among its texts."
            )
        if not self.prompt.strip() and not any(part for part in self.parts if isinstance(part, str)):
            raise UserError("Nothing is given: the template has neither a text nor a prompt. Give one of them.")


@dataclasses.dataclass(frozen=True)
class Filled:
    """A template with its holes filled.

    Attributes:
      text: all of it, without the prompt.
      holes: the text of each.
      generation: ids of the holes, and how they were decoded.
    """

    text: str
    holes: list[str]
    generation: Generation


def request(
    template: Template, tokenizer: Tokenizer, model: ModelConfig, config: SamplerConfig, index: int = 0, seed: int = 0
) -> Prompt:
    """A template as a request to an engine; `index` and `seed` as there.

    Raises:
      UserError: the template cannot be filled, or the method or the model cannot fill it.
    """
    template.check()
    config.check_holes(template.sizes)
    ids = list(tokenizer.encode_prompt(template.prompt)) if template.prompt.strip() else []
    positions, holes, at = list(range(len(ids))), [], len(ids)
    ends = isinstance(template.parts[-1], str) and bool(template.parts[-1])
    for part in [*template.parts, [model.eos_token_id] if ends else []]:
        if isinstance(part, Hole):
            holes.append((at, part.tokens))
            at += part.tokens
            continue
        given = tokenizer.encode(part) if isinstance(part, str) else part
        ids += given
        positions += range(at, at + len(given))
        at += len(given)
    if at > model.max_position_embeddings:
        raise UserError(
            f"The template has {at} positions ({len(ids)} given tokens and {at - len(ids)} in holes), more than the "
            f"model's {model.max_position_embeddings}. Shorten its texts or holes."
        )
    pad = () if model.pad_token_id in (None, model.eos_token_id) else (model.pad_token_id,)
    return Prompt(
        ids, config, index, seed, limit=sum(template.sizes), stop_ids=pad, positions=positions, holes=tuple(holes)
    )


def filled(template: Template, tokenizer: Tokenizer, generation: Generation) -> Filled:
    """The template with what was decoded for it."""
    ends = list(itertools.accumulate(generation.parts, initial=0))
    holes = [tokenizer.decode(generation.tokens[start:end]) for start, end in itertools.pairwise(ends)]
    left = iter(holes)
    text = "".join(next(left) if isinstance(part, Hole) else part for part in template.parts)
    return Filled(text, holes, generation)


def from_record(record: Any) -> Template:
    """{"template": ["text", 16, "text"], "prompt": "..."}, numbers being holes and the prompt optional.

    Raises:
      UserError: the record is another, or its template cannot be filled.
    """
    parts = record.get("template") if isinstance(record, dict) else None
    if not isinstance(parts, list) or not all(isinstance(p, (str, int)) and not isinstance(p, bool) for p in parts):
        raise UserError(
            f'{str(record)[:60]!r} has no template. Write {{"template": ["text", 16, "text"]}}: texts, and the sizes '
            "of the holes between them in tokens."
        )
    if not isinstance(record.get("prompt", ""), str):
        raise UserError(f"the prompt is {record['prompt']!r}; it must be a text.")
    template = Template([part if isinstance(part, str) else Hole(part) for part in parts], record.get("prompt", ""))
    template.check()
    return template
