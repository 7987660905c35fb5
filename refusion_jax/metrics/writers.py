"""Where a run's numbers are kept: metrics.jsonl, and TensorBoard when it is installed."""

import contextlib
import json
import math
import pathlib
import time

from refusion_jax.errors import UserError


class Metrics:
    """Appends records to FOLDER/metrics.jsonl, one history also across restarts, and to TensorBoard."""

    def __init__(self, folder: pathlib.Path, step: int, enabled: bool = True):
        """Drops records past `step`, left by a run that was cut off after its last checkpoint.

        Raises:
          UserError: the folder cannot be written.
        """
        self._file = self._board = None
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = (
                [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
                if path.exists()
                else []
            )
            part = path.with_suffix(".part")
            part.write_text("".join(kept))
            part.replace(path)
            self._file = path.open("a")
        except OSError as error:
            raise UserError(
                f"Cannot write {path}: {error.strerror or error}. Choose a --workdir that can be written and has room."
            ) from None
        try:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        except ImportError:
            pass

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One record; `kind` is train or evaluation.

        Raises:
          UserError: the disk is full or gone.
        """
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"step": step, "kind": kind, "time": time.time(), **values}) + "\n")
            self._file.flush()
            for name, value in values.items() if self._board else ():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            raise UserError(
                f"Cannot write {self._file.name}: {error.strerror or error}. Make room, then start again with the "
                "same --workdir."
            ) from None

    def close(self) -> None:
        for stream in (self._file, self._board):
            if stream is not None:
                with contextlib.suppress(OSError):  # what could not be written was reported by `write`
                    stream.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # a line cut off by a kill
        return math.inf
