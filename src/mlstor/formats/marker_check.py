"""The markers of `mlstor.torch.CheckpointDirectory`: each says which file holds a checkpoint, and what it ends with."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mlstor.formats.finding import Finding, Status, whole

if TYPE_CHECKING:
    from mlstor.blob.types import BlobDirectory

#: Of a marker's JSON, as the class writes it.
FORMAT = "mlstor-checkpoint-1"
_NAME = re.compile(r"(.+-[0-9]{8,})\.json")
#: What is larger is no marker.
_MOST_BYTES = 64 << 10


def check_markers(directory: BlobDirectory, names: Sequence[str]) -> Iterator[Finding]:
    """One finding per marker. Other JSON files are left alone; one beside a file of its name is taken for a marker.

    Raises
    ------
    OSError
        If a file can't be read; data that are missing are a finding.
    """
    for name in names:
        match = _NAME.fullmatch(name)
        if not match:
            continue
        blob = directory.blob(name)
        nbytes = blob.stat().nbytes
        try:
            said = json.loads(blob.read(0, nbytes)) if nbytes <= _MOST_BYTES else {}
            if said["format"] != FORMAT:
                raise ValueError("it is of another format")
            data, size = str(said["data"]), int(said["nbytes"])
            offset, crc = int(said["directory_offset"]), int(said["directory_crc32"])
            if os.path.basename(data) != data or not data.startswith(match[1]):
                raise ValueError(f"it names {data!r}")
            if not 0 <= offset < size:
                raise ValueError(f"the zip's directory can't be at {offset} of {size}")
        except (ValueError, TypeError, LookupError) as error:
            if f"{match[1]}.pt" in names:
                why = f"the marker is damaged ({error}): its checkpoint does not count"
                yield whole(blob.name, nbytes, "damaged", why)
            continue
        yield whole(blob.name, nbytes, *_compare(directory, data, size, offset, crc))


def _compare(directory: BlobDirectory, data: str, nbytes: int, offset: int, crc: int) -> tuple[Status, str]:
    blob = directory.blob(data)
    try:
        found = blob.stat().nbytes
    except FileNotFoundError:
        return "damaged", f"{data}, which it names, is missing"
    if found != nbytes:
        return "damaged", f"{data} has {found} bytes, and was saved with {nbytes}"
    if zlib.crc32(blob.read(offset, nbytes - offset)) != crc:
        return "damaged", f"the zip's directory in {data} is not the one that was saved"
    return "ok", ""
