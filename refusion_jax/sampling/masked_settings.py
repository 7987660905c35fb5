"""The settings of masked diffusion decoding, and which of them go together."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from refusion_jax.errors import UserError
from refusion_jax.sampling import masked_caches, masked_select
from refusion_jax.sampling.config import SamplerConfig, setting
from refusion_jax.sampling.masked_select import KEEP_FLOOR, LINEAR_T, SCHEDULES


@dataclasses.dataclass(frozen=True)
class MaskedSettings(SamplerConfig):
    """The settings of `MaskedConfig`, and what follows from them."""

    method: ClassVar[str] = "masked"

    alignment: str = setting(
        "same", "which logits predict a token: those at its position, or the ones before", choices=("same", "shift")
    )
    block_length: int = setting(0, "tokens of a block, blocks being decoded from left to right; 0: one block")
    select: str = setting(
        "topk",
        "what a forward decides: as many as the schedule says, all that are sure enough, from left to right what a "
        "causal pass of the same weights agrees with, or each token by itself at a random time: all alike, or (scores) "
        "as SEDD's ratios of probabilities say",
        choices=("topk", "threshold", "factor", "entropy_bound", "agreement", "independent", "scores"),
    )
    schedule: str = setting("even", "of topk: how many each forward decides", choices=SCHEDULES)
    steps: int = setting(
        0,
        "forwards for the whole answer with topk and independent, 0: as many as tokens; with threshold no forward "
        "decides more than its share and what was refused before, 0: any number",
        traced=True,
    )
    eps: float = setting(1e-3, "time at the last step of linear_t, independent and scores", traced=True)
    score: str = setting(
        "confidence",
        "which are decided first; given: as --order says",
        choices=("confidence", "margin", "entropy", "random", "given"),
    )
    order: tuple[int, ...] = setting((), "of score given: the positions of every block, as 2,0,1", traced=True)
    threshold: float = setting(0.9, "of threshold: least confidence", traced=True)
    factor: float = setting(
        1.0, "of factor: the nth best is decided while (n + 1)(1 - confidence) <= this", traced=True
    )
    gamma: float = setting(
        0.1, "of entropy_bound: nats that the decided tokens may have, the largest aside", traced=True
    )
    score_temperature: float = setting(
        1.0, "of the probabilities that scores are; 0: those that drafts are drawn from", traced=True
    )
    position_temperature: float = setting(0.0, "above 0, positions are drawn by softmax(score / this)", traced=True)
    cfg_scale: float = setting(0.0, "classifier-free guidance: twice the tokens in a forward; 0: none", traced=True)
    suppress: str = setting(
        "no",
        "end ids: never draft the EOS (logits), or decide end ids last (confidence)",
        choices=("no", "logits", "confidence", "both"),
    )
    cache: str = setting(
        "none", "positions that are not computed again in every forward; an approximation", choices=masked_caches.CACHES
    )
    cache_steps: int = setting(4, "of dkv caches: every so many forwards everything is computed again", traced=True)
    cache_shift: str = setting(
        "un",
        "of dkv caches with shifted logits: a position is kept once the next one is decided (un), or both (un_right)",
        choices=("un", "un_right"),
    )
    cache_window: int = setting(4, "of dkv_greedy: open neighbours of each token decided next", traced=True)
    prompt_interval: int = setting(
        100, "of dllm: every so many forwards the prompt goes through all layers again", traced=True
    )
    gen_interval: int = setting(7, "of dllm: the same of the answer", traced=True)
    transfer_ratio: float = setting(0.25, "of dllm: part of the answer, that has changed most, in other forwards")
    cfg_interval: int = setting(
        1, "of dllm: every so many forwards, and in the first 5, guidance is measured anew", traced=True
    )
    stop: str = setting(
        "answer", "a row is done when its answer is, or with all gen_length tokens", choices=("answer", "length")
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}; it is compared with a probability and must lie in [0, 1].")
        if not 0 <= self.eps < 1:
            raise UserError(f"eps is {self.eps}; time falls from 1 to it, so it must lie in [0, 1).")
        for name in ("factor", "gamma", "score_temperature", "position_temperature", "cfg_scale"):
            if not 0 <= getattr(self, name) <= math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0.")
        for name, least in dict(
            block_length=0, steps=0, cache_steps=1, cache_window=0, prompt_interval=1, gen_interval=1, cfg_interval=1
        ).items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not 0 <= self.transfer_ratio <= 1:
            raise UserError(f"transfer_ratio is {self.transfer_ratio}; it is a part, from 0 to 1.")
        if self.block_length and self.gen_length % self.block_length:
            raise UserError(
                f"block_length {self.block_length} does not divide gen_length {self.gen_length}; choose one that does, "
                "or another gen_length."
            )
        for wrong, message in self._impossible():
            if wrong:
                raise UserError(message)

    def _impossible(self) -> list[tuple[bool, str]]:
        """(whether it is so, what is to be said then) of settings that do not go together."""
        return [*self._impossible_counts(), *self._impossible_scores(), *self._impossible_caches()]

    def _impossible_counts(self) -> list[tuple[bool, str]]:
        """How many tokens a forward decides."""
        steps, shares = f"steps is {self.steps}", self.select in ("topk", "independent", "scores")
        return [
            (
                shares and self.steps % self.blocks > 0,
                f"{steps}, which {self.blocks} blocks cannot share equally; choose a multiple of {self.blocks}.",
            ),
            (
                self.select == "topk" and self.schedule == "even" and self.steps > self.gen_length,
                f"{steps} for {self.gen_length} tokens, so that some forwards would decide nothing; choose at most "
                f"{self.gen_length}.",
            ),
            (
                self.select == "threshold" and self.steps > 0 and (self.gen_length % self.steps > 0 or self.blocks > 1),
                f"{steps} with select = 'threshold', where it limits what a forward decides; it must divide gen_length "
                f"{self.gen_length} and there must be one block. Set it so, or to 0: no limit.",
            ),
            (
                self.select in ("factor", "entropy_bound", "agreement") and self.steps > 0,
                f"{steps}, but with select = {self.select!r} the model decides how many forwards there are; leave it "
                "at 0.",
            ),
            (
                self.select != "topk" and self.schedule != "even",
                f"schedule = {self.schedule!r} says how many each forward decides, which select = {self.select!r} does "
                "in another way; use select = 'topk', or leave the schedule at 'even'.",
            ),
            (
                self.schedule == KEEP_FLOOR and (self.blocks > 1 or self.cache != "none"),
                "schedule = 'keep_floor' compares all positions of the answer in every forward: it needs one block and "
                "cache = 'none'.",
            ),
        ]

    def _impossible_scores(self) -> list[tuple[bool, str]]:
        """Which tokens it decides."""
        score = f"score = {self.score!r}"
        return [
            (
                self.score in ("random", "given") and self.schedule == KEEP_FLOOR,
                f"schedule = 'keep_floor' keeps the least sure open, which {score} does not say; choose another score.",
            ),
            (
                (self.score == "given") != bool(self.order) or (self.score == "given" and not self._is_order()),
                "score = 'given' and order go together: the positions 0 to gen_length - 1 in the order in which they "
                "are decided, block after block.",
            ),
            (
                self.score == "given" and self.select != "topk",
                f"score = 'given' needs select = 'topk', not {self.select!r}: the order and the schedule say all.",
            ),
            (
                self.select == "agreement" and self.score != "confidence",
                f"{score} with select = 'agreement', which decides from left to right; leave it at 'confidence'.",
            ),
        ]

    def _impossible_caches(self) -> list[tuple[bool, str]]:
        """What is computed again."""
        cached, shifted = f"cache = {self.cache!r}", self.alignment == "shift"
        in_blocks, dkv = self.cache in masked_caches.PREFIX_CACHES, self.cache.startswith("dkv")
        return [
            (
                self.cfg_scale > 0 and self.cache not in ("none", "dllm"),
                f"cfg_scale is {self.cfg_scale} with {cached}: keys and values without the prompt would need a cache "
                "of their own. Use cache = 'none' or 'dllm', or cfg_scale 0.",
            ),
            (
                self.select in ("independent", "scores") and self.cache != "none",
                f"{cached} with select = {self.select!r} is not defined; use cache = 'none'.",
            ),
            (
                self.select == "agreement" and self.cache not in ("none", "free"),
                f"{cached} with select = 'agreement' is not defined; use cache = 'free', or 'none'.",
            ),
            (
                in_blocks
                and shifted
                and (self.block < 2 or (self.select, self.schedule) not in (("topk", LINEAR_T), ("threshold", "even"))),
                f"{cached} with shifted logits decides the first token of a block by itself and the others by "
                "threshold or schedule = 'linear_t': use one of these, and blocks of at least 2.",
            ),
            (
                in_blocks and shifted and self.select == "topk" and self.steps_of_block < 2,
                f"{cached} with shifted logits needs two steps for each block, the first of which decides one token; "
                f"steps is {self.steps} for {self.blocks} blocks.",
            ),
            (
                self.cache in masked_caches.SHIFTED_CACHES and not shifted,
                f"{cached} is made for shifted logits, and alignment is 'same'; use 'dkv_decode'.",
            ),
            (
                dkv and shifted and (self.blocks > 1 or self.cache == "dkv_greedy"),
                f"{cached} with shifted logits is not defined for blocks or a fixed order: use one block, and one of "
                "dkv_decode, dkv_prefill, dkv_pd.",
            ),
            (
                self.cache == "dkv_greedy"
                and (self.select != "topk" or self.schedule != "even" or self.score not in ("random", "given")),
                f"{cached} must know in advance what is decided when: it needs select = 'topk', schedule = 'even' and "
                "score = 'random' or 'given'.",
            ),
        ]

    def _is_order(self) -> bool:
        blocks = np.array(self.order).reshape(-1)
        if len(blocks) != self.gen_length:
            return False
        return (np.sort(blocks.reshape(self.blocks, -1), axis=1).reshape(-1) == np.arange(self.gen_length)).all()

    @property
    def block(self) -> int:
        """M, tokens of a block."""
        return self.block_length or self.gen_length

    @property
    def blocks(self) -> int:
        return self.gen_length // self.block

    @property
    def steps_of_block(self) -> int:
        return (self.steps or self.gen_length) // self.blocks

    def up_to(self, limit: int) -> int:
        return limit or self.length

    def check_holes(self, sizes: Sequence[int]) -> None:
        """Holes of any size can be filled."""
        if self.select == "agreement":
            raise UserError(
                "select = 'agreement' reads a text from left to right and fills no holes; choose another select."
            )
        if len(sizes) > 1 and self.alignment == "shift" and self.cache not in ("none", "dllm"):
            raise UserError(
                f"The template has {len(sizes)} holes. With shifted logits the token before a hole says its first one, "
                f"and cache = {self.cache!r} computes that again for one hole only: use cache = 'none' or 'dllm'."
            )

    def own(self, prompt: Any) -> dict[str, np.ndarray]:
        """Where the places of the answer lie in the text, and in which of its holes."""
        places, holes = prompt.places(self.length)
        return {"places": places, "holes": holes}

    @property
    def groups(self) -> tuple[int, int]:
        return 0, self.block

    @property
    def static(self) -> dict[str, Any]:
        """Whether there is guidance, and for how many forwards of a block there is room, is compiled in too."""
        longest = 1 << (max(self.steps_of_block, self.block) - 1).bit_length()
        return super().static | {"guided": self.cfg_scale > 0, "longest": longest}

    @property
    def changeable(self) -> list[str]:
        """Without guidance, which is compiled in, there is no scale of it."""
        return [name for name in super().changeable if name != "cfg_scale" or self.cfg_scale > 0]

    def traced(self, limit: int) -> dict[str, np.ndarray]:
        """Instead of `steps` the counts [longest] that follow from them: what each forward of a block decides."""
        found = super().traced(limit)
        counts = np.zeros(self.static["longest"], np.int32)
        if self.select == "topk":
            tokens = min(self.block, limit)
            of_block = masked_select.counts(self.schedule, tokens, self.steps_of_block, self.eps, self.leads)
            counts[: len(of_block)] = of_block
        elif self.select == "threshold":
            counts[: self.steps or None] = (
                masked_select.counts("even", limit, self.steps, 0) if self.steps else self.block
            )
        transfer = np.int32(int(limit * self.transfer_ratio))
        return found | {"steps": np.int32(self.steps_of_block), "counts": counts, "transfer": transfer}

    @property
    def leads(self) -> bool:
        """Whether the first forward of a block decides its first token and no other: with shifted logits, that is the
        only forward that has those before the block.
        """
        return self.alignment == "shift" and self.cache in masked_caches.PREFIX_CACHES
