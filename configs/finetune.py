"""Fine-tunes any checkpoint on your own pairs: the model's sizes come from the checkpoint.

    python -m refusion_jax.train --config configs/finetune.py:init_from=DIR,data=DATA.json --workdir runs/mine
    ... --config.lora.rank=16 --config.optimizer.lr=2e-4      adapters only, for a small accelerator

Arguments: init_from (a Hugging Face folder or name, or a checkpoint folder), data (JSON list or JSONL of query/response
records), tokenizer (the checkpoint's unless given), dtype (of computing), max_length, held_out (share of the data that
is evaluated on and not trained on; 0 for none), method (a name of `refusion_jax.objective.methods`: what the model is
to become).
"""

from ml_collections import ConfigDict

from refusion_jax.checkpoint import load
from refusion_jax.config import model_settings, parse_arguments
from refusion_jax.errors import UserError
from refusion_jax.objective.methods import objective_settings


def get_config(argument: str = "") -> ConfigDict:
    arg = parse_arguments(
        argument,
        init_from="",
        data="",
        tokenizer="",
        dtype="bfloat16",
        max_length=4096,
        held_out=0.05,
        method="refusion",
    )
    if not arg.init_from or not arg.data:
        raise UserError(
            "configs/finetune.py needs to know what and on what: configs/finetune.py:init_from=DIR,data=DATA.json"
        )
    source = dict(kind="jsonl" if arg.data.endswith(".jsonl") else "json", path=arg.data)
    return ConfigDict(
        dict(
            model=model_settings(load.load_model_config(arg.init_from), dtype=arg.dtype, remat="minimal"),
            init_from=arg.init_from,
            objective=objective_settings(arg.method),
            data=dict(
                tokenizer=arg.tokenizer or load.tokenizer_source(arg.init_from),
                train=[dict(source, stop=1 - arg.held_out)],
                evaluation=[dict(source, start=1 - arg.held_out)] if arg.held_out else [],
                max_length=arg.max_length,
            ),
            optimizer=dict(lr=2e-5),
            epochs=2.0,
            batch_size=32,
            eval_every=200,
            checkpoint_every_steps=200,
        )
    )
