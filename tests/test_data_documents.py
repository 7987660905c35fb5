"""Plain text: a document is a response to nothing; long ones are split, with positions that restart or continue."""

import dataclasses

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from flax import linen as nn
from forward import forward, logits

from refusion_jax import step as steps_lib
from refusion_jax import train as train_lib
from refusion_jax.config import SourceConfig, from_config_dict
from refusion_jax.data.pipeline import load_rows
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import UserError
from refusion_jax.model.qwen3 import init_params
from refusion_jax.objective.autoregressive import Autoregressive
from refusion_jax.objective.common import PackedBatch, with_first_positions
from refusion_jax.objective.masked import Masked
from refusion_jax.objective.refusion import Refusion

TOKENIZER = load_tokenizer("bytes")


@pytest.fixture
def source(tmp_path):
    for i, size in enumerate((10, 30, 200, 1000)):
        text = "".join(np.random.default_rng(i).choice(list("abcdefgh"), size))
        (tmp_path / f"{i}.txt").write_text(text)
    return SourceConfig("text", str(tmp_path))


def load(source, tmp_path, **settings):
    return load_rows([source], TOKENIZER, max_length=64, cache_dir=tmp_path / "cache", shuffle=False, **settings)


def batch_of(rows, count):
    found = [rows[i] for i in range(count)]
    return PackedBatch(**{name: jnp.stack([row[name] for row in found]) for name in found[0]})


def test_continuing_positions_are_those_in_the_document(source, tmp_path):
    rows = load(source, tmp_path, piece_positions="continue")
    found = {}
    for i in range(rows.rows_per_epoch):
        row = rows[i]
        ends = np.cumsum(row["lengths"])
        for end, length, first in zip(ends, row["lengths"], row["first_positions"]):
            tokens = row["tokens"][end - length : end].tolist()
            if length:
                assert tokens[0] == TOKENIZER.begin_id
                found.setdefault(int(first) == 0, []).append((int(first), tokens))
    documents = [(tmp_path / f"{i}.txt").read_text() for i in range(4)]
    text = {d: [TOKENIZER.begin_id, *d.encode(), TOKENIZER.eos_id] for d in documents}
    assert len(found[True]) == 4 and len(found[False]) == 3 + 15
    for first, tokens in found[True] + found[False]:
        whole = [ids for ids in text.values() if ids[first + 1 : first + len(tokens)] == tokens[1:]]
        assert len(whole) == 1  # only there does it stand
    assert rows.positions == 1 + 1000 + 1 and load(source, tmp_path).positions == 64


def test_restarting_is_the_default_and_the_other_is_another_run(source, tmp_path):
    restart, go_on = load(source, tmp_path), load(source, tmp_path, piece_positions="continue")
    assert "first_positions" not in restart[0]
    assert go_on.fingerprint == restart.fingerprint | {"data.piece_positions": "continue"}
    for name, values in restart[1].items():
        np.testing.assert_array_equal(values, go_on[1][name])


@pytest.mark.parametrize("objective", [Autoregressive(), Refusion(), Masked()], ids=lambda o: o.kind)
def test_the_model_is_given_the_positions(objective, source, tmp_path):
    """Every token of an example, also where an objective has moved it, is as much further as its example begins."""
    rows = load(source, tmp_path, piece_positions="continue")
    batch = batch_of(rows, rows.rows_per_epoch)
    model = from_config_dict(micro.get_config()).model
    before = objective.corrupt(jax.random.key(0), batch, model, 0)
    after = with_first_positions(before, batch)
    segments, moved = np.asarray(before.context.segment_ids), np.asarray(after.positions - before.positions)
    first = np.pad(np.asarray(batch.first_positions), ((0, 0), (1, 0)))
    assert first.max() > 500 and (segments > 1).any()
    for row in range(rows.rows_per_epoch):
        np.testing.assert_array_equal(moved[row], first[row][segments[row]])


def test_the_loss_of_documents_is_that_of_each_alone(source, tmp_path):
    """Next-token cross entropy of all that follows the begin id, by the model alone on each document."""
    config = from_config_dict(micro.get_config())
    config = dataclasses.replace(config, objective=Autoregressive())
    rows = load_rows([source], TOKENIZER, max_length=1024, cache_dir=tmp_path / "cache")
    batch = batch_of(rows, rows.rows_per_epoch)
    params = nn.unbox(init_params(config.model, jax.random.key(0)))
    found = steps_lib.eval_step(config, params, {}, batch)["ar"]
    total, count = 0.0, 0
    for i in range(4):
        ids = [TOKENIZER.begin_id, *(tmp_path / f"{i}.txt").read_bytes(), TOKENIZER.eos_id]
        hidden = forward(config.model, params, jnp.array([ids]), jnp.arange(len(ids))[None])
        logprobs = jax.nn.log_softmax(logits(config.model, params, hidden)[0], axis=-1)
        total -= float(logprobs[jnp.arange(len(ids) - 1), jnp.array(ids[1:])].sum())
        count += len(ids) - 1
    assert int(found["tokens"]) == count == 1240 + 4
    np.testing.assert_allclose(float(found["numerator"]), total, rtol=1e-4)


def test_a_document_beyond_the_models_positions_is_named(source, tmp_path):
    config = from_config_dict(micro.get_config())
    model = dataclasses.replace(config.model, max_position_embeddings=500)
    data = dataclasses.replace(config.data, train=(source,), evaluation=(), piece_positions="continue")
    with pytest.raises(UserError, match="a document of config.data.train has 1,002 tokens, but .* is 500. Raise it"):
        train_lib.train(dataclasses.replace(config, model=model, data=data), tmp_path / "run")


def test_a_run_with_continuing_positions(source, tmp_path):
    config = from_config_dict(micro.get_config("steps=2"))
    data = dataclasses.replace(config.data, train=(source,), evaluation=(), piece_positions="continue")
    train_lib.train(dataclasses.replace(config, data=data, keep_best=0), tmp_path / "run")
    assert micro.read_checkpoint(tmp_path / "run", 2)["next_row"] == 2 * config.batch_size
