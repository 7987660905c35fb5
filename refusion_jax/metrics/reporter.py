"""The numbers of a training run as it goes: read late, checked, written and shown."""

import contextlib
import math
import pathlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from refusion_jax.config import Config
from refusion_jax.errors import UserError
from refusion_jax.metrics import flops
from refusion_jax.metrics.writers import Metrics
from refusion_jax.progress import Progress


class Reporter:
    """Reads the metrics of a step when the next one has been dispatched: stops the run at NaN, writes, shows rates."""

    def __init__(self, config: Config, workdir: pathlib.Path, rates: np.ndarray, metrics: Metrics, progress: Progress):
        """`rates` are the learning rates of all steps of the run, [steps]."""
        self._config, self._workdir, self._rates, self._total = config, workdir, rates, len(rates)
        self._metrics, self._progress = metrics, progress
        self._chip = flops.CHIPS.get(jax.devices()[0].device_kind)
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self.restart()

    def restart(self) -> None:
        """Starts to count anew, leaving out the time of evaluations and checkpoints."""
        self._start, self._steps, self._tokens, self._flops, self._waited = time.perf_counter(), 0, 0.0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the body as spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def take(self, step: int, values: dict[str, jax.Array]) -> None:
        """Keeps the metrics of a step that has been dispatched, and reads those of the step before."""
        self.settle()
        self._pending = step, values

    def settle(self) -> None:
        """Reads the metrics that are kept: waits for their step.

        Raises:
          UserError: they are not finite.
        """
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        values = {name: float(x) for name, x in jax.device_get(values).items()}
        check_finite(step, values, self._workdir)
        self._steps += 1
        self._tokens += values["tokens"]
        self._flops += values.pop("flops")
        if step % self._config.log_every == 0 or step == self._total:
            record = {**values, "lr": float(self._rates[step - 1]), **self._speed()}
            self._metrics.write(step, "train", record)
            self._progress.show(step, shown(record), eta=(self._total - step) * record["step_seconds"])
            self.restart()

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Writes and shows an evaluation."""
        self._metrics.write(step, "evaluation", values)
        self._progress.say(f"step {step} evaluation: {', '.join(f'{name} {x:.4f}' for name, x in values.items())}")

    def _speed(self) -> dict[str, float]:
        """Useful tokens/s over all devices, seconds per step, shares of padding and waiting, MFU of a known chip."""
        elapsed = time.perf_counter() - self._start
        positions = self._steps * self._config.batch_size * self._config.data.max_length
        speed = {
            "tokens_per_second": self._tokens / elapsed,
            "step_seconds": elapsed / self._steps,
            "padding": 1 - self._tokens / positions,
            "input_wait": self._waited / elapsed,
        }
        if self._chip:
            speed["mfu"] = self._flops / elapsed / (self._chip.peak_flops * jax.device_count())
        return speed


def shown(record: dict[str, float]) -> dict[str, float | str]:
    """What of a step's record stands on the line of progress, under short names: the losses and the rates."""
    losses = {name: value for name, value in record.items() if name.endswith("_loss")}
    shares = {name.replace("_", " "): record[name] for name in ("mfu", "padding", "input_wait") if name in record}
    return {
        "loss": record["loss"],
        **{name.removesuffix("_loss"): value for name, value in losses.items()},
        "lr": record["lr"],
        "tok/s": record["tokens_per_second"],
        **{name: f"{value:.1%}" for name, value in shares.items()},
    }


def check_finite(step: int, values: dict[str, float], workdir: pathlib.Path) -> None:
    """Raises a UserError naming the step and the terms that are NaN or infinite."""
    terms_first = sorted(values.items(), key=lambda item: "loss" not in item[0])
    bad = [f"{name} is {value}" for name, value in terms_first if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"Step {step}: {', '.join(bad)}. The run stops and this state is not saved; the checkpoints in {workdir} "
            "are from before. Lower config.optimizer.lr, set config.objective.mdm_weight_cap, or look at the data of "
            "this step."
        )
