"""Likelihoods that other methods' code recorded (`likelihood.npz`, `loglik.jsonl`), beside this project's own."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import reference_losses

from refusion_jax.model.config import ModelConfig
from refusion_jax.objective import block, likelihood, masked
from refusion_jax.objective.common import token_losses
from refusion_jax.objective.sedd import Sedd

Batch = dict[str, np.ndarray]
Compared = tuple[str, float, float]  # name, ours, theirs


def likelihoods(model: ModelConfig, params: dict, path: pathlib.Path) -> Iterator[Compared]:
    """Of a likelihood.npz: the sum of every batch, the totals of every mode, variances of BD3-LM's clips."""
    data = dict(np.load(path))
    model = dataclasses.replace(model, mask_token_id=reference_losses.mask_token(data))
    totals: dict[str, np.ndarray] = {}
    for number in range(sum(key.startswith("batch") and key.endswith("/corrupted") for key in data)):
        batch = {key.split("/")[1]: value for key, value in data.items() if key.startswith(f"batch{number}/")}
        mode, ours, count = bound(model, params, batch)
        name = "bound_sum" if "bound_sum" in batch else "nll_sum"
        yield f"batch{number} {name}", ours, float(batch[name])
        totals[mode] = totals.get(mode, 0) + np.array([ours, count])
    for mode, (nats, count) in totals.items():
        values = nats, count, nats / count, np.exp(nats / count), nats / count / np.log(2)
        for name, ours, theirs in zip(("nll", "tokens", "nats", "ppl", "bits"), values, data[f"total/{mode}"]):
            yield f"{mode} {name}", float(ours), float(theirs)
    for key in data:
        if key.endswith("/variance"):
            for index, theirs in enumerate(data[key]):
                group = key.removesuffix("variance") + str(index)
                batch = {name: data[f"{group}/{name}"] for name in ("tokens", "t", "corrupted")}
                yield f"{group} variance", clip_variance(model, params, batch, size=4), float(theirs)


def bound(model: ModelConfig, params: dict, batch: Batch) -> tuple[str, float, float]:
    """(mode, nats, tokens) of a recorded batch, a row an example with all that fills it."""
    rows = reference_losses.rows_of(batch | _whole_rows(batch))
    hidden = jnp.asarray(batch["corrupted"] == model.mask_token_id)
    t = jnp.asarray(batch["t"] if batch["t"].ndim == 2 else batch["t"][:, None])
    t = jnp.broadcast_to(t, hidden.shape)
    counted = batch.get("loss_mask", np.ones_like(batch["tokens"]))
    if "block_size" in batch:
        size = int(batch["block_size"])
        clip = (1.0, 1.0) if size == 1 else block.Block().clip
        objective = dataclasses.replace(block.METHODS["bd3"], block_size=size, clip=clip)
        inputs, mode = objective.inputs(rows, model, block.Draws(t, hidden)), f"bs{size}"
    else:
        draws = masked.Draws(t, jnp.where(hidden, 0.0, 1.0))
        objective, mode = Sedd(norm="token"), "all"
        if "mode" in batch:
            mode = str(batch["mode"])
            objective = masked.METHODS["mdlm"]
            if mode != "continuous":  # steps end at the recorded levels
                steps = int(mode.removeprefix("T"))
                objective = dataclasses.replace(objective, diffusion_steps=steps)
                draws = draws.replace(t=draws.t - 0.5 / steps)
        inputs = objective.inputs(rows, model, draws)
    term = inputs.terms["mdm"]
    inputs = inputs.replace(terms={"mdm": term.replace(weights=term.weights * counted)})
    return mode, float(likelihood.bounds(objective, model, params, inputs).sum()), float(counted.sum())


def clip_variance(model: ModelConfig, params: dict, batch: Batch, size: int) -> float:
    """Unbiased variance over the blocks of a batch of the mean loss of a block: what BD3-LM chooses `clip` by."""
    rows = reference_losses.rows_of(batch | _whole_rows(batch))
    objective = dataclasses.replace(block.METHODS["bd3"], block_size=size)
    draws = block.Draws(jnp.asarray(batch["t"]), jnp.asarray(batch["corrupted"] == model.mask_token_id))
    inputs = objective.inputs(rows, model, draws)
    losses = inputs.terms["mdm"].weighted(token_losses(model, objective, {"params": params}, inputs).loss)
    means = np.asarray(losses, np.float64).reshape(len(losses), -1, size).mean(axis=-1)
    return float(np.var(means, ddof=1))


def _whole_rows(batch: Batch) -> Batch:
    count, length = batch["tokens"].shape
    return {"prompt_lengths": np.zeros(count, np.int32), "filled": np.full(count, length)}


def logliks(model: ModelConfig, params: dict, path: pathlib.Path) -> Iterator[Compared]:
    """Of a loglik.jsonl: LLaDA's estimates of given masks, one for each line; nan where numbers of masks differ."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        case = json.loads(line)
        prompt, answer = case["prompt"], case["answer"]
        tokens = np.zeros((1, -(-(len(prompt) + len(answer)) // 32) * 32), np.int32)
        tokens[0, : len(prompt) + len(answer)] = prompt + answer
        losses, same_counts = [], True
        for k, counts, masks in zip(case["k"], case["counts"], case["masks"], strict=True):
            ours = likelihood.stratified_counts(jnp.int32(k), jnp.int32(len(answer)), len(masks))
            same_counts &= ours.tolist() == counts
            hidden = np.zeros((len(masks), tokens.shape[1]), bool)
            hidden[:, len(prompt) : len(prompt) + len(answer)] = masks
            scale = float(case["params"]["cfg_scale"])
            lengths = jnp.int32(len(prompt)), jnp.int32(len(prompt) + len(answer))
            losses.append(
                float(likelihood.counted_loss(masked.METHODS["llada"], model, scale, params, tokens, *lengths, hidden))
            )
        yield f"line {number} loglik", -float(np.mean(losses)) if same_counts else np.nan, case["loglik"]
