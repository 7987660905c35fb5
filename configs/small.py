"""About 100M parameters for one GPU, from scratch, on grade-school word problems with worked solutions (gsm_symbolic).

Arguments: steps, batch_size, tokenizer.
"""

from ml_collections import ConfigDict

from refusion_jax.config import model_settings, parse_arguments
from refusion_jax.model.config import ModelConfig


def get_config(argument: str = "") -> ConfigDict:
    arg = parse_arguments(argument, steps=20000, batch_size=64, tokenizer="bytes")
    model = ModelConfig(
        vocab_size=384,
        hidden_size=768,
        intermediate_size=2304,
        num_layers=14,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        tie_embeddings=True,
        max_position_embeddings=4096,
    )
    task = dict(kind="procedural", path="gsm_symbolic", size=200000)
    return ConfigDict(
        dict(
            model=model_settings(model, logical_vocab_size=0, dtype="bfloat16"),
            data=dict(
                tokenizer=arg.tokenizer,
                train=[dict(task, stop=0.9975)],
                evaluation=[dict(task, start=0.9975)],  # a part, not another seed: its prompts are never trained on
                max_length=2048,
            ),
            objective=dict(mdm_weight_cap=10.0),
            optimizer=dict(lr=6e-4, warmup_steps=500, b2=0.95, weight_decay=0.1),
            steps=arg.steps,
            batch_size=arg.batch_size,
            eval_every=1000,
            checkpoint_every_steps=1000,
        )
    )
