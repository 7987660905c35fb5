"""Where a conversion goes: a folder that appears when it is whole, in a bucket or on a disk; and lines of progress."""

import contextlib
import errno
import fcntl
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

from refusion_jax import storage
from refusion_jax.errors import UserError

Say = Callable[[str], None]
Arrays = dict[str, tuple[tuple[int, ...], np.dtype]]  # shape and dtype by path


def new_folder(destination: epath.Path, say: Say) -> contextlib.AbstractContextManager[epath.Path]:
    """A folder to fill, which is or becomes `destination`; nothing is left of it when the block ends with an error.

    On a disk it gets that name at the end. A bucket cannot rename: what makes a checkpoint complete is written last.

    Raises:
      UserError: the destination exists, another process is writing it, or it cannot be written (a full disk, say).
    """
    if destination.exists():
        raise UserError(f"{destination} exists already. Remove it, or choose another name for the result.")
    return _on_disk(pathlib.Path(destination), say) if storage.is_local(destination) else _in_bucket(destination)


@contextlib.contextmanager
def _in_bucket(destination: epath.Path) -> Iterator[epath.Path]:
    storage.check_writable(destination, "destination")
    try:
        yield destination
    except BaseException as error:
        with contextlib.suppress(Exception):
            destination.rmtree()
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, UserError):  # ValueError: tensorstore's
            raise UserError(
                f"{destination} could not be written: {str(error).splitlines()[0][:300]}. Nothing of it was kept. "
                "Check the network and the credentials, then start again."
            ) from error
        raise


@contextlib.contextmanager
def _on_disk(destination: pathlib.Path, say: Say) -> Iterator[epath.Path]:
    partial = destination.with_name(destination.name + ".incomplete")
    try:
        if partial.exists():
            with _locked(partial):
                say(f"removing {partial}: an earlier conversion did not finish")
                shutil.rmtree(partial)
        partial.mkdir(parents=True)
        with _locked(partial):
            yield epath.Path(partial)
            os.rename(partial, destination)
    except BlockingIOError:
        raise UserError(
            f"{partial} is being written by another process. Wait for it, or choose another name for the result."
        ) from None
    except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors that quote the system's
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        if getattr(error, "errno", None) in full or any(f"os_error_code='{code}'" in str(error) for code in full):
            raise UserError(
                f"The disk is full: {destination} could not be written ({free(destination)} free) and nothing of it "
                "was kept. Make room, or choose another place."
            ) from None
        if isinstance(error, OSError):
            raise UserError(
                f"{destination} could not be written: {error}. Choose a folder that can be written."
            ) from None
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds a lock that ends with the process, so that left-overs can be told from work in progress."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def size_text(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def free(folder: pathlib.Path) -> str:
    """Room on the disk of a folder, which need not be there yet."""
    while not folder.exists():
        folder = folder.parent
    return size_text(shutil.disk_usage(folder).free)


class Progress:
    """One line for each parameter: what, how large, how fast."""

    def __init__(self, say: Say, arrays: Arrays):
        self._say, self._arrays = say, arrays
        self._bytes = {path: math.prod(shape) * dtype.itemsize for path, (shape, dtype) in arrays.items()}
        self.total, self._done, self._start = sum(self._bytes.values()), 0, time.monotonic()
        values = sum(math.prod(shape) for shape, _ in arrays.values())
        say(f"{len(arrays)} parameters, {values:,} values, {size_text(self.total)}")

    def line(self, path: str, note: str = "") -> None:
        shape, dtype = self._arrays[path]
        size = size_text(self._bytes[path])
        self._say(f"  {path:34} {'x'.join(map(str, shape)):>22} {dtype.name:9} {size:>10}{note}")

    def finished(self, path: str) -> None:
        self._done += self._bytes[path]
        seconds = time.monotonic() - self._start
        self.line(path, f"  {self._done / self.total:4.0%}  {seconds:6.1f} s")
