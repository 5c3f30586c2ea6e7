"""What aisloader lists that a store's own listing leaves out: files in archives, and only what the cluster holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mlstor.errors import UsageError
from mlstor.storage.ais import member_query
from mlstor.storage.store import Page
from mlstor.stream import manifest as manifests

if TYPE_CHECKING:
    from mlstor.storage.ais_client import AisClient
    from mlstor.storage.store import Store

# api/apc/lsmsg.go: LsCached, LsArchDir
_CACHED, _ARCHIVES = 1, 8
# EntryInArch and EntryIsArchive, beyond the five bits of an entry's status
IN_ARCHIVE, IS_ARCHIVE = 1 << 7, 1 << 9
_PARTED = re.compile(r"(.+?\.(?:tar|tgz|tar\.gz|zip|tar\.lz4))/(.+)", re.DOTALL)


class Listed:
    """A store whose listing is what the reads choose from; all else is as `store` has it.

    Parameters
    ----------
    client
        Of AIStore; None for S3.
    archives
        List the files in archives, and not the archives: names are the key, a zero byte, and the query.
    cached
        Of a remote bucket only what the cluster holds.
    """

    def __init__(self, store: Store, client: AisClient | None, archives: bool, cached: bool) -> None:
        self._store, self._client, self._archives, self._cached = store, client, archives, cached

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def list(self, prefix: str = "") -> Iterator[Page]:
        """See `Store.list`.

        Raises
        ------
        UsageError
            If there is nothing to read.
        """
        found = False
        for page in self._pages(prefix):
            kept = [one for one in zip(*page, strict=True) if not manifests.is_mark(one[0].partition("\0")[0])]
            if kept:
                found = True
                yield Page([key for key, _ in kept], [nbytes for _, nbytes in kept])
        if not found:
            beginning = f" that begins with {prefix!r}" if prefix else ""
            raise UsageError(f"{self._store.url} has no object{beginning}: write some first with -pctput=100")

    def _pages(self, prefix: str) -> Iterator[Page]:
        if self._client is None or not (self._archives or self._cached):
            yield from self._store.list(prefix)
            return
        flags = (_CACHED if self._cached else 0) | (_ARCHIVES if self._archives else 0)
        for listed in self._client.flagged(prefix, flags):
            yield members(listed)


def members(listed: list[tuple[str, int, int]]) -> Page:
    """Files in archives, and objects that are none, of entries with name, bytes and flags. A file in an archive is
    listed as ``ARCHIVE/FILE``; as AIStore does, it is parted behind the first extension of an archive.
    """
    keys: list[str] = []
    sizes: list[int] = []
    for name, nbytes, flags in listed:
        if flags & IS_ARCHIVE:
            continue
        if flags & IN_ARCHIVE and (parted := _PARTED.fullmatch(name)):
            name = f"{parted[1]}\0{member_query(parted[2])}"
        keys.append(name)
        sizes.append(nbytes)
    return Page(keys, sizes)
