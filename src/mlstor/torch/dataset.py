"""`ObjectDataset`: objects of a directory, S3 or AIStore as samples by their number, a batch of them read at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import Dataset

from mlstor.errors import UsageError
from mlstor.torch._batches import Batches
from mlstor.torch._worker import PerProcess, Place, objects_of

if TYPE_CHECKING:
    from mlstor.storage.store import Store
    from mlstor.stream.catalog import Objects


class Sample(NamedTuple):
    """An object as a transform gets it."""

    #: relative to the dataset's URL
    key: str
    #: its bytes, writable; torch.frombuffer and numpy.frombuffer take them without a copy. The objects of a batch share
    #: one buffer, which lives as long as any of them.
    data: memoryview
    #: in the dataset
    index: int  # type: ignore[assignment]  # a tuple's own index() is of no use here

    def __reduce__(self) -> Any:
        return _sample, (self.key, bytearray(self.data), self.index)  # from a worker to the training process


def _sample(key: str, data: bytearray, index: int) -> Sample:
    return Sample(key, memoryview(data), index)


class ObjectDataset(Dataset[Any]):
    """Objects as samples, by their number in the order of their names' bytes.

    A DataLoader fetches a batch by `__getitems__`: all its objects are under way at once. Works in workers under fork,
    spawn and forkserver; each process has an engine of its own, made with its first batch.

    Parameters
    ----------
    source : str, path or Store
        A directory, ``s3://BUCKET/PREFIX`` or ``ais://BUCKET/PREFIX``; or a store that was opened already, which the
        dataset then does not close.
    transform : callable, optional
        Makes a sample of a `Sample` (key, data, index), in the worker. Without it samples are `Sample`, which torch's
        own collate function does not know: give the DataLoader ``collate_fn=list`` then.
    catalog : Catalog, Synthetic, str or path, optional
        What there is, or the file of a catalog. Without it the store is listed now, by each rank for itself.
    prefix : str
        Without a catalog: only keys that begin with it.
    options : mapping, optional
        Of the store, as `mlstor.storage.store.open_store` takes them: endpoint, profile, anonymous, ...
    in_flight : int, optional
        Transfers under way in each thread of a process. 32 by default, 16 in a DataLoader's worker.

    Attributes
    ----------
    objects : Catalog or Synthetic
        Names and sizes.
    digest : str
        Of them, hex: an `EpochSampler` refuses to go on with other objects.
    url : str

    Raises
    ------
    UsageError
        If there are no objects, or the URL or an option is not understood.
    OSError
        If the store can't be listed. While reading: with errno and the object's key or URL. From a worker torch
        re-makes an exception of its text, which has the errno's number; the attributes are lost.

    Examples
    --------
    >>> def decode(sample):
    ...     return torch.frombuffer(sample.data, dtype=torch.uint8)
    >>> dataset = ObjectDataset("s3://bucket/train", decode)  # doctest: +SKIP
    >>> loader = StatefulDataLoader(  # doctest: +SKIP
    ...     dataset, sampler=EpochSampler(dataset, seed=7), batch_size=64, num_workers=4
    ... )
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Store,
        transform: Callable[[Sample], Any] | None = None,
        *,
        catalog: Objects | str | os.PathLike[str] | None = None,
        prefix: str = "",
        options: Mapping[str, Any] | None = None,
        in_flight: int | None = None,
    ) -> None:
        if in_flight is not None and in_flight < 1:
            raise UsageError(f"in_flight={in_flight} has to be above zero")
        place = Place(source, options)
        self.transform = transform
        self.objects, self.url = objects_of(self, place, catalog, prefix)
        self.digest = self.objects.digest
        self._batches = PerProcess(partial(Batches, place, self.objects, in_flight))

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> Any:
        """One sample; a loop over single ones waits for each of them."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The samples of a batch, in this order."""
        if not len(indices):
            return []
        with self._batches as batches:
            found = batches.whole(indices)
        return [self._made(int(index), data) for index, data in zip(indices, found, strict=True)]

    def _made(self, index: int, data: memoryview) -> Any:
        sample = Sample(self.objects.name(index), data, index)
        return sample if self.transform is None else transformed(self.transform, sample, sample.key)


def transformed(transform: Callable[[Any], Any], sample: Any, name: str) -> Any:
    """What `transform` makes of `sample`; its error says of which object, where Python can (3.11)."""
    try:
        return transform(sample)
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(f"in the transform of {name!r}")
        raise
