"""Multipart uploads as `parts.PartedTransfers` uses them: what a store has to say about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlstor.storage.transfers import Digest


class Part(NamedTuple):
    """A part that was written: number from 1 on, size in bytes, ETag, and its CRC32C if it was computed."""

    number: int
    nbytes: int
    etag: str
    crc32c: int | None


class Uploads(Protocol):
    """A store's way to make an object of parts. Called from several threads at once; errors are `OSError`, where a
    server refused with attributes `status` and, if its own words are to stand in a `Failure`, `answer`.
    """

    #: parts of an upload at most
    most_parts: int

    def begin(self, key: str, digest: Digest) -> str:
        """Start an upload whose parts are sent with `digest`; its id."""

    def query(self, upload_id: str, number: int) -> str:
        """The canonical query of the PUT of a part."""

    def complete(self, key: str, upload_id: str, parts: Sequence[Part]) -> str:
        """Make the object of its parts, which are in order; its ETag, "" if the store gives none."""

    def abort(self, key: str, upload_id: str) -> None:
        """Forget an upload and its parts; one that isn't there any more is no error."""
