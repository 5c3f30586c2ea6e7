"""What a run has written, as it lies beside its objects: enough to read, verify and remove them without a listing.

A run writes below a directory of its own, ``<run id>/``, and nothing else; its manifest lies in it,
``.mlstor-stream.json``. A copy in ``.mlstor-stream.json`` says which run wrote last.
"""

from __future__ import annotations

import errno
import re
import secrets
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from mlstor.errors import UsageError
from mlstor.stream.sizes import Sizes, SizeSpec
from mlstor.stream.synthetic import Synthetic

if TYPE_CHECKING:
    from mlstor.storage.store import Page, Store

NAME = ".mlstor-stream.json"
FORMAT = "mlstor-stream/1"
LAST = "last"
MOST_OBJECTS = 16**12
_REMOVED_AT_ONCE = 1000


class Manifest(msgspec.Struct, kw_only=True):
    """What a run writes. `run_key`: 64 random bits in the stamps of its data. `begun`: its objects have numbers below;
    `whole`: the objects below that were all written. Both are of the last phase that ended; unless the run has `ended`,
    there may be more. `thinned`: a run that deletes has had some of them. `before`: the run that wrote last until then.
    """

    format: str = FORMAT
    run_id: str
    run_key: int
    seed: int
    sizes: SizeSpec
    dirs: int
    compressibility: int
    before: str | None = None
    ended: bool = True
    begun: int = 0
    whole: int = 0
    thinned: bool = False

    def objects(self, count: int = MOST_OBJECTS) -> Synthetic:
        """The first `count` objects, by default more than there will be."""
        directory = "{dir:05x}/" if self.dirs else ""
        template = f"{self.run_id}/{directory}{{index:012x}}"
        sizes = Sizes(self.sizes, self.seed)
        return Synthetic(template, count, sizes, dirs=self.dirs or 1, sizes_name=f"{self.sizes} {self.seed}")


def new_key() -> int:
    """A key for `Manifest.run_key`."""
    return secrets.randbits(64)


def is_mark(key: str) -> bool:
    """Whether it is a name of mlstor's own, which no run reads as an object."""
    return key.rpartition("/")[2].startswith(".mlstor-")


class WithoutMarks:
    """A store whose listing leaves out what mlstor itself has put beside the objects."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def list(self, prefix: str = "") -> Iterator[Page]:
        """See `Store.list`."""
        for page in self._store.list(prefix):
            if any(map(is_mark, page.keys)):
                kept = [one for one in zip(page.keys, page.sizes, strict=True) if not is_mark(one[0])]
                page = page._replace(keys=[key for key, _ in kept], sizes=[size for _, size in kept])
            yield page


def save(store: Store, manifest: Manifest) -> None:
    """Put the manifest where readers find it."""
    store.write(f"{manifest.run_id}/{NAME}", _encoded(manifest))
    store.write(NAME, _encoded(manifest))


def save_again(store: Store, manifest: Manifest) -> None:
    """Put a changed manifest in the place of its former self; which run has written last stays as it is."""
    latest = load(store, LAST)
    store.write(f"{manifest.run_id}/{NAME}", _encoded(manifest))
    if latest is not None and latest.run_id == manifest.run_id:
        store.write(NAME, _encoded(manifest))


def _encoded(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def load(store: Store, run_id: str) -> Manifest | None:
    """The manifest of a run, or with ``"last"`` of the one that wrote last; None if there is none.

    Raises
    ------
    UsageError
        If there is one that this version does not read.
    """
    key = NAME if run_id == LAST else f"{run_id}/{NAME}"
    try:
        data = store.read(key)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    assert isinstance(data, bytes)
    try:
        found = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise UsageError(f"{store.url}: {key} can't be read as a manifest of mlstor: {error}") from None
    if found.format != FORMAT or run_id not in (found.run_id, LAST):
        raise UsageError(f"{store.url}: {key} is not a manifest of run {run_id} in a format that this version reads")
    return found


def wanted(store: Store, run_id: str) -> Manifest:
    """The manifest of a run whose objects are to be read or removed.

    Raises
    ------
    UsageError
        If there is none.
    """
    found = load(store, run_id)
    if found is None:
        which = "no run of mlstor" if run_id == LAST else f"no run {run_id} of mlstor"
        raise UsageError(f"{which} has written to {store.url}: write with --put 100% first, or check URL and run id")
    return found


def remove_objects(store: Store, manifest: Manifest, rank: int = 0, size: int = 1) -> int:
    """Remove this rank's part of what a run has written; how many objects that were. The manifest stays.

    Of a run that did not end by itself, or whose objects were deleted in part, the store is asked what is there; only
    names that such a run makes are removed, and with them what its killed writes left in a directory, which is no
    object and not counted.
    """
    if not manifest.ended or manifest.thinned:
        own = re.compile(re.escape(manifest.run_id) + ("/[0-9a-f]{5}" if manifest.dirs else "") + "/[0-9a-f]{12}")
        count = 0
        for page in store.list(f"{manifest.run_id}/") if rank == 0 else ():
            keys = [key for key in page.keys if own.fullmatch(key)]
            store.delete(keys)
            count += len(keys)
        leftovers = getattr(store, "remove_leftovers", None)
        if rank == 0 and leftovers is not None:
            leftovers(manifest.run_id)
        return count
    objects = manifest.objects()
    count = 0
    for first in range(rank, manifest.begun, size * _REMOVED_AT_ONCE):
        end = min(manifest.begun, first + size * _REMOVED_AT_ONCE)
        names = bytes(objects.pack(np.arange(first, end, size, dtype=np.uint64)).names).decode()
        keys = [names[at : at + objects.key_nbytes] for at in range(0, len(names), objects.key_nbytes)]
        store.delete(keys)
        count += len(keys)
    return count


def remove_marks(store: Store, manifest: Manifest) -> None:
    """Remove the manifest, once the objects are gone. If no other run has written since, the one before is the last."""
    latest = load(store, LAST)
    store.delete([f"{manifest.run_id}/{NAME}"])
    if latest is not None and latest.run_id == manifest.run_id:
        before = None if manifest.before is None else load(store, manifest.before)
        if before is None:
            store.delete([NAME])
        else:
            store.write(NAME, _encoded(before))


def written(counts: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of all ranks' (begun, whole), counted among their own objects, the manifest's `begun` and `whole`.

    Object j of rank r has the number r + j * size.
    """
    size = len(counts)
    begun = max((rank + (own - 1) * size + 1 for rank, (own, _) in enumerate(counts) if own), default=0)
    whole = min(rank + own * size for rank, (_, own) in enumerate(counts))
    return begun, min(begun, whole)
