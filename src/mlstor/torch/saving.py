"""`save`: a drop-in for `torch.save` that writes in parallel, durably, and with true CRC-32s."""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
import zlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mlstor._io import crc_pieces
from mlstor.blob.target import open_blob
from mlstor.blob.types import LatePiece, make_pieces
from mlstor.errors import UsageError
from mlstor.formats.zip_layout import Layout, Placed, Record, directory, header, lay_out, serialization_id
from mlstor.torch import _stock
from mlstor.torch.pickling import DEFAULT_PROTOCOL, Described, describe
from mlstor.units import parse_size

if TYPE_CHECKING:
    from mlstor._io import Engine
    from mlstor.blob.types import Blob
    from mlstor.storage.store import Store

#: From here on a record's offset is congruent with its memory, and its CRC is computed while it is written.
LARGE_BYTES = 1 << 20
#: Below this a record is copied beside its neighbours; from here on it is written from where it lies.
_COPIED_BELOW_BYTES = 64 << 10
_PAGE_BYTES = 4096


class Composed(NamedTuple):
    """A checkpoint file as it will be: what `Blob.publish` takes."""

    nbytes: int
    #: `PIECE_DTYPE`: the stretches of the file and their memory
    pieces: NDArray[Any]
    #: headers of the large records, and the directory: they hold CRCs that are known late
    late: list[LatePiece]
    #: what owns the memory
    keep: object
    layout: Layout


def save(
    obj: Any,
    f: str | os.PathLike[str],
    *,
    pickle_module: ModuleType = pickle,
    pickle_protocol: int = DEFAULT_PROTOCOL,
    max_bandwidth: str | int | None = None,
    engine: Engine | None = None,
    store: Store | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Save `obj` to a file or an object that `torch.load` reads; return when it is durable.

    The file appears under its name whole, or not at all: it is written beside it, synced, renamed, and the directory is
    synced. An object is published by the last request of its upload.

    Parameters
    ----------
    obj
        Anything that `torch.save` takes.
    f
        A path, or the URL of an object (``s3://bucket/run/step3.pt``).
    pickle_module, pickle_protocol
        As in `torch.save`; default pickle and 2.
    max_bandwidth
        Bytes per second at most (``"500MB/s"``), so that others' reads are not starved. Default: no limit.
    engine
        The engine that writes files. Default: the process's own.
    store, options
        The object store, or the options to open it with. Default: by the URL.

    Raises
    ------
    UsageError
        If `obj` or `f` can't be saved so; the message says what to do instead.
    OSError
        If the storage fails, with errno and name. What was there before under the name is still there.
    """
    name = name_of(f)
    save_to(
        obj,
        open_blob(name, engine=engine, **opening(store, options)),
        stem_of(name),
        pickle_module=pickle_module,
        pickle_protocol=pickle_protocol,
        max_bandwidth=max_bandwidth,
    )


def save_to(
    obj: Any,
    blob: Blob,
    stem: str,
    *,
    pickle_module: ModuleType = pickle,
    pickle_protocol: int = DEFAULT_PROTOCOL,
    max_bandwidth: str | int | None = None,
) -> None:
    """`save` to a blob; `stem` is the name of the folder inside the zip."""
    check_host()
    bytes_per_s = parse_bandwidth(max_bandwidth)
    described = describe(obj, pickle_module=pickle_module, pickle_protocol=pickle_protocol)
    if any(storage.device.type != "cpu" for _, storage in described.storages):
        _save_staged(described, blob, stem, bytes_per_s)
        return
    composed = compose(described, stem)
    blob.publish(
        composed.nbytes,
        composed.pieces,
        composed.late,
        digest="crc32",
        keep=composed.keep,
        max_bandwidth=bytes_per_s,
    )


def _save_staged(described: Described, blob: Blob, stem: str, bytes_per_s: int) -> None:
    """By way of the arena, whose memory is pinned: all devices copy to it at once, not a storage after the other."""
    from mlstor.torch.arena import default_arena
    from mlstor.torch.staging import stage

    staged = stage(described, stem, default_arena())
    try:
        staged.publish(blob, max_bandwidth=bytes_per_s)
    finally:
        staged.lease.release()


def check_host() -> None:
    """Refuse a host or a mode of torch in which no file can be written.

    Raises
    ------
    UsageError
        On a big-endian host, in FakeTensorMode, and in torch's `skip_data`.
    """
    if sys.byteorder != "little":
        raise UsageError("mlstor.torch.save writes little-endian files only: use torch.save on this host")
    if _stock.passes_to_torch():
        raise UsageError("no bytes to save: leave FakeTensorMode and torch's skip_data, or use torch.save")


def opening(store: Store | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `open_blob` is given for an object store."""
    if options is not None and not isinstance(options, Mapping):
        raise UsageError(f"options= takes names and values, as {{'endpoint': URL}}, not {type(options).__name__}")
    return {**({} if store is None else {"store": store}), **(options or {})}


def name_of(f: Any) -> str:
    """The path or URL in `f`; file objects are refused."""
    if not isinstance(f, (str, os.PathLike)):
        raise UsageError(f"give a path or a URL, not {type(f).__name__}; torch.save and torch.load take file objects")
    name = os.fsdecode(f)
    if not name:
        raise UsageError("the path is empty: name a file, or the URL of an object")
    return name


def parse_bandwidth(text: str | int | None) -> int:
    """Bytes per second in ``"500MB/s"``, ``"1GiB/s"`` or a number; 0 for None, which is no limit.

    Raises
    ------
    UsageError
        If it is no rate, or not above 0.
    """
    if text is None:
        return 0
    rate = parse_size(text.removesuffix("/s") if isinstance(text, str) else text)
    if rate <= 0:
        raise UsageError(
            f"max_bandwidth={text!r} writes nothing: give a rate above 0, as 500MB/s, or None for no limit"
        )
    return rate


def stem_of(name: str) -> str:
    """The folder inside the zip: the file's name without its ending, as `torch.save` has it."""
    last = name.rstrip("/").rpartition("/")[2]
    stem = last.rpartition(".")[0] or last
    return stem if stem and stem.isascii() else "archive"


def records_of(described: Described, storages: Sequence[torch.UntypedStorage]) -> list[Record]:
    """The records of a checkpoint file in the order of the file."""
    records = [Record("data.pkl", len(described.pickle)), Record("byteorder", 6)]
    for (key, _), storage in zip(described.storages, storages, strict=True):
        nbytes = storage.nbytes()
        residue = storage.data_ptr() % _PAGE_BYTES
        # torch maps files, and types want their own alignment then: nothing below 64 is kept
        records.append(Record(f"data/{key}", nbytes, residue if nbytes >= LARGE_BYTES and residue % 64 == 0 else -1))
    return [*records, Record("version", 2), Record(".data/serialization_id", 40)]


def compose(described: Described, stem: str) -> Composed:
    """Lay out the file of a described object whose storages are all on the CPU.

    Small records are packed with their headers into one slab. Those from `LARGE_BYTES` on stay where they are; their
    headers, and the directory, are made when their CRCs are known.
    """
    storages = [storage for _, storage in described.storages]
    layout = lay_out(stem, records_of(described, storages))
    memory = _Memory(described, storages)
    placed = layout.placed[:-1]  # the last record, the identity, belongs to the tail
    late_ones = [index for index, item in enumerate(placed) if item.nbytes >= LARGE_BYTES]
    crcs = memory.crcs(placed, set(late_ones))
    file = _File()
    for index, item in enumerate(placed):
        address = memory.addresses[index]
        if item.nbytes >= LARGE_BYTES:
            file.late.append(_late_header(stem, item, index))
            file.pieces.append((item.offset, item.nbytes, address, index))
            continue
        file.put(item.header_offset, header(stem, item, crcs[index]))
        if item.nbytes < _COPIED_BELOW_BYTES:
            file.put(item.offset, ctypes.string_at(address, item.nbytes))
        else:
            file.pieces.append((item.offset, item.nbytes, address, -1))

    def tail(digests: Mapping[int, int]) -> bytes:
        for index in late_ones:
            crcs[index] = digests[index]
        names = [item.name for item in placed]
        identity = serialization_id(names, crcs)
        last = layout.placed[-1]
        all_crcs = [*crcs, zlib.crc32(identity)]
        return header(stem, last, all_crcs[-1]) + identity + directory(stem, layout, all_crcs)

    start = layout.placed[-1].header_offset
    if late_ones:
        file.late.append(LatePiece(start, layout.nbytes - start, tail))
    else:
        file.put(start, tail({}))
    return Composed(layout.nbytes, file.table(), file.late, (described, storages, file.slab), layout)


def _late_header(stem: str, item: Placed, group: int) -> LatePiece:
    return LatePiece(
        item.header_offset, item.offset - item.header_offset, lambda digests: header(stem, item, digests[group])
    )


class _Memory:
    """Where the contents of each record lie, in the order of the file."""

    def __init__(self, described: Described, storages: Sequence[torch.UntypedStorage]) -> None:
        self._constants = [np.frombuffer(data, np.uint8) for data in (described.pickle, b"little", b"3\n")]
        first, second, last = (data.ctypes.data for data in self._constants)
        self.addresses = [first, second, *(storage.data_ptr() for storage in storages), last]

    def crcs(self, placed: Sequence[Placed], without: set[int]) -> list[int]:
        """The CRC-32 of each record; 0 for those whose sums come while they are written."""
        out = np.zeros(len(placed), np.uint32)
        sizes = [0 if index in without else item.nbytes for index, item in enumerate(placed)]
        crc_pieces("crc32", np.array(self.addresses, np.uint64).data, np.array(sizes, np.uint64).data, out.data)
        crcs: list[int] = out.tolist()
        return crcs


class _File:
    """The pieces of a file while they are put together. What is put in order, without holes, becomes one piece."""

    def __init__(self) -> None:
        self.slab = bytearray()
        self.pieces: list[tuple[int, int, int, int]] = []
        self.late: list[LatePiece] = []
        self._runs: list[tuple[int, int, int]] = []  # offset in the file, place in the slab, bytes

    def put(self, offset: int, data: bytes) -> None:
        place = len(self.slab)
        self.slab += data
        if self._runs and sum(self._runs[-1][::2]) == offset:
            first, start, _ = self._runs.pop()
            self._runs.append((first, start, offset + len(data) - first))
        elif data:
            self._runs.append((offset, place, len(data)))

    def table(self) -> NDArray[Any]:
        """All pieces, in the order of the file."""
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.slab))
        runs = [(offset, nbytes, base + place, -1) for offset, place, nbytes in self._runs]
        return make_pieces(sorted(self.pieces + runs))
