"""Archives that are written as objects: made in memory before the clock starts, each with files of drawn sizes."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlstor.errors import UsageError
from mlstor.stream.draws import Purpose, of_index

if TYPE_CHECKING:
    from mlstor._io import Pattern

#: Formats that AIStore reads (cmn/archive).
FORMATS = (".tar", ".tgz", ".tar.gz", ".zip", ".tar.lz4")
#: Files in a shard at most, and their sizes where nothing is said (tools/readers/arch.go).
MOST_FILES = 10_000
LEAST_BYTES, MOST_BYTES = 1 << 10, 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_SPEED_OVER_SIZE = 1  # of gzip: the data does not shrink anyway
# LZ4 frame format (lz4_Frame_format.md): magic, version 1 with independent blocks, blocks of 4 MiB
_LZ4_MAGIC, _LZ4_FLAGS, _LZ4_BLOCK_CODE, _LZ4_BLOCK_BYTES = b"\x04\x22\x4d\x18", 0x60, 0x70, 4 << 20
_LZ4_STORED = 1 << 31


@dataclass(frozen=True)
class Shards:
    """What shards look like.

    Attributes
    ----------
    format : str
        One of `FORMATS`.
    count : int
        Files in each, 0: as many as fit into the object's size.
    least_bytes, most_bytes : int
        Of a file.
    prefix : str
        Directory of the files, "" for none.
    seed : int
        Of the sizes.
    """

    format: str
    count: int
    least_bytes: int
    most_bytes: int
    prefix: str
    seed: int

    def sizes(self, index: int, nbytes: int) -> list[int]:
        """Bytes of the files in shard `index`, which is to have `nbytes` bytes as a TAR: one file at least, and no more
        than fit.
        """
        most = self.count or MOST_FILES
        numbers = (np.uint64(index) << np.uint64(16)) + np.arange(most, dtype=np.uint64)
        low, high = min(self.least_bytes, nbytes), min(self.most_bytes, nbytes)
        drawn = np.uint64(low) + of_index(numbers, self.seed, Purpose.MEMBER) % np.uint64(high - low + 1)
        in_tar = np.uint64(_BLOCK) + (drawn + np.uint64(_BLOCK - 1)) // np.uint64(_BLOCK) * np.uint64(_BLOCK)
        fitting = int(np.searchsorted(np.cumsum(in_tar), np.uint64(max(0, nbytes - 2 * _BLOCK)), side="right"))
        sizes: list[int] = drawn[: max(1, fitting)].tolist()
        return sizes

    def make(self, index: int, nbytes: int, pattern: Pattern) -> bytes:
        """The archive; its files hold what `pattern` makes."""
        files = [(self._name(number), size) for number, size in enumerate(self.sizes(index, nbytes))]
        if self.format == ".zip":
            return _zip(files, pattern)
        tar = _tar(files, pattern)
        if self.format in (".tgz", ".tar.gz"):
            return gzip.compress(tar, _SPEED_OVER_SIZE)
        return _lz4(tar) if self.format == ".tar.lz4" else tar

    def _name(self, number: int) -> str:
        leaf = f"obj-{number:06d}.txt"
        return f"{self.prefix.strip('/')}/{leaf}" if self.prefix.strip("/") else leaf


def shards(format: str, count: int, least: int, most: int, prefix: str, seed: int, object_bytes: int) -> Shards:
    """What ``-arch.format``, ``-arch.num-files``, ``-arch.minsize``, ``-arch.maxsize`` and ``-arch.prefix`` ask for;
    objects have `object_bytes` bytes at most.

    Raises
    ------
    UsageError
        If they can't be had together.
    """
    format = format if not format or format.startswith(".") else f".{format}"
    if format and format not in FORMATS:
        raise UsageError(f"-arch.format={format}: AIStore reads {', '.join(FORMATS)}")
    if count > MOST_FILES:
        raise UsageError(f"-arch.num-files={count}: give {MOST_FILES} at most")
    if not least and not most:
        least, most = LEAST_BYTES, MOST_BYTES
    most = most or least
    if most < least:
        raise UsageError(f"-arch.maxsize={most} is less than -arch.minsize={least}: exchange them")
    if count * least > object_bytes:
        raise UsageError(f"{count} files of {least} bytes do not fit into objects of {object_bytes}: raise -maxsize")
    return Shards(format or ".tar", count, least, most, prefix, seed)


def _tar(files: list[tuple[str, int]], pattern: Pattern) -> bytes:
    total = sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for _, size in files) + 2 * _BLOCK
    made = bytearray(total)
    pattern.fill(made)
    at = 0
    for name, size in files:
        member = tarfile.TarInfo(name)
        member.size = size
        header = member.tobuf(tarfile.PAX_FORMAT)
        if len(header) != _BLOCK:  # a name too long for one block
            raise UsageError(f"-arch.prefix is too long: {name!r} does not fit into a TAR's header")
        made[at : at + _BLOCK] = header
        end = at + _BLOCK + size
        at = at + _BLOCK + -(-size // _BLOCK) * _BLOCK
        made[end:at] = bytes(at - end)
    made[at:] = bytes(total - at)
    return bytes(made)


def _zip(files: list[tuple[str, int]], pattern: Pattern) -> bytes:
    out = io.BytesIO()
    data = bytearray(max(size for _, size in files))
    pattern.fill(data)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, size in files:
            archive.writestr(name, memoryview(data)[:size])
    return out.getvalue()


def _lz4(data: bytes) -> bytes:
    """A frame of stored blocks: the data would not shrink."""
    descriptor = bytes([_LZ4_FLAGS, _LZ4_BLOCK_CODE])
    parts = [_LZ4_MAGIC, descriptor, bytes([xxh32(descriptor) >> 8 & 0xFF])]
    for at in range(0, len(data), _LZ4_BLOCK_BYTES):
        block = data[at : at + _LZ4_BLOCK_BYTES]
        parts += [(len(block) | _LZ4_STORED).to_bytes(4, "little"), block]
    return b"".join([*parts, bytes(4)])


def xxh32(data: bytes) -> int:
    """XXH32 with seed 0 of less than 4 bytes (github.com/Cyan4973/xxHash, doc/xxhash_spec.md): a frame's descriptor."""
    assert len(data) < 4
    mask = 2**32 - 1
    value = 0x165667B1 + len(data)
    for byte in data:
        value = (value + byte * 0x165667B1) & mask
        value = (value << 11 | value >> 21) * 0x9E3779B1 & mask
    value = (value ^ value >> 15) * 0x85EBCA77 & mask
    value = (value ^ value >> 13) * 0xC2B2AE3D & mask
    return value ^ value >> 16
