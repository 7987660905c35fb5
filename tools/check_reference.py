"""Compares this implementation with reference data: `python tools/check_reference.py DIR`.

DIR holds `model/` (Hugging Face layout), or a file `MODEL` with the path of the model's folder from DIR, and any of
`logits.npz`, `losses*.npz` (of ReFusion, or of a method of `reference_losses.py`), `likelihood.npz`, `loglik.jsonl`,
`decode.jsonl`. Prints one line per kind and every mismatch with its size; exits with 1 if anything differs.
--checkpoint takes the parameters from elsewhere, a converted checkpoint say, and --mesh restores them onto several
devices.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference_decode
import reference_likelihood
import reference_losses

from refusion_jax.checkpoint import load
from refusion_jax.decoder import parse_mesh
from refusion_jax.errors import UserError, run_main
from refusion_jax.model.attention import Packed
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import Qwen3
from refusion_jax.objective.block import Block
from refusion_jax.objective.common import Inputs, token_losses
from refusion_jax.objective.masked import Masked
from refusion_jax.objective.refusion import Refusion
from refusion_jax.parallel import sharding

LOGITS_TOLERANCE = 2e-4  # max abs difference
LOSS_TOLERANCE = 1e-5  # relative
LIKELIHOOD_TOLERANCE = 2e-5  # relative
GRADIENT_TOLERANCE = 1e-4  # relative, of the global norm


def differs(name: str, ours: float, theirs: float, relative: float) -> list[str]:
    """One line when two numbers differ by more than `relative`."""
    error = abs(ours - theirs) / max(abs(theirs), 1e-12)
    return [] if error <= relative else [f"{name}: {ours:.8g}, reference {theirs:.8g}, relative difference {error:.2e}"]


def logits(config: ModelConfig, params: dict, tokens: jax.Array, positions: jax.Array, context: Packed) -> jax.Array:
    """[batch, length, vocab] in full."""
    hidden, _ = Qwen3(config).apply({"params": params}, tokens, positions, context)
    return over_vocabulary(config, params, hidden, lambda logits: logits)


def check_logits(config: ModelConfig, params: dict, path: pathlib.Path) -> tuple[int, int, list[str]]:
    """(cases, equal ones, mismatches): natural and permuted position order."""
    data = np.load(path)
    whole = Packed(jnp.ones(data["tokens"].shape, jnp.int32), implementation=config.attention)
    forward = jax.jit(lambda params, tokens, positions: logits(config, params, tokens, positions, whole))
    problems = []
    kinds = [("positions", "logits"), ("permuted_positions", "logits_permuted")]
    for positions, name in kinds:
        ours = np.asarray(forward(params, data["tokens"], data[positions]))[:, data["rows"]]
        error = np.abs(ours - data[name]).max()
        if not error <= LOGITS_TOLERANCE:
            problems.append(f"{name}: max abs difference {error:.2e}")
    return len(kinds), len(kinds) - len(problems), problems


def reference_inputs(config: ModelConfig, batch: dict[str, np.ndarray]) -> Inputs:
    """A recorded corrupted batch, with terms weighted as in training (one example per row, padded at the end)."""
    labels, masked = batch["labels"], batch["masked"].astype(bool)
    row = lambda name: jnp.broadcast_to(jnp.asarray(batch[name])[:, None], labels.shape)
    segments = jnp.asarray(batch["attention_mask"], jnp.int32)
    return Inputs(
        tokens=jnp.asarray(batch["corrupted"], jnp.int32),
        positions=jnp.asarray(batch["positions"], jnp.int32),
        context=Packed(segments, implementation=config.attention),
        targets=jnp.maximum(jnp.asarray(labels, jnp.int32), 0),
        terms=Refusion().terms(
            ar=(labels >= 0) & ~masked,
            mdm=(labels >= 0) & masked,
            q=row("mask_prob"),
            response_length=row("response_length"),
            segment_ids=segments,
            examples=len(labels),
        ),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def losses_and_norm(config: ModelConfig, objective: Any, params: dict, inputs: Inputs) -> dict:
    """loss, NAME_loss of every term and grad_norm."""

    def total(params: dict):
        losses = token_losses(config, objective, {"params": params}, inputs)
        means = {
            name: term.numerator(losses.loss) / jnp.maximum(term.denominator, 1) for name, term in inputs.terms.items()
        }
        return sum(means.values()), means

    (value, means), grads = jax.value_and_grad(total, has_aux=True)(params)
    losses = {"loss": value, **{f"{name}_loss": mean for name, mean in means.items()}}
    return losses | {"grad_norm": optax.tree.norm(grads)}


def check_recorded_losses(config: ModelConfig, params: dict, data: dict[str, np.ndarray]) -> tuple[int, int, list[str]]:
    """(losses, equal ones, mismatches) of other methods: what the model sees, the loss, the global gradient norm."""
    config = dataclasses.replace(config, mask_token_id=reference_losses.mask_token(data))
    count, equal, problems = 0, 0, []
    for case in reference_losses.cases(config, data):
        # The cross-entropy of a token depends on no other settings, so one program serves all cases.
        same = case.objective
        if getattr(same, "loss", "") == "cross_entropy" or isinstance(same, Block):
            same = Masked(softmax=same.softmax)
        ours = losses_and_norm(config, same, params, case.inputs)
        found = differs(f"{case.name} loss", float(ours["loss"]), case.loss, LOSS_TOLERANCE)
        if case.grad_norm is not None:
            found += differs(f"{case.name} grad_norm", float(ours["grad_norm"]), case.grad_norm, GRADIENT_TOLERANCE)
        seen = np.asarray(case.inputs.tokens)[tuple(map(slice, case.corrupted.shape))]
        others = (seen != case.corrupted).sum()
        found += [f"{case.name} corrupted: {others} tokens differ"] * bool(others)
        count, equal, problems = count + 1, equal + (not found), problems + found
    return count, equal, problems


def check_losses(config: ModelConfig, params: dict, path: pathlib.Path) -> tuple[int, int, list[str]]:
    """(batches, equal ones, mismatches): both terms, the global gradient norm and the logits of the first row.

    Raises:
      UserError: the losses are of no kind that is known here.
    """
    data = dict(np.load(path))
    if reference_losses.is_known(data):
        return check_recorded_losses(config, params, data)
    if "batch0/ar_loss" not in data:
        raise UserError(
            f"{path} has losses of a method that is not known here; known are ReFusion's and those of "
            "tools/reference_losses.py, each by its own keys."
        )
    first_row = jax.jit(
        lambda params, inputs: logits(config, params, inputs.tokens, inputs.positions, inputs.context)[0]
    )
    batches = sorted({name.split("/")[0] for name in data}, key=lambda name: int(name.removeprefix("batch")))
    equal, problems = 0, []
    for name in batches:
        batch = {key.split("/")[1]: data[key] for key in data if key.startswith(f"{name}/")}
        inputs = reference_inputs(config, batch)
        ours, first = losses_and_norm(config, Refusion(), params, inputs), first_row(params, inputs)
        found = []
        for key, value in ours.items():
            tolerance = GRADIENT_TOLERANCE if key == "grad_norm" else LOSS_TOLERANCE
            found += differs(f"{name} {key}", float(value), float(batch[key]), tolerance)
        real = batch["attention_mask"][0].astype(bool)
        error = np.abs(np.asarray(first) - batch["logits_row0"])[real].max()
        if not error <= LOGITS_TOLERANCE:
            found.append(f"{name} logits_row0: max abs difference {error:.2e}")
        equal += not found
        problems += found
    return len(batches), equal, problems


def check_decode(
    config: ModelConfig, params: dict, path: pathlib.Path, speculate: str = "off"
) -> tuple[int, int, list[str]]:
    """(prompts, equal ones, mismatches): response, order and, without speculation, forwards and their tokens."""
    if jax.default_backend() == "cpu":  # compiling takes far longer than running
        jax.config.update("jax_disable_most_optimizations", True)
    if config.mask_token_id is None:  # the last id, where a model's file does not say
        config = dataclasses.replace(config, mask_token_id=config.vocab_size - 1)
    cases = reference_decode.read(path, config.vocab_size, speculate)
    equal, problems, forwards, forwarded = 0, [], 0, 0
    for case, answer in reference_decode.decode(params, config, cases):
        different = reference_decode.mismatches(case, answer, path.name)
        equal, problems = equal + (not different), problems + different
        forwards, forwarded = forwards + answer.forwards, forwarded + answer.tokens_forwarded
    print(f"{forwards} forward passes of {forwarded} tokens" + f", speculate={speculate}" * (speculate != "off"))
    return len(cases), equal, problems


def check_likelihoods(
    read: Callable, config: ModelConfig, params: dict, path: pathlib.Path
) -> tuple[int, int, list[str]]:
    """(numbers, equal ones, mismatches) of what `read` of reference_likelihood.py makes of a file."""
    compared = list(read(config, params, path))
    problems = [line for name, ours, theirs in compared for line in differs(name, ours, theirs, LIKELIHOOD_TOLERANCE)]
    return len(compared), len(compared) - len(problems), problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="take the parameters from here instead of DIR/model")
    parser.add_argument("--mesh", default="1,1,1", help="data,fsdp,tensor")
    parser.add_argument(
        "--speculate",
        default="off",
        choices=["off", "on", "auto"],
        help="for decode.jsonl; other than off, forward passes are not compared",
    )
    arguments = parser.parse_args()
    folder = arguments.folder
    named = folder / "MODEL"
    model = folder / named.read_text().strip() if named.is_file() else folder / "model"
    if not model.is_dir():
        raise UserError(
            f"{folder} has no folder 'model' beside its reference data, and no file 'MODEL' that names one; give a "
            "folder in the layout of tests/reference/tiny."
        )
    source = arguments.checkpoint or model
    config = dataclasses.replace(load.load_model_config(source), dtype="float32", attention="xla")
    mesh = parse_mesh(arguments.mesh)
    params = load.load_params(source, config, mesh, sharding.DECODE_RULES, dtype="float32")

    decode = functools.partial(check_decode, speculate=arguments.speculate)
    losses = dict.fromkeys(("losses.npz", "losses_dllm.npz"), check_losses)
    kinds = {
        "logits.npz": check_logits,
        **losses,
        "likelihood.npz": functools.partial(check_likelihoods, reference_likelihood.likelihoods),
        "loglik.jsonl": functools.partial(check_likelihoods, reference_likelihood.logliks),
        "decode.jsonl": decode,
    }
    present = [name for name in kinds if (folder / name).exists()]
    if not present:
        raise UserError(f"{folder} holds none of {', '.join(kinds)}; there is nothing to compare with.")
    failed = False
    for name in present:
        with sharding.use(mesh, sharding.DECODE_RULES):
            cases, equal, problems = kinds[name](config, params, folder / name)
        print(f"{pathlib.Path(name).stem} {equal}/{cases}")
        print("".join(f"  {line}\n" for line in problems), end="")
        failed |= equal < cases
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_main(main)
