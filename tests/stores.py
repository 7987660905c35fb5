"""What is in a store of tokenised examples, all of it."""

import numpy as np


def sequences(store) -> list[list[int]]:
    """Token ids of every example."""
    found = []
    for block in range(store.num_blocks):
        ends = np.cumsum(store.examples(block)["length"])
        found += [ids.tolist() for ids in np.split(store.tokens(block), ends[:-1])]
    return found


def records(store) -> np.ndarray:
    """The records of all examples."""
    return np.concatenate([store.examples(block) for block in range(store.num_blocks)])


def contents(folder) -> dict[str, bytes]:
    """Every file under a folder, but notes of what was read when."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and not path.name.startswith(("content-", "checked"))
    }
