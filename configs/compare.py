"""One run of a comparison of methods: the same model, data and steps for all of them (tools/compare_methods.py).

Arguments: method (a name of `refusion_jax.objective.methods`, or refusion_causal: ReFusion with a share of clean
examples in order), seed, lr, steps, and scale:

    quick   0.1M parameters on two tasks, minutes on a CPU, to see that everything works
    tiny    2M parameters on five tasks of different kinds, hours on two CPU cores for the whole table
    100m    100M parameters on grade-school word problems (gsm_symbolic), for one GPU
"""

from ml_collections import ConfigDict

from refusion_jax.config import model_settings, parse_arguments
from refusion_jax.model.config import ModelConfig
from refusion_jax.objective.methods import objective_settings

# Byte-level; of each question only what differs. Sums are best written from the right, spelling in any order, sorting
# from the left; ciphers are letter by letter; word problems have worked steps.
SUM = (("min_terms", 2), ("max_terms", 2), ("min_digits", 2), ("max_digits", 4), ("query_pattern", r": (.*) ="))
SPELL = (("min_word_len", 3), ("max_word_len", 10), ("query_pattern", r": (\w+)$"))
SORT = (
    ("min_numbers", 3),
    ("max_numbers", 5),
    ("min_decimals", 0),
    ("max_decimals", 0),
    ("min_value", 0.0),
    ("max_value", 99.0),
    ("query_pattern", r"Sort these numbers in (\w+ order: .*?)\n"),
)
CIPHER = (("min_words", 1), ("max_words", 2), ("query_pattern", r"text: (.*?)\. Provide"))
TASKS = {
    "chain_sum": SUM,
    "spell_backward": SPELL,
    "number_sorting": SORT,
    "caesar_cipher": CIPHER,
    "gsm_symbolic": (),
}
SCALES = {
    "quick": dict(tasks=("chain_sum", "spell_backward"), width=64, layers=2, steps=300, length=128, multiple=16),
    "tiny": dict(tasks=tuple(TASKS), width=192, layers=4, steps=3000, length=1024, multiple=16),
    "100m": dict(tasks=("gsm_symbolic",), width=768, layers=14, steps=20000, length=2048, multiple=16),
}


def get_config(argument: str = "") -> ConfigDict:
    arg = parse_arguments(argument, method="refusion", scale="tiny", steps=0, seed=0, lr=0.0)
    scale = SCALES[arg.scale]
    large, width, steps = arg.scale == "100m", scale["width"], arg.steps or scale["steps"]
    model = ModelConfig(
        vocab_size=384,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=scale["layers"],
        num_heads=width // (64 if large else 32),
        num_kv_heads=width // (64 if large else 32) // 2,
        head_dim=64 if large else 32,
        tie_embeddings=True,
        rope_theta=10000.0,
        max_position_embeddings=2 * scale["length"],
    )
    sources = [dict(kind="procedural", path=name, size=20000, options=TASKS[name]) for name in scale["tasks"]]
    # Slots and blocks as short as the answers; where tokens see what comes after them, an answer is filled up with EOS
    # tokens, or its length would be known.
    slots = (4, 8, 16, 32) if large else (4, 8)
    refusion = dict(slot_sizes=slots, mdm_weight_cap=10.0)
    suited = {
        "refusion": refusion,
        "refusion_causal": refusion | dict(causal_share=0.3),
        "diffullama": dict(anneal_steps=steps // 4),
        "blockwise_sft": dict(block_size=4),
        "dllm": dict(block_size=4),
    }
    name = "refusion" if arg.method == "refusion_causal" else arg.method
    objective = objective_settings(name, **suited.get(arg.method, {}))
    return ConfigDict(
        dict(
            model=model_settings(model, logical_vocab_size=0, dtype="bfloat16" if large else "float32"),
            data=dict(
                tokenizer="bytes",
                train=[dict(source, stop=0.98) for source in sources],
                evaluation=[dict(source, start=0.98) for source in sources],  # prompts that are never trained on
                max_length=scale["length"],
                response_multiple=1 if objective["kind"] in ("refusion", "autoregressive") else scale["multiple"],
            ),
            objective=objective,
            optimizer=dict(lr=arg.lr or (6e-4 if large else 2e-3), warmup_steps=steps // 20, b2=0.95),
            steps=steps,
            batch_size=64 if large else 8,
            seed=arg.seed,
            eval_every=max(1, steps // 5),
            log_every=max(1, steps // 100),
            checkpoint_every_steps=max(1, steps // 5),
            keep_last=1,
            keep_best=0,
        )
    )
