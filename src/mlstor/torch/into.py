"""`load(into=)`: read a checkpoint straight into the tensors of a state that is already there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from mlstor.blob.memory import view
from mlstor.errors import CorruptionError, UsageError
from mlstor.torch import _stock, walk
from mlstor.torch.archive import Archive, Target
from mlstor.torch.records import Unpickling, described_in, outline, settle
from mlstor.torch.storages import allocate
from mlstor.torch.walk import Pair

#: Bytes of records that are in memory beside the state at one time.
_SCRATCH_BYTES = 256 << 20
_LISTED = 20
_UNDEFINED = "The content of `into` is undefined now: load an older checkpoint into it before it is used"


class _Copy(NamedTuple):
    """A tensor in the file and the one that it goes to."""

    path: str
    #: on the meta device
    source: torch.Tensor
    place: torch.Tensor

    def start_nbytes(self) -> int:
        """Where the source begins in its record."""
        return int(self.source.storage_offset()) * self.source.element_size()

    def span(self) -> tuple[int, int]:
        """First byte and end of the source in its record."""
        reach = sum((size - 1) * stride for size, stride in zip(self.source.shape, self.source.stride(), strict=True))
        start = self.start_nbytes()
        return start, start + (reach + 1) * self.source.element_size()

    def is_dense(self) -> bool:
        start, end = self.span()
        return end - start == self.source.numel() * self.source.element_size()

    def base(self) -> int | None:
        """The address that the record would have if the place were its part; None if the bytes can't go there as is."""
        place = self.place
        if place.device.type != "cpu" or not walk.is_ordinary(place):
            return None
        if place.is_conj() != self.source.is_conj() or place.is_neg() != self.source.is_neg():
            return None
        return place.data_ptr() - self.start_nbytes()

    def take(self, storage: torch.UntypedStorage) -> None:
        """Copy from a storage that holds the record."""
        source = torch.empty(0, dtype=self.source.dtype, device="cpu")
        source.set_(storage, self.source.storage_offset(), self.source.shape, self.source.stride())
        source = torch._neg_view(source) if self.source.is_neg() else source
        source = source.conj() if self.source.is_conj() else source
        _assign(self.place, source)


def _assign(place: torch.Tensor, source: torch.Tensor) -> None:
    if place.layout == torch.strided and not place.is_nested:
        for dimension, stride in enumerate(place.stride()):
            if stride == 0 and place.shape[dimension] > 1:  # expanded: copy_ refuses to write one element many times
                place, source = place.narrow(dimension, 0, 1), source.narrow(dimension, 0, 1)
    with torch.no_grad():
        place.copy_(source)


def load_into(archive: Archive, into: Any, how: Unpickling, load: Callable[[], Any]) -> Any:
    """Fill `into` from an archive.

    Parameters
    ----------
    archive
    into
        A nested state of mappings, lists and tuples whose tensors agree with those in the file.
    how
    load
        Loads the file in the ordinary way: for tensors that have no plain place in the file.

    Raises
    ------
    UsageError
        If the two differ; then nothing was touched.
    CorruptionError
        If the file is damaged; then the content of `into` is undefined.
    """
    contents = archive.read(described_in(archive))
    try:
        tree, records = outline(archive, contents["data.pkl"], how)
    except NotImplementedError:  # quantized and nested tensors have no form on the meta device
        return copy_into(load(), into, archive.name)
    if contents.get("byteorder", b"little") != b"little" or not all(walk.is_ordinary(x) for _, x in walk.leaves(tree)):
        return copy_into(load(), into, archive.name)
    pairs = _agree(tree, into, archive.name)
    _refuse_meta([place for place in pairs if walk.record_number(place.wanted) is not None], archive.name)
    copies: dict[str, list[_Copy]] = {}
    for place in pairs:
        number = walk.record_number(place.wanted)
        if number is not None and place.wanted.numel():
            _check_size(archive, records[number], place.wanted)
            copies.setdefault(records[number], []).append(_Copy(place.path, place.wanted, place.found.detach()))
    _refuse_conflicts(copies, archive.name)
    _fill(archive, copies, how)
    _finish(pairs)
    return into


def _refuse_meta(pairs: Sequence[Pair], name: str) -> None:
    """Refuse places without memory for what the file has bytes of: a copy to them does nothing, and says nothing."""
    without = [place.path for place in pairs if isinstance(place.found, torch.Tensor) and place.found.is_meta]
    _refuse([f"{path} is on the meta device here, which has no memory" for path in without], name)


def _check_size(archive: Archive, record: str, tensor: torch.Tensor) -> None:
    needed, there = tensor.untyped_storage().nbytes(), archive.entry(record).nbytes
    if needed != there:
        raise CorruptionError(
            f"{archive.name}: a tensor needs {needed} bytes of the record {record}, which has {there}"
        )


def _agree(tree: Any, into: Any, name: str) -> list[Pair]:
    pairs, differences = walk.pair(tree, into)
    _refuse(differences, name)
    return pairs


def _refuse(differences: Sequence[str], name: str) -> None:
    if differences:
        listed = "; ".join(differences[:_LISTED])
        more = f"; and {len(differences) - _LISTED} more" if len(differences) > _LISTED else ""
        raise UsageError(f"{name} does not fit into=, and nothing was loaded: {listed}{more}")


def _refuse_conflicts(copies: dict[str, list[_Copy]], name: str) -> None:
    """Refuse places that share memory where their sources don't: what is written last would win."""
    spans = []
    for record, owned in copies.items():
        for copy in owned:
            base = copy.base()
            if base is not None:
                start, end = copy.span()
                spans.append((base + start, base + end, record, base, copy.path))
    spans.sort()
    differences = []
    last = None
    for span in spans:
        if last is not None and span[0] < last[1] and span[2:4] != last[2:4]:
            differences.append(f"{last[4]} and {span[4]} share memory here, but not in the file")
        if last is None or span[1] > last[1]:
            last = span
    _refuse(differences, name)


def _fill(archive: Archive, copies: dict[str, list[_Copy]], how: Unpickling) -> None:
    straight: dict[str, int] = {}
    indirect: list[str] = []
    for record, owned in copies.items():
        base = _whole(owned, archive.entry(record).nbytes)
        if base is None:
            indirect.append(record)
        else:
            straight[record] = base
    # What no tensor refers to is read to be verified, and dropped
    dropped = [record for record in archive.directory.entries if record not in copies]
    targets = [Target(record, base) for record, base in straight.items()] + [Target(record, 0) for record in dropped]
    settle(archive, _fetched(archive, targets, copies), how, _UNDEFINED)
    for record, base in straight.items():
        _alias(copies[record], base, archive.entry(record).nbytes)
    for some in _batches(archive, indirect):
        storages = allocate(archive.entry(record).nbytes for record in some)
        places = [Target(record, storage.data_ptr()) for record, storage in zip(some, storages, strict=True)]
        settle(archive, _fetched(archive, places, storages), how, _UNDEFINED)
        for record, storage in zip(some, storages, strict=True):
            for copy in copies[record]:
                copy.take(storage)


def _fetched(archive: Archive, targets: Sequence[Target], keep: object) -> list[str]:
    try:
        return archive.fetch(targets, keep)
    except CorruptionError as error:  # a local header: other records may have been read by then
        raise CorruptionError(f"{error}. {_UNDEFINED}") from None


def _whole(owned: Sequence[_Copy], nbytes: int) -> int | None:
    """The address to read a record to, if places that lie as in the file cover all of it; else None."""
    base = owned[0].base()
    if base is None:
        return None
    covered = 0
    for start, end in sorted(copy.span() for copy in owned if copy.base() == base and copy.is_dense()):
        if start > covered:
            return None
        covered = max(covered, end)
    return base if covered == nbytes else None


def _alias(owned: Sequence[_Copy], base: int, nbytes: int) -> None:
    """Fill those places that show the record's bytes elsewhere in memory than where it was read to."""
    others = [copy for copy in owned if copy.base() != base]
    if others:
        storage = torch.frombuffer(view(base, nbytes, owned), dtype=torch.uint8).untyped_storage()
        for copy in others:
            copy.take(storage)


def _batches(archive: Archive, records: Sequence[str]) -> Iterator[list[str]]:
    some: list[str] = []
    nbytes = 0
    for record in records:
        size = archive.entry(record).nbytes
        if some and nbytes + size > _SCRATCH_BYTES:
            yield some
            some, nbytes = [], 0
        some.append(record)
        nbytes += size
    if some:
        yield some


def _finish(pairs: Sequence[Pair]) -> None:
    """Tell autograd of the tensors that were written, and set the values that are no tensors."""
    for place in pairs:
        if isinstance(place.found, torch.Tensor):
            _stock.changed(place.found)
        elif place.holder is not None and not isinstance(place.holder, tuple):
            place.holder[place.key] = place.wanted


def copy_into(loaded: Any, into: Any, name: str) -> Any:
    """Fill `into` from a state that was loaded beside it; `UsageError` as `load_into`."""
    pairs = _agree(loaded, into, name)
    _refuse_meta([p for p in pairs if isinstance(p.wanted, torch.Tensor) and not p.wanted.is_meta], name)
    for place in pairs:
        if isinstance(place.found, torch.Tensor) and not place.wanted.is_meta:
            _assign(place.found, place.wanted)
    _finish(pairs)
    return into
