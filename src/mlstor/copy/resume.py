"""What need not be copied again: what the destination has, and what the journal of an interrupted copy proves.

The journal lies under the results directory, in ``.copy-<16 hex>``, which the source's and the destination's URLs
choose. Each process appends to two files of its own: ``<rank>.proven``, records of 40 bytes of objects that have
arrived and were verified, and ``<rank>.uploads``, lines of JSON of uploads that were begun. A copy that ends without
errors removes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlstor.stream.catalog import Catalog

if TYPE_CHECKING:
    from mlstor.storage.store import Store
    from mlstor.stream.catalog import Objects

#: BLAKE2b-128 of the key, its size in bytes, the checksum of what was read (0 if there was none), and which version of
#: the object that was, see `version_of`.
_RECORD = np.dtype([("key", "<u8"), ("more", "<u8"), ("nbytes", "<u8"), ("digest", "<u8"), ("version", "<u8")])
_CHUNK = 1 << 16


def already_there(objects: Objects, store: Store, prefix: str) -> Any:
    """Of each object whether `store` lists one of the same name and size; both sides in the order of their names.

    Raises
    ------
    OSError
        If the store can't be listed.
    """
    found = np.zeros(len(objects), bool)
    descriptor, path = tempfile.mkstemp(prefix="mlstor-", suffix=".catalog")
    os.close(descriptor)
    try:
        there = Catalog.build(store.list(prefix), path)
    finally:
        os.unlink(path)
    others = _walk(there)
    other = next(others, None)
    for index, (name, size) in enumerate(_walk(objects)):
        while other is not None and other[0] < name:
            other = next(others, None)
        if other is None:
            break
        found[index] = other == (name, size)
    return found


def _walk(objects: Objects) -> Iterator[tuple[bytes, int]]:
    for first in range(0, len(objects), _CHUNK):
        packed = objects.pack(np.arange(first, min(first + _CHUNK, len(objects)), dtype=np.uint64))
        starts, lengths = packed.key_start.tolist(), packed.key_nbytes.tolist()
        low = starts[0]
        names = bytes(packed.names[low : starts[-1] + lengths[-1]])
        for start, length, size in zip(starts, lengths, packed.sizes.tolist(), strict=True):
            yield names[start - low : start - low + length], size


class Proof(NamedTuple):
    """Of an object that has arrived: the checksum of what was read, and its version; 0 where there was none."""

    digest: int
    version: int


def version_of(etag: bytes) -> int:
    """A number for an entity tag or, of large objects whose store has none, a checksum; 0 for neither."""
    return int.from_bytes(hashlib.blake2b(etag, digest_size=8).digest(), "little") if etag else 0


class Proven:
    """The journal of a copy.

    Parameters
    ----------
    results_dir
        Where its directory lies.
    key
        What the copies that may go on with one another have in common.
    rank
        Of this process.

    Attributes
    ----------
    found : int
        Records of copies that were interrupted.
    begun_ns : int
        When this copy began, by this host's clock, ns since 1970: a file that changes later may not be what was read.
    """

    def __init__(self, results_dir: str, key: str, rank: int) -> None:
        self.directory = _directory(results_dir, key)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.begun_ns = time.time_ns()
        self._proven = self.directory / f"{rank}.proven"
        self._uploads = self.directory / f"{rank}.uploads"
        records = [_records(path) for path in sorted(self.directory.glob("*.proven"))]
        whole = np.concatenate([np.empty(0, _RECORD), *records])
        self._known = whole[np.argsort(whole["key"], kind="stable")]
        self.found = len(self._known)
        self._new: list[Any] = []
        # a record that a kill has cut off would put those behind it out of step
        with open(self._proven, "ab") as file:
            file.truncate(file.tell() // _RECORD.itemsize * _RECORD.itemsize)

    def unfinished(self) -> list[tuple[str, str]]:
        """Keys and ids of all uploads that were begun by earlier copies; most have ended. For one process."""
        begun = []
        for path in sorted(self.directory.glob("*.uploads")):
            for line in path.read_text().splitlines():
                try:
                    key, upload_id = json.loads(line)
                except ValueError:  # cut off by a kill: the upload had not begun to be used
                    continue
                begun.append((key, upload_id))
        return begun

    def forget_uploads(self) -> None:
        """They have been aborted."""
        for path in self.directory.glob("*.uploads"):
            path.unlink()

    def knows(self, keys: Sequence[str], sizes: Sequence[int]) -> list[Proof | None]:
        """Of each object what an interrupted copy knew when it had arrived; None if it had not."""
        if not self.found:
            return [None] * len(keys)
        asked = _hashes(keys)
        at = np.minimum(np.searchsorted(self._known["key"], asked[:, 0]), self.found - 1)
        near = self._known[at]
        same = (near["key"] == asked[:, 0]) & (near["more"] == asked[:, 1])
        same &= near["nbytes"] == np.array(sizes, np.uint64)
        columns = (same.tolist(), near["digest"].tolist(), near["version"].tolist())
        return [Proof(digest, version) if known else None for known, digest, version in zip(*columns, strict=True)]

    def add(self, keys: Sequence[str], sizes: Any, digests: Any, versions: Any) -> None:
        """These have arrived and were verified; written down by `save`."""
        made = np.empty(len(keys), _RECORD)
        hashes = _hashes(keys)
        made["key"], made["more"] = hashes[:, 0], hashes[:, 1]
        made["nbytes"], made["digest"], made["version"] = sizes, digests, versions
        self._new.append(made)

    def save(self) -> None:
        """Append what was added."""
        if self._new:
            new, self._new = np.concatenate(self._new), []
            with open(self._proven, "ab") as file:
                file.write(new.tobytes())

    def versions(self, scheme: str, etags: Sequence[bytes]) -> list[int]:
        """What is kept of the versions that were read: entity tags; of files, when this copy began."""
        return [self.begun_ns if scheme == "file" else version_of(etag) for etag in etags]

    def begun(self, key: str, upload_id: str) -> None:
        """An upload has begun."""
        with open(self._uploads, "a") as file:
            file.write(json.dumps([key, upload_id]) + "\n")

    def discard(self) -> None:
        """All is there: nothing is left to be resumed."""
        shutil.rmtree(self.directory, ignore_errors=True)


def forget(results_dir: str, key: str) -> None:
    """Remove the journal of interrupted copies, if there is one."""
    shutil.rmtree(_directory(results_dir, key), ignore_errors=True)


def _directory(results_dir: str, key: str) -> Path:
    return Path(results_dir, f".copy-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}")


def _records(path: Path) -> Any:
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) // _RECORD.itemsize * _RECORD.itemsize], _RECORD)


def _hashes(keys: Sequence[str]) -> Any:
    digests = [hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest() for key in keys]
    return np.frombuffer(b"".join(digests), "<u8").reshape(len(keys), 2)
