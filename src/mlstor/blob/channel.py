"""A store as blobs use it: transfers that callers take turns with, anew in each process."""

from __future__ import annotations

import os
import pickle
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlstor.blob.types import BlobInfo
from mlstor.storage.store import digest_of
from mlstor.storage.transfers import Digest

if TYPE_CHECKING:
    from mlstor.storage.store import Store
    from mlstor.storage.transfers import Transfers
    from mlstor.storage.uploads import Uploads

#: Transfers that are kept for the next caller: one that saves, and one that loads meanwhile.
_KEPT = 2


class _Pool:
    """What one process has open."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.lock = threading.Lock()
        self.idle: list[Transfers] = []


class Channel:
    """Any thread may lease transfers; what is idle is closed with the last blob that uses the channel.

    Parameters
    ----------
    store
        A child process opens it anew, by its URL and options.
    owns
        It is closed with the channel.
    """

    def __init__(self, store: Store, owns: bool) -> None:
        self._owns = owns
        self._pools = {os.getpid(): _Pool(store)}
        # At exit the engines close themselves, and perhaps before this would be called.
        weakref.finalize(self, _close, self._pools, owns).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Channel, (self.store, True)

    def _here(self) -> _Pool:
        """By process, so that no lock is used that another thread may have held when the process forked."""
        found = self._pools.get(os.getpid())
        if found is None:
            given = next(iter(self._pools.values())).store
            found = self._pools.setdefault(os.getpid(), _Pool(pickle.loads(pickle.dumps(given))))
        return found

    @property
    def store(self) -> Store:
        """That of this process."""
        return self._here().store

    def stat(self, key: str) -> BlobInfo:
        """Of a store without ETags, as AIStore, the checksum stands for it."""
        found = self.store.stat(key)
        return BlobInfo(found.nbytes, found.etag or "-".join(found.checksum or ()))

    @contextmanager
    def lease(self) -> Iterator[Transfers]:
        """Transfers for this caller alone. After an exception nothing of them is in flight."""
        pool = self._here()
        with pool.lock:
            transfers = pool.idle.pop() if pool.idle else None
        if transfers is None:
            transfers = pool.store.transfers()
        try:
            yield transfers
        except BaseException:  # what is under way must not come back to the next caller
            transfers.close()
            raise
        with pool.lock:
            keep = len(pool.idle) < _KEPT
            if keep:
                pool.idle.append(transfers)
        if not keep:
            transfers.close()

    def uploads(self) -> Uploads | None:
        """Who makes objects of parts; None where the store has none."""
        with self.lease() as transfers:
            found: Uploads | None = getattr(transfers, "uploads", None)
            return found

    def digest(self) -> Digest:
        """The checksum that the store takes with what is written."""
        return digest_of(self.store)


def _close(pools: dict[int, _Pool], owns: bool) -> None:
    mine = pools.pop(os.getpid(), None)
    if mine is None:
        return
    while mine.idle:
        mine.idle.pop().close()
    if owns or len(pools):  # in a child it was opened by the channel
        mine.store.close()
