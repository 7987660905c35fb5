"""Files of lines, plain or compressed (.gz, .zst)."""

import contextlib
import gzip
import io
import mmap
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from refusion_jax import storage
from refusion_jax.errors import UserError

_FED = 4096  # bytes decompressed at a time, which become at most 2**15 times as many


def compressed(path: str) -> bool:
    return path.endswith((".gz", ".zst"))


@contextlib.contextmanager
def lines_of(path: str) -> Iterator[BinaryIO]:
    """Opens a file of lines.

    Raises:
      UserError: here or on reading: it is damaged, or a library for it is not installed.
    """
    try:
        with storage.open_binary(path) as file:
            if path.endswith(".zst"):
                yield io.BufferedReader(_Stream(_frames(file, path)), 1 << 20)
            elif path.endswith(".gz"):
                with gzip.open(file) as stream:
                    yield stream
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}. Fetch or write it again.") from error


def _frames(file: BinaryIO, path: str) -> Iterator[bytes]:
    """Yields the content of zstandard's frames; the library's own reader takes the end of half a frame for its end.

    Raises:
      EOFError: the file ends within a frame, or something else stands where one should begin.
      UserError: the library is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path} needs the zstandard library ({error}). Install it: pip install zstandard.") from error
    frame, fed = None, b""
    while fed := fed or file.read(_FED):
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            yield frame.decompress(fed)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        fed = frame.unused_data
        if frame.eof:
            frame = None
    if frame:
        raise EOFError("it ends within a zstandard frame")


class _Stream(io.RawIOBase):
    """What an iterator yields, as a file."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._left = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left and (piece := next(self._pieces, None)) is not None:
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def mapped(path: str):
    """All of a file that is not empty: plain on a disk it is mapped into memory, else read."""
    if compressed(path) or not storage.is_local(path):
        with lines_of(path) as file:
            return file.read()
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def lines_before(path: str, start: int) -> int:
    """Lines of a plain file that begin before the first one that begins at byte `start` or behind."""
    if not start:
        return 0
    with storage.open_binary(path) as file:
        file.seek(start - 1)
        last = file.readline()
        end = start - 1 + len(last)
        file.seek(0)
        return sum(1 for _ in iter(lambda: file.tell() < end and file.readline(), False))
