"""The training step: state, optimizer, and one jitted program over a mesh."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from refusion_jax import keys, lora
from refusion_jax.config import Config, OptimizerConfig
from refusion_jax.errors import UserError
from refusion_jax.metrics import flops
from refusion_jax.model.qwen3 import init_params, unstacked
from refusion_jax.objective.common import Inputs, PackedBatch, token_losses, with_first_positions
from refusion_jax.parallel import sharding


@struct.dataclass
class TrainState:
    """Everything a step changes, and the frozen base that it does not.

    Attributes:
      step: scalar int32, optimizer steps done.
      params: trainable parameters in float32: the model's, or the adapters'.
      opt_state: optax state.
      frozen: the base parameters under adapters; empty otherwise. Not part of a checkpoint.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    frozen: Any


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine to 0 at `steps` or constant."""
    start = 0.0 if config.warmup_steps else config.lr  # optax stays at its start when there is no warm-up
    if config.schedule == "constant":
        return optax.warmup_constant_schedule(start, config.lr, config.warmup_steps)
    return optax.warmup_cosine_decay_schedule(
        start, config.lr, config.warmup_steps, max(steps, config.warmup_steps + 1)
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by global norm; norm scales are not decayed."""

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            config.b1,
            config.b2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def compute_params(params: dict, dtype: str) -> dict:
    """Matrices in the compute dtype, all at once and before any gather over fsdp; norm scales stay float32."""

    def cast(path, leaf):
        return leaf if "norm" in jax.tree_util.keystr(path) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def model_variables(config: Config, params: dict, frozen: dict) -> dict:
    """What the model is applied to, in the compute dtype; `params` are trainable, `frozen` as in TrainState."""
    if config.lora.rank:
        variables = {"params": compute_params(frozen, config.model.dtype), "lora": lora.scaled(params, config.lora)}
    else:
        variables = {"params": compute_params(params, config.model.dtype)}
    if not config.model.scan_layers:
        variables = {name: unstacked(tree) for name, tree in variables.items()}
    return variables


def train_step(
    config: Config, optimizer: optax.GradientTransformation, state: TrainState, batch: PackedBatch
) -> tuple[TrainState, dict]:
    """One optimizer step of the config's objective.

    Corruption comes first, for the whole batch: it needs no parameters, and it gives the global denominators that make
    accumulation over microbatches exact.

    Returns:
      The next state and float32 scalars: loss; NAME_loss and NAME_tokens of every term; examples, tokens (useful ones),
      flops (operations needed), grad_norm (before clipping), param_norm (after the update).
    """
    inputs = config.objective.corrupt(keys.domain_key(config.seed, "corruption"), batch, config.model, state.step)
    inputs = with_first_positions(inputs, batch)

    def loss_fn(params: dict, inputs: Inputs) -> tuple[jax.Array, dict]:
        variables = model_variables(config, params, state.frozen)
        losses = token_losses(config.model, config.objective, variables, inputs)
        means = {
            name: term.numerator(losses.loss) / jnp.maximum(term.denominator, 1) for name, term in inputs.terms.items()
        }
        return _weighted(inputs, means), means

    def accumulate(total, micro):
        (_, means), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, micro)
        return jax.tree.map(jnp.add, total, (means, grads)), None

    zero = ({name: jnp.float32(0) for name in inputs.terms}, jax.tree.map(jnp.zeros_like, state.params))
    if config.accumulation == 1:
        (means, grads), _ = accumulate(zero, inputs)
    else:
        # Denominators stay global, so the microbatches' losses and gradients simply add up.
        micros = jax.tree.map(lambda x: _microbatches(x, config.accumulation), inputs)
        (means, grads), _ = jax.lax.scan(accumulate, zero, micros)

    lengths = batch.lengths.astype(jnp.float32)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": _weighted(inputs, means),
        **{f"{name}_loss": mean for name, mean in means.items()},
        **{f"{name}_tokens": jnp.sum(term.weights > 0, dtype=jnp.float32) for name, term in inputs.terms.items()},
        "examples": jnp.sum(batch.lengths > 0, dtype=jnp.float32),
        "tokens": jnp.sum(batch.lengths, dtype=jnp.float32),
        "flops": flops.train_flops(config.model, jax.tree.map(jnp.sum, config.objective.work(lengths))),
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(params),
    }
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def _weighted(inputs: Inputs, means: dict[str, jax.Array]) -> jax.Array:
    return sum(inputs.terms[name].scale * mean for name, mean in means.items())


def _microbatches(x: jax.Array, count: int) -> jax.Array:
    """[batch, ...] -> [count, batch / count, ...], every device giving an equal part of its rows to each microbatch.

    What is the same for all rows (a scalar, a first axis of 1) goes to each whole.
    """
    if x.ndim == 0 or x.shape[0] == 1:
        return jnp.broadcast_to(x, (count, *x.shape))
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)


def eval_step(config: Config, params: dict, frozen: dict, batch: PackedBatch) -> dict:
    """Sums over one batch, under corruption that is the same every time; what changes over steps is at its end.

    Returns:
      For every term numerator, denominator, weighted (the numerator times the term's scale), correct and tokens; over
      several batches they add up.
    """
    inputs = config.objective.corrupt(keys.domain_key(config.seed, "evaluation"), batch, config.model, math.inf)
    inputs = with_first_positions(inputs, batch)
    losses = token_losses(config.model, config.objective, model_variables(config, params, frozen), inputs)
    return {
        name: {
            "numerator": term.numerator(losses.loss),
            "denominator": term.denominator,
            "weighted": term.scale * term.numerator(losses.loss),
            "correct": jnp.sum(losses.correct & (term.weights > 0), dtype=jnp.float32),
            "tokens": jnp.sum(term.weights > 0, dtype=jnp.float32),
        }
        for name, term in inputs.terms.items()
    }


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted functions of a run on its mesh, with the sharding of everything they take.

    Attributes:
      init: key -> TrainState with random parameters (without adapters) or random adapters over an empty base.
      start: parameters -> TrainState at step 0; the parameters are donated.
      train: (state, batch) -> (state, metrics); the state is donated.
      evaluate: (params, frozen, batch) -> sums.
      abstract_state: TrainState of sharded jax.ShapeDtypeStructs.
      batch_sharding: of every array of a PackedBatch.
    """

    mesh: Mesh
    init: sharding.OnMesh
    start: sharding.OnMesh
    train: sharding.OnMesh
    evaluate: sharding.OnMesh
    abstract_state: TrainState
    batch_sharding: jax.sharding.NamedSharding


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises a UserError where a microbatch does not split over the devices."""
    rows, split = config.batch_size // config.accumulation, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % split:
        raise UserError(
            f"config.batch_size = {config.batch_size} with config.accumulation = {config.accumulation} makes "
            f"microbatches of {rows} rows, which do not split over "
            f"the mesh's data x fsdp = {split} devices. Choose a batch_size that is a multiple of "
            f"{split * config.accumulation}."
        )


def build(config: Config, mesh: Mesh, steps: int) -> Program:
    """The program of a run of `steps` optimizer steps.

    Raises:
      UserError: the mesh does not divide the model or the batch, or the model lacks the mask token that is needed.
    """
    if config.objective.needs_mask_token and config.model.mask_token_id is None:
        raise UserError(
            "config.model.mask_token_id is not set and the tokenizer names no mask token; the objective "
            f"{config.objective.kind!r} cannot be trained without one."
        )
    check_batch(config, mesh)
    optimizer = make_optimizer(config.optimizer, steps)
    base_shardings = sharding.param_shardings(config.model, mesh, sharding.TRAIN_RULES)
    if config.lora.rank:
        param_shardings = lora.shardings(config.model, config.lora, mesh)
        frozen_shardings = base_shardings
        base = jax.eval_shape(lambda key: nn.unbox(init_params(config.model, key)), jax.random.key(0))
        abstract_frozen = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, config.lora.base_dtype), base)
    else:
        param_shardings = base_shardings
        frozen_shardings = abstract_frozen = {}

    def start(params: dict) -> TrainState:
        return TrainState(jnp.int32(0), params, optimizer.init(params), {})

    def init(key: jax.Array) -> TrainState:
        if config.lora.rank:
            return start(lora.init(key, config.model, config.lora))
        return start(nn.unbox(init_params(config.model, key)))

    abstract = jax.eval_shape(init, jax.random.key(0))
    replicated = sharding.replicated(mesh)
    opt_shardings = optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, abstract.opt_state, param_shardings, transform_non_params=lambda _: replicated
    )
    shardings = TrainState(replicated, param_shardings, opt_shardings, {})
    with_base = shardings.replace(frozen=frozen_shardings)
    rows = sharding.batch_sharding(mesh)

    on_mesh = functools.partial(sharding.OnMesh, mesh, sharding.TRAIN_RULES)
    return Program(
        mesh=mesh,
        init=on_mesh(init, out_shardings=shardings),
        start=on_mesh(start, in_shardings=(param_shardings,), out_shardings=shardings, donate_argnums=0),
        train=on_mesh(
            lambda state, batch: train_step(config, optimizer, state, batch),
            in_shardings=(with_base, rows),
            out_shardings=(with_base, replicated),
            donate_argnums=0,
        ),
        evaluate=on_mesh(
            lambda params, frozen, batch: eval_step(config, params, frozen, batch),
            in_shardings=(param_shardings, frozen_shardings, rows),
            out_shardings=replicated,
        ),
        abstract_state=jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract.replace(frozen=abstract_frozen),
            with_base,
        ),
        batch_sharding=rows,
    )
