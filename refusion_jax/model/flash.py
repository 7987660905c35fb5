"""Attention kernels that never hold the scores: splash attention on TPU, cuDNN flash attention on GPU.

Both are exact for packed rows: inside a segment, causal in buffer order or not. They work on the heads and rows of one
device, so under a mesh they run in a `shard_map`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.pallas.ops.tpu import splash_attention

from refusion_jax.errors import UserError

LANES = 128  # splash works on multiples of a TPU vector register's width
BLOCK = 512  # largest tile of queries or keys in splash


def platform() -> tuple[str, str]:
    """("tpu", "TPU v5p") and the like: where the program being traced will run, which is the mesh's device if there is
    one.

    A program may be compiled for a TPU topology on a machine that has none, so the default backend does not tell.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform:
        return device.platform, device.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind


@functools.cache
def choose(implementation: str, platform: str, kind: str, length: int, head_dim: int, dtype: str) -> str:
    """Name of the implementation to use: the one asked for, or for "auto" the fastest that the device and shapes allow.

    Says once per choice what "auto" became.

    Raises:
      UserError: an implementation was named that cannot run with this device or these shapes.
    """
    aligned = length % LANES == 0 and head_dim % LANES == 0
    able = {  # what each needs: whether it is there, and its name
        "xla": (True, ""),
        # On a CPU splash runs interpreted, for tests.
        "splash": (
            platform in ("tpu", "cpu") and aligned,
            f"a TPU, length {length} and head_dim {head_dim} to be multiples of {LANES}",
        ),
        "cudnn": (
            runs_cudnn(platform, kind, head_dim, dtype) and length % 2 == 0,
            "an NVIDIA GPU, bfloat16, an even length and a head_dim that is a multiple of 8, at most 128",
        ),
    }
    if implementation != "auto":
        there, needed = able[implementation]
        if not there:
            raise UserError(
                f"model.attention = {implementation!r} needs {needed} (this is {kind}, length {length}, head_dim "
                f"{head_dim}, {dtype}). Use model.attention = 'auto' or 'xla'."
            )
        return implementation
    chosen = "xla"
    if platform == "tpu" and able["splash"][0]:
        chosen = "splash"
    elif able["cudnn"][0] and length >= 1024:  # it loses to XLA's fused kernels on short rows
        chosen = "cudnn"
    if jax.process_index() == 0:
        print(f"attention: {chosen} (auto; {kind}, length {length}, head_dim {head_dim}, {dtype})", flush=True)
    return chosen


def runs_cudnn(platform: str, kind: str, head_dim: int, dtype: str) -> bool:
    """Whether cuDNN's flash attention exists for a device: NVIDIA's from Ampere on are called so, AMD's are not."""
    nvidia = platform in ("gpu", "cuda") and kind.startswith("NVIDIA")
    return nvidia and dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= 128


def per_device(attention: Callable, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Runs `attention` on each device's own rows and heads; arguments as in `splash`."""
    if jax.sharding.get_abstract_mesh().empty:
        return attention(q, k, v, segment_ids)
    queries, keys, rows = (
        nn.logical_to_mesh_axes(axes)
        for axes in (
            ("batch", "length", "heads", "head_dim"),
            ("batch", "length", "kv_heads", "head_dim"),
            ("batch", "length"),
        )
    )
    return jax.shard_map(attention, in_specs=(queries, keys, keys, rows), out_specs=queries, check_vma=False)(
        q, k, v, segment_ids
    )


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, causal: bool = True, interpret: bool = False
) -> jax.Array:
    """TPU splash attention.

    Args:
      q: [batch, length, heads, head_dim].
      k, v: [batch, length, kv_heads, head_dim].
      segment_ids: [batch, length].
      causal: whether a token sees nothing behind it in the buffer.
      interpret: run the kernel's program with XLA on any device, for tests.

    Returns:
      [batch, length, heads, head_dim]. The output and the softmax's normaliser carry the checkpoint name "attended", so
      that a remat policy which keeps it does not run the kernel again in the backward pass.
    """
    length, heads, dim = q.shape[1:]
    block = next(b for b in (BLOCK, BLOCK // 2, LANES) if length % b == 0)
    mask = (splash_attention.CausalMask if causal else splash_attention.FullMask)((length, length))
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attended",
        interpret=interpret,
    )
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    ids = splash_attention.SegmentIds(q=segment_ids, kv=segment_ids)
    out = jax.vmap(kernel)(heads_first(q) * jnp.asarray(dim**-0.5, q.dtype), heads_first(k), heads_first(v), ids)
    return heads_first(out)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, causal: bool = True) -> jax.Array:
    """cuDNN flash attention; arguments as in `splash`. The segments go in as a [batch, 1, query, key] mask."""
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=causal, implementation="cudnn")


def choose_decoding(implementation: str, platform: str, kind: str, head_dim: int, dtype: str) -> str:
    """ "cudnn" or "xla": how a window attends on a cache. Splash, which training may use, has no such kernel."""
    wanted = implementation in ("auto", "cudnn")
    return "cudnn" if wanted and runs_cudnn(platform, kind, head_dim, dtype) else "xla"


def cudnn_cached(q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
    """cuDNN attention of a window on a cache, which is read as it lies.

    The public function wants keys as [batch, length, head, dim]: XLA would copy the whole cache for it.

    Args:
      q: [batch, window, heads, head_dim].
      keys, values: [batch, kv_heads, cache_length, head_dim], the window's written into them.
      seen: [batch, window, cache_length] bool.

    Returns:
      [batch, window, heads, head_dim].
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused  # private

    bias = jnp.where(seen[:, None], 0, jnp.finfo(q.dtype).min).astype(q.dtype)
    # Entries behind the last that any query of the row sees are not read.
    last = jnp.max(jnp.where(seen.any(axis=1), jnp.arange(seen.shape[2]) + 1, 1), axis=1).astype(jnp.int32)

    def attend(q, keys, values, bias, last):
        window = jnp.full(q.shape[0], q.shape[2], jnp.int32)
        return fused.dot_product_attention(
            q,
            keys,
            values,
            bias,
            q_seqlen=window,
            kv_seqlen=last,
            mask_type=fused.MaskType.PADDING,
            scale=q.shape[3] ** -0.5,
            qkv_layout="BNTH",
        )

    heads_first = jnp.einsum("BTNH->BNTH", q)
    if not jax.sharding.get_abstract_mesh().empty:
        axes = (
            ("batch", "heads", None, None),
            *(("batch", "kv_heads", None, None),) * 2,
            ("batch", None, None, None),
            ("batch",),
        )
        specs = tuple(nn.logical_to_mesh_axes(a) for a in axes)
        attend = jax.shard_map(attend, in_specs=specs, out_specs=specs[0], check_vma=False)
    return jnp.einsum("BNTH->BTNH", attend(heads_first, keys, values, bias, last))
