"""`ObjectIterableDataset`: an `ObjectStream` per DataLoader worker, dealt over ranks and workers."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from mlstor.errors import UsageError
from mlstor.stream.objects import ObjectStream
from mlstor.stream.order import Share
from mlstor.torch._worker import Place, in_flight_here, objects_of, placed
from mlstor.torch.dataset import Sample, transformed

if TYPE_CHECKING:
    from mlstor.storage.store import Store
    from mlstor.stream.catalog import Objects
    from mlstor.stream.order import Uneven


class ObjectIterableDataset(IterableDataset[Any]):
    """Objects in a random order of each epoch's own, every one once over all ranks and their workers, read ahead.

    Each worker of each rank has its share and reads ahead of it in bounded memory. An iteration is one epoch: call
    `set_epoch` before each, as the workers begin with it. Under torchdata's ``StatefulDataLoader`` a restart goes on
    exactly with the same number of ranks and workers; `ObjectDataset` with `EpochSampler` also goes on with another
    number of ranks.

    Parameters
    ----------
    source, transform, catalog, prefix, options, in_flight
        As of `ObjectDataset`.
    seed : int
        Of the orders, 64 bits. 0 by default.
    rank, world_size, uneven
        As of `EpochSampler`. `uneven` is over all workers of all ranks.
    shuffle : bool
        False: in the order of the names' bytes.
    in_flight_bytes : int
        Bytes of objects that are read ahead in all workers of this rank together, at most. 256 MiB by default.

    Attributes
    ----------
    objects : Catalog or Synthetic
        Names and sizes.
    url : str

    Raises
    ------
    UsageError
        If there are no objects, or the URL or an option is not understood.
    OSError
        As of `ObjectDataset`.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Store,
        transform: Callable[[Sample], Any] | None = None,
        *,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = "exact",
        shuffle: bool = True,
        catalog: Objects | str | os.PathLike[str] | None = None,
        prefix: str = "",
        options: Mapping[str, Any] | None = None,
        in_flight: int | None = None,
        in_flight_bytes: int = 256 << 20,
    ) -> None:
        if in_flight_bytes < 1 or (in_flight is not None and in_flight < 1):
            raise UsageError(f"in_flight={in_flight} and in_flight_bytes={in_flight_bytes} have to be above zero")
        self._rank, self._world_size = placed(rank, world_size)
        self._place = Place(source, options)
        self.transform = transform
        self.objects, self.url = objects_of(self, self._place, catalog, prefix)
        Share(len(self.objects), self._rank, self._world_size, uneven)  # says what is wrong with these
        self._uneven: Uneven = uneven
        self._seed, self._shuffle = seed, shuffle
        self._in_flight, self._in_flight_bytes = in_flight, in_flight_bytes
        # in shared memory: persistent workers have copies of this object, which set_epoch would not reach
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # torch has no types for it

    @property
    def epoch(self) -> int:
        """Of iterations that begin now."""
        return int(self._epoch.item())

    def set_epoch(self, epoch: int) -> None:
        """Iterations that begin from now on are of this epoch, in persistent workers too."""
        if epoch < 0:
            raise UsageError(f"epoch {epoch}: epochs count from 0")
        self._epoch.fill_(epoch)

    def __iter__(self) -> _Epoch:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return _Epoch(self, self._rank * workers + number, self._world_size * workers)


class _Epoch(Iterator[Any]):
    """One epoch of one worker's share."""

    def __init__(self, dataset: ObjectIterableDataset, share: int, shares: int) -> None:
        self._share = [share, shares]
        self._transform = dataset.transform
        workers = shares // dataset._world_size
        store = dataset._place.open()
        self._stream = ObjectStream(
            store,
            seed=dataset._seed,
            rank=share,
            world_size=shares,
            catalog=dataset.objects,
            uneven=dataset._uneven,
            order="permutation" if dataset._shuffle else "sequential",
            in_flight_bytes=max(dataset._in_flight_bytes // workers, 1),
            workers=0 if get_worker_info() is None else 1,
            in_flight=in_flight_here(dataset._in_flight),
        )
        # also of one that is left early: files, connections and threads are not to wait for the garbage collection
        self._close = weakref.finalize(self, _end, os.getpid(), self._stream, dataset._place, store)
        self._close.atexit = False
        self._stream.load_state_dict({**self._stream.state_dict(), "epoch": dataset.epoch})

    def __next__(self) -> Any:
        if not self._close.alive:
            raise StopIteration
        try:
            found = next(self._stream)
        except StopIteration:
            self._close()
            raise
        sample = Sample(found.key, found.data, found.index)
        return sample if self._transform is None else transformed(self._transform, sample, found.key)

    def state_dict(self) -> dict[str, Any]:
        """Where this worker is, for `StatefulDataLoader`."""
        return {"share": list(self._share), "stream": self._stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises
        ------
        UsageError
            If it was saved by another worker, with another number of ranks or workers, or of other objects.
        """
        if list(state["share"]) != self._share:
            (was, of), (here, count) = state["share"], self._share
            raise UsageError(
                f"the saved state is of share {was} of {of} (ranks x workers), this worker has {here} of {count}: go "
                "on with as many ranks and workers, or use ObjectDataset with EpochSampler, which takes any ranks"
            )
        self._stream.load_state_dict(state["stream"])


def _end(pid: int, stream: ObjectStream, place: Place, store: Store) -> None:
    if os.getpid() == pid:  # what a forked child has of it is the parent's
        stream.close()
        place.close(store)
