"""Decodings recorded from code of block diffusion: settings that repeat them, and samplers that take recorded draws.

BD3-LM's draws are those of `numpy.random.RandomState(seed)`: of every update one number for each token of the block and
each id, and with first hitting one more for the position.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling import block
from refusion_jax.sampling.block import Block, BlockConfig, below_p
from refusion_jax.sampling.config import setting
from refusion_jax.sampling.masked_select import Scores
from refusion_jax.sampling.state import Request

ROOM = 32  # tokens of the longest answer; shorter ones are a request's limit, so that they share a program
NAMES = {
    "sequential": "sequential",
    "low_confidence_static": "static",
    "low_confidence_dynamic": "dynamic",
    "entropy_bounded": "entropy",
}


def settings(record: dict[str, Any], vocabulary: int) -> tuple[BlockConfig, int]:
    """Of a recorded line: the settings that repeat it, and the limit of the request."""
    params, sampler = record["params"], record["params"]["sampler"]
    length, size = params["gen_length"], params["block_size"]
    if sampler in ("first_hitting", "ddpm"):
        config = RecordedBlockConfig(
            gen_length=ROOM,
            block_size=size,
            reveal=sampler,
            steps=params["num_steps"] if sampler == "ddpm" else 0,
            temperature=1.0,
            top_p=params["nucleus_p"],
            stop="length",
            seed=params["seed"],
            vocabulary=vocabulary,
            updates=params["num_steps"] if sampler == "ddpm" else 1,
        )
        return config, length
    if sampler == "dllm_low_confidence":
        return BlockConfig(
            gen_length=ROOM,
            block_size=size,
            blocks_from="answer",
            reveal="static",
            schedule="linear_t",
            steps=params["steps_per_block"],
        ), length
    given = {"gen_length": ROOM, "block_size": size, "reveal": NAMES[sampler]}
    if sampler == "entropy_bounded":
        given["gamma"] = params["threshold"]
    else:
        given["steps"] = params["denoising_steps"]
    if sampler == "low_confidence_dynamic":
        given |= dict(threshold=params["threshold"], fallback=params["fallback"])
    return BlockConfig(**given), length


def wanted(record: dict[str, Any]) -> dict[str, Any]:
    """What is to be equal; passes that fill the cache count too. dllm has no cache between blocks: its passes over all
    that is before a block are here one pass over the block before, and one over the prompt.
    """
    params, response = record["params"], record["response"]
    passes = record["forwards"] + record["store_forwards"]
    tokens = record["tokens_forwarded"]
    if params["sampler"] == "dllm_low_confidence":
        size, tokens = params["block_size"], len(record["prompt"])
        for start in range(0, len(response), size):
            own = record["order"][start : start + size]
            tokens += len(own) * (len(set(own)) + 1)
    return {"response": response, "order": record["order"], "forwards": passes, "tokens_forwarded": tokens}


@dataclasses.dataclass(frozen=True)
class RecordedBlockConfig(BlockConfig):
    """BD3-LM's sampling with the draws of a seed."""

    method: ClassVar[str] = "block with recorded draws"

    seed: int = setting(0, "of the draws", traced=True)
    vocabulary: int = setting(0, "ids that each draw is for")
    updates: int = setting(1, "updates of a block, at most, between two forwards")

    def traced(self, limit: int) -> dict[str, np.ndarray]:
        return {name: value for name, value in super().traced(limit).items() if name != "seed"}

    def own(self, prompt: Any) -> dict[str, np.ndarray]:
        """`noise` [draws + updates, M, vocabulary] and `numbers` [draws], in the order in which they are taken."""
        draws = (ROOM + self.block_size) * (self.updates if self.reveal == "ddpm" else 1)
        draws = draws // self.block_size if self.reveal == "ddpm" else draws
        random = np.random.RandomState(prompt.config.seed)
        uniform = lambda *shape: (random.randint(0, 2**24, shape) / 2**24).astype(np.float32)
        noise = np.ones((draws + self.updates, self.block_size, self.vocabulary), np.float32)
        numbers = np.zeros(draws, np.float32)
        for i in range(draws):
            noise[i] = uniform(self.block_size, self.vocabulary)
            if self.reveal == "first_hitting":
                numbers[i] = uniform(1)[0]
        return super().own(prompt) | {"noise": noise, "numbers": numbers}

    def sampler(self, model: ModelConfig, batch: int, platform: str) -> "RecordedBlock":
        plain = super().sampler(model, batch, platform)
        kept = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        draws = {name: x.shape for name, x in self.own(_Nothing(self)).items()}
        return RecordedBlock(**kept, updates=self.updates, noise=draws["noise"], numbers=draws["numbers"])


@dataclasses.dataclass(frozen=True)
class _Nothing:
    """A prompt whose draws only have a shape."""

    config: RecordedBlockConfig
    tokens: tuple[int, ...] = (0,)


@struct.dataclass
class Row(block.Row):
    """With the draws, and how many have been taken."""

    noise: jax.Array
    numbers: jax.Array
    taken: jax.Array


@struct.dataclass
class Question:
    """What the recorded draws make of the logits; leaves are [M, ...].

    Attributes:
      noise: [M, updates, vocab], of the next updates.
      stays: [M, updates], probability to stay a mask.
      top_p: [M].
    """

    noise: jax.Array
    stays: jax.Array
    top_p: jax.Array

    def answer(self, model: ModelConfig, logits: jax.Array, sampled: bool) -> Scores:
        """Drafts [tokens, updates], of which a mask is none."""
        is_mask = jnp.arange(logits.shape[-1]) == model.mask_token_id
        kept = below_p(jnp.where(is_mask, -jnp.inf, logits), self.top_p)
        p = jax.nn.softmax(kept, axis=-1)[:, None]
        q = jnp.where(is_mask, self.stays[..., None], p * (1 - self.stays[..., None]))
        drafts = jnp.argmax(q / (1e-10 - jnp.log(self.noise + 1e-10)), axis=-1)
        nothing = jnp.zeros_like(self.top_p)
        return Scores(drafts, *[nothing] * 5)


@dataclasses.dataclass(frozen=True)
class RecordedBlock(Block):
    """`Block` with recorded draws; an update that changes nothing takes no forward."""

    updates: int
    noise: tuple[int, ...]
    numbers: tuple[int, ...]

    def start(self, request: Request) -> Row:
        row = super().start(request)
        noise = request.own.get("noise", jnp.zeros(self.noise))
        numbers = request.own.get("numbers", jnp.zeros(self.numbers))
        return Row(**vars(row), noise=noise, numbers=numbers, taken=jnp.int32(0))

    def question(self, row: Row, keys: jax.Array) -> Question:
        noise = jax.lax.dynamic_slice_in_dim(row.noise, row.taken, self.updates)
        step = row.step + jnp.arange(self.updates)
        stays = jnp.maximum(self.updates - 1 - step, 0) / jnp.maximum(self.updates - step, 1)
        if self.reveal == "first_hitting":
            stays = jnp.zeros(1)
        spread = lambda x: jnp.broadcast_to(x, (self.window, *jnp.shape(x)))
        return Question(jnp.swapaxes(noise, 0, 1), spread(stays), spread(row.settings.top_p))

    def advance(self, row: Row, window: block.Window, seen: Scores) -> tuple[Row, jax.Array]:
        """Of the next updates the first that changes the block."""
        changes = (row.open[:, None] & (seen.draft != self.model.mask_token_id)).any(axis=0)
        update = jnp.argmax(changes)
        after, count = super().advance(row, window, seen.replace(draft=seen.draft[:, update]))
        took = jnp.where(row.open.any() & ~row.done, update + 1, 0)
        extra = jnp.where(after.start == row.start, update, 0)
        return after.replace(taken=row.taken + took, step=after.step + jnp.where(row.done, 0, extra)), count

    def choose(self, row: Row, seen: Scores) -> jax.Array:
        if self.reveal == "first_hitting":
            return super().choose(row, seen)
        return seen.draft != self.model.mask_token_id

    def number(self, row: Row) -> jax.Array:
        return row.numbers[row.taken]
