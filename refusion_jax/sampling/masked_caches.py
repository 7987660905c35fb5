"""Masked diffusion decoding with stale caches: which positions a forward computes again.

Keys and values of every position are kept as they were computed last. A forward computes those of a set F of positions
again, whose queries see all positions, fresh or stale; only F has logits. Of a text with holes, these are the answer,
and what is given before and behind is the prompt. A cache is nothing but the rule for F:

    none          every position
    prefix        every position in the first forward of a block, then what is not before the block (Fast-dLLM)
    dual          the same, then only the block (Fast-dLLM)
    free          every position in the first forward of all, then what is not before the block, and in the first
                  forward of a block the one before it too, which is final now: with it that is frozen (FreeCache)
    dkv_decode    what is open or has just been decided; every `cache_steps`-th forward everything (dKV-Cache)
    dkv_prefill   everything once, then all but the prompt
    dkv_pd        everything once; then as dkv_decode, but the prompt never again
    dkv_greedy    what the last and this forward decide and some open neighbours, in an order that is fixed in advance;
                  every `cache_steps`-th forward everything
    dllm          every position, but not through every layer: dllm_cache.py

With logits that are shifted, position j - 1 is needed as long as j is open. All functions are of one row.
"""

import jax
import jax.numpy as jnp

PREFIX_CACHES = ("prefix", "dual")
SHIFTED_CACHES = ("dkv_prefill", "dkv_pd")
CACHES = ("none", *PREFIX_CACHES, "free", "dkv_decode", *SHIFTED_CACHES, "dkv_greedy", "dllm")


def forwarded(sampler, row, offset: jax.Array) -> jax.Array:
    """[S] bool: F of a row's next forward.

    Args:
      sampler, row: of masked.py.
      offset: [S] int32, `sampler.offset(row)`: positions counted from the answer's first token.
    """
    every = offset < row.settings.limit
    if sampler.cache in ("none", "dllm"):
        return every
    first, due = row.step == 0, row.step % row.settings.own["cache_steps"] == 0
    start = row.block * sampler.block_length
    if sampler.cache == "prefix":
        return every & (first | (offset >= start))
    if sampler.cache == "dual":
        return every & (first | ((offset >= start) & (offset < start + sampler.block_length)))
    if sampler.cache == "free":
        since = start - (sampler.alignment == "shift") - jnp.where(first, sampler.block_length, 0)
        return every & ((first & (row.block == 0)) | (offset >= since))
    if sampler.cache == "dkv_greedy":
        return every & (due | at(row.near, offset))
    if sampler.alignment == "same":
        return every & (due | (row.step == 1) | at(row.before, offset))
    response = every & (offset >= -1)
    if sampler.cache == "dkv_prefill":
        return jnp.where(first, every, response)
    needed = every & jnp.where(row.step == 1, offset >= -1, ~settled(sampler, row, offset))
    if sampler.cache == "dkv_pd":
        return jnp.where(first, every, jnp.where(due, response, needed))
    return jnp.where(due, every, needed)


def at(flags: jax.Array, offset: jax.Array) -> jax.Array:
    """[S] bool: flags [length] of the answer's positions; outside it False."""
    return flags.at[jnp.where(offset < 0, len(flags), offset)].get(mode="fill", fill_value=False)


def settled(sampler, row, offset: jax.Array) -> jax.Array:
    """[S] bool: positions that need not be computed again with shifted logits, by what was decided when the last
    forward began: un: whose next position was; un_right: who were themselves too.
    """
    decided = ~row.before
    last = row.settings.limit - 1
    # Behind the last position comes the first one, of the prompt: decided. un_right: as the one before the last.
    if sampler.cache_shift == "un":
        after = jnp.where(offset == last, True, at(decided, offset + 1))
    else:
        after = at(decided, jnp.minimum(offset, last - 1) + 1)
        own = jnp.minimum(offset, last - 1)
        after &= (own < 0) | at(decided, own)
    return (offset < -1) | after


def neighbours(center: jax.Array, open: jax.Array, taken: jax.Array, count: jax.Array) -> jax.Array:
    """[length] bool: `taken` with up to `count` more positions next to `center`: left, right, left, ... outwards; open
    ones that are not taken yet.
    """
    length = len(open)
    distance = jnp.repeat(jnp.arange(1, length), 2)
    place = center + distance * jnp.where(jnp.arange(2 * length - 2) % 2, 1, -1)
    inside = (place >= 0) & (place < length)
    free = inside & (open & ~taken)[jnp.clip(place, 0, length - 1)]
    chosen = free & (jnp.cumsum(free) <= count)
    return taken.at[jnp.where(chosen, place, length)].set(True, mode="drop")


def near_next(row, open: jax.Array, rank: jax.Array, bounds: jax.Array) -> jax.Array:
    """[length] bool: F of the next forward with dkv_greedy.

    Args:
      open: [length] bool, before this forward.
      rank: [length] int32, of each position in the order of its block; that of others: -1.
      bounds: [3] int32: ranks from which this forward, the next and the one after it decide.
    """
    this, after, end = bounds
    taken = (rank >= this) & (rank < end)

    def add(i, taken):
        return neighbours(jnp.argmax(rank == after + i), open, taken, row.settings.own["cache_window"])

    return jax.lax.fori_loop(0, end - after, add, taken)
