"""Checkpoints of every kind, read through without loading: what a file is, and which check is for it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Literal

from mlstor.blob.types import require_same
from mlstor.errors import UsageError
from mlstor.formats.dcp_check import METADATA, check_dcp, interrupted
from mlstor.formats.finding import Finding, reason, whole
from mlstor.formats.marker_check import check_markers
from mlstor.formats.safetensors_check import check_safetensors
from mlstor.formats.safetensors_file import looks_like
from mlstor.formats.zip_check import Extent, check_zip
from mlstor.formats.zip_directory import kind_of

if TYPE_CHECKING:
    from mlstor.blob.types import Blob, BlobDirectory, BlobInfo

#: Files of a directory that are looked at. What ends with .bin may be anything: it counts only if it looks like it.
SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".bin")
#: Enough to tell a tar, whose magic is at 257.
_HEAD_BYTES = 512
#: Where a zip whose beginning is damaged still shows itself: its end record and a comment of any length.
_TAIL_BYTES = (64 << 10) + 22
#: Of a save without collectives, one per rank.
_RANKS_METADATA = re.compile(r"__\d+\.metadata")


def scrub(blob: Blob) -> Iterator[Finding]:
    """Read a file through and check all that can be checked; nothing of it is unpickled.

    Parameters
    ----------
    blob
        A file of torch.save or of safetensors, by whatever program.

    Yields
    ------
    Finding
        At least one; what can't be read is one too, with the status ``error``.
    """
    yield from _guarded(blob.name, partial(_check, blob))


def _check(blob: Blob) -> Iterator[Finding]:
    info = blob.stat()
    try:
        yield from _check_kind(blob, info, _kind(blob, info))
    except OSError as error:
        if error.errno == errno.ENODATA:
            require_same(blob, info.etag)
        raise


def _check_kind(blob: Blob, info: BlobInfo, kind: str) -> Iterator[Finding]:
    if kind == "zip":
        yield from check_zip(blob, Extent(0, info.nbytes), info.etag)
    elif kind == "safetensors":
        yield from check_safetensors(blob, info)
    elif kind == "legacy":
        _read_through(blob, info)
        yield whole(blob.name, info.nbytes, "unverified", "the format of torch before 1.6 has no checksums")
    else:
        why = "it begins neither as a file of torch.save nor as one of safetensors" if info.nbytes else "it is empty"
        yield whole(blob.name, info.nbytes, "damaged", why)


def _kind(blob: Blob, info: BlobInfo) -> Literal["zip", "legacy", "safetensors", "unknown"]:
    first = blob.read(0, min(_HEAD_BYTES, info.nbytes))
    kind = kind_of(first)
    if kind in ("legacy", "tar"):
        return "legacy"
    if kind == "unknown":
        if looks_like(first, info.nbytes) or (first and blob.name.endswith(".safetensors")):
            return "safetensors"
        # A zip whose first bytes are damaged.
        tail_nbytes = min(_TAIL_BYTES, info.nbytes)
        return "zip" if b"PK\5\6" in blob.read(info.nbytes - tail_nbytes, tail_nbytes) else "unknown"
    return "zip"


def _read_through(blob: Blob, info: BlobInfo) -> None:
    from mlstor.blob.types import make_pieces

    blob.fetch(make_pieces([(0, info.nbytes, 0, -1)]), etag=info.etag)


def scrub_directory(directory: BlobDirectory, names: Iterable[str]) -> Iterator[Finding]:
    """Check the checkpoints that lie directly in a directory.

    Parameters
    ----------
    directory
    names
        Of all that is in it; others than those of checkpoints are left alone.

    Yields
    ------
    Finding
        None if there is no checkpoint.
    """
    names = sorted(names)
    all_metadata = [name for name in names if name == METADATA or _RANKS_METADATA.fullmatch(name)]
    for name in all_metadata:
        yield from _guarded(directory.blob(name).name, partial(check_dcp, directory, name))
    if not all_metadata:
        yield from interrupted(directory, names)
    yield from _guarded(directory.name, partial(check_markers, directory, names))
    for name in names:
        suffix = os.path.splitext(name)[1]
        if suffix in SUFFIXES and not name.startswith("."):
            blob = directory.blob(name)
            yield from _guarded(blob.name, partial(_check_recognised if suffix == ".bin" else _check, blob))


def _check_recognised(blob: Blob) -> Iterator[Finding]:
    if _kind(blob, blob.stat()) != "unknown":
        yield from _check(blob)


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except OSError as error:
        yield whole(os.fsdecode(error.filename or name), 0, "error", reason(error, name))
    except UsageError as error:
        yield whole(name, 0, "error", reason(error, name))
