"""Storages of CUDA devices: their records come through a piece of pinned host memory that is used again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mlstor.formats.inert_pickle import stored
from mlstor.formats.zip_directory import expected_offset
from mlstor.torch.archive import Archive, Target
from mlstor.torch.arena import Arena
from mlstor.torch.records import Unpickling, described_in, fetch
from mlstor.torch.storages import allocate

#: Of the records that pass through host memory at one time; one that is larger passes alone.
SCRATCH_BYTES = 256 << 20
_PAGE_BYTES = 4096
#: Of its own: a background save may hold the default one for long.
_arena = Arena()


def passes(device: torch.device) -> bool:
    """Whether what goes to `device` passes through the arena."""
    return device.type == "cuda" and torch.cuda.is_available()


def storages_elsewhere(archive: Archive, map_location: Any) -> dict[str, torch.UntypedStorage]:
    """New storages, by record, for what `torch.load` would copy from the host to a CUDA device; none without CUDA.

    Where a function says the place, torch copies as it always does.
    """
    if callable(map_location) or not _is_any_in_reach():
        return {}
    described = archive.read(described_in(archive))
    if described.get("byteorder", b"little") != b"little":
        return {}  # the host swaps the bytes
    try:
        found = stored(described["data.pkl"])
    except ValueError:  # another pickle module's own: torch copies
        return {}
    made = {}
    for key, one in found.items():
        device = _device(map_location, one.location)
        if device is not None and passes(device) and f"data/{key}" in archive.directory.entries:
            nbytes = archive.entry(f"data/{key}").nbytes
            kind: Any = torch.UntypedStorage  # Any: torch types its constructor for no arguments
            made[f"data/{key}"] = kind(nbytes, device=device)
    return made


def _is_any_in_reach() -> bool:
    return passes(torch.device("cuda"))


def _device(map_location: Any, location: str) -> torch.device | None:
    """Where a storage goes that was saved at `location`, by the rules of `torch.load`; None if that is no device."""
    if isinstance(map_location, Mapping):
        map_location = map_location.get(location)
    try:
        return torch.device(location if map_location is None else map_location)
    except RuntimeError:  # a name that is registered with torch.serialization alone
        return None


def fill(archive: Archive, storages: Mapping[str, torch.UntypedStorage], how: Unpickling) -> None:
    """Read records to storages of devices, verified; `CorruptionError` as `records.fetch`."""
    for some in batches(archive, list(storages)):
        with host_storages(archive, some, pinned=True) as hosts:
            targets = [Target(record, host.data_ptr()) for record, host in zip(some, hosts, strict=True)]
            fetch(archive, targets, hosts, how)
            for record, host in zip(some, hosts, strict=True):
                if host.nbytes():
                    storages[record].copy_(host, non_blocking=False)


def batches(archive: Archive, records: Sequence[str]) -> Iterator[list[str]]:
    """Records that are in host memory at one time."""
    some: list[str] = []
    nbytes = 0
    for record in records:
        size = archive.entry(record).nbytes
        if some and nbytes + size > SCRATCH_BYTES:
            yield some
            some, nbytes = [], 0
        some.append(record)
        nbytes += size
    if some:
        yield some


@contextmanager
def host_storages(archive: Archive, records: Sequence[str], *, pinned: bool) -> Iterator[list[torch.UntypedStorage]]:
    """CPU storages for some records, for a while: new ones, or `pinned`, in the arena, from where devices copy fast."""
    if not pinned:
        yield allocate(archive.entry(record).nbytes for record in records)
        return
    places, end = [], 0
    for record in records:
        entry = archive.entry(record)
        end += (expected_offset(entry) - end) % _PAGE_BYTES  # congruent with the file: read without a copy
        places.append((end, entry.nbytes))
        end += entry.nbytes
    with _arena.lease(end) as lease:
        if torch.cuda.is_available():
            _arena.pin()
        yield [_part(lease.memory, *place) for place in places]


def _part(memory: Any, position: int, nbytes: int) -> torch.UntypedStorage:
    if not nbytes:
        kind: Any = torch.UntypedStorage
        empty: torch.UntypedStorage = kind(0, device="cpu")
        return empty
    return torch.frombuffer(memory, dtype=torch.uint8, offset=position, count=nbytes).untyped_storage()
