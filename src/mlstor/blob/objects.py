"""Objects of a store as blobs, and what is under a prefix as a directory of them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mlstor.blob.download import download
from mlstor.blob.types import BlobInfo, DigestKind, Fetched, LatePiece, Published, make_pieces
from mlstor.blob.upload import upload

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mlstor.blob.channel import Channel


class ObjectBlob:
    """See `types.Blob`.

    Parameters
    ----------
    channel
    key
        Relative to the store's URL.
    """

    def __init__(self, channel: Channel, key: str) -> None:
        self._channel, self._key = channel, key
        self.name = f"{channel.store.url.rstrip('/')}/{key}"

    def __repr__(self) -> str:
        return f"<ObjectBlob {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectBlob, (self._channel, self._key)

    def stat(self) -> BlobInfo:
        return self._channel.stat(self._key)

    def read(self, offset: int, nbytes: int) -> bytes:
        memory = bytearray(nbytes)
        if nbytes:
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            self.fetch(make_pieces([(offset, nbytes, address, -1)]), keep=memory)
        return bytes(memory)

    def publish(
        self,
        nbytes: int,
        pieces: NDArray[Any],
        late: Sequence[LatePiece] = (),
        *,
        digest: DigestKind = "crc32",
        keep: object = None,
        max_bandwidth: int = 0,
        block_bytes: int = 0,
        cancel: threading.Event | None = None,
    ) -> Published:
        return upload(
            self._channel,
            self._key,
            self.name,
            nbytes,
            pieces,
            late,
            digest=digest,
            keep=keep,
            max_bandwidth=max_bandwidth,
            cancel=cancel,
        )

    def fetch(
        self, pieces: NDArray[Any], *, digest: DigestKind = "crc32", keep: object = None, etag: str = ""
    ) -> Fetched:
        return download(self._channel, self._key, self.name, pieces, digest=digest, keep=keep, etag=etag)

    def delete(self) -> None:
        self._channel.store.delete([self._key])


class ObjectDirectory:
    """See `types.BlobDirectory`; `names` lists all that is under the prefix to find what is directly there."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.name = channel.store.url

    def __repr__(self) -> str:
        return f"<ObjectDirectory {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectDirectory, (self._channel,)

    def blob(self, relative: str) -> ObjectBlob:
        return ObjectBlob(self._channel, relative)

    def names(self) -> list[str]:
        return sorted(key for page in self._channel.store.list() for key in page.keys if "/" not in key)

    def remove(self, names: Iterable[str]) -> None:
        self._channel.store.delete(names)

    def make(self) -> None:
        """A prefix is there as soon as an object is."""
