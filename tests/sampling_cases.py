"""A tiny random model whose predictions are sharp enough to take every path, for the tests of decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling import Generation, PlanAndInfillConfig

MODEL = ModelConfig(
    vocab_size=16,
    logical_vocab_size=14,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    tie_embeddings=True,
    rope_theta=100.0,
    mask_token_id=13,
    begin_token_id=12,
    eos_token_id=1,
    pad_token_id=0,
    max_position_embeddings=256,
)


def random_params(seed: int, scale: float, config: ModelConfig = MODEL) -> dict:
    """Random parameters; the scale of the table sets how sure the model is of itself."""
    rng = np.random.default_rng(seed)
    c, n = config, rng.standard_normal
    layers, d, f = c.num_layers, c.hidden_size, c.intermediate_size
    matrix = lambda fan_in, *shape: n(shape) * fan_in**-0.5
    table = n((c.vocab_size, d)) * scale
    table[c.eos_token_id] *= 2.0  # predicted more often, so that its paths are taken too
    params = {
        "embed": {"embedding": table},
        "final_norm": {"scale": 1 + 0.1 * n(d)},
        "layers": {
            "attention_norm": {"scale": 1 + 0.1 * n((layers, d))},
            "attention": {
                "query": matrix(d, layers, d, c.num_heads, c.head_dim),
                "key": matrix(d, layers, d, c.num_kv_heads, c.head_dim),
                "value": matrix(d, layers, d, c.num_kv_heads, c.head_dim),
                "output": matrix(d, layers, c.num_heads, c.head_dim, d),
                "query_norm": 1 + 0.1 * n((layers, c.head_dim)),
                "key_norm": 1 + 0.1 * n((layers, c.head_dim)),
            },
            "mlp_norm": {"scale": 1 + 0.1 * n((layers, d))},
            "mlp": {"gate": matrix(d, layers, d, f), "up": matrix(d, layers, d, f), "down": matrix(f, layers, f, d)},
        },
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def random_prompts(seed: int, count: int, longest: int = 12, config: ModelConfig = MODEL) -> list[list[int]]:
    """Prompts of different lengths without special ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, config.begin_token_id, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def oracle_forward(params: dict, config: ModelConfig = MODEL) -> oracle.Forward:
    return oracle.numpy_qwen3(
        params, rope_theta=config.rope_theta, eps=config.rms_norm_eps, logical_vocab=config.logical_vocab_size
    )


def expected(
    forward: oracle.Forward, prompt: list[int], sampler: PlanAndInfillConfig, config: ModelConfig = MODEL
) -> oracle.Decoded:
    """What the oracle makes of a prompt."""
    return oracle.decode(
        forward,
        prompt,
        gen_length=sampler.gen_length,
        slot_size=sampler.slot_size,
        blocks=sampler.blocks,
        slot_threshold=sampler.slot_threshold,
        token_threshold=sampler.token_threshold,
        mask_id=config.mask_token_id,
        eos_id=config.eos_token_id,
        banned=[config.mask_token_id, config.begin_token_id],
    )


def same_tokens(answer: Generation, wanted: oracle.Decoded, prompt: list[int]) -> None:
    """Response, everything committed, its order and its rounds are equal."""
    assert answer.finished
    assert answer.tokens == wanted.tokens
    assert answer.committed == wanted.commit_tokens
    assert [len(prompt) + offset for offset in answer.order] == wanted.commit_order
    assert answer.rounds == wanted.rounds
