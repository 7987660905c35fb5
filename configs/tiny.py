"""A model that two CPU cores train in minutes: a byte-level one that spells words backward.

Arguments: steps, method (a name of `refusion_jax.objective.methods`), e.g. `configs/tiny.py:method=llada,steps=2000`.
"""

from ml_collections import ConfigDict

from refusion_jax.config import model_settings, parse_arguments
from refusion_jax.model.config import ModelConfig
from refusion_jax.objective.methods import METHODS, objective_settings


def get_config(argument: str = "") -> ConfigDict:
    arg = parse_arguments(argument, steps=1000, method="refusion")
    model = ModelConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=384,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        tie_embeddings=True,
        rope_theta=10000.0,
        max_position_embeddings=512,
    )
    # Only the word of "Spell this word backward (example: sun -> nus): word": in bytes the rest is most of the tokens.
    options = (("min_word_len", 3), ("max_word_len", 10), ("query_pattern", r": (\w+)$"))
    task = dict(kind="procedural", path="spell_backward", size=20000, options=options)
    # The slots of ReFusion, and blocks of the methods that have them, are as short as the words; what is learned is the
    # answer, also by methods whose papers learn all of a text; where tokens see what comes after them, an answer is
    # filled up with EOS tokens, or its length would be known.
    suited = {
        "refusion": dict(slot_sizes=(4, 8), mdm_weight_cap=10.0),
        "diffullama": dict(anneal_steps=arg.steps // 4),
        "mdlm": dict(maskable="response"),
        "d3pm": dict(maskable="response"),
        "sedd": dict(maskable="response"),
        "blockwise_sft": dict(block_size=4),
        "dllm": dict(block_size=4),
    }
    objective = objective_settings(arg.method, **suited.get(arg.method, {}))
    return ConfigDict(
        dict(
            model=model_settings(model, logical_vocab_size=0),
            data=dict(
                tokenizer="bytes",
                train=[dict(task, stop=0.98)],
                evaluation=[dict(task, start=0.98)],  # a part, not another seed: its prompts are never trained on
                max_length=64,
                response_multiple=12 if METHODS[arg.method].bidirectional else 1,
            ),
            objective=objective,
            optimizer=dict(lr=2e-3, warmup_steps=50),
            steps=arg.steps,
            batch_size=16,
            eval_every=200,
            log_every=20,
            checkpoint_every_steps=500,
        )
    )
