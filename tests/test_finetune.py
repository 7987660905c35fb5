"""From somebody's checkpoint to one's own and back: `init_from`, the fine-tuning config, export, decoding."""

import json

import chex
import numpy as np
import pytest
import safetensors.numpy
from micro import write_examples

from refusion_jax.checkpoint import convert, load
from refusion_jax.config import load_config
from refusion_jax.decoder import Decoder
from refusion_jax.errors import UserError
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.train import train


def tensors_in(folder) -> dict[str, np.ndarray]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


def finetune(repository, init_from, folder, name, method="refusion", **overrides):
    """Trains folder/name for one step on folder/data.json; returns the config."""
    write_examples(folder / "data.json")
    argument = (
        f"{repository / 'configs' / 'finetune.py'}:init_from={init_from},data={folder / 'data.json'},tokenizer=bytes,"
        f"dtype=float32,max_length=64,held_out=0,method={method}"
    )
    few = {"steps": "1", "batch_size": "8", "mesh.data": "8", "mesh.fsdp": "1", "optimizer.lr": "1e-3"}
    config = load_config(argument, few | overrides)
    train(config, folder / name)
    return config


def test_fine_tune_export_decode_and_start_from_it_again(reference, repository, tmp_path):
    """Sizes, RoPE base and weights come from the folder; what training changed is what is exported and decodes."""
    source = reference / "qwen3_untied" / "model"
    config = finetune(repository, source, tmp_path, "run")
    assert (config.model.num_layers, config.model.vocab_size, config.model.rope_theta) == (4, 768, 5e6)
    convert.to_huggingface(tmp_path / "run", tmp_path / "exported", say=lambda line: None)

    before, after = tensors_in(source), tensors_in(tmp_path / "exported")
    assert set(after) == set(before)
    moved = {name: np.abs(after[name] - before[name]).max() for name in before}
    assert all(
        0 < change <= 1.01e-3 for name, change in moved.items() if "proj" in name
    )  # one step of Adam from these very weights
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["mask_token_id"] == 261

    decoder = Decoder.load(str(tmp_path / "exported"), dtype="float32")
    chex.assert_trees_all_equal(decoder.params, Decoder.load(str(tmp_path / "run"), dtype="float32").params)
    (answer,) = decoder.generate(["3 and 21"], gen_length=8, method="autoregressive")
    assert 0 < len(answer.generation.tokens) <= 8

    # Weights only: another run begins at step 0 with these weights. (A rate of almost 0 leaves them as they were.)
    finetune(repository, tmp_path / "run", tmp_path, "second", **{"optimizer.lr": "1e-9"})
    first, second = (
        load.load_params(tmp_path / run, config.model, make_mesh(), sharding.TRAIN_RULES) for run in ("run", "second")
    )
    chex.assert_trees_all_close(first, second, atol=1e-8, rtol=1e-6)
    assert [json.loads(line)["step"] for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()][
        -1
    ] == 1


def test_init_from_another_model(reference, repository, tmp_path):
    with pytest.raises(UserError, match="num_layers is 3, config.model has 2"):
        finetune(repository, reference / "qwen3_tied" / "model", tmp_path, "run", **{"model.num_layers": "2"})


def test_config_says_what_it_needs(repository):
    with pytest.raises(UserError, match="init_from=DIR,data=DATA.json"):
        load_config(str(repository / "configs" / "finetune.py"))


def test_a_method_that_does_not_suit_the_checkpoint_is_refused(reference, repository, tmp_path):
    finetune(repository, reference / "qwen3_untied" / "model", tmp_path, "run", method="llada")
    with pytest.raises(UserError, match="A model of the objective 'masked' cannot be decoded"):
        Decoder.load(str(tmp_path / "run"), dtype="float32").settings(method="autoregressive")
