"""What to decode and how: settings, their checks, and the result of one prompt."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import struct

from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig

METHODS = ("plan_and_infill", "autoregressive")
SPECULATE = ("off", "on", "auto")
MAX_STOP_IDS = 8  # ids that may end an answer, the model's EOS among them


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Settings of a decoding (method section 4).

    Attributes:
      gen_length: tokens an answer may have; rounded up to a multiple of `slot_size`.
      slot_size: k, tokens of a slot.
      blocks: parts of the answer decoded strictly left to right; the rounded gen_length / blocks must be a multiple of
        k.
      slot_threshold: a slot is chosen when the confidence of its first token is above this, in [0, 1].
      token_threshold: a draft token is accepted when its autoregressive probability is above this, in [0, 1].
      temperature: 0 is greedy; above, drafts of a plan (and autoregressive tokens) are sampled.
      top_k: with a temperature, sample among the k most probable ids; 0 is all.
      top_p: with a temperature, sample among the fewest ids whose probability reaches this, in (0, 1].
      method: "plan_and_infill", or "autoregressive" (one token per forward, slots and thresholds unused).
      speculate: carry forwards that may be needed next in the same window ("on", "off"); "auto" decides from batch,
        width and device. Changes the number of forwards, never a token.
      window: most tokens of a row's window with speculation; 0 chooses it.
    """

    gen_length: int = 512
    slot_size: int = 32
    blocks: int = 4
    slot_threshold: float = 0.9
    token_threshold: float = 0.4
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    method: str = "plan_and_infill"
    speculate: str = "auto"
    window: int = 0

    def __post_init__(self):
        for name in ("gen_length", "slot_size", "blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name, allowed in (("method", METHODS), ("speculate", SPECULATE)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")
        if self.method == "plan_and_infill" and self.slots % self.blocks:
            raise UserError(
                f"gen_length {self.slots * self.slot_size} (rounded up to whole slots) in {self.blocks} blocks leaves "
                f"blocks that are no multiple of slot_size {self.slot_size}; choose blocks that divide {self.slots} "
                "slots, or another gen_length."
            )
        for name in ("slot_threshold", "token_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"{name} is {getattr(self, name)}; it is compared with a probability and must lie in [0, 1]."
                )
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or above, and finite.")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (all ids) or above.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie in (0, 1], 1 being all ids.")
        if self.window < 0:
            raise UserError(f"window is {self.window}; it must be 0 (chosen for you) or a number of tokens.")

    @property
    def slots(self) -> int:
        """Slots of the whole answer."""
        return -(-self.gen_length // self.slot_size)

    @property
    def length(self) -> int:
        """Most tokens an answer can have: gen_length rounded up to whole slots."""
        return self.gen_length if self.method == "autoregressive" else self.slots * self.slot_size


@struct.dataclass
class Settings:
    """The part of a request's settings that is traced, of one row: changing it compiles nothing.

    Attributes:
      slot_threshold, token_threshold, temperature, top_k, top_p: as in `SamplerConfig`.
      limit: tokens the answer may have, at most the sampler's length.
      stop_ids: [MAX_STOP_IDS] ids that end the answer, the model's EOS first; -1 where there are fewer.
    """

    slot_threshold: jax.Array
    token_threshold: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    limit: jax.Array
    stop_ids: jax.Array

    @classmethod
    def of(cls, config: SamplerConfig, eos: int, *, limit: int = 0, stop_ids: Sequence[int] = ()) -> "Settings":
        """Settings of a request, as NumPy scalars; `limit` 0 is the whole length, `stop_ids` end an answer besides
        `eos`.
        """
        stops = np.full(MAX_STOP_IDS, -1, np.int32)
        stops[: 1 + len(stop_ids)] = [eos, *stop_ids]
        return cls(
            slot_threshold=np.float32(config.slot_threshold),
            token_threshold=np.float32(config.token_threshold),
            temperature=np.float32(config.temperature),
            top_k=np.int32(config.top_k),
            top_p=np.float32(config.top_p),
            limit=np.int32(limit or config.length),
            stop_ids=stops,
        )

    def stops(self, tokens: jax.Array) -> jax.Array:
        """Which of `tokens`, of any shape, end the answer."""
        return (tokens[..., None] == self.stop_ids).any(axis=-1)


@dataclasses.dataclass(frozen=True)
class Generation:
    """The answer to one prompt, or what there is of it.

    Attributes:
      index: which prompt.
      tokens: response ids by position, cut after the first EOS (while decoding: up to the first open position).
      order: positions of all committed tokens in commit order, counted from the start of the response. Tokens committed
        behind an EOS are in here (they condition the slots before it) though not in `tokens`.
      committed: the ids that belong to `order`.
      rounds: the round (which plan) each entry of `order` was committed in.
      forwards: forward passes of the loop that this prompt took part in. The prompt's own, chunk by chunk, are not
        counted.
      tokens_forwarded: tokens in all passes, the prompt included, padding not.
      finished: the answer is complete.
    """

    index: int
    tokens: list[int]
    order: list[int]
    committed: list[int]
    rounds: list[int]
    forwards: int
    tokens_forwarded: int
    finished: bool

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens, EOS included, per forward pass."""
        return len(self.tokens) / self.forwards

    @classmethod
    def of(
        cls, index: int, canvas: dict[str, np.ndarray], stop_ids: Sequence[int], limit: int, finished: bool
    ) -> "Generation":
        """From the canvas of one row (see `state.Canvas`)."""
        order = np.argsort(canvas["when"], kind="stable")[np.sum(canvas["when"] < 0) :]
        tokens, response, ended = canvas["tokens"].tolist(), [], False
        while len(response) < limit and canvas["when"][len(response)] >= 0 and not ended:
            response.append(tokens[len(response)])
            ended = response[-1] in stop_ids
        return cls(
            index=index,
            tokens=response,
            order=order.tolist(),
            committed=canvas["tokens"][order].tolist(),
            rounds=canvas["round"][order].tolist(),
            forwards=int(canvas["forwards"]),
            tokens_forwarded=int(canvas["tokens_forwarded"]),
            finished=finished,
        )


def check_prompts(prompts: Sequence[Sequence[int]], model: ModelConfig, sampler: SamplerConfig) -> None:
    """Raises a UserError that names the first prompt that cannot be decoded, or what the model lacks."""
    if model.eos_token_id is None:
        raise UserError(
            "The model has no end-of-sequence token (eos_token_id is not set); decode with a tokenizer or a "
            "checkpoint that names it."
        )
    if sampler.method == "plan_and_infill" and model.mask_token_id is None:
        raise UserError(
            "The model has no mask token (mask_token_id is not set), so it cannot plan. Use a checkpoint trained "
            "with the ReFusion objective, or method='autoregressive'."
        )
    for index, prompt in enumerate(prompts):
        where = f"Prompt {index}"
        if len(prompt) == 0:
            raise UserError(f"{where} is empty; a prompt needs at least one token, for example the begin token.")
        ids = np.asarray(prompt)
        bad = ids[(ids < 0) | (ids >= model.logical_vocab_size)]
        if bad.size:
            raise UserError(
                f"{where} contains id {bad[0]}, outside the model's vocabulary of {model.logical_vocab_size} ids; use "
                "the tokenizer the model was trained with."
            )
        if model.mask_token_id is not None and (ids == model.mask_token_id).any():
            raise UserError(
                f"{where} contains the mask token (id {model.mask_token_id}) at index "
                f"{int((ids == model.mask_token_id).argmax())}; remove it, only responses are masked."
            )
        total = len(prompt) + sampler.length
        if total > model.max_position_embeddings:
            raise UserError(
                f"{where} has {len(prompt)} tokens; with gen_length {sampler.length} that is {total} positions, more "
                f"than the model's {model.max_position_embeddings}. Shorten the prompt or gen_length."
            )
