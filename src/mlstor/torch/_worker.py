"""What belongs to one process: a DataLoader's workers are forked or spawned, and no engine lives through that."""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch.distributed
from torch.utils.data import get_worker_info

from mlstor.errors import UsageError
from mlstor.storage.store import open_store
from mlstor.stream import listing
from mlstor.stream.catalog import Catalog, Objects
from mlstor.stream.manifest import WithoutMarks

if TYPE_CHECKING:
    from mlstor.storage.store import Store

T = TypeVar("T")

#: Transfers under way in one process, as a directory's store takes them; half of them in a DataLoader's worker, of
#: which a node may have dozens.
IN_FLIGHT = 32
IN_FLIGHT_OF_WORKER = 16


def in_flight_here(asked: int | None) -> int:
    """Transfers under way in this process: `asked`, or the default of a training process or a DataLoader's worker."""
    if asked is not None:
        return asked
    return IN_FLIGHT if get_worker_info() is None else IN_FLIGHT_OF_WORKER


def placed(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process among how many: as given, or torch.distributed's if it has begun, or torchrun's, else 0 of 1.

    Raises
    ------
    UsageError
        If only one of both is given, or they don't fit.
    """
    if (rank is None) != (world_size is None):
        raise UsageError("give both, rank and world_size, or none of them")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:  # as torchrun sets them before a script calls init_process_group
            found = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
            rank, world_size = (int(found[0]), int(found[1])) if all(text.isdigit() for text in found) else (0, 1)
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} is not of a world of {world_size}; ranks are 0 to world_size - 1")
    return rank, world_size


class PerProcess(Generic[T]):
    """Something that each process makes for itself when it first needs it. Pickles to how it is made.

    Parameters
    ----------
    make : callable
        Has to be picklable. What it returns is used by one thread at a time, within ``with``.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        # By process id. A child keeps its parent's entry: to free what that holds is not the child's business.
        self._by_pid: dict[int, _Made[T]] = {}

    def __enter__(self) -> T:
        made = self._by_pid.setdefault(os.getpid(), _Made())
        made.lock.acquire()
        try:
            if not made.value:
                made.value.append(self._make())
        except BaseException:
            made.lock.release()
            raise
        return made.value[0]

    def __exit__(self, *_: object) -> None:
        self._by_pid[os.getpid()].lock.release()

    def __reduce__(self) -> Any:
        return type(self), (self._make,)


class _Made(Generic[T]):
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value: list[T] = []


class Place:
    """A store by its URL and options, or one that was opened already; other processes open it anew."""

    def __init__(self, source: str | os.PathLike[str] | Store, options: Mapping[str, Any] | None) -> None:
        self._source = os.fspath(source) if isinstance(source, os.PathLike) else source
        if not isinstance(self._source, str) and not hasattr(self._source, "transfers"):
            raise UsageError(f"a dataset's source is a path, a URL or a store, not {type(source).__name__}")
        if options and not isinstance(self._source, str):
            raise UsageError("options are for a URL: a store that was opened already has its own")
        self._options = dict(options or {})
        self._pid = os.getpid()

    def open(self) -> Store:
        """The store, in this process."""
        if isinstance(self._source, str):
            return open_store(self._source, **self._options)
        if os.getpid() != self._pid:  # forked: its connections and locks are the parent's
            again: Store = pickle.loads(pickle.dumps(self._source))
            return again
        return self._source

    def close(self, store: Store) -> None:
        """End what `open` began."""
        if store is not self._source:
            store.close()

    def __reduce__(self) -> Any:
        return type(self), (self._source, self._options)


def objects_of(
    owner: object, place: Place, catalog: Objects | str | os.PathLike[str] | None, prefix: str
) -> tuple[Objects, str]:
    """What there is, with sizes, and the store's URL. Workers get at it without a listing of their own.

    Without `catalog` the store is listed now, into a temporary file that lives as long as `owner`, so that workers can
    map it under every way of starting them.

    Raises
    ------
    UsageError
        If there is no object, or the URL or catalog is not understood.
    OSError
        If the store can't be listed.
    """
    store = place.open()
    try:
        if catalog is None:
            objects: Objects = _listed(owner, store, prefix)
        elif prefix:
            raise UsageError("prefix= is for a listing: a catalog holds the objects that it holds")
        else:
            objects = Catalog.open(catalog) if isinstance(catalog, str | os.PathLike) else catalog
        if not len(objects):
            raise UsageError(listing.nothing_there(store.url, prefix))
        if objects.total_bytes is None:
            if not isinstance(objects, Catalog):
                raise UsageError("a dataset needs the sizes of its objects: give them to the catalog")
            objects = listing.with_sizes(store, objects, _temporary(owner))
        return objects, store.url
    finally:
        place.close(store)


def _listed(owner: object, store: Store, prefix: str) -> Catalog:
    return Catalog.build(WithoutMarks(store).list(prefix), _temporary(owner))


def _temporary(owner: object) -> str:
    descriptor, path = tempfile.mkstemp(prefix="mlstor-", suffix=".catalog")
    os.close(descriptor)
    weakref.finalize(owner, _remove, path, os.getpid())
    return path


def _remove(path: str, pid: int) -> None:
    if os.getpid() == pid:  # a forked worker has a copy of the owner, not of the file
        with suppress(FileNotFoundError):  # a cleaner of temporary files was there first
            os.unlink(path)
