"""The same weights in PyTorch (transformers' Qwen3): the same logits, the same continuation. Skipped without torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from forward import forward, logits
from micro import get_config, write_examples

from refusion_jax.checkpoint import convert, load, metadata, stream
from refusion_jax.model import qwen3
from refusion_jax.model.config import ModelConfig
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

UNTIED = ModelConfig(
    vocab_size=320,
    hidden_size=96,
    intermediate_size=160,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    tie_embeddings=False,
    rope_theta=5e6,
    mask_token_id=319,
)


def quiet(line: str) -> None:
    pass


def our_logits(folder, tokens, positions) -> np.ndarray:
    """Logits [batch, length, vocab] of a checkpoint on a 2x2x2 mesh."""
    config, mesh = load.load_model_config(folder), make_mesh(2, 2, 2)
    params = load.load_params(folder, config, mesh, sharding.TRAIN_RULES)
    with sharding.use(mesh, sharding.TRAIN_RULES):
        whole = jax.jit(lambda params, *inputs: logits(config, params, forward(config, params, *inputs)))
        return np.asarray(whole(params, tokens, positions))


def our_continuation(folder, prompt: list[int], count: int) -> list[int]:
    """Greedy autoregressive continuation of a checkpoint, from whole forward passes."""
    config, mesh = load.load_model_config(folder), make_mesh(devices=jax.devices()[:1])
    params = load.load_params(folder, config, mesh, sharding.DECODE_RULES)
    buffer = jnp.zeros((1, len(prompt) + count), jnp.int32).at[0, : len(prompt)].set(jnp.array(prompt))
    positions = jnp.arange(buffer.shape[1])[None]

    @jax.jit
    def extend(params, buffer, n):
        hidden = jax.lax.dynamic_slice_in_dim(forward(config, params, buffer, positions), n - 1, 1, axis=1)
        return buffer.at[0, n].set(jnp.argmax(logits(config, params, hidden)))

    for n in range(len(prompt), buffer.shape[1]):
        buffer = extend(params, buffer, n)
    return buffer[0, len(prompt) :].tolist()


def their_continuation(folder, prompt: list[int], count: int) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([prompt])
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("shard_bytes", [10**9, 300_000], ids=["one file", "shards"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_exported_model_in_transformers(tmp_path, tie, shard_bytes):
    config = dataclasses.replace(UNTIED, tie_embeddings=tie)
    rng = np.random.default_rng(1)
    noisy = lambda p: np.asarray(p) + (0.3 if p.ndim < 3 else 0.02) * rng.standard_normal(p.shape).astype(np.float32)
    params = jax.tree.map(noisy, nn.unbox(qwen3.init_params(config, jax.random.key(0))))
    flat = {"/".join(key.key for key in path): p for path, p in jax.tree_util.tree_leaves_with_path(params)}
    streams = {
        path: stream.Stream(p.shape, p.dtype, lambda start, stop, p=p: p[start:stop]) for path, p in flat.items()
    }
    stream.save(tmp_path / "run" / "checkpoints" / "0", streams, metadata.make_meta(config, step=0, tokenizer=""))
    convert.to_huggingface(tmp_path / "run", tmp_path / "exported", shard_bytes=shard_bytes, say=quiet)
    assert (len(list((tmp_path / "exported").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)

    tokens = rng.integers(0, 320, (2, 640), np.int32)
    positions = np.stack([np.arange(640), rng.permutation(640)]).astype(np.int32)  # natural and any other order
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long(), position_ids=torch.from_numpy(positions).long()).logits.numpy()
    difference = np.abs(our_logits(tmp_path / "run", tokens, positions) - theirs).max()
    print(f"max difference of logits {difference:.2e}; logits up to {np.abs(theirs).max():.1f}")
    assert difference <= 2e-4
    prompt = tokens[0, :50].tolist()
    assert our_continuation(tmp_path / "run", prompt, 40) == their_continuation(tmp_path / "exported", prompt, 40)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_model_saved_by_transformers(tmp_path, tie):
    """Their files, sharded and in bfloat16, are read: logits in float32 agree."""
    settings = transformers.Qwen3Config(
        vocab_size=320,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=tie,
        rope_theta=5e5,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(settings).to(torch.bfloat16).save_pretrained(
        tmp_path / "model", max_shard_size="300KB"
    )
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    tokens = np.random.default_rng(0).integers(0, 320, (2, 640), np.int32)
    positions = np.broadcast_to(np.arange(640, dtype=np.int32), (2, 640))
    # Loaded again, because their `to(torch.bfloat16)` also rounds the rotary frequencies.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(our_logits(tmp_path / "model", tokens, positions) - theirs).max() <= 2e-4


def test_trained_model_continues_the_same_in_transformers(tmp_path):
    """Trained here, exported, loaded there: the greedy continuation of a prompt is the same tokens."""
    from refusion_jax.config import from_config_dict
    from refusion_jax.train import train

    write_examples(tmp_path / "data.json")
    config = get_config(f"data={tmp_path / 'data.json'},steps=400")  # after which it says more than one token
    config.checkpoint_every_steps = 400
    train(from_config_dict(config), tmp_path / "run")
    convert.to_huggingface(tmp_path / "run", tmp_path / "exported", say=quiet)
    for query in ("1 and 7", "21 and 147"):
        prompt = load.load_tokenizer_for(tmp_path / "run").encode_prompt(query)
        ours = our_continuation(tmp_path / "run", prompt, 32)
        theirs = their_continuation(tmp_path / "exported", prompt, 32)
        assert len(set(ours)) > 1
        assert ours == theirs
