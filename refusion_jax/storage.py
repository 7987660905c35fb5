"""Files wherever they lie: in folders of this machine, or in buckets (`gs://`, `s3://`) through etils.epath and fsspec.

Credentials come from the environment, as the storage's own client finds them, and are never printed.
"""

import contextlib
import io
import os
import pathlib
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

import fsspec
from etils import epath

from refusion_jax.errors import UserError

ATTEMPTS = 6  # of a read or write in a bucket, with pauses between them of 0.5, 1, 2, 4 and 8 seconds
FIRST_PAUSE = 0.5
_AT_ONCE = 8 * 2**20  # bytes fetched by a reader that goes through a file
Result = TypeVar("Result")
for _kind in ("gs", "gcs", "s3"):  # other machines write there too: what a folder holds is asked for every time
    fsspec.config.conf.setdefault(_kind, {})["use_listings_cache"] = False


def is_local(path: str | os.PathLike) -> bool:
    """Whether a path names a file of this machine's file systems, not the address of something else."""
    return "://" not in str(path)


def as_path(path: str | os.PathLike) -> epath.Path:
    """A path in a folder of this machine ("~" is the home) or in a bucket."""
    return epath.Path(os.path.expanduser(path)) if is_local(path) else epath.Path(path)


def absolute(path: str | os.PathLike) -> epath.Path:
    """A path that does not depend on the working directory."""
    return epath.Path(os.path.abspath(path)) if is_local(path) else epath.Path(path)


def read(path: epath.Path, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes start..stop of a file; to its end by default.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is in a bucket that does not answer, or in none of ours.
    """
    if is_local(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)
    system, name = _file_system(path)
    first = None if stop is None and not start else start  # an empty file has no range
    return patiently(lambda: system.cat_file(name, start=first, end=stop), f"Cannot read {path}")


class _Ranges(io.RawIOBase):
    """A file in a bucket, of which what is asked for is fetched."""

    def __init__(self, path: str | os.PathLike):
        self._path, self._size, self._at = path, *sizes([path]), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def readinto(self, buffer) -> int:
        content = self._read(self._at + len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        return self._read(self._size)

    def _read(self, stop: int) -> bytes:
        stop = min(stop, self._size)
        content = read(self._path, self._at, stop) if self._at < stop else b""
        self._at += len(content)
        return content


def open_binary(path: str | os.PathLike) -> BinaryIO:
    """Opens a file to read; one in a bucket is fetched in ranges, each of them as patiently as by `read`."""
    return open(path, "rb") if is_local(path) else io.BufferedReader(_Ranges(path), _AT_ONCE)


def stat(path: str | os.PathLike) -> tuple[int, int]:
    """(bytes, time of the last change in nanoseconds) of a file.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: as `read`.
    """
    if is_local(path):
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    system, name = _file_system(path)
    what = f"Cannot read {path}"
    changed = patiently(lambda: system.modified(name), what).timestamp()
    return patiently(lambda: system.info(name), what)["size"], int(changed * 1e9)


def sizes(paths: list[str]) -> list[int]:
    """Bytes of each file; all are of this machine, or all in buckets of one kind."""
    if all(map(is_local, paths)):
        return list(map(os.path.getsize, paths))
    system, _ = _file_system(paths[0])
    return patiently(lambda: system.sizes(paths), f"Cannot read {paths[0]}")


def find(address: str, suffixes: tuple[str, ...]) -> list[str]:
    """Files in buckets: the one of this address, those of this folder whose names end so, or those a glob matches."""
    system, name = _file_system(address)
    what = f"Cannot look into {address}"
    try:
        if patiently(lambda: system.info(name), what)["type"] == "file":
            return [address]
        found = [n for n in patiently(lambda: system.ls(name, detail=False), what) if n.endswith(suffixes)]
    except FileNotFoundError:
        matching = patiently(lambda: system.glob(name, detail=True), what)
        found = [n for n, described in matching.items() if described["type"] == "file"]
    return [system.unstrip_protocol(n) for n in sorted(found)]


def write(path: epath.Path, content: bytes) -> None:
    """Writes a file that nobody ever sees half written.

    Raises:
      OSError: the disk is full, or the folder cannot be written.
      UserError: it is in a bucket that does not answer, or in none of ours.
    """
    if not is_local(path):
        system, name = _file_system(path)
        patiently(lambda: system.pipe_file(name, content), f"Cannot write {path}")  # objects appear whole
        return
    with replacing(path) as part, open(part, "wb") as file:
        file.write(content)


def check_writable(folder: epath.Path, setting: str) -> None:
    """Makes a folder, and sees whether files can be written there.

    Raises:
      UserError: they cannot, naming the setting that says where.
    """
    probe = folder / f".writable-{uuid.uuid4().hex}"
    try:
        if is_local(folder):  # in a bucket files need no folder, and clients would make a bucket that is not there
            folder.mkdir(parents=True, exist_ok=True)
        write(probe, b"")
        probe.unlink()
    except UserError as error:
        raise UserError(f"{setting} is {folder}: {error}") from error
    except Exception as error:  # OSError, or what the bucket's client raises
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(
            f"Cannot write to {folder}: {reason}. Choose a {setting} that is there, can be written and has room."
        ) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike):
    """Gives the name of a local file to be written, which then takes the place of `path` unless an error is raised."""
    part = f"{path}.{uuid.uuid4().hex}.part"
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # the move to its place must not reach the disk before the content
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


def upload(part: str, path: epath.Path) -> None:
    """Copies a local file to its place in a bucket, where it appears whole."""
    system, name = _file_system(path)
    patiently(lambda: system.put_file(part, name), f"Cannot write {path}")


@contextlib.contextmanager
def filling(folder: epath.Path) -> Iterator[pathlib.Path]:
    """Gives a local folder to fill: `folder` itself, or one whose files are then put into the bucket."""
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield pathlib.Path(scratch)
        for path in sorted(path for path in pathlib.Path(scratch).rglob("*") if path.is_file()):
            upload(str(path), folder / str(path.relative_to(scratch)))


def folder_bytes(folder: str | os.PathLike) -> int:
    """Size of all files under a folder."""
    paths = list(as_path(folder).iterdir())
    return sum(folder_bytes(path) if path.is_dir() else path.stat().length for path in paths)


def copy_folder(source: str | os.PathLike, destination: epath.Path, suffixes: tuple[str, ...] = ("",)) -> None:
    """Copies the files of a folder whose names end so, which are few and small, from or to a bucket."""
    source, destination = as_path(source), as_path(destination)
    for path in source.iterdir():
        if path.is_dir():
            copy_folder(path, destination / path.name, suffixes)
        elif path.name.endswith(suffixes):
            destination.mkdir(parents=True, exist_ok=True)
            write(destination / path.name, read(path))


def patiently(action: Callable[[], Result], what: str) -> Result:
    """The result of `action`, tried again with growing pauses while the storage fails.

    Raises:
      FileNotFoundError: at once.
      UserError: no permission, at once; or it has failed `ATTEMPTS` times.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:  # each storage's client has its own kinds
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
            if _refused(error) or attempt == ATTEMPTS - 1:
                raise UserError(
                    f"{what}: {reason} ({attempt + 1} attempts). Check that the bucket is there, that the "
                    "environment's credentials may use it, and the network; then start again."
                ) from error
            if attempt:
                print(f"{what}: {reason}; trying again", file=sys.stderr)
            time.sleep(FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1))  # not all hosts at the same time
    raise AssertionError


def _refused(error: Exception) -> bool:
    """Whether it is no use to ask again."""
    return isinstance(error, PermissionError) or str(getattr(error, "code", "")) in ("400", "401", "403")


def _file_system(path: epath.Path):
    """(fsspec's file system, the name in it) of an address.

    Raises:
      UserError: the library for this kind of address is not installed, or does not find credentials.
    """
    try:
        return fsspec.core.url_to_fs(str(path))
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{path} cannot be used: {error}. gs:// addresses need pip install 'refusion_jax[gcs]', s3:// ones "
            "'refusion_jax[s3]'."
        ) from error
    except Exception as error:
        raise UserError(
            f"{path} cannot be used: {type(error).__name__}: {error}. Give the environment credentials for it."
        ) from error
