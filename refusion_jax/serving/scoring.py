"""Log-probabilities of texts, token by token from left to right, as the model sees them."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from refusion_jax.decoder import Decoder
from refusion_jax.model.attention import Packed
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import Qwen3
from refusion_jax.parallel import sharding
from refusion_jax.sampling.programs import decode_model

SHORTEST = 128


@dataclasses.dataclass(frozen=True)
class Score:
    """Of a text of n tokens; entry i is of token i + 1, given those before it.

    Attributes:
      logprobs: [n - 1] of the text's own tokens.
      top: [n - 1] ids of the most probable tokens.
      top_logprobs: [n - 1] of these.
    """

    logprobs: list[float]
    top: list[int]
    top_logprobs: list[float]


class Scorer:
    """Compiled for texts of up to 128, 256, 512, .. tokens."""

    def __init__(self, decoder: Decoder, max_length: int):
        """`max_length`: of a text, tokens."""
        self._params, self._rows = decoder.params, decoder.mesh.shape["data"] * decoder.mesh.shape["fsdp"]
        longest = max(0, math.ceil(math.log2(max_length / SHORTEST)))
        self._lengths = [SHORTEST << i for i in range(longest + 1)]
        model = decode_model(decoder.model, decoder.mesh)

        def score(params, tokens, count):
            """tokens [row, length], of which only the first row's first `count` are looked at."""
            real = (jnp.arange(tokens.shape[1]) < count) & (jnp.arange(len(tokens)) == 0)[:, None]
            context = Packed(real.astype(jnp.int32), implementation=model.attention)
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            hidden, _ = Qwen3(model).apply({"params": params}, tokens, positions, context)

            def reduce(logits, following):
                total = jax.nn.logsumexp(logits, axis=-1)
                given = jnp.take_along_axis(logits, following[:, None], axis=-1)[:, 0]
                return given - total, jnp.argmax(logits, axis=-1), jnp.max(logits, axis=-1) - total

            return jax.tree.map(lambda x: x[0], over_vocabulary(model, params, hidden, reduce, jnp.roll(tokens, -1, 1)))

        self._score = sharding.OnMesh(decoder.mesh, sharding.DECODE_RULES, score)

    def __call__(self, tokens: Sequence[int]) -> Score:
        """The score of a text of at most `max_length` tokens."""
        length = next(length for length in self._lengths if length >= len(tokens))
        padded = np.zeros((self._rows, length), np.int32)
        padded[0, : len(tokens)] = tokens
        found = jax.device_get(self._score(self._params, padded, np.int32(len(tokens))))
        return Score(*(x[: len(tokens) - 1].tolist() for x in found))

    def warm_up(self) -> None:
        """Compiles all lengths."""
        for length in self._lengths:
            self([0] * length)
