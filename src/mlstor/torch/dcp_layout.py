"""One data file of a distributed checkpoint before it is written: what lies where, and what its sums are made of.

The file is what stock torch's writer makes: items one after the other, a tensor being a zip as `torch.save` writes it.
Large tensors lie at offsets that suit their memory addresses, so that direct I/O needs no copy; readers find everything
by the offsets in ``.metadata`` and in the zips.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from mlstor._io import crc32, crc32c, crc_combine
from mlstor.blob.types import LatePiece, make_pieces
from mlstor.formats.dcp_sidecar import CHUNK_BYTES, Item, Sums, chunk_count
from mlstor.formats.zip_layout import PAGE, Layout, Placed, Record, directory, header, lay_out, serialization_id
from mlstor.torch.pickling import describe

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Name of the archives: torch's own where it writes to a stream.
_STEM = "archive"
#: Data of this size and above are written from where they lie; smaller ones are gathered.
LARGE_BYTES = 1 << 20
_BYTEORDER = b"little"
_VERSION = b"3\n"


class _Stretch(NamedTuple):
    """Bytes of the file whose digest is known after the write; they follow one another without holes."""

    offset: int
    nbytes: int
    #: the digest's group; None: bytes that `late` makes
    group: int | None
    late: LatePiece | None


class _Zip(NamedTuple):
    """The archive of a large tensor, whose header and directory hold the CRC-32 of what the workers write."""

    layout: Layout
    #: CRC-32 of the records before the data
    crcs: tuple[int, ...]
    #: (group, bytes) of the data's pieces, in order
    parts: tuple[tuple[int, int], ...]

    def crc(self, digests: Mapping[int, int]) -> int:
        return combined("crc32", ((digests[group] & 0xFFFFFFFF, nbytes) for group, nbytes in self.parts))

    def head(self, digests: Mapping[int, int]) -> bytes:
        """The data's local header."""
        return header(_STEM, self.layout.placed[len(self.crcs)], self.crc(digests))

    def tail(self, digests: Mapping[int, int]) -> bytes:
        """What follows the data."""
        return _tail(self.layout, (*self.crcs, self.crc(digests)))


class FileImage:
    """A data file that grows by one item after the other.

    Tensors are not copied but where they are small, or not dense: their memory is read while the file is written, and
    must not change before.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        #: memory that the image holds beside the tensors' own, bytes
        self.copied_bytes = 0
        self.items: list[Item] = []
        self._rows: list[tuple[int, int, int, int]] = []
        self._stretches: list[_Stretch] = []
        self._keep: list[object] = []
        self._early = bytearray()

    @property
    def keep(self) -> object:
        """What must live until the file is written."""
        return self._keep

    def pieces(self) -> NDArray[Any]:
        """The bytes that are known now, with a digest ("crc32+crc32c") of each; for `Blob.publish`."""
        self._flush()
        return make_pieces(self._rows)

    def late(self) -> list[LatePiece]:
        """The bytes that hold digests of others."""
        return [stretch.late for stretch in self._stretches if stretch.late is not None]

    def add_bytes(self, content: memoryview) -> Item:
        """Add an item that is no tensor, as it is."""
        offset = self.nbytes
        if len(content) < LARGE_BYTES:
            self._append(content)
        else:
            array = np.frombuffer(content, np.uint8)
            self._keep.append(array)
            self.copied_bytes += len(content)
            self._data(array.ctypes.data, len(content))
        return self._added(Item(offset, len(content), 0, 0))

    def add_tensor(self, tensor: torch.Tensor, dtype: torch.dtype, shape: torch.Size, *, is_copy: bool = False) -> Item:
        """Add a tensor in the memory of this host.

        Row-major tensors of the type and shape that ``.metadata`` will say are what a reader can take byte ranges of.
        Others are written as stock torch writes them, and read as it does. `is_copy`: nobody else holds its memory.
        """
        if not is_plain(tensor):
            stream = io.BytesIO()
            torch.save(tensor, stream)
            return self.add_bytes(stream.getbuffer())
        given = tensor.data_ptr()
        tensor = tensor.resolve_conj().resolve_neg()
        if not _is_dense(tensor):
            tensor = tensor.clone()
        nbytes = tensor.numel() * tensor.element_size()
        pickled = _pickled(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
        address = tensor.data_ptr() if nbytes else 0
        large = nbytes >= LARGE_BYTES
        records = [
            Record("data.pkl", len(pickled)),
            Record("byteorder", len(_BYTEORDER)),
            Record("version", len(_VERSION)),
            Record("data/0", nbytes, address % PAGE if large else -1),
            Record(".data/serialization_id", 40),
        ]
        layout = lay_out(_STEM, records, self.nbytes)
        early = (pickled, _BYTEORDER, _VERSION)
        crcs = tuple(crc32(content) for content in early)
        for placed, content, crc in zip(layout.placed, early, crcs, strict=False):
            self._append(header(_STEM, placed, crc))
            self._append(content)
        data = layout.placed[3]
        if large:
            self._keep.append(tensor)
            self.copied_bytes += nbytes if is_copy or address != given else 0
            self._large(layout, crcs, data, address)
        else:
            content = bytes(_memory(tensor, nbytes))
            crc = crc32(content)
            self._append(header(_STEM, data, crc))
            self._append(content)
            self._append(_tail(layout, (*crcs, crc)))
        simple = tensor.is_contiguous() and tensor.dtype == dtype and tensor.shape == shape
        return self._added(Item(layout.start, layout.nbytes, data.offset if simple else 0, nbytes))

    def sums(self, file_id: str, digests: Mapping[int, int]) -> Sums:
        """The content of the sums file, once the digests of the pieces are known."""
        values = [0] * chunk_count(self.nbytes)
        for offset, nbytes, group, late in self._stretches:
            if late is None:
                parts = [(offset, nbytes, digests[group or 0] >> 32)]
            else:
                content = memoryview(late.make(digests))
                parts = [(at, size, crc32c(content[at - offset : at - offset + size])) for at, size in _cut(*late[:2])]
            for at, size, crc in parts:
                chunk = at // CHUNK_BYTES
                values[chunk] = crc_combine("crc32c", values[chunk], crc, size)
        return Sums(file_id, self.nbytes, CHUNK_BYTES, tuple(self.items), np.array(values, "<u4"))

    def _added(self, item: Item) -> Item:
        self.items.append(item)
        return item

    def _append(self, content: bytes | memoryview) -> None:
        self._early += content
        self.nbytes += len(content)
        self.copied_bytes += len(content)

    def _flush(self) -> None:
        """Makes pieces of what was gathered."""
        if not self._early:
            return
        gathered = np.frombuffer(self._early, np.uint8)
        self.nbytes -= len(gathered)
        self._keep.append(gathered)
        self._early = bytearray()
        self._data(gathered.ctypes.data, len(gathered))

    def _data(self, address: int, nbytes: int) -> tuple[tuple[int, int], ...]:
        """Bytes that lie in memory: their groups and sizes. One group per chunk: one transfer, one sum."""
        self._flush()
        parts = []
        for offset, size in _cut(self.nbytes, nbytes):
            group = len(self._rows)
            self._rows.append((offset, size, address + offset - self.nbytes, group))
            self._stretches.append(_Stretch(offset, size, group, None))
            parts.append((group, size))
        self.nbytes += nbytes
        return tuple(parts)

    def _large(self, layout: Layout, crcs: tuple[int, ...], data: Placed, address: int) -> None:
        self._flush()
        end = data.offset + data.nbytes
        first = len(self._rows)
        sizes = [size for _, size in _cut(data.offset, data.nbytes)]
        archive = _Zip(layout, crcs, tuple(zip(range(first, first + len(sizes)), sizes, strict=True)))
        self._promise(LatePiece(data.header_offset, data.offset - data.header_offset, archive.head))
        self._data(address, data.nbytes)
        self._promise(LatePiece(end, layout.start + layout.nbytes - end, archive.tail))

    def _promise(self, late: LatePiece) -> None:
        self._stretches.append(_Stretch(late.offset, late.nbytes, None, late))
        self.nbytes += late.nbytes


def combined(kind: str, parts: Iterable[tuple[int, int]]) -> int:
    """The CRC of stretches that follow one another, from (CRC, bytes) of each."""
    whole = 0
    for crc, nbytes in parts:
        whole = crc_combine(kind, whole, crc, nbytes)
    return whole


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is its elements and strides and nothing else."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.is_cpu
        and not tensor.is_quantized
        and not tensor.is_nested
    )


@functools.lru_cache(maxsize=4096)
def plain_pickle(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """The record ``data.pkl`` of a row-major tensor, as torch.save and mlstor write it."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return _pickled(dtype, shape, tuple(reversed(strides)))


@functools.lru_cache(maxsize=4096)
def _pickled(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    # The pickle tells type, shape, strides and the storage's size, and nothing of the content: a storage of that size
    # that nobody touches takes address space, no memory.
    return describe(torch.empty_strided(shape, strides, dtype=dtype, device="cpu")).pickle


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements, in some order of the dimensions, follow one another without holes."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _memory(tensor: torch.Tensor, nbytes: int) -> memoryview:
    """The bytes of a dense tensor, in the order in which they lie."""
    from mlstor.blob.memory import view

    return view(tensor.data_ptr() if nbytes else 0, nbytes, tensor)


def _cut(offset: int, nbytes: int) -> list[tuple[int, int]]:
    """A stretch cut at the chunks' borders."""
    ends = [*range(offset - offset % CHUNK_BYTES + CHUNK_BYTES, offset + nbytes, CHUNK_BYTES), offset + nbytes]
    starts = [offset, *ends[:-1]]
    return [(start, end - start) for start, end in zip(starts, ends, strict=True) if end > start]


def _tail(layout: Layout, crcs: tuple[int, ...]) -> bytes:
    """What follows the data: the record that tells one state from another, and the directory."""
    names = [placed.name for placed in layout.placed[:-1]]
    identity = serialization_id(names, crcs)
    crc = crc32(identity)
    return header(_STEM, layout.placed[-1], crc) + identity + directory(_STEM, layout, (*crcs, crc))
