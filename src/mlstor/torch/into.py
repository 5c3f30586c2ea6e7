"""`load(into=)`: read a checkpoint straight into the tensors of a state that is already there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mlstor.blob.memory import view
from mlstor.errors import CorruptionError, UsageError
from mlstor.torch import _stock, devices, walk
from mlstor.torch.archive import Archive, Target
from mlstor.torch.records import Unpickling, described_in, fetch, outline
from mlstor.torch.walk import Pair

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

    def address(self) -> int:
        """The one that the record would have if the place were its part."""
        return self.place.data_ptr() - self.start_nbytes()

    def base(self) -> int | None:
        """As `address`; None if the bytes can't go there as is."""
        place = self.place
        if place.device.type != "cpu" or not walk.is_ordinary(place):
            return None
        if place.is_conj() != self.source.is_conj() or place.is_neg() != self.source.is_neg():
            return None
        return self.address()

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
    if contents.get("byteorder", b"little") != b"little" or not _is_ordinary(tree):
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
    without = []
    for place in pairs:
        if isinstance(place.found, torch.Tensor) and (place.found.is_meta or _stock.is_fake(place.found)):
            kind = "a fake tensor" if _stock.is_fake(place.found) else "on the meta device"
            without.append(f"{place.path} is {kind} here, which has no memory")
    _refuse(without, name)


def _check_size(archive: Archive, record: str, tensor: torch.Tensor) -> None:
    needed, there = tensor.untyped_storage().nbytes(), archive.entry(record).nbytes
    if needed != there:
        raise CorruptionError(
            f"{archive.name}: a tensor needs {needed} bytes of the record {record}, which has {there}"
        )


def _is_ordinary(tree: Any) -> bool:
    try:
        return all(walk.is_ordinary(leaf) for _, leaf in walk.leaves(tree))
    except RecursionError:  # which is refused where it is compared
        return False


def _agree(tree: Any, into: Any, name: str) -> list[Pair]:
    try:
        pairs, differences = walk.pair(tree, into)
    except RecursionError:
        raise UsageError(f"{name} does not fit into=: a state holds itself, or is nested too deeply") from None
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
            base = copy.address()
            start, end = copy.span()
            spans.append((base + start, base + end, record, base, copy.path))
    spans.sort()
    differences = []
    last = None
    for span in spans:
        if last is not None and span[0] < last[1] and span[2:4] != last[2:4]:
            differences.append(_shared(last[4], span[4]))
        if last is None or span[1] > last[1]:
            last = span
    _refuse(differences, name)


def _shared(one: str, other: str) -> str:
    return f"{one} and {other} share memory here, but not in the file"


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
    fetch(archive, targets, copies, how, _UNDEFINED)
    for record, base in straight.items():
        _alias(copies[record], base, archive.entry(record).nbytes)
    for some in devices.batches(archive, indirect):
        pinned = any(devices.passes(copy.place.device) for record in some for copy in copies[record])
        with devices.host_storages(archive, some, pinned=pinned) as storages:
            places = [Target(record, storage.data_ptr()) for record, storage in zip(some, storages, strict=True)]
            fetch(archive, places, storages, how, _UNDEFINED)
            for record, storage in zip(some, storages, strict=True):
                for copy in copies[record]:
                    copy.take(storage)


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


def _finish(pairs: Sequence[Pair]) -> None:
    """Tell autograd of the tensors that were written, and set the values that are no tensors."""
    for place in pairs:
        if isinstance(place.found, torch.Tensor):
            _stock.changed(place.found)
        elif walk.can_be_set(place):
            place.holder[place.key] = place.wanted


def copy_into(loaded: Any, into: Any, name: str) -> Any:
    """Fill `into` from a state that was loaded beside it; `UsageError` as `load_into`."""
    pairs = _agree(loaded, into, name)
    tensors = [pair for pair in pairs if isinstance(pair.wanted, torch.Tensor) and not pair.wanted.is_meta]
    _refuse_meta(tensors, name)
    copies: dict[str, list[_Copy]] = {}
    twice: dict[int, Pair] = {}  # sparse tensors get new memory: only the very same one can be filled twice
    differences = []
    for pair in tensors:
        other = twice.setdefault(id(pair.found), pair)
        if pair.found.is_sparse and other.wanted is not pair.wanted:
            differences.append(_shared(other.path, pair.path))
        for source, place in zip(walk.parts(pair.wanted), walk.parts(pair.found), strict=True):
            if source.numel():
                storage = str(source.untyped_storage()._cdata)
                copies.setdefault(storage, []).append(_Copy(pair.path, source, place))
    _refuse(differences, name)
    _refuse_conflicts(copies, name)
    for pair in tensors:
        try:
            _assign(pair.found, pair.wanted)
        except RuntimeError as error:  # a subclass's own rules
            raise UsageError(f"{name}: {pair.path} can't be filled: {error}. {_UNDEFINED}") from error
    _finish(pairs)
    return into
