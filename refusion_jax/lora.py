"""Low-rank adapters on a frozen base (LoRA, arXiv 2106.09685): w + alpha / rank * a b.

Adapters are a tree shaped like the parameters, with {"a": [layer, ...in, rank], "b": [layer, rank, ...out]} in place of
every targeted projection. The model applies them beside the projections (model/layers.py); `merge` adds them to the
base once and for all.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from refusion_jax.config import LoraConfig
from refusion_jax.model.config import ModelConfig
from refusion_jax.parallel import sharding


def _targets(tree: dict, lora: LoraConfig) -> dict[tuple[str, ...], object]:
    """Path -> leaf of every targeted projection of a parameter tree."""
    return {path: leaf for path, leaf in flatten_dict(tree).items() if path[0] == "layers" and path[-1] in lora.targets}


def _input_axes(path: tuple[str, ...]) -> int:
    return 2 if path[-1] == "output" else 1  # the attention output projects from (head, head_dim)


def init(key: jax.Array, config: ModelConfig, lora: LoraConfig) -> dict:
    """Fresh adapters in float32: a random, b zero, so that the model starts as its base."""
    adapters = {}
    targets = _targets(nn.unbox(sharding.abstract_params(config)), lora)
    for (path, leaf), part in zip(targets.items(), jax.random.split(key, len(targets))):
        layers, *shape = leaf.shape
        inputs = shape[: _input_axes(path)]
        fan_in = math.prod(inputs)
        adapters[path] = {
            "a": jax.random.normal(part, (layers, *inputs, lora.rank)) * fan_in**-0.5,
            "b": jnp.zeros((layers, lora.rank, *shape[_input_axes(path) :])),
        }
    return unflatten_dict(adapters)


def abstract(config: ModelConfig, lora: LoraConfig) -> dict:
    """Shapes and types of adapters."""
    return jax.eval_shape(lambda key: init(key, config, lora), jax.random.key(0))


def shardings(config: ModelConfig, lora: LoraConfig, mesh: Mesh) -> dict:
    """Adapters lie on the mesh as the projections they belong to; the rank is never split."""
    specs = _targets(sharding.param_specs(config, sharding.TRAIN_RULES), lora)
    out = {}
    for path, spec in specs.items():
        layers, *axes = spec
        cut = _input_axes(path)
        out[path] = {
            "a": NamedSharding(mesh, PartitionSpec(layers, *axes[:cut], None)),
            "b": NamedSharding(mesh, PartitionSpec(layers, None, *axes[cut:])),
        }
    return unflatten_dict(out)


def scaled(adapters: dict, lora: LoraConfig) -> dict:
    """Adapters with alpha / rank multiplied into b: what the model's "lora" collection takes."""

    def scale(path: tuple, x: jax.Array) -> jax.Array:
        return x * (lora.alpha / lora.rank) if path[-1].key == "b" else x

    return jax.tree_util.tree_map_with_path(scale, adapters)


def merge(base: dict, adapters: dict, lora: LoraConfig) -> dict:
    """Base parameters with the adapters' updates added, in float32."""
    merged, flat = flatten_dict(base), flatten_dict(scaled(adapters, lora))
    for path in {path[:-1] for path in flat}:
        update = jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1))(flat[*path, "a"], flat[*path, "b"])
        merged[path] = merged[path].astype(jnp.float32) + update
    return unflatten_dict(merged)
