"""The checksums that mlstor adds to a distributed checkpoint, where stock torch does not look.

Beside each data file ``__0_0.distcp`` lies ``__0_0.distcp.sums``: a CRC32C of every chunk of the file, headers and all,
so that any range of bytes can be verified by reading the chunks that it touches. Stock torch opens only files that
``.metadata`` names. ``.metadata`` itself ends with a trailer, behind the pickle where readers of pickles stop: it holds
its own CRC-32, and says which sums belong to which data file, so that a file that another writer has replaced is taken
as unverified and never for damage.

All numbers are little-endian. No torch here: `mlstor verify` reads these files without unpickling anything.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mlstor.errors import CorruptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Added to a data file's name.
SUFFIX = ".sums"
#: A chunk is as much as a reader of one byte must read, and a transfer of the engine's on the way to storage.
CHUNK_BYTES = 1 << 20
#: Bytes of a file id, ASCII.
ID_BYTES = 32

_MAGIC = b"MLSSUMS1"
_CRC32C = 2
#: magic, version, algorithm, bytes of a chunk, bytes of the data file, file id, number of items
_HEAD = struct.Struct(f"<8sHHIQ{ID_BYTES}sI")
_VERSION = 1
#: offset and bytes of the item, offset and bytes of its data
_ITEM_DTYPE = [("offset", "<u8"), ("nbytes", "<u8"), ("data_offset", "<u8"), ("data_nbytes", "<u8")]
_CRC = struct.Struct("<I")

_META_MAGIC = b"MLSMETA1"
#: bytes of the pickle, of the JSON, CRC-32 of all before this field, magic
_META_END = struct.Struct("<QII8s")


class Item(NamedTuple):
    """Where an item of a checkpoint lies in its data file."""

    offset: int
    nbytes: int
    #: where the tensor's elements are, in row-major order and of the type that ``.metadata`` says; 0: it is not so
    #: simple, and torch has to unpickle the item
    data_offset: int
    data_nbytes: int


class Sums(NamedTuple):
    """What a sums file says."""

    #: written at random once per data file; ``.metadata``'s trailer repeats it
    file_id: str
    #: size of the data file
    nbytes: int
    chunk_bytes: int
    items: tuple[Item, ...]
    #: CRC32C of each chunk
    values: NDArray[Any]

    def chunks(self, offset: int, nbytes: int) -> range:
        """The chunks that a stretch of the data file touches."""
        return range(offset // self.chunk_bytes, -(-(offset + nbytes) // self.chunk_bytes)) if nbytes else range(0)

    def span(self, chunk: int) -> tuple[int, int]:
        """Where a chunk starts and ends."""
        start = chunk * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.nbytes)


def chunk_count(nbytes: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many chunks a file has."""
    return -(-nbytes // chunk_bytes)


def pack(sums: Sums) -> bytes:
    """The content of a sums file.

    Raises
    ------
    ValueError
        If there is not one sum per chunk.
    """
    import numpy as np

    if len(sums.values) != chunk_count(sums.nbytes, sums.chunk_bytes):
        raise ValueError(f"{len(sums.values)} sums for {chunk_count(sums.nbytes, sums.chunk_bytes)} chunks")
    head = _HEAD.pack(
        *(_MAGIC, _VERSION, _CRC32C, sums.chunk_bytes, sums.nbytes, sums.file_id.encode(), len(sums.items))
    )
    items = np.array(list(sums.items), _ITEM_DTYPE).tobytes()
    body = head + items + sums.values.astype("<u4").tobytes()
    return body + _CRC.pack(zlib.crc32(body))


def parse(content: bytes, name: str) -> Sums:
    """The inverse of `pack`.

    Raises
    ------
    CorruptionError
        If it is no sums file, or not the one that was written.
    """
    import numpy as np

    if len(content) < _HEAD.size + _CRC.size or _CRC.unpack(content[-4:])[0] != zlib.crc32(content[:-4]):
        raise CorruptionError(f"{name}: the sums file is damaged: its own CRC-32 does not match")
    magic, version, algorithm, chunk_bytes, nbytes, file_id, count = _HEAD.unpack_from(content)
    if (magic, version, algorithm) != (_MAGIC, _VERSION, _CRC32C) or not chunk_bytes:
        raise CorruptionError(f"{name}: no sums file of a kind that this mlstor knows: was a newer one at work?")
    chunks = chunk_count(nbytes, chunk_bytes)
    table = np.dtype(_ITEM_DTYPE).itemsize * count
    if len(content) != _HEAD.size + table + 4 * chunks + _CRC.size:
        raise CorruptionError(f"{name}: the sums file has {len(content)} bytes, which does not fit what it counts")
    items = np.frombuffer(content, _ITEM_DTYPE, count, _HEAD.size)
    values = np.frombuffer(content, "<u4", chunks, _HEAD.size + table)
    return Sums(file_id.decode("ascii"), nbytes, chunk_bytes, tuple(Item(*row) for row in items.tolist()), values)


def seal(pickled: bytes, files: Mapping[str, str]) -> bytes:
    """The content of a ``.metadata``: the pickle and mlstor's trailer.

    Parameters
    ----------
    pickled
        What stock torch would write.
    files
        The file id of each data file, by name.
    """
    said = json.dumps({"sums": dict(files)}, separators=(",", ":")).encode()
    end = _META_END.pack(len(pickled), len(said), 0, _META_MAGIC)
    body = pickled + said + end[:12]
    return body + _CRC.pack(zlib.crc32(body)) + _META_MAGIC


def unseal(content: bytes, name: str) -> tuple[bytes, dict[str, str] | None]:
    """The pickle of a ``.metadata``, and the file id of each data file; None if stock torch wrote it.

    Raises
    ------
    CorruptionError
        If it has a trailer, and is not what was written.
    """
    if len(content) < _META_END.size or content[-len(_META_MAGIC) :] != _META_MAGIC:
        return content, None
    pickle_nbytes, said_nbytes, crc, _ = _META_END.unpack(content[-_META_END.size :])
    if crc != zlib.crc32(content[:-12]) or pickle_nbytes + said_nbytes + _META_END.size != len(content):
        raise CorruptionError(f"{name}: the metadata are not what was written: their CRC-32 does not match")
    try:
        ids = dict(json.loads(content[pickle_nbytes : pickle_nbytes + said_nbytes])["sums"])
    except (ValueError, TypeError, LookupError) as error:  # whoever made it: its CRC-32 is right
        raise CorruptionError(f"{name}: what mlstor adds to the metadata can't be read: {error}") from None
    return content[:pickle_nbytes], ids


def is_data_file(name: str) -> bool:
    """Whether a name is that of a distributed checkpoint's data file, or of its sums."""
    return re.fullmatch(r"__\d+_\d+\.distcp(" + re.escape(SUFFIX) + ")?", name) is not None
