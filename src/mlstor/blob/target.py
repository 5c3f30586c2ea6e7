"""Which blob a path or URL names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mlstor.errors import UsageError
from mlstor.storage.store import open_store, scheme_of

if TYPE_CHECKING:
    from mlstor._io import Engine
    from mlstor.blob.types import Blob, BlobDirectory
    from mlstor.storage.store import Store


def open_blob(
    path_or_url: str | os.PathLike[str], *, store: Store | None = None, engine: Engine | None = None, **options: Any
) -> Blob:
    """The file or object of that name, which need not exist.

    Parameters
    ----------
    path_or_url
        A path, ``file:///PATH``, ``s3://BUCKET/KEY`` or ``ais://BUCKET/KEY``.
    store
        One that is open already, which stays open: the name is then relative to it, or begins with its URL.
    engine
        For files; by default the process's own.
    **options
        Of the object store, as `storage.store.open_store` takes them: endpoint, region, profile, ...

    Raises
    ------
    UsageError
        If the URL or an option is not understood, the URL names a bucket, or `store` is of another place.
    """
    text = os.fsdecode(path_or_url)
    if store is None and scheme_of(text) == "file":
        from mlstor.blob.files import FileBlob

        return FileBlob(_local(text, options), engine)
    from mlstor.blob.channel import Channel
    from mlstor.blob.objects import ObjectBlob

    if store is not None:
        key = _relative(text, store)
        root = _directory_of(store)
        if root is not None:
            from mlstor.blob.files import FileBlob

            return FileBlob(os.path.join(root, key), engine)
        return ObjectBlob(Channel(store, owns=False), key)
    above, _, key = text.rpartition("/")
    if not key or above.endswith(":/"):
        raise UsageError(f"{text!r} names a bucket or a directory: name an object, as {text.rstrip('/')}/NAME")
    return ObjectBlob(Channel(open_store(above, **options), owns=True), key)


def open_directory(
    path_or_url: str | os.PathLike[str], *, store: Store | None = None, engine: Engine | None = None, **options: Any
) -> BlobDirectory:
    """The directory of that name, or what is under that URL; it need not exist. As `open_blob`, but for `store`, which
    is the directory itself.
    """
    text = os.fsdecode(path_or_url)
    root = _directory_of(store) if store is not None else None
    if root is not None or (store is None and scheme_of(text) == "file"):
        from mlstor.blob.directory import FileDirectory

        return FileDirectory(_local(text, options) if root is None else root, engine)
    from mlstor.blob.channel import Channel
    from mlstor.blob.objects import ObjectDirectory

    if store is not None:
        return ObjectDirectory(Channel(store, owns=False))
    return ObjectDirectory(Channel(open_store(text.rstrip("/"), **options), owns=True))


def _local(text: str, options: dict[str, Any]) -> str:
    if options:
        raise UsageError(f"{text!r} is a path, which has no options: leave out {', '.join(sorted(options))}")
    if "://" in text:
        from mlstor.storage.posix import path_of

        return path_of(text)
    return text


def _directory_of(store: Store) -> str | None:
    """Where a store of files has them."""
    from mlstor.storage.posix import PosixStore

    return store.path if isinstance(store, PosixStore) else None


def _relative(text: str, store: Store) -> str:
    url = store.url.rstrip("/")
    key = text[len(url) + 1 :] if text.startswith(f"{url}/") else text
    if not key or "://" in key or key.startswith("/"):
        raise UsageError(f"{text!r} is not in {url}: give a name relative to it")
    return key
