"""One listing for all ranks of a run: made once, or once per node, and opened by everyone."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlstor.errors import MlstorError, UsageError
from mlstor.storage.store import Page
from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Kind, Op, zeros
from mlstor.stream.catalog import Catalog, Objects
from mlstor.stream.failures import failed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mlstor.storage.store import Store
    from mlstor.storage.transfers import Transfers
    from mlstor.world import World

#: Objects that are asked for again to see whether a catalog and the store agree.
SAMPLES = 16
_STAT_BATCH = 1024
_PIECE_BYTES = 16 << 20  # of a catalog on its way to another host
#: Errors that are a user's to mend: said once and without a rank.
_USERS = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM)


class Listing(NamedTuple):
    """A catalog that all ranks of this host have open, and where it came from."""

    catalog: Catalog
    #: listed, list file or catalog
    source: str
    #: from the first request to the catalog, at the rank that made it, s
    seconds: float


def shared(
    store: Store,
    world: World,
    *,
    prefix: str = "",
    list_file: str | None = None,
    catalog: str | None = None,
    per_node: bool = False,
    directory: str | None = None,
    samples: int = SAMPLES,
) -> Listing:
    """The objects of `store`, listed once for all ranks; every rank calls this.

    One rank lists (or reads `list_file`, or opens `catalog`), looks up a few objects again to see whether store and
    catalog agree, and gives the catalog to the other hosts. The ranks of a host map one file, which is removed as soon
    as all have.

    Parameters
    ----------
    prefix
        Keys begin with it.
    list_file
        A text file as `Catalog.from_list_file` takes it. Sizes that it does not give stay unknown.
    catalog
        A file that `Catalog.build` made; it stays.
    per_node
        The store is another one on each host: each host lists for itself.
    directory
        For the catalog, by default the one for temporary files; needs 16 bytes and a name for each object.
    samples
        How many objects are looked up again.

    Raises
    ------
    UsageError
        If there is no object, the store refuses the listing, or the samples differ; on all ranks.
    OSError
        If the storage fails.
    """
    leader = world.host_of_rank.index(world.host_index) if per_node else 0
    mine: Listing | None = None
    kept = catalog is not None
    error: MlstorError | None = None
    if world.rank == leader:
        try:
            mine = _make(store, prefix, list_file, catalog, directory)
            check(store, mine.catalog, samples)
        except UsageError as found:
            error = found
        except OSError as found:
            if found.errno not in _USERS:
                raise
            error = UsageError(f"{found.filename or store.url}: {found.strerror}")
    try:
        world.agree(error, took_part=world.rank == leader)
        here = _everywhere(world, leader, mine, directory)
    finally:
        if mine is not None and not kept:
            os.unlink(mine.catalog.path)
    return here


def _make(store: Store, prefix: str, list_file: str | None, catalog: str | None, directory: str | None) -> Listing:
    start = time.monotonic()
    if catalog is not None:
        return Listing(Catalog.open(catalog), "catalog", time.monotonic() - start)
    path = _temporary(directory)
    try:
        if list_file is not None:
            made = Catalog.from_list_file(list_file, path)
        else:
            made = Catalog.build(store.list(prefix), path)
            if not len(made):
                raise UsageError(nothing_there(store.url, prefix))
    except BaseException:
        os.unlink(path)
        raise
    return Listing(made, "listed" if list_file is None else "list file", time.monotonic() - start)


def nothing_there(url: str, prefix: str) -> str:
    """What to say of an empty listing."""
    where = f"{url} has no objects" + (f" whose key begins with {prefix!r}" if prefix else "")
    return f"{where}: check the URL, or write some first with --put 100%"


def _temporary(directory: str | None) -> str:
    descriptor, path = tempfile.mkstemp(prefix="mlstor-", suffix=".catalog", dir=directory)
    os.close(descriptor)
    return path


def _everywhere(world: World, leader: int, mine: Listing | None, directory: str | None) -> Listing:
    """The leader's catalog at all ranks it is for: by its path on its host, by copies on others."""
    said = None if mine is None else [mine.catalog.path, mine.catalog.digest, mine.source, mine.seconds]
    path, digest, source, seconds = json.loads(world.allgather(json.dumps(said).encode())[leader])
    if mine is None and world.host_of_rank[leader] == world.host_index:
        mine = Listing(Catalog.open(path), source, seconds)
    if mine is None:
        found = _same(path, digest)
        mine = None if found is None else Listing(found, source, seconds)
    lacking = [json.loads(text) for text in world.allgather(json.dumps(mine is None).encode())]
    if any(lacking):
        copy = _copied(world, path if world.rank == 0 else None, mine is None, directory)
        paths = [json.loads(text) for text in world.allgather(json.dumps(copy).encode())]
        if mine is None:
            here = paths[world.host_of_rank.index(world.host_index)]
            mine = Listing(Catalog.open(here), source, seconds)
        world.barrier("catalog opened")
        if copy is not None:
            os.unlink(copy)
    else:
        world.barrier("catalog opened")
    if mine is None or mine.catalog.digest != digest:
        raise AssertionError("the catalog that arrived is not the one that was sent")
    return mine


def _same(path: str, digest: str) -> Catalog | None:
    """The catalog, if it is here too: on a file system that hosts share, or put on each by the user."""
    try:
        found = Catalog.open(path)
    except (OSError, UsageError):
        return None  # not here, or a stranger of that name: it will be copied
    return found if found.digest == digest else None


def _copied(world: World, path: str | None, lacking: bool, directory: str | None) -> str | None:
    """Rank 0 sends the file to all; the first rank of each host that lacks it writes it. Its path there, else None."""
    writes = lacking and world.local_rank == 0
    copy = _temporary(directory) if writes else None
    with ExitStack() as stack:
        out = None if copy is None else stack.enter_context(open(copy, "wb"))
        source = None if path is None else stack.enter_context(open(path, "rb"))
        while piece := world.bcast(b"" if source is None else source.read(_PIECE_BYTES)):
            if out is not None:
                out.write(piece)
    return copy


def sizes_of(transfers: Transfers, objects: Objects, indices: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What the store says of the sizes of some objects, bytes.

    Raises
    ------
    OSError
        If one can't be looked up; with its key.
    """
    packed = objects.pack(indices)
    asked = zeros(len(indices), TRANSFER_DTYPE)
    asked["tag"] = np.arange(len(indices))
    asked["key_start"] = packed.key_start
    asked["key_nbytes"] = packed.key_nbytes
    asked["op"] = Op.STAT
    asked["object_nbytes"] = WHOLE
    done = zeros(len(indices), COMPLETION_DTYPE)
    transfers.submit(asked, packed.names)
    count = 0
    while count < len(indices):
        count += transfers.reap(done[count:], len(indices) - count)
    bad = np.flatnonzero(done["kind"] != Kind.OK)
    if len(bad):
        first = done[bad[0]]
        raise failed(transfers, first, objects.name(int(indices[int(first["tag"])])))
    sizes = np.empty(len(indices), np.uint64)
    sizes[done["tag"].astype(np.intp)] = done["object_nbytes"]
    return sizes


def check(store: Store, catalog: Objects, samples: int = SAMPLES) -> None:
    """Look up `samples` objects, spread over the catalog, and compare their sizes.

    Raises
    ------
    UsageError
        If one is not there or has another size: the catalog is of other objects, or old.
    OSError
        If the store fails.
    """
    n = len(catalog)
    indices = np.unique(np.linspace(0, n - 1, min(samples, n)).astype(np.uint64)) if n else np.empty(0, np.uint64)
    if not len(indices):
        return
    transfers = store.transfers(workers=1, in_flight=len(indices))
    try:
        found = sizes_of(transfers, catalog, indices)
    except ValueError as error:
        raise UsageError(f"a name in the catalog can't be one in {store.url}: {error}") from error
    except FileNotFoundError as error:
        raise UsageError(
            f"{error.filename} is in the catalog and not in {store.url}: list again, or check the URL"
        ) from error
    finally:
        transfers.close()
    listed = catalog.pack(indices).sizes
    for index, was, now in zip(indices.tolist(), listed.tolist(), found.tolist(), strict=True):
        if was not in (WHOLE, now):
            raise UsageError(
                f"{catalog.name(index)!r} has {now} bytes in {store.url} and {was} in the catalog: list again"
            )


def with_sizes(store: Store, catalog: Catalog, path: str | os.PathLike[str]) -> Catalog:
    """The same objects in a new catalog at `path`, with the sizes that the store says.

    Raises
    ------
    OSError
        If an object can't be looked up; with its key.
    """

    def pages(transfers: Transfers) -> Iterator[Page]:
        for first in range(0, len(catalog), _STAT_BATCH):
            indices = np.arange(first, min(first + _STAT_BATCH, len(catalog)), dtype=np.uint64)
            sizes = sizes_of(transfers, catalog, indices)
            yield Page([catalog.name(index) for index in indices.tolist()], sizes.tolist())

    transfers = store.transfers()
    try:
        return Catalog.build(pages(transfers), path)
    finally:
        transfers.close()


def sized(store: Store, catalog: Catalog, directory: str | None = None) -> Catalog:
    """`with_sizes` for this process alone: the file is gone already."""
    path = _temporary(directory)
    try:
        return with_sizes(store, catalog, path)
    finally:
        os.unlink(path)


def private(store: Store, prefix: str = "", directory: str | None = None) -> Catalog:
    """A listing for this process alone, whose file is gone already.

    Raises
    ------
    UsageError
        If there is no object.
    OSError
        If the store fails.
    """
    catalog = _make(store, prefix, None, None, directory).catalog
    os.unlink(catalog.path)
    return catalog
