"""One place for objects: what every kind of URL can do, and which module does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mlstor.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from mlstor.storage.transfers import Digest, Transfers


class Page(NamedTuple):
    """Part of a listing: keys relative to the store's URL, and their sizes in bytes, in one order."""

    keys: list[str]
    sizes: list[int]


class ObjectInfo(NamedTuple):
    """What a store says of an object. `checksum` is (type, value) as the store has it, None if it has none."""

    nbytes: int
    etag: str = ""
    checksum: tuple[str, str] | None = None


class Store(Protocol):
    """Objects under one URL. Keys are relative to it, unescaped. Errors are `OSError` with errno and URL.

    Made by `open_store`; pickles to its URL and options (no credentials), and is opened again in the other process.
    """

    url: str

    def list(self, prefix: str = "") -> Iterator[Page]:
        """Pages of all objects whose key begins with `prefix`; parallel where the store allows it; in no order.

        Raises
        ------
        OSError
            ENOENT for a missing bucket or directory, EACCES for refused credentials (and which).
        """

    def stat(self, key: str) -> ObjectInfo: ...

    def read(self, key: str, into: Buffer | None = None, offset: int = 0, nbytes: int | None = None) -> bytes | int:
        """A whole object or a range of it: its bytes, or how many of them were put `into` a writable buffer."""

    def write(self, key: str, source: Buffer) -> None:
        """Make or replace an object; in parts beyond the store's threshold. It shows only when it is complete."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that isn't there is no error."""

    def transfers(self, *, workers: int = 0, in_flight: int = 8) -> Transfers:
        """Many transfers at once, `in_flight` per worker; 0 workers is the store's own choice."""

    def describe(self) -> dict[str, Any]:
        """For the record: scheme, endpoint, how it is reached (direct or by a proxy, signed or anonymous), options."""

    def close(self) -> None: ...


_SCHEMES = {"s3": "mlstor.storage.s3", "ais": "mlstor.storage.ais", "file": "mlstor.storage.posix"}


def scheme_of(url: str) -> str:
    """``"s3"``, ``"ais"`` or, for a path or file:// URL, ``"file"``.

    Raises
    ------
    UsageError
        If the URL has another scheme.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        return "file"
    if scheme not in _SCHEMES:
        raise UsageError(
            f"{scheme}:// in {url!r} is unknown; give a directory, s3://BUCKET/PREFIX or ais://BUCKET/PREFIX"
        )
    return scheme


def open_store(url: str, **options: Any) -> Store:
    """The store behind `url`. Options by keyword as its module's `open` takes them (endpoint, profile, anonymous, ...).

    Raises
    ------
    UsageError
        If the URL or an option is not understood, or the build lacks what it needs.
    """
    import importlib
    import inspect

    scheme = scheme_of(url)
    opening = importlib.import_module(_SCHEMES[scheme]).open
    parameters = inspect.signature(opening).parameters
    known = [name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise UsageError(
            f"{url}: the option {', '.join(unknown)} is not for this kind of store, which has {', '.join(known)}"
        )
    for name, value in options.items():
        kinds = str(parameters[name].annotation).split(" | ")  # text: modules have annotations from __future__
        if "bool" in kinds and not (isinstance(value, bool) or (value is None and "None" in kinds)):
            raise UsageError(f"{url}: the option {name}={value} is neither yes nor no")
    store: Store = opening(url, **options)
    return store


def digest_of(store: Store) -> Digest:
    """The checksum that a store takes with what is written: its own choice, CRC32C by our client, none by others."""
    from mlstor.storage.transfers import Digest

    chosen: Any = getattr(store, "digest", None)
    if chosen is not None:
        found: Digest = chosen()
        return found
    return Digest.CRC32C if store.describe()["client"] == "mlstor" else Digest.NONE
