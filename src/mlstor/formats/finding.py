"""What a check of a file found, one record or tensor at a time."""

from __future__ import annotations

from typing import Literal, NamedTuple

from mlstor.errors import MlstorError

Status = Literal["ok", "unverified", "error", "damaged"]
"""unverified: readable and well formed, but nothing says what the bytes were; error: it could not be read."""


class Finding(NamedTuple):
    """What became of one record of a file, or of the file as a whole."""

    #: of the file, as in messages
    name: str
    #: of the file's parts, as ``data/3``; empty for the whole file
    record: str
    #: in it, as ``state['model']['w']``; empty if there is none, or if it is not known
    tensor: str
    #: where in the file, bytes
    offset: int
    nbytes: int
    status: Status
    #: a sentence; empty if all is well
    why: str


def whole(name: str, nbytes: int, status: Status, why: str) -> Finding:
    """A finding about a file as a whole."""
    return Finding(name, "", "", 0, nbytes, status, why)


def reason(error: MlstorError | OSError, name: str) -> str:
    """The text of an error about the file `name`, which a finding names already."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).removeprefix(f"{name}: ")
