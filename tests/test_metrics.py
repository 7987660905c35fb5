"""The metrics file is one history whatever happens to a run, and the operations counted are those of the matrices."""

import json
import resource

import jax
import pytest
from flax import linen as nn

from refusion_jax.errors import UserError
from refusion_jax.metrics import flops
from refusion_jax.metrics.writers import Metrics
from refusion_jax.model.config import qwen3
from refusion_jax.parallel import sharding


def steps(folder):
    return [
        (record["step"], record["kind"])
        for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    ]


def test_what_came_after_the_last_checkpoint_is_dropped(tmp_path):
    first = Metrics(tmp_path / "run", 0)
    for step in (1, 2, 3, 4):
        first.write(step, "train", {"loss": 1 / 3})
    first.write(2, "evaluation", {"loss": 0.1})
    first.close()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ki')  # killed while it wrote
    resumed = Metrics(tmp_path / "run", 2)
    resumed.write(3, "train", {"loss": 0.5})
    resumed.close()
    assert steps(tmp_path / "run") == [(1, "train"), (2, "train"), (2, "evaluation"), (3, "train")]
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"] == 1 / 3


def test_records_are_on_disk_as_soon_as_they_are_written(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, "train", {"loss": 1.0})
    assert steps(tmp_path) == [(1, "train")]
    metrics.close()


def test_only_the_main_process_writes(tmp_path):
    metrics = Metrics(tmp_path / "run", 0, enabled=False)
    metrics.write(1, "train", {"loss": 1.0})
    metrics.close()
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_written_and_full_disks_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write .*file/run/metrics.jsonl: Not a directory"):
        Metrics(tmp_path / "file" / "run", 0)
    metrics = Metrics(tmp_path / "run", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match="Cannot write .*metrics.jsonl: File too large. Make room"):
            for step in range(3):
                metrics.write(step, "train", {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", ["0.6b", "8b"])  # tied and not
def test_operations_are_counted_over_every_matrix(size):
    config = qwen3(size)
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(sharding.abstract_params(config)))
    matrices = sum(leaf.size for path, leaf in leaves if "norm" not in jax.tree_util.keystr(path))
    head = config.vocab_size * config.hidden_size
    assert flops.matmul_params(config) == (matrices if config.tie_embeddings else matrices - head)
    # One example of n tokens: 6 N n for the matrices, and per layer two products of [n, n, heads * head_dim], causal
    # half, three times.
    n, width = 4096, config.num_heads * config.head_dim
    attention = 3 * 2 * (2 * n * n * width / 2) * config.num_layers
    assert flops.train_flops(config, flops.Work(n, n, n * (n + 1) / 2)) == pytest.approx(
        6 * flops.matmul_params(config) * n + attention, rel=1e-3
    )
