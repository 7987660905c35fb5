"""Where a run's numbers are kept: metrics.jsonl, and TensorBoard when it is installed."""

import concurrent.futures
import contextlib
import json
import math
import pathlib
import sys
import tempfile
import time

from refusion_jax import storage
from refusion_jax.errors import UserError

MIRROR_SECONDS = 30  # between two copies to a bucket


class Metrics:
    """Appends records to FOLDER/metrics.jsonl, one history also across restarts, and to TensorBoard.

    Nothing can be appended to a file in a bucket: there the files are written on this machine and copied now and then.
    """

    def __init__(self, folder: pathlib.Path, step: int, enabled: bool = True):
        """Drops records past `step`, left by a run that was cut off after its last checkpoint.

        Raises:
          UserError: the folder cannot be written.
        """
        self._file = self._board = self._mirror = None
        if not enabled:
            return
        if not storage.is_local(folder):
            self._mirror = Mirror(folder)
            folder = self._mirror.local
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
            if self._mirror:
                self._mirror.copy()
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
        if self._mirror:
            self._mirror.close()


class Mirror:
    """A folder on this machine that is copied to one in a bucket, in the background.

    Attributes:
      local: the folder here; it begins with the bucket's metrics.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder, self._last, self._copying = folder, time.monotonic(), None
        self._temporary = tempfile.TemporaryDirectory()
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self.local = pathlib.Path(self._temporary.name)
        with contextlib.suppress(FileNotFoundError):  # a new run
            (self.local / "metrics.jsonl").write_bytes(storage.read(folder / "metrics.jsonl"))

    def copy(self) -> None:
        """Begins to copy, unless that is too soon.

        Raises:
          UserError: the copy before has failed.
        """
        if self._copying and self._copying.done():
            self._copying.result()
            self._copying = None
        if not self._copying and time.monotonic() - self._last > MIRROR_SECONDS:
            self._last = time.monotonic()
            self._copying = self._pool.submit(storage.copy_folder, self.local, self._folder)

    def close(self) -> None:
        """Copies what is there now."""
        self._pool.shutdown()
        try:
            storage.copy_folder(self.local, self._folder)
        except UserError as error:
            print(f"the last metrics are lost: {error}", file=sys.stderr)
        self._temporary.cleanup()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # a line cut off by a kill
        return math.inf
