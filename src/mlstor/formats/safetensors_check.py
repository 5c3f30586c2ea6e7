"""A safetensors file, read through: its structure, and its sums where mlstor wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlstor.blob.types import require_same
from mlstor.errors import CorruptionError
from mlstor.formats.finding import Finding, reason, whole
from mlstor.formats.safetensors_file import read_header

if TYPE_CHECKING:
    from mlstor.blob.types import Blob, BlobInfo


def check_safetensors(blob: Blob, info: BlobInfo) -> Iterator[Finding]:
    """One finding per tensor, or one for the whole file if its header is damaged.

    Raises
    ------
    OSError
        If it can't be read.
    UsageError
        For a type of elements that is not known.
    """
    from mlstor.blob.types import make_pieces

    try:
        header = read_header(blob.read, info.nbytes, blob.name)
    except CorruptionError as error:
        require_same(blob, info.etag)
        yield whole(blob.name, info.nbytes, "damaged", reason(error, blob.name))
        return
    tensors = list(header.tensors.values())
    known = header.sums is not None
    rows = [(one.offset, one.nbytes, 0, group if known else -1) for group, one in enumerate(tensors)]
    digests = blob.fetch(make_pieces(rows), etag=info.etag).digests
    for group, one in enumerate(tensors):
        finding = Finding(blob.name, "", one.name, one.offset, one.nbytes, "ok", "")
        if header.sums is None:
            yield finding._replace(
                status="unverified", why="the format has no checksums, and the file none of mlstor's"
            )
        elif digests.get(group, 0) != (crc := header.sums[one.name]):
            why = (
                f"its CRC-32 is {digests.get(group, 0):08x}, not {crc:08x} as the file says: it is not what was written"
            )
            yield finding._replace(status="damaged", why=why)
        else:
            yield finding
