"""What was learned by reading files, kept so that later starts need not read them again unless one of them changes."""

import contextlib
import fcntl
import json
import os
import pathlib
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from refusion_jax import storage


def take(files: Sequence[str | os.PathLike]) -> list[list]:
    """Name, size and time of change of each file; to be taken before the files are read.

    Raises:
      OSError: a file is missing.
    """
    return [[os.path.basename(path), *storage.stat(path)] for path in files]


def remember(note: pathlib.Path, stamps: list[list], value: Any) -> None:
    """Writes down what was learned from files with these stamps; nothing where `note` cannot be written."""
    part = note.with_name(f"{note.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        part.write_text(json.dumps({"files": stamps, "value": value}))
        part.replace(note)


def recall(note: pathlib.Path, files: Sequence[str | os.PathLike]) -> Any:
    """What was written down about these files; None if nothing was, or if one has changed since.

    A file as young as the note counts as changed: within one tick of the clock it could have been written again.
    """
    try:
        written, now = json.loads(note.read_text()), take(files)
        young = any(changed >= os.stat(note).st_mtime_ns for _, _, changed in now)
        return None if young or written["files"] != now else written["value"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[bool]:
    """Holds a lock file, which the system releases if the process dies; gives False on a file system without locks."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
