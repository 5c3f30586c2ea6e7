"""What the tests of arrays of files share: transfers from a few words, all completions, files with known contents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from engine_support import noise

from mlstor._io import ObjectFiles, Pattern
from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Op

# Nothing, less than a block, blocks, not a multiple, and more than the small engine's block of 64 KiB.
SIZES = (0, 1, 511, 4096, 65536, 4096 * 9 + 17, 65537, 300_001)


def asking(keys: Sequence[str | bytes], op: Op = Op.READ, **fields: Any) -> tuple[np.ndarray, bytes]:
    """Transfers of these keys, tagged 0, 1, ..., and their names; `fields` are values or sequences of them."""
    names = [os.fsencode(key) for key in keys]
    asked = np.zeros(len(names), TRANSFER_DTYPE)
    asked["tag"] = np.arange(len(names))
    asked["op"] = op
    asked["key_nbytes"] = [len(name) for name in names]
    asked["key_start"] = np.cumsum([0, *map(len, names)])[:-1]
    asked["object_nbytes"] = WHOLE
    asked["nbytes"] = WHOLE if op == Op.READ else 0
    for name, value in fields.items():
        asked[name] = value
    return asked, b"".join(names)


def reaped(files: ObjectFiles, timeout_s: float = 60) -> np.ndarray:
    """All that is outstanding, by tag."""
    done = np.zeros(files.outstanding, COMPLETION_DTYPE)
    count = files.reap(done, min_done=len(done), timeout_s=timeout_s)
    assert count == len(done), f"{len(done) - count} of {len(done)} are still under way after {timeout_s} s"
    return np.sort(done, order="tag")


def run(
    files: ObjectFiles, keys: Sequence[str | bytes], op: Op = Op.READ, buffer: Any = None,
    pattern: Pattern | None = None, **fields: Any,
) -> np.ndarray:  # fmt: skip
    asked, names = asking(keys, op, **fields)
    assert files.submit(asked, names, buffer, pattern) == len(keys)
    return reaped(files)


def placed(sizes: Sequence[int], align_bytes: int = 4096, shift: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """Where objects of these sizes may lie in a buffer, what room each has, and how large the buffer is."""
    room = np.array([(size + align_bytes) // align_bytes * align_bytes for size in sizes], np.uint64)
    place = np.cumsum([shift, *room[:-1]]).astype(np.uint64)
    return place, room, int(room.sum()) + shift


def make(directory: Path, sizes: Sequence[int] = SIZES) -> tuple[list[str], list[bytes]]:
    """Files of noise of these sizes."""
    contents = [noise(size, seed=i + 1) for i, size in enumerate(sizes)]
    keys = [f"{i}-{size}.bin" for i, size in enumerate(sizes)]
    for key, content in zip(keys, contents, strict=True):
        (directory / key).write_bytes(content)
    os.sync()
    return keys, contents
