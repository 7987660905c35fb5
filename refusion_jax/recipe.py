"""The authors' fine-tuning recipe (method section 5), shared by the configs of the published sizes."""

from ml_collections import ConfigDict

from refusion_jax.config import model_settings, parse_arguments


def recipe(size: str, argument: str) -> ConfigDict:
    """Full fine-tuning of a Qwen3 of that size.

    Arguments of every config: data (a JSON list or JSON lines of query/response records), init_from (weights to start
    from), tokenizer, batch_size, steps (0: as many as `epochs` take), epochs.
    """
    arg = parse_arguments(
        argument,
        data="data/train.json",
        init_from=f"Qwen/Qwen3-{size.upper()}",
        tokenizer=f"Qwen/Qwen3-{size.upper()}",
        batch_size=512,
        steps=0,
        epochs=4.0,
    )
    kind = "jsonl" if arg.data.endswith(".jsonl") else "json"
    return ConfigDict(
        dict(
            model=model_settings(size, dtype="bfloat16", remat="full"),
            init_from=arg.init_from,
            data=dict(
                tokenizer=arg.tokenizer,
                train=[dict(kind=kind, path=arg.data, stop=0.99)],
                evaluation=[dict(kind=kind, path=arg.data, start=0.99)],
                max_length=4096,
            ),
            optimizer=dict(lr=2e-5, schedule="cosine", b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0),
            mesh=dict(data=1, fsdp=-1, tensor=1),
            steps=arg.steps,
            epochs=arg.epochs,
            batch_size=arg.batch_size,
            accumulation=1,
            eval_every=500,
            eval_batches=8,
            checkpoint_every_steps=500,
        )
    )
