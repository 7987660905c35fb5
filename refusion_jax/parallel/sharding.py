"""Which logical axis lies on which mesh axis. One table for training, one for decoding."""

import contextlib
from collections.abc import Callable, Iterator

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from refusion_jax.errors import UserError
from refusion_jax.model import qwen3
from refusion_jax.model.config import ModelConfig

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

_COMMON: Rules = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("hidden", None),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("head_dim", None),
    ("layers", None),
    ("norm", None),
)
TRAIN_RULES: Rules = (*_COMMON, ("embed", "fsdp"))
# Decoding reads every weight once per forward: sharded over fsdp they would be gathered again in every step.
DECODE_RULES: Rules = (*_COMMON, ("embed", None))


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Makes logical constraints inside the model mean `rules` on `mesh`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


class OnMesh:
    """A jitted function that is always traced and run with the rules meaning the mesh, and leaves neither behind.

    Tracing takes the mesh and the rules in, so a function that is used under others needs another OnMesh.
    """

    def __init__(self, mesh: Mesh | None, rules: Rules, function: Callable, **jit_arguments):
        self._mesh, self._rules = mesh, rules
        # A function of its own: JAX would share the trace of `function` between rules.
        self.jitted = jax.jit(lambda *args: function(*args), **jit_arguments)

    def __call__(self, *args):
        with self._use():
            return self.jitted(*args)

    def lower(self, *args):
        with self._use():
            return self.jitted.lower(*args)

    def _use(self) -> contextlib.AbstractContextManager:
        return use(self._mesh, self._rules) if self._mesh else contextlib.nullcontext()


def check_model(config: ModelConfig, mesh: Mesh, rules: Rules) -> None:
    """Raises a UserError where the mesh does not divide the model, as the rules split it."""
    tensor = mesh.shape["tensor"]
    fsdp = mesh.shape["fsdp"] if dict(rules)["embed"] else 1
    for name, axis, size in (
        ("num_heads", "tensor", tensor),
        ("num_kv_heads", "tensor", tensor),
        ("intermediate_size", "tensor", tensor),
        ("vocab_size", "tensor", tensor),
        ("hidden_size", "fsdp", fsdp),
    ):
        value = getattr(config, name)
        if value % size:
            raise UserError(
                f"The mesh axis {axis} = {size} does not divide model.{name} = {value}. Choose a mesh that does."
            )


def abstract_params(config: ModelConfig) -> dict:
    """Parameters as jax.ShapeDtypeStructs, boxed with their logical axis names."""
    return jax.eval_shape(lambda key: qwen3.init_params(config, key), jax.random.key(0))


def param_specs(config: ModelConfig, rules: Rules) -> dict:
    """Tree of PartitionSpecs of the (unboxed) parameters."""
    return nn.logical_to_mesh(nn.get_partition_spec(abstract_params(config)), rules)


def param_shardings(config: ModelConfig, mesh: Mesh, rules: Rules) -> dict:
    """Tree of NamedShardings of the (unboxed) parameters."""
    check_model(config, mesh, rules)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        param_specs(config, rules),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over data x fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
