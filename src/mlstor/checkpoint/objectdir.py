"""What `rundir` does in a directory, in a store: keys are ``<run id>/manifest.json`` and ``<run id>/<model>/...``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from mlstor.checkpoint import rundir
from mlstor.checkpoint.layout import step_dir
from mlstor.checkpoint.rundir import MANIFEST, Manifest
from mlstor.stream.group import mended_by_user

if TYPE_CHECKING:
    from mlstor.storage.s3_xml import Upload
    from mlstor.storage.store import Store


def url_of(store: Store, key: str) -> str:
    """The URL of one of its objects."""
    return f"{store.url.rstrip('/')}/{key}"


def load(store: Store, run_id: str) -> Manifest | None:
    """The manifest of `run_id`, None if there is no such run.

    Raises
    ------
    UsageError
        If there is something else under that name, a manifest that this version does not read, no such bucket, or
        credentials that are refused.
    """
    return mended_by_user(lambda: _load(store, run_id), store.url)


def _load(store: Store, run_id: str) -> Manifest | None:
    key = f"{run_id}/{MANIFEST}"
    try:
        data = store.read(key)
    except FileNotFoundError:
        # of the object or of the bucket: a listing tells, and what else lies there
        if any(page.keys for page in store.list(f"{run_id}/")):
            raise rundir.taken(url_of(store, run_id)) from None
        return None
    assert isinstance(data, bytes)
    return rundir.decoded(data, url_of(store, key), run_id)


def save(store: Store, manifest: Manifest) -> None:
    """Put the manifest into the store."""
    store.write(f"{manifest.run_id}/{MANIFEST}", rundir.encoded(manifest))


def claim(store: Store, manifest: Manifest) -> Manifest:
    """See `rundir.claim`."""
    claimed = rundir.succeeding(manifest, load(store, manifest.run_id), store.url)
    mended_by_user(lambda: save(store, claimed), store.url)
    return claimed


def remove_checkpoint(manifest: Manifest, store: Store, checkpoint: int) -> tuple[int, list[str]]:
    """See `rundir.remove_checkpoint`; what killed writes have left are uploads that nobody has completed."""
    prefix = f"{manifest.run_id}/{manifest.model}/{step_dir(checkpoint)}/"
    own = {f"{prefix}{file.name}" for file in manifest.layout().all_files()}
    return _remove(store, prefix, own)


def remove(manifest: Manifest, store: Store) -> tuple[int, list[str]]:
    """Remove all of the run's own objects, the manifest last; returns as `remove_checkpoint`."""
    names = [file.name for file in manifest.layout().all_files()]
    steps = [
        f"{manifest.run_id}/{manifest.model}/{step_dir(checkpoint)}/" for checkpoint in range(1, manifest.written + 1)
    ]
    mark = f"{manifest.run_id}/{MANIFEST}"
    removed, others = _remove(store, f"{manifest.run_id}/", {step + name for step in steps for name in names})
    store.delete([mark])
    return removed, [url for url in others if url != url_of(store, mark)]


def _remove(store: Store, prefix: str, own: set[str]) -> tuple[int, list[str]]:
    removed, foreign = 0, []
    for page in list(store.list(prefix)):  # first all names, then deletions
        mine = [key for key in page.keys if key in own]
        foreign += [url_of(store, key) for key in page.keys if key not in own]
        store.delete(mine)
        removed += len(mine)
    unfinished: Callable[[], Iterable[Upload]] | None = getattr(store, "unfinished_uploads", None)
    if unfinished is not None:
        abort: Callable[[str, str], None] = store.abort_upload  # type: ignore[attr-defined]  # it comes with the other
        for upload in list(unfinished()):
            if upload.key in own:
                abort(upload.key, upload.upload_id)
    return removed, sorted(foreign)
