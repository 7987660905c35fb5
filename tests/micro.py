"""A run that starts in seconds and takes milliseconds per step: its config (`tests/micro.py:steps=20,data=FILE`), its
data, and what it leaves behind."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from ml_collections import ConfigDict

from refusion_jax.checkpoint import metadata, orbax
from refusion_jax.config import Config, model_settings, parse_arguments
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.qwen3 import init_params
from refusion_jax.step import TrainState


def get_config(argument: str | None = None) -> ConfigDict:
    """data: a JSON list of queries and responses; its first fifth is held out."""
    arguments = parse_arguments(argument, data="data.json", steps=8)
    model = ModelConfig(
        vocab_size=264,
        logical_vocab_size=262,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        tie_embeddings=True,
        mask_token_id=261,
        begin_token_id=260,
        eos_token_id=257,
        pad_token_id=256,
    )
    source = dict(kind="json", path=arguments.data)
    config = ConfigDict(
        dict(
            model=model_settings(model),
            data=dict(
                tokenizer="bytes", max_length=64, train=(dict(source, start=0.2),), evaluation=(dict(source, stop=0.2),)
            ),
            optimizer=dict(lr=3e-3),
            steps=arguments.steps,
            batch_size=8,
            log_every=1,
            checkpoint_every_steps=2,
            checkpoint_every_minutes=0.0,
        ),
        type_safe=False,
    )
    return config


def write_examples(path, count: int = 60) -> None:
    """Examples of uneven lengths, so that rows hold different numbers of them and targets differ between devices."""
    examples = [
        {"query": f"{i} and {i * 7}", "response": " ".join(str(i * k) for k in range(1, 2 + i % 7))}
        for i in range(count)
    ]
    path.write_text(json.dumps(examples))


def save_run(folder, config: Config, step: int = 1) -> None:
    """Fills a run's folder: a checkpoint whose random weights are so large that the model is sure of what it says."""
    params = nn.unbox(init_params(config.model, jax.random.key(2 + step)))
    params["embed"]["embedding"] *= 60
    load_tokenizer("bytes").save(folder / "tokenizer")
    meta = metadata.make_meta(config.model, step=step, tokenizer="bytes", config=json.loads(config.to_json()))
    checkpoints = orbax.Checkpoints(folder)
    checkpoints.save(TrainState(jax.numpy.int32(step), params, {}, {}), 0, meta)
    checkpoints.close()


def read_checkpoint(run, step: int) -> dict:
    """Everything that a checkpoint of a run holds, as numpy arrays by name: parameters, optimizer, the next row."""
    folder = run / "checkpoints" / str(step)
    found = {"next_row": json.loads((folder / "data" / "metadata").read_text())["next_row"]}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for part in ("params", "optimizer"):
            tree = checkpointer.metadata(folder / part).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            tree = checkpointer.restore(folder / part, ocp.args.PyTreeRestore(restore_args=as_numpy))
            found |= {
                part + jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }
    return found
