"""Files of the safetensors format on the engine: written durably, read straight to their memory, verified if ours."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mlstor.blob.target import open_blob
from mlstor.blob.types import LatePiece, make_pieces, require_same
from mlstor.errors import CorruptionError, MlstorError, UsageError
from mlstor.formats.safetensors_file import Header, Placed, Tensor, header, lay_out, read_header
from mlstor.torch import _stock
from mlstor.torch.loading import UnverifiedWarning
from mlstor.torch.saving import name_of, opening, parse_bandwidth
from mlstor.torch.storages import allocate

if TYPE_CHECKING:
    from mlstor._io import Engine
    from mlstor.storage.store import Store

#: By the format's name; types that torch packs into bytes (float4) and complex128 have none.
_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: How many names a message lists.
_MOST_NAMED = 20


def save_safetensors(
    tensors: Mapping[str, torch.Tensor],
    f: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    max_bandwidth: str | int | None = None,
    engine: Engine | None = None,
    store: Store | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Save named tensors to a file or an object that every reader of safetensors takes; return when it is durable.

    The file appears under its name whole, or not at all. The CRC-32 of each tensor is computed while it is written, and
    put into the file's metadata as ``mlstor.crc32``; `load_safetensors` and ``mlstor verify`` compare with it.

    Parameters
    ----------
    tensors
        Dense and contiguous, by name; no two may share memory. Those of other devices are copied to this host first.
    f
        A path, or the URL of an object (``s3://bucket/run/model.safetensors``).
    metadata
        Text by text, as ``{"format": "pt"}``.
    max_bandwidth
        Bytes per second at most, as ``"500MB/s"``. Default: no limit.
    engine
        The engine that writes files. Default: the process's own.
    store, options
        The object store, or the options to open it with. Default: by the URL.

    Raises
    ------
    UsageError
        For what the format can't hold; the message names the tensors.
    OSError
        If the storage fails, with errno and name. What was there before under the name is still there.
    """
    name = name_of(f)
    if sys.byteorder != "little":
        raise UsageError("safetensors files are little-endian: use the safetensors package on this host")
    if _stock.passes_to_torch():
        raise UsageError("save_safetensors writes real bytes: leave FakeTensorMode and torch's skip_data")
    bytes_per_s = parse_bandwidth(max_bandwidth)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise UsageError(f"metadata= takes text by text, as {{'format': 'pt'}}, not {type(metadata).__name__}")
    _check(tensors)
    held = {key: tensor.detach().cpu().resolve_conj().resolve_neg() for key, tensor in tensors.items()}
    layout = lay_out(
        [
            Tensor(key, _NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, tensor.data_ptr())
            for key, tensor in held.items()
        ],
        metadata or {},
    )
    pieces = [(one.offset, one.nbytes, held[one.name].data_ptr(), group) for group, one in enumerate(layout.placed)]

    def late(digests: Mapping[int, int]) -> bytes:
        return header(layout, {one.name: digests.get(group, 0) for group, one in enumerate(layout.placed)})

    open_blob(name, engine=engine, **opening(store, options)).publish(
        layout.nbytes,
        make_pieces(pieces),
        [LatePiece(0, layout.header_nbytes, late)],
        digest="crc32",
        keep=held,
        max_bandwidth=bytes_per_s,
    )


def load_safetensors(
    f: str | os.PathLike[str],
    device: str | torch.device | int = "cpu",
    *,
    into: Mapping[str, torch.Tensor] | None = None,
    verify: bool = True,
    engine: Engine | None = None,
    store: Store | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Load the tensors of a safetensors file or object, read in parallel straight to their memory.

    The format has no checksums. What `save_safetensors` wrote has them in its metadata, and is verified; a file of
    another program is checked for its structure only, and a warning says so.

    Parameters
    ----------
    f
        A path, or the URL of an object.
    device
        Where the tensors are wanted.
    into
        Tensors to fill instead of new ones: the same names, shapes and types as the file has. What is dense, contiguous
        and on this host is read without a copy of it; nothing is touched if anything differs.
    verify
        Compare with mlstor's checksums, where the file has them.
    engine
        The engine that reads files. Default: the process's own.
    store, options
        The object store, or the options to open it with. Default: by the URL.

    Returns
    -------
    dict of str to Tensor
        By name; the tensors of `into` if that was given.

    Raises
    ------
    CorruptionError
        If the file is not what was written; it names file, tensor and offset. The content of `into` is undefined then.
    UsageError
        If `into` does not fit, or the file holds types that torch has not.
    OSError
        If the storage fails, the file is cut short, or it was replaced while it was read.

    Warns
    -----
    UnverifiedWarning
        If the file has no checksums to compare with, unless `verify` is false.
    """
    name = name_of(f)
    if sys.byteorder != "little":
        raise UsageError("safetensors files are little-endian: use the safetensors package on this host")
    if _stock.passes_to_torch():
        raise UsageError("load_safetensors reads real bytes: leave FakeTensorMode and torch's skip_data")
    if into is not None and not isinstance(into, Mapping):
        raise UsageError(f"into= takes tensors by name, as a state dict has them, not {type(into).__name__}")
    other = [key for key, tensor in (into or {}).items() if not isinstance(tensor, torch.Tensor)]
    if other:
        raise UsageError(f"into= takes tensors alone, and these are none: {_listed(other)}")
    blob = open_blob(name, engine=engine, **opening(store, options))
    info = blob.stat()
    try:
        found = read_header(blob.read, info.nbytes, blob.name)
    except (MlstorError, OSError):
        require_same(blob, info.etag)
        raise
    unknown = sorted({one.dtype for one in found.tensors.values()} - set(_DTYPES))
    if unknown:
        raise UsageError(f"{blob.name}: torch has no type for elements of {', '.join(unknown)}")
    if into is not None:
        _compare(found, into, blob.name)
    placed = list(found.tensors.values())
    read = _destinations(placed, into)
    verifies = verify and found.sums is not None
    if verify and not verifies:
        warnings.warn(
            f"{blob.name}: loaded, but unverified: it holds none of mlstor's checksums, and the format has none",
            UnverifiedWarning,
            stacklevel=2,
        )
    rows = [
        (one.offset, one.nbytes, read[one.name].data_ptr(), group if verifies else -1)
        for group, one in enumerate(placed)
    ]
    digests = blob.fetch(make_pieces(rows), digest="crc32", keep=read, etag=info.etag).digests
    if verifies and found.sums is not None:
        damaged = [one for group, one in enumerate(placed) if digests.get(group, 0) != found.sums[one.name]]
        if damaged:
            raise _damage(blob.name, damaged, into is not None)
    if into is None:
        return {key: read[key].to(device) for key in sorted(read)}
    with torch.no_grad():
        for key, tensor in into.items():
            if read[key].data_ptr() == tensor.data_ptr():
                torch.autograd.graph.increment_version(tensor)  # autograd did not see the write
            else:
                tensor.copy_(read[key])
    return dict(into)


def _check(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse what the format can't hold."""
    if not isinstance(tensors, Mapping):
        raise UsageError(f"safetensors files hold tensors by name: give a dict of them, not {type(tensors).__name__}")
    unnamed = [key for key in tensors if not isinstance(key, str)]
    if unnamed:
        raise UsageError(f"names in a safetensors file are text, and these are not: {_listed(unnamed)}; convert them")
    other = [key for key, tensor in tensors.items() if not isinstance(tensor, torch.Tensor)]
    if other:
        raise UsageError(f"safetensors files hold tensors alone, and these are none: {_listed(other)}; use save()")
    meta = [key for key, tensor in tensors.items() if tensor.is_meta or _is_wrapper(tensor)]
    if meta:
        raise UsageError(
            f"these tensors have no memory of their own, as those on the meta device and DTensors: {_listed(meta)}; "
            "give tensors that have, as tensor.to_local() or tensor.full_tensor() does"
        )
    sparse = [key for key, tensor in tensors.items() if tensor.layout != torch.strided or tensor.is_nested]
    if sparse:
        raise UsageError(
            f"safetensors files hold dense tensors: {_listed(sparse)}; convert them by .to_dense(), or use save()"
        )
    unknown = [key for key, tensor in tensors.items() if tensor.dtype not in _NAMES or tensor.is_quantized]
    if unknown:
        types = ", ".join(sorted({str(tensors[key].dtype) for key in unknown}))
        raise UsageError(f"safetensors has no type for {types}: {_listed(unknown)}; convert them, or use save()")
    strided = [key for key, tensor in tensors.items() if not tensor.is_contiguous()]
    if strided:
        raise UsageError(f"safetensors files hold contiguous tensors: {_listed(strided)}; call .contiguous() on them")
    shared = _sharing(tensors)
    if shared:
        raise UsageError(
            f"these tensors share memory, which safetensors files can't hold: {_listed(shared)}; leave all but one "
            "out, .clone() them, or use save()"
        )


def _sharing(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that overlap with another."""
    spans: dict[torch.device, list[tuple[int, int, str]]] = {}
    for key, tensor in tensors.items():
        if tensor.nbytes:
            spans.setdefault(tensor.device, []).append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, key))
    names = set()
    for one in spans.values():
        one.sort()
        furthest, holder = 0, ""
        for start, end, key in one:
            if start < furthest:
                names |= {key, holder}
            if end > furthest:
                furthest, holder = end, key
    return sorted(names)


def _compare(found: Header, into: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse destinations that differ from what the file has."""
    differences = [f"{key!r} is not in the file" for key in into if key not in found.tensors]
    for key, one in found.tensors.items():
        if key not in into:
            differences.append(f"{key!r} is only in the file")
        elif tuple(into[key].shape) != one.shape:
            differences.append(f"{key!r} has the shape {list(into[key].shape)}, and {list(one.shape)} in the file")
        elif into[key].dtype != _DTYPES[one.dtype]:
            differences.append(f"{key!r} is of {into[key].dtype}, and of {_DTYPES[one.dtype]} in the file")
        elif not _has_memory(into[key]):
            differences.append(f"{key!r} is no dense tensor with memory of its own (of a DTensor, give to_local())")
        elif any(stride == 0 and size > 1 for size, stride in zip(into[key].shape, into[key].stride(), strict=True)):
            differences.append(f"{key!r} is expanded: several of its elements lie in one place")
    if differences:
        more = f"; and {len(differences) - _MOST_NAMED} more" if len(differences) > _MOST_NAMED else ""
        raise UsageError(f"{name} does not fit into what is given: {'; '.join(differences[:_MOST_NAMED])}{more}")


def _destinations(placed: Sequence[Placed], into: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The memory that each tensor is read to: that of `into` where it can be, else new."""
    read: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for one in placed:
        if into is None:
            break
        given = into[one.name].detach()
        # Tensors that share memory must not be read at the same time.
        place = given.untyped_storage().data_ptr()
        if given.device.type == "cpu" and _is_plain(given) and place not in seen:
            seen.add(place)
            read[one.name] = given
    new = [one for one in placed if one.name not in read]
    for one, storage in zip(new, allocate(one.nbytes for one in new), strict=True):
        read[one.name] = torch.empty(0, dtype=_DTYPES[one.dtype], device="cpu").set_(storage).view(one.shape)
    return read


def _has_memory(tensor: torch.Tensor) -> bool:
    without = tensor.is_meta or _stock.is_fake(tensor) or _stock.is_wrapper(tensor)
    return tensor.layout == torch.strided and not (without or tensor.is_nested)


def _is_wrapper(tensor: torch.Tensor) -> bool:
    dense = tensor.layout == torch.strided and not tensor.is_nested
    return dense and tensor.nbytes > 0 and tensor.untyped_storage().data_ptr() == 0


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _damage(name: str, damaged: Sequence[Placed], into: bool) -> CorruptionError:
    named = "; ".join(
        f"tensor {one.name!r} (bytes {one.offset} to {one.offset + one.nbytes} of the file)"
        for one in damaged[:_MOST_NAMED]
    )
    more = f" and {len(damaged) - _MOST_NAMED} more" if len(damaged) > _MOST_NAMED else ""
    undefined = "; the content of `into` is undefined now" if into else ""
    verb = "is" if len(damaged) == 1 else "are"
    return CorruptionError(f"{name}: {named}{more} {verb} not what was written: the CRC-32 differs{undefined}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(repr, names[:_MOST_NAMED])) + more
