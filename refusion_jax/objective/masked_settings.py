"""Settings of masked diffusion that are refused: what published code has and is not here, and what cannot be."""

from typing import Any

from refusion_jax.errors import UserError

# Values that published code has, and why they are not here.
UNWANTED = {
    (
        "schedule",
        "cosine",
    ): "no published run uses it, and the bound does not depend on the schedule; take linear",
    ("schedule", "importance"): "it draws the same probabilities as log_uniform, which is its name here",
    ("schedule", "change_of_variables"): "it draws the same probabilities as log_uniform, which is its name here",
    ("weight", "focal"): "it is switched off in the code that has it; take elbo, or cart",
    ("weight", "original"): "it is 1 / t, which is elbo here",
    ("weight", "linear"): "it is 1-t here, since linear is a schedule",
    (
        "norm",
        "micro_batch",
    ): "means of unequal microbatches do not add up to that of the batch; masked counts over the batch",
    ("alignment", "right"): "with logits to the right some masks would have no prediction; take shift",
}


def refuse_unwanted(objective: Any) -> None:
    """Raises a UserError, with the reason, where a `Masked` has a value of UNWANTED."""
    for (name, value), why in UNWANTED.items():
        if getattr(objective, name) == value:
            raise UserError(f"objective.{name} = {value!r} is not supported: {why}.")


def refuse_impossible(objective: Any) -> None:
    """Raises a UserError where the settings of a `Masked` contradict each other."""
    for wrong, message in _impossible(objective):
        if wrong:
            raise UserError(message)


def _impossible(objective: Any) -> list[tuple[bool, str]]:
    names = ("alignment", "weight", "block_size", "eos_as_one", "anneal_steps")
    plain = all(getattr(objective, name) == getattr(type(objective), name) for name in names)
    return [
        (
            objective.diffusion_steps > 0
            and (objective.schedule, objective.loss == "diffusionbert")
            not in (("log_linear", False), ("spindle", True)),
            f"objective.diffusion_steps = {objective.diffusion_steps} makes levels discrete, which is defined for "
            f"schedule = 'log_linear' only, and for 'spindle' with loss = 'diffusionbert', not {objective.schedule!r} "
            f"and {objective.loss!r}. Set these, or diffusion_steps = 0.",
        ),
        (
            (objective.schedule == "spindle") != bool(objective.counts),
            "objective.schedule = 'spindle' and objective.counts, the file with the count of every id, need each "
            "other: set both (tools/count_tokens.py writes the file), or neither.",
        ),
        (
            objective.loss == "diffusionbert"
            and (
                (objective.schedule, objective.diffusion_steps > 0, objective.softmax) != ("spindle", True, "raw")
                or objective.norm not in ("batch", "token")
                or not plain
            ),
            "objective.loss = 'diffusionbert' needs schedule = 'spindle', a positive diffusion_steps (2048), "
            "norm = 'batch' or 'token', and alignment, weight, softmax, block_size, eos_as_one and anneal_steps at "
            "their defaults. Set these, or loss = 'cross_entropy'.",
        ),
        (
            objective.loss == "d3pm" and (objective.diffusion_steps == 0 or objective.norm != "token" or not plain),
            "objective.loss = 'd3pm' is a bound that leaves little choice: it needs schedule = 'log_linear', a "
            "positive diffusion_steps (1000) and norm = 'token', and alignment, weight, block_size, eos_as_one and "
            "anneal_steps at their defaults. Set these, or loss = 'cross_entropy'.",
        ),
        (
            objective.weight == "1-t" and objective.schedule in ("log_uniform", "spindle"),
            "objective.weight = '1-t' is a function of the share that is masked, which is not t under schedule = "
            f"{objective.schedule!r}. Choose schedule = 'linear', or weight = 'elbo'.",
        ),
        (
            objective.weight == "cart" and objective.cart_p == 0,
            "objective.cart_p is 0, so that every weight of 'cart' is 0; choose one above 0, such as 0.1.",
        ),
        (
            objective.block_size > 0 and objective.maskable == "all",
            f"objective.block_size = {objective.block_size} cuts responses into blocks, so the prompt cannot be "
            "masked: set maskable = 'response', or block_size = 0.",
        ),
        (
            objective.block_size > 0
            and (objective.weight == "cart" or objective.eos_as_one or objective.anneal_steps > 0),
            f"objective.block_size = {objective.block_size} goes with none of weight = 'cart', eos_as_one and "
            "anneal_steps, which are of methods that mask a whole response. Leave these at their defaults.",
        ),
        (
            objective.block_size == 0 and (objective.prefix_mask_rate, objective.suffix_mask_prob) != (0, 1),
            "objective.prefix_mask_rate and suffix_mask_prob are about what lies before and after a block, but "
            "block_size is 0. Set it, or leave them at 0 and 1.",
        ),
    ]
