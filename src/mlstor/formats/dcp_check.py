"""A directory of torch's distributed checkpoints, read through.

Where mlstor wrote it, every byte of a data file is compared with the sums beside it. Stock torch leaves none: there the
items are zips with CRC-32s of their own. ``.metadata`` says where the items are; of its pickle nothing is carried out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from mlstor.blob.types import read_all
from mlstor.errors import CorruptionError
from mlstor.formats import dcp_sidecar
from mlstor.formats.finding import Finding, reason, whole
from mlstor.formats.inert_pickle import Inert, read_inert
from mlstor.formats.zip_check import Extent, check_zip

if TYPE_CHECKING:
    from mlstor.blob.types import Blob, BlobDirectory, BlobInfo

METADATA = ".metadata"
_DATA_SUFFIX = ".distcp"
#: How an item of torch's own making begins.
_ZIP = b"PK\3\4"


class _Item(NamedTuple):
    name: str
    offset: int
    nbytes: int
    #: whether an extension of torch has transformed the bytes
    transformed: bool


def check_dcp(directory: BlobDirectory, name: str = METADATA) -> Iterator[Finding]:
    """Findings of ``.metadata`` and of every data file that it names.

    Parameters
    ----------
    directory
    name
        Of the metadata: without collectives each rank writes its own, as ``__0.metadata``.

    Raises
    ------
    OSError
        If a file can't be read; one that is missing is a finding.
    """
    metadata = directory.blob(name)
    content = read_all(metadata)
    try:
        pickled, ids = dcp_sidecar.unseal(content, metadata.name)
        items = _items(pickled)
    except (CorruptionError, ValueError) as error:
        why = reason(error, metadata.name) if isinstance(error, CorruptionError) else str(error)
        yield whole(metadata.name, len(content), "damaged", why)
        return
    if ids is None:
        why = "it has no checksum: stock torch wrote it"
        yield whole(metadata.name, len(content), "unverified", why)
    else:
        yield whole(metadata.name, len(content), "ok", "")
    for file, inside in sorted(items.items()):
        yield from _check_file(directory, file, inside, (ids or {}).get(file, ""))


def _items(pickled: bytes) -> dict[str, list[_Item]]:
    """The items of each data file; ValueError if the pickle is not torch's `Metadata`."""
    root = read_inert(pickled)
    found: dict[str, list[_Item]] = {}
    storage_data = _state(root, "storage_data")
    if not isinstance(storage_data, dict):
        raise ValueError("it is no metadata of torch: 'storage_data' is no dictionary")
    for index, info in storage_data.items():
        path, offset, nbytes = (_state(info, key) for key in ("relative_path", "offset", "length"))
        numbers = all(isinstance(number, int) and number >= 0 for number in (offset, nbytes))
        if not isinstance(path, str) or "\0" in path or not numbers:
            raise ValueError(f"an item lies at {offset!r} of {path!r}")
        transformed = bool(info.state.get("transform_descriptors"))
        found.setdefault(path, []).append(_Item(str(_state(index, "fqn")), offset, nbytes, transformed))
    return found


def _state(value: Any, key: str) -> Any:
    """An attribute of what torch has pickled."""
    if not isinstance(value, Inert) or not isinstance(value.state, dict) or key not in value.state:
        raise ValueError(f"it is no metadata of torch: {key!r} is missing")
    return value.state[key]


def _check_file(directory: BlobDirectory, name: str, items: Sequence[_Item], file_id: str) -> Iterator[Finding]:
    blob = directory.blob(name)
    try:
        info = blob.stat()
    except FileNotFoundError:
        yield whole(blob.name, 0, "damaged", "it is missing, and the metadata name it")
        return
    end = max(item.offset + item.nbytes for item in items)
    if end > info.nbytes:
        why = f"it ends at {info.nbytes}, but its items go to {end} as the metadata say"
        yield whole(blob.name, info.nbytes, "damaged", why)
        return
    if file_id:
        beside = directory.blob(name + dcp_sidecar.SUFFIX)
        try:
            sums = dcp_sidecar.parse(beside.read(0, beside.stat().nbytes), beside.name)
        except FileNotFoundError:
            yield whole(beside.name, 0, "damaged", "it is missing, and the metadata name it")
        except CorruptionError as error:
            yield whole(beside.name, 0, "damaged", reason(error, beside.name))
        else:
            if sums.file_id == file_id:
                yield from _check_sums(blob, info, items, sums)
                return
            yield whole(beside.name, 0, "unverified", "it belongs to another data file: another writer was here")
    for item in items:
        yield from _check_item(blob, info, item)


def _check_sums(blob: Blob, info: BlobInfo, items: Sequence[_Item], sums: dcp_sidecar.Sums) -> Iterator[Finding]:
    from mlstor.blob.types import make_pieces

    if info.nbytes != sums.nbytes:
        yield whole(
            blob.name, info.nbytes, "damaged", f"it has {info.nbytes} bytes, and was written with {sums.nbytes}"
        )
        return
    spans = [sums.span(chunk) for chunk in range(len(sums.values))]
    rows = [(start, end - start, 0, chunk) for chunk, (start, end) in enumerate(spans)]
    digests = blob.fetch(make_pieces(rows), digest="crc32c", etag=info.etag).digests
    damaged = [chunk for chunk, value in enumerate(sums.values.tolist()) if digests[chunk] != value]
    for chunk in damaged:
        start, end = spans[chunk]
        inside = [item.name for item in items if item.offset < end and start < item.offset + item.nbytes]
        crcs = f"{digests[chunk]:08x}, not {int(sums.values[chunk]):08x}"
        why = f"the CRC32C of the chunk is {crcs}: it is not what was written"
        yield Finding(blob.name, "", ", ".join(inside[:8]), start, end - start, "damaged", why)
    if not damaged:
        yield whole(blob.name, info.nbytes, "ok", "")
        return
    for is_damaged, run in groupby(range(len(spans)), key=set(damaged).__contains__):
        chunks = list(run)
        if not is_damaged:
            start, end = spans[chunks[0]][0], spans[chunks[-1]][1]
            yield Finding(blob.name, "", "", start, end - start, "ok", "")


def _check_item(blob: Blob, info: BlobInfo, item: _Item) -> Iterator[Finding]:
    """An item without sums beside it: by the CRC-32s inside of it, if it is a zip."""
    if item.transformed or blob.read(item.offset, min(4, item.nbytes)) != _ZIP:
        yield Finding(blob.name, "", item.name, item.offset, item.nbytes, "unverified", "it has no checksum")
        return
    for finding in check_zip(blob, Extent(item.offset, item.nbytes), info.etag):
        yield finding._replace(tensor=item.name)


def interrupted(directory: BlobDirectory, names: Sequence[str]) -> Iterator[Finding]:
    """Findings of data files without a ``.metadata`` beside them: a save that never was completed."""
    for name in names:
        if name.endswith(_DATA_SUFFIX):
            why = f"there is no {METADATA} beside it: the save was not completed; remove it, or save again"
            yield whole(directory.blob(name).name, 0, "damaged", why)
