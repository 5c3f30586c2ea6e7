"""`ObjectStream`: objects of a directory, S3 or AIStore in an order shared by all ranks, in the caller's memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from mlstor.errors import UsageError
from mlstor.storage.store import open_store
from mlstor.stream import listing
from mlstor.stream.catalog import Catalog, Objects
from mlstor.stream.order import Order, Share
from mlstor.stream.prefetch import Prefetch, Upcoming
from mlstor.stream.state import State

if TYPE_CHECKING:
    from typing_extensions import Self

    from mlstor.storage.store import Store
    from mlstor.storage.transfers import Transfers
    from mlstor.stream.order import Kind, Uneven

_CHUNK = 1024  # positions that are computed at once


class StreamedObject(NamedTuple):
    """An object of a stream."""

    #: relative to the stream's URL
    key: str
    #: its bytes, writable; numpy.frombuffer and torch.frombuffer take them without a copy. The memory goes back to the
    #: stream when the last reference to it is gone. Small objects share a buffer of up to 4 MiB, which lives as long as
    #: any of them: copy what is to be kept for long.
    data: memoryview
    nbytes: int
    #: in the catalog; the same object in every epoch
    index: int  # type: ignore[assignment]  # a tuple's own index() is of no use here
    epoch: int


class ObjectStream:
    """Every object once per epoch, in a random order that all ranks share and that no memory is needed for.

    Objects are read ahead in native threads, up to `in_flight_bytes` of them: a consumer that stalls stops the
    transfers. Iterating goes through `epochs` epochs; iterating again goes on with the next ones.

    Parameters
    ----------
    source : str or Store
        A directory, ``s3://BUCKET/PREFIX`` or ``ais://BUCKET/PREFIX``; or a store that was opened already, which the
        stream then does not close.
    seed : int
        Of the order. Each epoch has an order of its own.
    rank, world_size : int
        This process takes positions rank, rank + world_size, ... of each epoch.
    catalog : Catalog, Synthetic, str or path, optional
        What there is, or the file of a catalog. Without it the store is listed when the first object is asked for, by
        each rank for itself; with more than one rank a warning says so.
    prefix : str
        Without a catalog: only keys that begin with it.
    uneven : {"exact", "drop", "pad"}
        What becomes of the objects that can't be dealt evenly; see `mlstor.stream.order.Share`.
    epochs : int or None
        Epochs of one iteration; None goes on for ever.
    order : {"permutation", "sequential", "replacement"}
    ordered : bool
        Objects come in the order of the permutation. False: as they arrive; the position in `state_dict` is then that
        up to which all were delivered, and what was delivered beyond it comes again after loading it, and after an
        object that could not be read.
    in_flight_bytes : int
        Bytes of objects under way or waiting for the consumer, at most; one object is read whatever its size. 256 MiB
        by default. What the consumer holds is not counted.
    workers, in_flight : int
        Threads, 0 for the store's choice, and transfers under way in each.
    options
        Of the store, by keyword, as `mlstor.storage.store.open_store` takes them.

    Raises
    ------
    UsageError
        If an option or the URL is not understood. When the first object is asked for also if there are none.

    Examples
    --------
    >>> stream = ObjectStream("/mnt/nvme/train", seed=7, rank=0, world_size=2)  # doctest: +SKIP
    >>> for obj in stream:  # doctest: +SKIP
    ...     samples = numpy.frombuffer(obj.data, numpy.uint16)
    """

    def __init__(
        self,
        source: str | Store,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        catalog: Objects | str | os.PathLike[str] | None = None,
        prefix: str = "",
        uneven: Uneven = "exact",
        epochs: int | None = 1,
        order: Kind = "permutation",
        ordered: bool = True,
        in_flight_bytes: int = 256 << 20,
        workers: int = 0,
        in_flight: int = 8,
        **options: Any,
    ) -> None:
        if in_flight_bytes < 1 or (epochs is not None and epochs < 1):
            raise UsageError(f"in_flight_bytes={in_flight_bytes} and epochs={epochs} have to be above zero")
        Share(world_size, rank, world_size, uneven)  # says what is wrong with these, before anything is listed
        Order(1, seed, order)
        if isinstance(source, str):
            self._url: str | None = source
            self._store: Store | None = None
        else:
            self._url, self._store = None, source
        self._source = source
        self._arguments = {
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "catalog": catalog,
            "prefix": prefix,
            "uneven": uneven,
            "epochs": epochs,
            "order": order,
            "ordered": ordered,
            "in_flight_bytes": in_flight_bytes,
            "workers": workers,
            "in_flight": in_flight,
            **options,
        }
        self._options = options
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._uneven, self._kind, self._ordered = uneven, order, ordered
        self._epochs, self._prefix = epochs, prefix
        self._given = catalog
        self._objects: Objects | None = None
        self._share: Share | None = None
        self._order: Order | None = None
        self._transfers: Transfers | None = None
        self._prefetch: Prefetch | None = None
        self._pid = os.getpid()
        self._closed = False
        #: delivered without a gap: epoch, the position from which the share was dealt, how many of it
        self._at = (0, 0, 0)
        #: what is submitted next, in the same terms
        self._ahead = (0, 0, 0)
        self._upcoming: Upcoming | None = None
        self._stop = epochs  # the epoch before which the iteration ends

    # -- what there is --

    @property
    def objects(self) -> Objects:
        """The catalog; listed now, if that has not been done.

        Raises
        ------
        UsageError
            If there are no objects.
        OSError
            If the store can't be listed.
        """
        if self._objects is None:
            self._objects = self._catalog()
            if not len(self._objects):
                raise UsageError(listing.nothing_there(self.store.url, self._prefix))
            self._share = Share(len(self._objects), self._rank, self._world_size, self._uneven)
            self._order = Order(len(self._objects), self._seed, self._kind, self._share.client)
        return self._objects

    def _catalog(self) -> Objects:
        if isinstance(self._given, str | os.PathLike):
            objects: Objects = Catalog.open(self._given)
        elif self._given is not None:
            objects = self._given
        else:
            if self._world_size > 1:
                warnings.warn(
                    f"each of {self._world_size} ranks lists {self.store.url} for itself: build a catalog once and "
                    "give it as catalog=",
                    stacklevel=4,
                )
            from mlstor.stream.manifest import WithoutMarks

            store: Any = WithoutMarks(self.store)
            objects = listing.private(store, self._prefix)
        if objects.total_bytes is None:
            objects = self._with_sizes(objects)
        return objects

    def _with_sizes(self, objects: Objects) -> Objects:
        if not isinstance(objects, Catalog):
            raise UsageError("a stream needs the sizes of its objects: give them to the catalog")
        return listing.sized(self.store, objects)

    @property
    def store(self) -> Store:
        """Where the objects are; opened now, if that has not been done."""
        if self._store is None:
            if self._url is None:
                raise AssertionError("a stream has a URL or a store")
            self._store = open_store(self._url, **self._options)
        return self._store

    def __len__(self) -> int:
        """Objects of this rank in an epoch."""
        return len(self._shared()[0].positions())

    def _shared(self) -> tuple[Share, Order]:
        if self._share is None or self._order is None:
            self.objects  # noqa: B018 - makes both
        if self._share is None or self._order is None:
            raise AssertionError("the catalog makes share and order")
        return self._share, self._order

    # -- iterating --

    def __iter__(self) -> Self:
        """Goes on where it is; after the last of `epochs` epochs, with the next ones."""
        if self._stop is not None and self._epochs is not None and self._over():
            self._stop += self._epochs
        return self

    def _over(self) -> bool:
        """Whether all epochs of this iteration have been delivered."""
        epoch, base, done = self._at
        if self._stop is None or epoch < self._stop - 1:
            return False
        return epoch >= self._stop or done == len(self._shared()[0].positions(base))

    def __next__(self) -> StreamedObject:
        """The next object.

        Raises
        ------
        StopIteration
            At the end of the last epoch.
        OSError
            If an object can't be read, with errno and its key or URL. All before it were delivered; the next call tries
            it again.
        RuntimeError
            In a child that was forked after the first object: give each process a stream of its own.
        """
        try:
            prefetch = self._ready()
            while True:
                self._fill(prefetch)
                taken = prefetch.take(self._settle)
                if taken is not None:
                    group, at, data = taken
                    index = group.indices[at]
                    return StreamedObject(self.objects.name(index), data, len(data), index, group.epoch)
                if prefetch.empty:
                    raise StopIteration
                prefetch.reap()
        except StopIteration:
            raise
        except BaseException:
            self._rewind()
            raise

    def _ready(self) -> Prefetch:
        if self._closed:
            raise ValueError("the stream is closed")
        if os.getpid() != self._pid:
            if self._transfers is not None:
                raise RuntimeError("this stream was begun before the process was forked: make one in each process")
            self._pid = os.getpid()
        if self._prefetch is None:
            objects, arguments = self.objects, self._arguments
            self._transfers = self.store.transfers(workers=arguments["workers"], in_flight=arguments["in_flight"])
            self._prefetch = Prefetch(self._transfers, objects, arguments["in_flight_bytes"], self._ordered)
        return self._prefetch

    def _fill(self, prefetch: Prefetch) -> None:
        while True:
            if self._upcoming is None:
                self._upcoming = self._look_ahead()
                if self._upcoming is None:
                    return
            count = prefetch.submit(self._upcoming)
            if not count:
                return
            more = count < len(self._upcoming.indices)
            self._upcoming = self._upcoming.after(count) if more else None

    def _look_ahead(self) -> Upcoming | None:
        """The next positions of this rank, None behind the last epoch."""
        share, order = self._shared()
        epoch, base, done = self._ahead
        while self._stop is None or epoch < self._stop:
            positions = share.positions(base)[done : done + _CHUNK]
            if positions:
                indices = order.indices(epoch, positions.start, positions.step, len(positions))
                self._ahead = (epoch, base, done + len(positions))
                return Upcoming(epoch, base, done, indices, self.objects.pack(indices))
            if not base and not done:  # more ranks than objects: no epoch has any for this one
                return None
            epoch, base, done = epoch + 1, 0, 0
        return None

    def _settle(self, epoch: int, base: int, done: int) -> None:
        self._at = (epoch, base, done)

    def _rewind(self) -> None:
        """Forget what was read ahead; the next object is the first that was not delivered."""
        self._upcoming = None
        self._ahead = self._at
        if self._prefetch is not None and os.getpid() == self._pid:
            self._prefetch.abandon()

    # -- where it is --

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: plain integers and strings. Loads on as many ranks, each its own; on another number
        those of all ranks load, where all had taken equally many objects of one epoch, in its order.
        """
        return self._state().as_dict()

    def _state(self) -> State:
        share, order = self._shared()
        epoch, base, done = self._at
        return State(
            seed=self._seed,
            epoch=epoch,
            position=share.position_after(base, done),
            n=order.n,
            catalog=self.objects.digest,
            order=self._kind,
            uneven=self._uneven,
        )

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on from there.

        Parameters
        ----------
        state
            What `state_dict` gave: of one rank, or of all of them in the order of ranks, which are then compared.

        Raises
        ------
        UsageError
            If it is of other objects, another seed, order or `uneven`, or the ranks' states disagree.
        """
        if isinstance(state, Mapping):
            saved = State.from_dict(state)
        else:
            saved = State.agree([State.from_dict(one) for one in state])
        saved.check(self._state())
        self._at = (saved.epoch, saved.position, 0)
        self._rewind()
        if self._epochs is not None:
            self._stop = (saved.epoch // self._epochs + 1) * self._epochs

    def __reduce__(self) -> Any:
        at = None if self._at == (0, 0, 0) else self.state_dict()
        return _again, (type(self), self._source, self._arguments, at)

    # -- the end --

    def close(self) -> None:
        """End the transfers. Memory that was delivered stays the consumer's. May be called twice."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        if self._transfers is not None:
            self._rewind()
            self._transfers.close()
        if self._url is not None and self._store is not None:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _again(
    kind: type[ObjectStream], source: str | Store, arguments: dict[str, Any], state: dict[str, Any] | None
) -> ObjectStream:
    stream = kind(source, **arguments)
    if state is not None:
        stream.load_state_dict(state)
    return stream
