"""Functions under two tables of sharding rules."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh


def test_a_function_under_other_rules_is_traced_anew_and_nothing_stays_behind():
    mesh = make_mesh(1, 4, 2)

    def place(x):
        return nn.with_logical_constraint(x + 1, ("embed", "heads"))

    x = jnp.zeros((8, 8))
    found = []
    for rules in (sharding.TRAIN_RULES, sharding.DECODE_RULES, sharding.TRAIN_RULES):
        found.append(sharding.OnMesh(mesh, rules, place)(x).sharding.spec)
        assert jax.sharding.get_abstract_mesh().empty
    assert found[0] == found[2] == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert found[1] == jax.sharding.PartitionSpec(None, "tensor")
