"""A second copy of the matrices, in the order that a CPU reads them in, for forwards of few tokens.

A kernel multiplies by 64 columns of a matrix at a time. Where each row's are far from the next row's, as in a matrix
that is stored row by row, a few tokens wait for memory twice as long as it takes to read the matrix from one end to the
other.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

COLUMNS = 64  # of a tile
TILES = 16  # of an array, at most: tokens are copied for each of its tiles, and should stay in a core's cache
MOST_TOKENS = 64  # with more, what is computed takes as long either way
MEMORY = 1 / 4  # of the machine, that the second copy may take

# Leading axes that a projection sums over, by its name.
INPUTS = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}


@struct.dataclass
class Tiles:
    """A matrix of D rows in tiles of 64 columns.

    Attributes:
      arrays: each [tiles, D, 64].
      outputs: axes that the columns stand for.
    """

    arrays: tuple[jax.Array, ...]
    outputs: tuple[int, ...] = struct.field(pytree_node=False)

    @classmethod
    def of(cls, w: jax.Array, inputs: int = 1) -> "Tiles | jax.Array":
        """A matrix whose first `inputs` axes are its rows; itself where its columns make no whole tiles."""
        outputs = w.shape[inputs:]
        rows = w.reshape(-1, *outputs).shape[0]
        if w.size // rows % COLUMNS:
            return w
        tiles = jnp.swapaxes(w.reshape(rows, -1, COLUMNS), 0, 1)
        return cls(tuple(jnp.array_split(tiles, -(-len(tiles) // TILES))), outputs)

    def product(self, x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """x [tokens, D] times the matrix: [tokens, *outputs] in `dtype`; None: x's."""
        tokens, dtype = len(x), dtype or x.dtype
        if tokens == 1:  # A product with a vector is another kernel, which takes longer than this one does for two.
            x = jnp.concatenate([x, x])

        # A product in every tile: any other order of axes would put the matrix in another order first.
        def columns(a):
            copies = jnp.broadcast_to(x, (len(a), *x.shape))
            y = jnp.einsum("ctd,cdn->ctn", copies, a.astype(x.dtype), preferred_element_type=dtype)
            return jnp.swapaxes(y[:, :tokens], 0, 1).reshape(tokens, -1)

        return jnp.concatenate([columns(a) for a in self.arrays], axis=1).reshape(tokens, *self.outputs)


def tiled(params: dict) -> dict:
    """Parameters of single layers with their matrices in tiles, the head's too; the rest are the same arrays."""

    def of_layer(tree: Any) -> Any:
        return {
            name: of_layer(part) if isinstance(part, dict) else Tiles.of(part, INPUTS[name]) if name in INPUTS else part
            for name, part in tree.items()
        }

    table = Tiles.of(params["head" if "head" in params else "embed"]["embedding"].T)
    return of_layer(params) | ({"head": {"embedding": table}} if isinstance(table, Tiles) else {})


def suited(params: dict, tokens: int) -> dict:
    """Of parameters that may have "tiles" besides, those to forward so many tokens with."""
    return params["tiles"] if "tiles" in params and tokens <= MOST_TOKENS else params


def pay(params: dict) -> bool:
    """Whether a second copy is worth its memory, on a machine whose one device is its CPU."""
    leaves = jax.tree.leaves(params)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Before JAX 0.11 one core alone computes a product in tiles: less work, but more than two are faster without them.
    parallel = jax.__version_info__ >= (0, 11) or (os.cpu_count() or 1) <= 2
    return parallel and all(x.dtype == jnp.float32 for x in leaves) and sum(x.nbytes for x in leaves) < MEMORY * memory
