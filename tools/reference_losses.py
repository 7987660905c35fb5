"""Losses that other methods' code recorded (`losses*.npz`): what `inputs` of an objective makes of recorded draws."""

import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from refusion_jax.model.config import ModelConfig
from refusion_jax.objective import block
from refusion_jax.objective.block import Block
from refusion_jax.objective.common import Inputs, PackedBatch, layout
from refusion_jax.objective.masked import METHODS, Draws, Masked, level
from refusion_jax.objective.sedd import Sedd

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss of a recorded batch.

    Attributes:
      name: of the batch and, where it has several losses, of the loss.
      objective, inputs: what makes the loss here.
      loss, grad_norm: recorded; None: not recorded.
      corrupted: [rows, length], the recorded input.
    """

    name: str
    objective: Masked | Block | Sedd
    inputs: Inputs
    loss: float
    grad_norm: float | None
    corrupted: np.ndarray


def is_known(data: Batch) -> bool:
    """Whether a file's losses are those of a kind that `cases` knows."""
    return "word_counts" in data or any(f"batch0/{key}" in data for key in KINDS)


def mask_token(data: Batch) -> int:
    """The id of the masks in a file, which its model may not name."""
    if "word_counts" in data:
        return len(data["word_counts"]) - 1
    return int(data["batch0/corrupted"][data["batch0/corrupted"] != data["batch0/tokens"]][0])


def cases(model: ModelConfig, data: Batch) -> Iterator[Case]:
    """All losses of a file, keys `batchN/..`; its batches are padded to one shape."""
    if "word_counts" in data:
        yield from _spindle(model, data)
        return
    numbers = sorted({int(key.split("/")[0].removeprefix("batch")) for key in data})
    rows, length = np.max([data[f"batch{number}/tokens"].shape for number in numbers], axis=0)
    for number in numbers:
        batch = {key.split("/")[1]: data[key] for key in data if key.startswith(f"batch{number}/")}
        batch = _padded(batch, rows, length)
        (read,) = (KINDS[key] for key in KINDS if key in batch)
        for name, objective, inputs in read(model, batch):
            key = name if name in batch else "loss"
            norm = batch.get("grad_norm" if key == "loss" else f"{key}_grad_norm")
            yield Case(
                f"batch{number}" + f" {name}" * (key != "loss"),
                objective,
                inputs,
                float(batch[key]),
                norm,
                batch["corrupted"],
            )


def _padded(batch: Batch, rows: int, length: int) -> Batch:
    """With rows without examples and with padding behind the examples; `filled` is the recorded length of every row."""
    own_rows, own_length = batch["tokens"].shape
    batch = batch | {"filled": np.full(own_rows, own_length)}
    missing = {own_rows: rows - own_rows, own_length: length - own_length}
    grow = lambda x: np.pad(x, [(0, missing.get(size, 0)) for size in x.shape]) if x.ndim else x
    return {name: grow(x) for name, x in batch.items()}


def rows_of(batch: Batch, lengths: str = "filled") -> PackedBatch:
    """One example to a row; what fills its recorded length is part of it, unless `lengths` names others."""
    as_column = lambda values: jnp.asarray(values, jnp.int32)[:, None]
    prompts, lengths = as_column(batch["prompt_lengths"]), as_column(batch[lengths])
    return PackedBatch(jnp.asarray(batch["tokens"], jnp.int32), prompts, lengths, jnp.zeros(lengths.shape, jnp.uint32))


def _draws(t: np.ndarray, u: np.ndarray, **others) -> Draws:
    """Of levels [rows] and numbers [rows, length]."""
    return Draws(jnp.broadcast_to(jnp.asarray(t)[:, None], u.shape), jnp.asarray(u), **others)


def _llada(model: ModelConfig, batch: Batch):
    objective = METHODS["llada_pretrain" if batch["objective"] == "pretrain" else "llada"]
    yield "loss", objective, objective.inputs(rows_of(batch), model, _draws(level(batch["t"]), batch["uniform"]))


def _dream(model: ModelConfig, batch: Batch):
    """Dream's own trainer (sft), and dllm's, which divides by t + 1e-6."""
    common = dataclasses.replace(METHODS["dream"], eos_as_one=bool(batch["eos_as_one"]))
    weights = {"original": "elbo", "scheduler": "elbo", "linear": "1-t", "uniform": "uniform"}
    for name in batch:
        author, _, setting = name.partition("_")
        if author not in ("sft", "dllm") or name.endswith("grad_norm"):
            continue
        weight, _, norm = setting.rpartition("_") if author == "dllm" else (setting, "_", "masked")
        kind, _, p = weight.partition("_")
        objective = dataclasses.replace(
            common, norm=norm, weight=weights.get(kind, kind), **({"cart_p": float(p)} if p else {})
        )
        t = batch["t"] + np.float32(1e-6) if kind == "scheduler" else batch["t"]
        yield name, objective, objective.inputs(rows_of(batch), model, _draws(t, batch["u"]))


def _diffullama(model: ModelConfig, batch: Batch):
    objective = dataclasses.replace(METHODS["diffullama"], alignment="shift" if batch["shift"] else "same")
    draws = _draws(batch["t"], batch["u"], seen=jnp.asarray(batch["bernoulli"])[None])
    yield "loss", objective, objective.inputs(rows_of(batch), model, draws)
    unweighted = dataclasses.replace(objective, weight="uniform")
    yield "unweighted_loss", unweighted, unweighted.inputs(rows_of(batch), model, draws)


def _mdlm(model: ModelConfig, batch: Batch):
    """What fills a row is masked and seen, but has no part in the loss where `loss_mask` says so."""
    uniform_log = batch["importance"] or batch["change_of_variables"]
    objective = dataclasses.replace(
        METHODS["d3pm" if batch["parameterization"] == "d3pm" else "mdlm"],
        softmax="subs" if batch["parameterization"] == "subs" or batch["subs_masking"] else "raw",
        schedule="log_uniform" if uniform_log else "log_linear",
        diffusion_steps=int(batch["T"]),
    )
    t = batch["t_drawn"]
    if batch["importance"]:  # recorded is where log_linear has the same probability
        lowest, highest = np.log(-np.expm1(-1e-3)), np.log1p(-1e-3)
        t = ((np.log(np.maximum(t, 1e-9) * (1 - 1e-3)) - lowest) / (highest - lowest)).astype(np.float32)
    inputs = objective.inputs(rows_of(batch), model, _draws(t, batch["u_mask"]))
    counted = jnp.asarray(batch["loss_mask"], jnp.float32)
    of_rows = jnp.tile(counted, (len(inputs.tokens) // len(counted), 1))  # twice with clean ones
    terms = {
        name: term.replace(weights=term.weights * of_rows, denominator=jnp.sum(counted))
        for name, term in inputs.terms.items()
    }
    yield "loss", objective, inputs.replace(terms=terms)


def _blockwise(model: ModelConfig, batch: Batch):
    """`u` of a row: for the tokens before its block, if any may be masked; for p; for the block; for those after it."""
    objective = dataclasses.replace(
        METHODS["blockwise_sft"],
        block_size=int(batch["block_size"]),
        prefix_mask_rate=float(batch["prefix_mask_rate"]),
        suffix_mask_prob=float(batch["suffix_mask_prob"]),
    )
    t, u = np.zeros(len(batch["u"]), np.float32), np.zeros(batch["tokens"].shape, np.float32)
    blocks = batch["block_index"]
    u[blocks < 0] = 1  # the example's blocks were used up: nothing is masked
    for row in np.flatnonzero((batch["filled"] > 0) & (blocks >= 0)):
        prompt, length, block = batch["prompt_lengths"][row], batch["lengths"][row], blocks[row]
        numbers = iter(batch["u"][row])
        start = prompt + block * objective.block_size
        end = min(start + objective.block_size, length)
        if objective.prefix_mask_rate:
            u[row, prompt:start] = list(itertools.islice(numbers, int(start - prompt)))
        t[row] = level(next(numbers))
        u[row, start:end] = list(itertools.islice(numbers, int(end - start)))
        if 0 < objective.suffix_mask_prob < 1:
            u[row, end:length] = list(itertools.islice(numbers, int(length - end)))
    draws = _draws(t, u, block=jnp.broadcast_to(blocks[:, None], u.shape))
    yield "loss", objective, objective.inputs(rows_of(batch, "lengths"), model, draws)


def _bd3(model: ModelConfig, batch: Batch):
    """What fills a row is masked and seen, but has no part in the loss where `loss_mask` says so."""
    low, high = (round(float(batch[name]), 6) for name in ("eps_min", "eps_max"))
    objective = dataclasses.replace(
        block.METHODS["bd3"],
        block_size=int(batch["block_size"]),
        clip=(low, high),
        resample=bool(batch["resample"]) and (low, high) != (1e-3, 1),
        weight="uniform" if low > 0.5 else "elbo",
    )
    rows, again = rows_of(batch), jnp.asarray(batch["u_resample"])
    t = np.broadcast_to(batch["t"], batch["tokens"].shape)
    recorded = jnp.concatenate([jnp.asarray(batch["u_mask"])[None], *[u[None] for u in again]])
    masked = objective.masks(
        layout(rows), jnp.asarray(t), lambda round: recorded[jnp.minimum(round, len(recorded) - 1)]
    )
    inputs = objective.inputs(rows, model, block.Draws(jnp.asarray(t), masked))
    counted = jnp.asarray(batch["loss_mask"], jnp.float32)
    term = inputs.terms["mdm"]
    term = term.replace(weights=term.weights * counted, denominator=jnp.sum(counted))
    yield "loss", objective, inputs.replace(terms={"mdm": term})


def _sdar(model: ModelConfig, batch: Batch):
    """Rows of several examples, each with padding that is learnt."""
    objective = dataclasses.replace(block.METHODS["sdar"], block_size=int(batch["block_size"]))
    count = len(batch["u_t"])
    prompts, lengths = (np.zeros((count, batch["u_t"].shape[1]), np.int32) for _ in range(2))
    t = np.zeros(batch["tokens"].shape, np.float32)
    for row, k, start, prompt, _, length in batch["samples"]:
        if length:
            prompts[row, k], lengths[row, k] = prompt, length
            t[row, start : start + length] = objective.level_of(batch["u_t"][row, k])
    # A row whose draws mask nothing, after ten tries, has one token that is masked without a draw.
    drawn = (batch["u_mask"] < t) & (batch["labels"] != -100)
    masked = np.where(drawn.any(axis=1, keepdims=True), drawn, batch["masked"])
    rows = PackedBatch(jnp.asarray(batch["tokens"]), prompts, lengths, jnp.zeros(lengths.shape, jnp.uint32))
    yield "loss", objective, objective.inputs(rows, model, block.Draws(jnp.asarray(t), jnp.asarray(masked)))


def _dllm(model: ModelConfig, batch: Batch):
    """dllm's block diffusion, which divides by p + 1e-6; what fills a row has no label."""
    objective = dataclasses.replace(
        block.METHODS["dllm"],
        block_size=int(batch["block_size"]),
        schedule=str(batch["schedule"]),
        weight={"scheduler": "elbo", "uniform": "uniform"}[str(batch["weighting"])],
        norm=str(batch["norm"]),
    )
    labelled = (batch["labels"] != -100).sum(axis=1) * (batch["filled"] > 0)
    rows = rows_of(batch | {"labelled": batch["prompt_lengths"] + labelled}, "labelled")
    t = jnp.broadcast_to(jnp.asarray(batch["t"])[:, None], rows.tokens.shape)
    p, _ = objective.probability(t)
    masked = jnp.asarray(batch["u_mask"]) < p
    inputs = objective.inputs(rows, model, block.Draws(t, masked))
    term = inputs.terms["mdm"]
    if objective.weight == "elbo":
        term = term.replace(weights=term.weights * p / (p + 1e-6))
    yield "loss", objective, inputs.replace(terms={"mdm": term})


def _sedd(model: ModelConfig, batch: Batch):
    objective = Sedd()
    yield "loss", objective, objective.inputs(rows_of(batch), model, _draws(batch["t"], batch["u_mask"]))


def _spindle(model: ModelConfig, data: Batch) -> Iterator[Case]:
    """DiffusionBERT's losses, keys `T{steps}_lam{strength}/lossN/..`; a row without its padding."""
    with tempfile.TemporaryDirectory() as folder:
        counts = pathlib.Path(folder) / "counts.npy"
        np.save(counts, data["word_counts"])
        for name in sorted({key.rsplit("/", 1)[0] for key in data if "/loss" in key and key.endswith("/corrupted")}):
            group, loss = name.split("/")
            steps, strength = group.removeprefix("T").split("_lam")
            objective = Masked(
                maskable="all",
                schedule="spindle",
                counts=str(counts),
                strength=float(strength),
                diffusion_steps=int(steps),
                loss="diffusionbert",
                norm="batch",
            )
            tokens, recorded = data[f"{group}/tokens"], lambda key, name=name: data[f"{name}/{key}"]
            batch = {"tokens": tokens, "lengths": data[f"{group}/lengths"]}
            batch["prompt_lengths"] = np.zeros_like(batch["lengths"])
            t = np.full(len(tokens), (recorded("t") + 0.5) / int(steps), np.float32)
            inputs = objective.inputs(rows_of(batch, "lengths"), model, _draws(t, recorded("u_mask")))
            yield Case(
                f"{group} {loss}",
                objective,
                inputs,
                float(recorded("loss")) / len(tokens),
                float(recorded("grad_norm")),
                np.where(np.arange(tokens.shape[1]) < batch["lengths"][:, None], recorded("corrupted"), tokens),
            )


# By a key that only batches of the kind have: of such a batch (name of the loss, objective, inputs) for every loss.
KINDS = {
    "objective": _llada,
    "sft_original": _dream,
    "bernoulli": _diffullama,
    "parameterization": _mdlm,
    "block_index": _blockwise,
    "u_resample": _bd3,
    "samples": _sdar,
    "weighting": _dllm,
    "entropy": _sedd,
}
