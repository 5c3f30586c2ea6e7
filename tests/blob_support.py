"""What the tests of blobs share: random pieces in memory, what a blob of them must hold, and a round trip."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from hypothesis import strategies as st

from mlstor.blob.types import Blob, LatePiece, make_pieces

SIZES = (0, 1, 100, 4096, 5000, 70_000, 300_000, 1_200_001)
GAPS = (0, 0, 1, 64, 4096, 70_000)
GUARD = 64
MIB = 1 << 20


class Row(NamedTuple):
    """A piece: bytes before it in the blob and in memory, its size, its group."""

    gap: int
    space: int
    nbytes: int
    group: int


class Case(NamedTuple):
    """Rows in the order of the blob; `order` is that of the array."""

    rows: list[Row]
    order: list[int]
    #: bytes of the late piece at the beginning, and zeros at the end
    head: int
    tail: int
    kind: str


#: Pieces of which parts and ranges are made in every way: within one, of several, of gaps and late bytes.
LARGE = Case(
    [
        Row(0, 0, 7 * MIB + 3, 0),
        Row(5000, 1, 100, 1),
        Row(0, 0, 4096, 2),
        Row(70_000, 64, 4 * MIB, 0),
        Row(7, 0, 5, -1),
    ],
    [0, 1, 2, 3, 4],
    8,
    10_000,
    "crc32+crc32c",
)

rows = st.builds(Row, st.sampled_from(GAPS), st.sampled_from((0, 0, 1, 64)), st.sampled_from(SIZES), st.integers(-1, 3))


@st.composite
def cases(draw: Any, most: int = 10) -> Case:
    made = draw(st.lists(rows, max_size=most))
    return Case(
        made,
        draw(st.permutations(range(len(made)))),
        draw(st.sampled_from((0, 8, 5000))),
        draw(st.sampled_from((0, 1, 10_000))),
        draw(st.sampled_from(("crc32", "crc32c", "crc32+crc32c"))),
    )


def digest(kind: str, data: bytes) -> int:
    """By others' code."""
    crc32, crc32c = zlib.crc32(data), int(google_crc32c.value(data))
    return {"crc32": crc32, "crc32c": crc32c, "crc32+crc32c": crc32c << 32 | crc32}[kind]


class Laid:
    """A case in memory: `source` and the array `pieces` that names it; `expected` is the blob, `digests` of groups."""

    def __init__(self, case: Case, seed: int = 1) -> None:
        self.case = case
        self.source = np.frombuffer(
            bytearray(random.Random(seed).randbytes(sum(row.space + row.nbytes for row in case.rows) + 2 * GUARD)), "u1"
        )
        self.places: list[tuple[int, int, int, int]] = []
        offset, place = case.head, GUARD
        for row in case.rows:
            offset, place = offset + row.gap, place + row.space
            self.places.append((offset, row.nbytes, place, row.group))
            offset, place = offset + row.nbytes, place + row.nbytes
        self.nbytes = offset + case.tail
        self.expected = bytearray(self.nbytes)
        inside: dict[int, bytes] = {}
        for offset, nbytes, place, _ in self.places:
            self.expected[offset : offset + nbytes] = self.source[place : place + nbytes].tobytes()
        for number in case.order:
            _, nbytes, place, group = self.places[number]
            if group >= 0 and nbytes:
                inside[group] = inside.get(group, b"") + self.source[place : place + nbytes].tobytes()
        self.digests = {group: digest(case.kind, data) for group, data in inside.items()}
        self.expected[: case.head] = self.head(self.digests)
        self.late = [LatePiece(0, case.head, self.head)] if case.head else []

    def head(self, digests: Mapping[int, int]) -> bytes:
        """What the late piece is made of."""
        return repr(sorted(digests.items())).encode()[: self.case.head].ljust(self.case.head, b".")

    def pieces(self, memory: Any, dropped: frozenset[int] = frozenset()) -> Any:
        """An array of pieces that lie in `memory` as they do in `source`; some are to be dropped."""
        address = memory.ctypes.data
        return make_pieces(
            [
                (offset, nbytes, 0 if number in dropped else address + place, group)
                for number in self.case.order
                for offset, nbytes, place, group in (self.places[number],)
            ]
        )


def check_round_trip(blob: Blob, case: Case, dropped: frozenset[int] = frozenset()) -> None:
    """Publish and fetch; every byte, digest and count is as it must be."""
    laid = Laid(case)
    kind: Any = case.kind
    published = blob.publish(laid.nbytes, laid.pieces(laid.source), laid.late, digest=kind, keep=laid.source)
    assert (published.name, published.nbytes, published.digests) == (blob.name, laid.nbytes, laid.digests)
    assert blob.stat() == (laid.nbytes, published.etag)
    assert blob.read(0, laid.nbytes) == laid.expected

    memory = np.zeros(len(laid.source), "u1")
    fetched = blob.fetch(laid.pieces(memory, dropped), digest=kind, keep=memory, etag=published.etag)
    assert (fetched.digests, fetched.etag) == (laid.digests, published.etag)
    assert fetched.nbytes == sum(row.nbytes for row in case.rows)
    assert fetched.zero_copy_bytes + fetched.staged_bytes == fetched.nbytes
    due = np.zeros(len(laid.source), "u1")
    for number, (_, nbytes, place, _) in enumerate(laid.places):
        if number not in dropped:
            due[place : place + nbytes] = laid.source[place : place + nbytes]
    assert np.array_equal(memory, due)  # and nothing beside the pieces was touched


def one_piece(data: Any, group: int = 0) -> Any:
    """An array of the one piece that a numpy array is, which it does not keep alive."""
    return make_pieces([(0, data.nbytes, data.ctypes.data, group)])


def noise_array(nbytes: int, seed: int = 1) -> Any:
    return np.frombuffer(random.Random(seed).randbytes(nbytes), "u1")
