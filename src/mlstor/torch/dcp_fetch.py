"""Stretches of one data file, read to where they are wanted and verified by the file's sums."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from mlstor._io import AlignedBuffer
from mlstor.blob.types import Blob, make_pieces
from mlstor.errors import CorruptionError
from mlstor.formats.dcp_sidecar import Sums

#: A chunk that is wanted in more pieces than this is read as one, and its pieces are copied.
_PIECES = 4
#: Chunks that are read so at one time.
_GATHERED = 64
#: How many damaged chunks, and tensors of one, a message names.
_NAMED = 4


class Want(NamedTuple):
    """A stretch of the file, and where it goes."""

    offset: int
    nbytes: int
    address: int
    #: the tensor, for messages
    name: str


class _Chunk(NamedTuple):
    """What is wanted of a chunk: (offset, bytes, address) by offset."""

    number: int
    parts: list[tuple[int, int, int]]
    names: list[str]


class Scratch:
    """Memory for one stretch of a file, placed so that direct reads need no copy where that can be."""

    def __init__(self, offset: int, nbytes: int) -> None:
        # Elements must lie at multiples of their size, which in stock files they need not do
        residue = offset % 4096 if offset % 16 == 0 else 0
        self._buffer = AlignedBuffer(nbytes + residue + 1)
        self.memory = memoryview(self._buffer)[residue : residue + nbytes]
        self.address = self._buffer.address + residue

    def tensor(self) -> torch.Tensor:
        """As bytes; there is at least one."""
        return torch.frombuffer(self.memory, dtype=torch.uint8)


def fetch(blob: Blob, wants: Iterable[Want], keep: object, etag: str = "") -> None:
    """Fill the memory of `wants`, which may overlap in the file; nothing is verified. `etag` as in `Blob.fetch`."""
    for some in _disjoint(wants):
        rows = [(want.offset, want.nbytes, want.address, -1) for want in some]
        blob.fetch(make_pieces(rows), keep=keep, etag=etag)


def fetch_digests(blob: Blob, wants: Sequence[Want], keep: object, etag: str = "") -> list[int]:
    """The same, and the CRC-32 of each."""
    order = {id(want): index for index, want in enumerate(wants)}
    crcs = [0] * len(wants)
    for some in _disjoint(wants):
        rows = [(want.offset, want.nbytes, want.address, order[id(want)]) for want in some]
        for index, crc in blob.fetch(make_pieces(rows), digest="crc32", keep=keep, etag=etag).digests.items():
            crcs[index] = crc
    return crcs


def fetch_verified(blob: Blob, wants: Iterable[Want], sums: Sums, keep: object, etag: str = "") -> None:
    """Fill the memory of `wants`, and verify every chunk of the file that they touch.

    What else lies in those chunks is read as well.

    Raises
    ------
    CorruptionError
        If a chunk is not what was written; it names file, bytes and tensors. The memory is undefined then.
    """
    for some in _disjoint(wants):
        chunks: list[_Chunk] = []
        gathered = 0
        for chunk in _chunks(some, sums.chunk_bytes):
            chunks.append(chunk)
            gathered += len(chunk.parts) > _PIECES
            if gathered == _GATHERED:
                _fetch_chunks(blob, chunks, sums, keep, etag)
                chunks, gathered = [], 0
        if chunks:
            _fetch_chunks(blob, chunks, sums, keep, etag)


def _fetch_chunks(blob: Blob, chunks: Sequence[_Chunk], sums: Sums, keep: object, etag: str) -> None:
    whole = [chunk for chunk in chunks if len(chunk.parts) > _PIECES]
    scratch = AlignedBuffer(max(len(whole), 1) * sums.chunk_bytes)
    places = {chunk.number: scratch.address + number * sums.chunk_bytes for number, chunk in enumerate(whole)}
    rows: list[tuple[int, int, int, int]] = []
    for chunk in chunks:
        start, end = sums.span(chunk.number)
        if chunk.number in places:
            rows.append((start, end - start, places[chunk.number], chunk.number))
            continue
        at = start
        for offset, nbytes, address in chunk.parts:
            if at < offset:
                rows.append((at, offset - at, 0, chunk.number))
            rows.append((offset, nbytes, address, chunk.number))
            at = offset + nbytes
        if at < end:
            rows.append((at, end - at, 0, chunk.number))
    digests = blob.fetch(make_pieces(rows), digest="crc32c", keep=(keep, scratch), etag=etag).digests
    damaged = [chunk for chunk in chunks if digests[chunk.number] != int(sums.values[chunk.number])]
    if damaged:
        raise _damage(blob.name, damaged, sums)
    move = ctypes.memmove
    for chunk in whole:
        place = places[chunk.number] - chunk.number * sums.chunk_bytes
        for offset, nbytes, address in chunk.parts:
            move(address, place + offset, nbytes)


def _disjoint(wants: Iterable[Want]) -> list[list[Want]]:
    """By offset, in as many lists as it takes that none overlap in one: the same bytes may be wanted twice."""
    lists: list[list[Want]] = []
    for want in sorted((want for want in wants if want.nbytes), key=lambda want: want.offset):
        for some in lists:
            if some[-1].offset + some[-1].nbytes <= want.offset:
                some.append(want)
                break
        else:
            lists.append([want])
    return lists


def _chunks(wants: Iterable[Want], chunk_bytes: int) -> Iterator[_Chunk]:
    """The chunks that are touched, in order; `wants` are by offset and don't overlap."""
    chunk = _Chunk(-1, [], [])
    for offset, nbytes, address, name in wants:
        at, end = offset, offset + nbytes
        while at < end:
            index = at // chunk_bytes
            size = min(end, (index + 1) * chunk_bytes) - at
            if index != chunk.number:
                if chunk.parts:
                    yield chunk
                chunk = _Chunk(index, [], [])
            chunk.parts.append((at, size, address + at - offset))
            chunk.names.append(name)
            at += size
    if chunk.parts:
        yield chunk


def _damage(name: str, chunks: Sequence[_Chunk], sums: Sums) -> CorruptionError:
    texts = []
    for chunk in chunks[:_NAMED]:
        start, end = sums.span(chunk.number)
        names = list(dict.fromkeys(chunk.names))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        texts.append(f"bytes {start} to {end} (of {', '.join(names[:_NAMED])}{more})")
    more = f" and {len(chunks) - _NAMED} more chunks" if len(chunks) > _NAMED else ""
    return CorruptionError(
        f"{name}: {'; '.join(texts)}{more}: not what was written, the CRC32C differs. What was loaded so far is "
        "undefined; load an older checkpoint, or verify=False to get the damage too"
    )
