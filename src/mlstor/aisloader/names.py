"""Names as aisloader gives them, so that each of the two tools finds what the other wrote.

``[SUBDIR/][%05x/]LEAF[.tar]``, where the second part is a counter from 1 on, modulo -num-subdirs, and LEAF is 32 drawn
characters, the counter from 0 on in hexadecimal, or that with the loader's id in its lowest bits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mlstor.errors import UsageError
from mlstor.stream.catalog import Packed
from mlstor.stream.draws import U64, Purpose, of_index

if TYPE_CHECKING:
    from mlstor.stream.sizes import Sizes

#: Characters of a drawn name, and what they are drawn from.
LEAF = 32
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz234567", np.uint8)
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_HEX_MOST = 16
_DIR = 5
_CHARS_PER_WORD = 12  # of 5 bits each, in 64
#: The seed with which AIStore hashes ids (cmn/cos: MLCG32).
_SEED = 1103515245
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Loader:
    """A loader's id, and in how many low bits of a name it is; drawn names have none."""

    id: int
    bits: int
    random: bool


def loader(loaderid: str, loadernum: int, hashlen: int, randomname: bool) -> Loader:
    """Which names a loader gives, by ``-loaderid``, ``-loadernum``, ``-loaderidhashlen`` and ``-randomname``.

    Raises
    ------
    UsageError
        If these exclude one another, or the id is not what they need.
    """
    if loadernum and hashlen:
        raise UsageError("-loadernum and -loaderidhashlen exclude one another: give one")
    if hashlen:
        if hashlen > 63:
            raise UsageError(f"-loaderidhashlen={hashlen} is a number of bits: give 1 to 63")
        bits = -(-hashlen // 4) * 4
        return Loader(xxh64(loaderid.encode(), _SEED) & ((1 << bits) - 1), bits, False)
    if not loaderid.isdecimal():
        raise UsageError(f"-loaderid={loaderid} is no number: give one, or -loaderidhashlen for a name")
    number = int(loaderid)
    if not loadernum:
        return Loader(number, 0, randomname)
    if number >= loadernum:
        raise UsageError(
            f"-loaderid={number} is not less than -loadernum={loadernum}: loaders are 0 to {loadernum - 1}"
        )
    return Loader(number, -(-(loadernum - 1).bit_length() // 4) * 4, False)


class Names:
    """Objects that a loader writes, by number from 0 on; the interface of `stream.catalog.Objects`.

    Parameters
    ----------
    loader
        Which names.
    sizes
        Bytes by number.
    seed
        Of drawn names.
    subdir
        Directory before all of them, "" for none.
    dirs
        Directories below it to which they are dealt, 0 for none.
    shard_percent, extension
        How many of them are shards, and what is appended to the names of those.
    """

    def __init__(
        self,
        loader: Loader,
        sizes: Sizes,
        seed: int,
        *,
        subdir: str = "",
        dirs: int = 0,
        shard_percent: int = 0,
        extension: str = "",
    ) -> None:
        self.loader, self._sizes, self._seed = loader, sizes, seed
        self._subdir = f"{subdir}/".encode() if subdir else b""
        self._dirs, self._shard_percent, self._extension = dirs, shard_percent, extension.encode()

    @property
    def digest(self) -> str:
        """Of what the names and sizes follow from, hex."""
        text = repr((self.loader, self._subdir, self._dirs, self._shard_percent, self._extension, str(self._sizes)))
        return hashlib.blake2b(f"{text} {self._seed}".encode(), digest_size=16).hexdigest()

    @property
    def total_bytes(self) -> int | None:
        """None: there is no end to them."""
        return None

    def __len__(self) -> int:
        return 1 << 48

    def name(self, index: int) -> str:
        """The name of an object."""
        return bytes(self.pack(np.array([index], np.uint64)).names).decode()

    def is_shard(self, indices: U64) -> npt.NDArray[np.bool_]:
        """Which of these are shards; each by a draw of its own."""
        if not self._shard_percent:
            return np.zeros(len(indices), np.bool_)
        drawn: npt.NDArray[np.bool_] = of_index(indices, self._seed, Purpose.SHARD) % np.uint64(100) < np.uint64(
            self._shard_percent
        )
        return drawn

    def pack(self, indices: U64) -> Packed:
        """Names and sizes of many objects, see `Objects.pack`."""
        indices = np.asarray(indices, np.uint64)
        count = len(indices)
        always = np.ones(count, np.bool_)
        columns: list[npt.NDArray[np.uint8]] = [_repeated(self._subdir, count)]
        shown = [np.broadcast_to(always[:, None], (count, len(self._subdir)))]
        if self._dirs:
            numbers = (indices + np.uint64(1)) % np.uint64(self._dirs)
            columns += [_digits(numbers, _DIR), _repeated(b"/", count)]
            shown.append(np.broadcast_to(always[:, None], (count, _DIR + 1)))
        leaf, leaf_shown = self._leaves(indices)
        columns += [leaf, _repeated(self._extension, count)]
        shards = self.is_shard(indices)
        shown += [leaf_shown, np.broadcast_to(shards[:, None], (count, len(self._extension)))]
        mask = np.concatenate(shown, axis=1)
        lengths = mask.sum(axis=1)
        ends = np.cumsum(lengths)
        return Packed(
            np.concatenate(columns, axis=1)[mask],
            (ends - lengths).astype(np.uint64),
            lengths.astype(np.uint32),
            self._sizes(indices),
        )

    def _leaves(self, indices: U64) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        count = len(indices)
        if self.loader.random:
            leaf = np.empty((count, LEAF), np.uint8)
            for first in range(0, LEAF, _CHARS_PER_WORD):
                bits = of_index(indices, self._seed ^ first, Purpose.NAME)
                for column in range(first, min(first + _CHARS_PER_WORD, LEAF)):
                    leaf[:, column] = _LETTERS[(bits & np.uint64(31)).astype(np.intp)]
                    bits = bits >> np.uint64(5)
            return leaf, np.ones((count, LEAF), np.bool_)
        numbers = indices << np.uint64(self.loader.bits)
        if self.loader.bits:
            numbers = numbers | np.uint64(self.loader.id)
        leaf = _digits(numbers, _HEX_MOST)
        # leading zeros are not shown, but the last digit always is
        shown = np.maximum.accumulate(leaf != ord("0"), axis=1)
        shown[:, -1] = True
        return leaf, shown


def _repeated(text: bytes, count: int) -> npt.NDArray[np.uint8]:
    return np.broadcast_to(np.frombuffer(text, np.uint8), (count, len(text)))


def _digits(numbers: U64, width: int) -> npt.NDArray[np.uint8]:
    shifts = np.arange(4 * (width - 1), -1, -4, dtype=np.uint64)
    digits: npt.NDArray[np.uint8] = _HEX[((numbers[:, None] >> shifts) & np.uint64(15)).astype(np.intp)]
    return digits


# Primes of XXH64 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md).
_P1, _P2, _P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P4, _P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5


def xxh64(data: bytes, seed: int = 0) -> int:
    """XXH64 of a short text: the loader's name."""

    def rotated(value: int, by: int) -> int:
        return (value << by | value >> (64 - by)) & _MASK

    def stirred(lane: int, word: int) -> int:
        return rotated((lane + word * _P2) & _MASK, 31) * _P1 & _MASK

    at, end = 0, len(data)
    if end >= 32:
        lanes = [seed + _P1 + _P2, seed + _P2, seed, seed - _P1]
        while at + 32 <= end:
            lanes = [
                stirred(lane, int.from_bytes(data[at + 8 * i : at + 8 * i + 8], "little"))
                for i, lane in enumerate(lanes)
            ]
            at += 32
        value = sum(rotated(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True)) & _MASK
        for lane in lanes:
            value = ((value ^ stirred(0, lane)) * _P1 + _P4) & _MASK
    else:
        value = seed + _P5
    value = (value + end) & _MASK
    for width in (8, 4, 1):
        while at + width <= end:
            word = int.from_bytes(data[at : at + width], "little")
            at += width
            if width == 8:
                value = (rotated(value ^ stirred(0, word), 27) * _P1 + _P4) & _MASK
            elif width == 4:
                value = (rotated(value ^ (word * _P1 & _MASK), 23) * _P2 + _P3) & _MASK
            else:
                value = rotated(value ^ (word * _P5 & _MASK), 11) * _P1 & _MASK
    value = (value ^ value >> 33) * _P2 & _MASK
    value = (value ^ value >> 29) * _P3 & _MASK
    return value ^ value >> 32
