"""The safetensors format: where tensors lie in a file, and what its header says. No torch, no I/O.

A file is the length of a JSON text (u64, little-endian), that text, padded by spaces, and the tensors' bytes without
holes. Readers refuse holes, but not spaces: so the padding puts the largest tensors where direct I/O needs no copy of
them. The format has no checksums; ours stand in the metadata, which other readers hand on as text.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mlstor.errors import CorruptionError, UsageError

#: Bits of an element, by the format's name of its type.
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
BITS |= dict.fromkeys(("I32", "U32", "F32"), 32)
BITS |= dict.fromkeys(("I64", "U64", "F64", "C64"), 64)

METADATA = "__metadata__"
#: Key in the metadata. Its value in hexadecimal digits, 8 for each number: bytes of the header, CRC-32 of each tensor
#: by offset, CRC-32 of the header with zeros in place of these last eight digits.
SUMS = "mlstor.crc32"

_LENGTH = struct.Struct("<Q")
#: The safetensors package refuses longer headers (its MAX_HEADER_SIZE).
_MOST_HEADER_BYTES = 100_000_000
_PAGE = 4096
#: The package pads by less than 8 spaces. Ours are never fewer: so sums that a program has copied along with the
#: metadata don't fit its header's length, and are not taken for those of its tensors.
_LEAST_PADDING = 8
#: Tensors from here on are worth a place where direct I/O needs no copy.
_LARGE_BYTES = 256 << 10
_HEAD_BYTES = 64 << 10


class Tensor(NamedTuple):
    """What is to be laid out."""

    name: str
    #: the format's name of it, as F32
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    #: of its memory; only its remainder modulo 4096 matters
    address: int = 0


class Placed(NamedTuple):
    """A tensor and its place in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    #: in the file, bytes
    offset: int


class Layout(NamedTuple):
    """Where everything lies, by offset; the header's text around its sums."""

    placed: tuple[Placed, ...]
    #: of the length and the padded text: where the first tensor starts
    header_nbytes: int
    #: of the file
    nbytes: int
    before: bytes
    after: bytes


class Header(NamedTuple):
    """What a file says of itself."""

    #: by offset
    tensors: dict[str, Placed]
    #: without the sums
    metadata: dict[str, str]
    #: CRC-32 by name; None if the file has none of its own
    sums: dict[str, int] | None
    nbytes: int


def lay_out(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> Layout:
    """Give each tensor its place; every one is aligned to its element.

    Raises
    ------
    UsageError
        For a name that the format keeps for itself, metadata that is no text, or a header beyond 100 MB.
    """
    if any(tensor.name == METADATA for tensor in tensors):
        raise UsageError(f"no tensor can be called {METADATA!r} in a safetensors file: rename it")
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise UsageError("the metadata of a safetensors file are text by text: convert keys and values to str")
    order, residue = _order(tensors)
    described: dict[str, Any] = {}
    position = 0
    for tensor in order:
        end = position + tensor.nbytes
        described[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    own = {key: value for key, value in metadata.items() if key != SUMS}
    before = _text({METADATA: {**own, SUMS: ""}})[: -len(b'"}}')]
    after = b'"}' + (b"," + _text(described)[1:] if described else b"}")
    least = _LENGTH.size + len(before) + 8 * (len(order) + 2) + len(after) + _LEAST_PADDING
    header_nbytes = least + (residue - least) % _PAGE
    if header_nbytes > _MOST_HEADER_BYTES:
        raise UsageError(f"{len(order)} tensors make a header of over 100 MB, which safetensors refuses: save fewer")
    after += b" " * (header_nbytes - least + _LEAST_PADDING)
    placed = []
    offset = header_nbytes
    for tensor in order:
        placed.append(Placed(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, offset))
        offset += tensor.nbytes
    return Layout(tuple(placed), header_nbytes, offset, before, after)


def _order(tensors: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """The tensors in the order of the file, and where the first one starts modulo 4096 (a multiple of 8).

    Whole pages that share a remainder come first: each leaves the next one congruent. One large tensor of odd length
    may follow; the others by falling alignment, then by name, as the package has it.
    """
    paged = [tensor for tensor in tensors if tensor.nbytes >= _LARGE_BYTES and tensor.nbytes % _PAGE == 0]
    rest = [tensor for tensor in tensors if tensor.nbytes < _LARGE_BYTES or tensor.nbytes % _PAGE]
    rest.sort(key=lambda tensor: (-BITS[tensor.dtype], tensor.name))
    odd = max((tensor for tensor in rest if tensor.nbytes % 8 == 0), key=lambda tensor: tensor.nbytes, default=None)
    weights: Counter[int] = Counter()
    for tensor in [*paged, *([odd] if odd else [])]:
        if tensor.address % 8 == 0:
            weights[tensor.address % _PAGE] += tensor.nbytes
    residue = weights.most_common(1)[0][0] if weights else 0
    paged.sort(key=lambda tensor: (tensor.address % _PAGE != residue, tensor.name))
    if odd and odd.nbytes >= _LARGE_BYTES:
        rest.remove(odd)
        rest.insert(0, odd)
    return paged + rest, residue


def header(layout: Layout, crcs: Mapping[str, int]) -> bytes:
    """The file's first ``header_nbytes`` bytes.

    Parameters
    ----------
    crcs
        CRC-32 (zlib's) of each tensor's bytes, by name.
    """
    numbers = (layout.header_nbytes, *(crcs[tensor.name] for tensor in layout.placed))
    sums = b"".join(b"%08x" % number for number in numbers)
    length = _LENGTH.pack(layout.header_nbytes - _LENGTH.size)
    own = zlib.crc32(b"".join((length, layout.before, sums, b"0" * 8, layout.after)))
    return b"".join((length, layout.before, sums, b"%08x" % own, layout.after))


def looks_like(first: bytes, nbytes: int) -> bool:
    """Whether a file of `nbytes` bytes that begins with `first` (9 bytes at least) has the shape of safetensors."""
    return len(first) > 8 and first[8:9] == b"{" and 8 + _LENGTH.unpack_from(first)[0] <= nbytes


def read_header(read: Callable[[int, int], bytes], nbytes: int, name: str) -> Header:
    """Read the header and check that it describes the file.

    Parameters
    ----------
    read
        ``read(offset, nbytes)`` gives that many bytes of the file.
    nbytes
        Size of the file.
    name
        Of the file, for messages.

    Raises
    ------
    CorruptionError
        The header is damaged, or contradicts the file's size or itself.
    UsageError
        For a type of elements that is not known here.
    """
    first = read(0, min(nbytes, _HEAD_BYTES))
    end = _LENGTH.size + _LENGTH.unpack_from(first)[0] if len(first) >= _LENGTH.size else nbytes + 1
    if end > nbytes or end > _MOST_HEADER_BYTES:
        raise CorruptionError(f"{name}: no safetensors file, or cut short: its header would end at {end} of {nbytes}")
    raw = first[:end] if end <= len(first) else first + read(len(first), end - len(first))
    try:
        described = json.loads(raw[_LENGTH.size :].decode(), object_pairs_hook=_once)
        if not isinstance(described, dict):
            raise ValueError("it is no JSON object")
        metadata = described.pop(METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are no text by text")
        said = metadata.pop(SUMS, None)
        sums = None if said is None else _sums(raw, said, len(described))
        tensors = _placed(described, end, nbytes)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{name}: the safetensors header is damaged: {error}") from None
    except LookupError as error:
        raise UsageError(f"{name}: elements of type {error.args[0]!r} are not known here: is mlstor too old?") from None
    by_name = None if sums is None else dict(zip(tensors, sums, strict=True))
    return Header(tensors, metadata, by_name, end)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} stands there more than once")
    return found


def _sums(raw: bytes, said: str, count: int) -> list[int] | None:
    """CRC-32s by offset, after the header's own is found right; None if they are those of another header."""
    numbers = [int(said[at : at + 8], 16) for at in range(0, len(said), 8)]
    if numbers[:1] != [len(raw)]:
        return None  # copied by a program that keeps metadata and writes other tensors
    if len(said) != 8 * (count + 2):
        raise ValueError(f"it has {len(said)} digits of sums for {count} tensors")
    zeroed = raw.replace(said.encode(), said[:-8].encode() + b"0" * 8, 1)
    if zlib.crc32(zeroed) != numbers[-1]:
        raise ValueError("its CRC-32 is not the one that was written")
    return numbers[1:-1]


def _placed(described: dict[str, Any], data_offset: int, nbytes: int) -> dict[str, Placed]:
    """The tensors by offset; LookupError for an unknown type, ValueError for what can't be."""
    found = []
    for name, one in described.items():
        if not isinstance(one, dict) or set(one) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = one["dtype"], one["shape"], one["data_offsets"]
        numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers) or len(offsets) != 2:
            raise ValueError(f"tensor {name!r} has the shape {shape!r} and the place {offsets!r}")
        if not isinstance(dtype, str):
            raise ValueError(f"tensor {name!r} has elements of type {dtype!r}")
        bits = BITS[dtype]
        for number in [0] if 0 in shape else shape:
            bits *= number
            if bits > 8 * nbytes:  # more than the file has; products of more digits take long
                break
        if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
            raise ValueError(f"tensor {name!r} of {dtype} {shape} lies in {offsets[1] - offsets[0]} bytes")
        found.append(Placed(name, dtype, tuple(shape), bits // 8, data_offset + offsets[0]))
    found.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    position = data_offset
    for tensor in found:
        if tensor.offset != position:
            raise ValueError(f"tensor {tensor.name!r} starts at {tensor.offset}, where {position} is due")
        position += tensor.nbytes
    if position != nbytes:
        raise ValueError(f"the tensors end at {position}, the file at {nbytes}: was its writer interrupted?")
    return {tensor.name: tensor for tensor in found}


def _text(value: object) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"names and metadata of a safetensors file are Unicode: {error.object!r} is not") from None
