"""One large object on its way: ranges of the source that become parts of the destination, many at once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from mlstor.storage import crc32c
from mlstor.storage.transfers import COMPLETION_DTYPE, Failure, Kind, Op
from mlstor.storage.uploads import Part

if TYPE_CHECKING:
    from mlstor.copy.parts import Target


class Large:
    """Its parts, and what became of them. `Mover` moves it on.

    Attributes
    ----------
    upload_id : str
        Empty until the upload has begun.
    waiting : list
        Slots whose part was read before that.
    flying : int
        Slots that hold parts of it.
    ended : bool
        The upload was completed or aborted, or is about to be.
    version : int
        Of the checksum that the source says, see `version_of`; 0 without one.
    failure : tuple or None
        Of the first failure: get or put, its completion, what is said of it, and whether bytes were others.
    """

    def __init__(self, index: int, key: str, nbytes: int, part_bytes: int, target: Target) -> None:
        self.index, self.key, self.nbytes, self.part_bytes, self.target = index, key, nbytes, part_bytes, target
        self.count = -(-nbytes // part_bytes)
        self.read = np.zeros(self.count, COMPLETION_DTYPE)
        self.wrote = np.zeros(self.count, COMPLETION_DTYPE)
        self.upload_id = ""
        self.begins = self.ended = False
        self.next = self.written = self.flying = 0
        self.waiting: list[int] = []
        self.failure: tuple[str, Any, Failure | None, bool] | None = None
        self.source_crc: int | None = None
        self.version = 0
        self.began_ns = time.monotonic_ns()

    def span(self, number: int) -> tuple[int, int]:
        """Offset and bytes of a part."""
        offset = number * self.part_bytes
        return offset, min(self.part_bytes, self.nbytes - offset)

    def fail(self, op: str, row: Any, failure: Failure | None, damaged: bool = False) -> None:
        """Nothing more of it is begun; the first failure is what counts."""
        if self.failure is None:
            self.failure = op, row, failure, damaged

    @property
    def is_read(self) -> bool:
        """Whether all its parts were read well."""
        return bool((self.read["attempts"] > 0).all() and (self.read["kind"] == Kind.OK).all())

    def changed(self) -> bool:
        """Whether its parts are of more than one version of the object."""
        return len(np.unique(self.read["etag"])) > 1

    def crc(self) -> int:
        """CRC32C of what was read."""
        crcs = self.read["digest_value"].tolist()
        crc: int = crcs[0]
        for number in range(1, self.count):
            crc = crc32c.combine(crc, crcs[number], self.span(number)[1])
        return crc

    def parts(self, with_crc: bool) -> list[Part]:
        """Those that were written."""
        etags = self.wrote["etag"].tolist()
        crcs = self.read["digest_value"].tolist()
        return [
            Part(number + 1, self.span(number)[1], etags[number].decode(), crcs[number] if with_crc else None)
            for number in range(self.count)
        ]


def failed_row(op: Op, kind: Kind, result: int, end_ns: int) -> Any:
    """A completion that no transfer gave."""
    row = np.zeros((), COMPLETION_DTYPE)
    row["op"], row["kind"], row["result"], row["attempts"] = op, kind, result, 1
    for name in ("start_ns", "attempt_ns", "first_byte_ns", "end_ns"):
        row[name] = end_ns
    return row
