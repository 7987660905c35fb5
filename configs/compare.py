"""One run of a comparison of methods: the same model, data and steps for all of them (tools/compare_methods.py).

Arguments: method (a name of `refusion_jax.objective.methods`, or refusion_causal: ReFusion with a share of clean
examples in order), seed, lr, steps, and scale:

    quick   0.1M parameters on two tasks, minutes on a CPU, to see that everything works
    tiny    1M parameters on five tasks of different kinds, for a CPU
    100m    100M parameters on grade-school word problems (gsm_symbolic), for one GPU
"""

from ml_collections import ConfigDict

from refusion_jax.config import model_settings, parse_arguments
from refusion_jax.model.config import ModelConfig
from refusion_jax.objective.methods import METHODS, objective_settings

# Byte-level; of each question only what differs. Sums are best written from the right, spelling in any order, sorting
# and insertion from the left; a word ladder is its own worked steps, each one letter from the one before.
SUM = (("min_terms", 2), ("max_terms", 2), ("min_digits", 1), ("max_digits", 2), ("query_pattern", r": (.*) ="))
SPELL = (("min_word_len", 4), ("max_word_len", 8), ("query_pattern", r": (\w+)$"))
SORT = (
    ("min_numbers", 2),
    ("max_numbers", 2),
    ("min_decimals", 1),
    ("max_decimals", 1),
    ("min_value", 0.0),
    ("max_value", 9.9),
    ("query_pattern", r"Sort these numbers in (\w+ order: .*?)\n"),
)
INSERT = (("min_string_length", 5), ("max_string_length", 8), ("query_pattern", r"pattern: (\w+)"))
LADDER = (
    ("min_word_length", 3),
    ("max_word_length", 3),
    ("min_chain_length", 3),
    ("max_chain_length", 4),
    ("query_pattern", r"ladder '(\w+' to '\w+)'"),
)
TASKS = {
    "chain_sum": SUM,
    "spell_backward": SPELL,
    "number_sorting": SORT,
    "string_insertion": INSERT,
    "word_ladder": LADDER,
}
SCALES = {
    "quick": dict(
        tasks=("chain_sum", "spell_backward"), width=64, mlp=192, layers=2, steps=300, length=128, rows=8, size=5000
    ),
    "tiny": dict(tasks=tuple(TASKS), width=192, mlp=640, layers=2, steps=1200, length=128, rows=8, size=10000),
    "100m": dict(
        tasks=("gsm_symbolic",), width=768, mlp=2304, layers=14, steps=20000, length=2048, rows=64, size=20000
    ),
}
FILLED = 16  # tokens that an answer is filled up to a multiple of: the longest short one has 15 and its end


def get_config(argument: str = "") -> ConfigDict:
    arg = parse_arguments(argument, method="refusion", scale="tiny", steps=0, seed=0, lr=0.0)
    scale = SCALES[arg.scale]
    large, width, steps = arg.scale == "100m", scale["width"], arg.steps or scale["steps"]
    model = ModelConfig(
        vocab_size=384,
        hidden_size=width,
        intermediate_size=scale["mlp"],
        num_layers=scale["layers"],
        num_heads=width // (64 if large else 32),
        num_kv_heads=width // (64 if large else 32) // 2,
        head_dim=64 if large else 32,
        tie_embeddings=True,
        rope_theta=10000.0,
        max_position_embeddings=2 * scale["length"],
    )
    sources = [
        dict(kind="procedural", path=name, size=scale["size"], options=TASKS.get(name, ())) for name in scale["tasks"]
    ]
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
                response_multiple=FILLED if METHODS[name].bidirectional else 1,
            ),
            objective=objective,
            optimizer=dict(lr=arg.lr or (6e-4 if large else 3e-3), warmup_steps=steps // 20, b2=0.95),
            steps=steps,
            batch_size=scale["rows"],
            seed=arg.seed,
            eval_every=max(1, steps // 2),
            log_every=max(1, steps // 100),
            checkpoint_every_steps=max(1, steps // 2),
            keep_last=1,
            keep_best=0,
        )
    )
