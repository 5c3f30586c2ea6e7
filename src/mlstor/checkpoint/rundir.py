"""Where a run's files lie, and whose they are: ``PATH/<run id>/manifest.json`` and ``PATH/<run id>/<model>/...``.

The manifest is the claim: nothing is written over or deleted that a manifest of this run id does not name.
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction

from mlstor.checkpoint.layout import Layout, step_dir
from mlstor.checkpoint.models import Transformer
from mlstor.errors import UsageError
from mlstor.operations import is_leftover

MANIFEST = "manifest.json"
FORMAT = "mlstor-checkpoint/1"
_PARTIAL = ".partial"  # end of a manifest's name until it is whole


@dataclass(frozen=True)
class Manifest:
    """What a run has written, enough to read and verify it and to remove it.

    Attributes
    ----------
    run_key : int
        64 random bits, stamped into the data: two runs never share one, not even of the same id.
    shape : Transformer or None
        What the workload file described, in place of a built-in model: it may be gone when the run is removed.
    written : int
        Checkpoints begun, which may lie there in part.
    complete : tuple of int
        Checkpoints that all ranks have made durable and that are still there.
    targets : tuple of str
        PATH as the user gave it, with its fields unresolved.
    """

    format: str
    run_id: str
    run_key: int
    model: str
    shape: Transformer | None
    ranks: int
    scale: str
    compressibility: int
    only_ranks: tuple[int, ...] | None
    targets: tuple[str, ...]
    written: int = 0
    complete: tuple[int, ...] = ()

    def same_files(self, other: Manifest) -> bool:
        """Whether both name the same files with the same sizes."""
        mine, theirs = ((one.model, one.shape, one.ranks, one.scale) for one in (self, other))
        return mine == theirs

    def layout(self) -> Layout:
        """The layout that the run's files have."""
        from mlstor.checkpoint import models

        shape = models.get(self.model) if self.shape is None else self.shape
        return Layout(shape, self.ranks, None, Fraction(self.scale))


def new_key() -> int:
    """A key for `Manifest.run_key`."""
    return secrets.randbits(64)


def model_dir(target: str, run_id: str, model: str) -> str:
    """Directory of a run's checkpoints under a target."""
    return os.path.join(target, run_id, model)


def checkpoint_dir(target: str, run_id: str, model: str, checkpoint: int) -> str:
    """Directory of one checkpoint, numbered from 1."""
    return os.path.join(model_dir(target, run_id, model), step_dir(checkpoint))


def load(target: str, run_id: str) -> Manifest | None:
    """The manifest of `run_id` under `target`, None if there is no such run.

    Raises
    ------
    UsageError
        If there is something else under that name, or a manifest that this version does not read.
    """
    directory = os.path.join(target, run_id)
    path = os.path.join(directory, MANIFEST)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        if any(not _is_partial(name) for name in _names(directory)):
            raise taken(directory) from None
        return None
    except OSError as error:
        raise UsageError(f"{path} can't be read as a manifest of mlstor: {error}") from None
    return decoded(data, path, run_id)


def taken(directory: str) -> UsageError:
    """The refusal of a run id under which lies something that is not mlstor's."""
    return UsageError(
        f"{directory} exists and holds no {MANIFEST} of mlstor: nothing in it is touched; choose another --run-id"
    )


def encoded(manifest: Manifest) -> bytes:
    """A manifest as it is stored."""
    import msgspec

    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decoded(data: bytes, path: str, run_id: str) -> Manifest:
    """The manifest of `run_id` that is stored at `path`.

    Raises
    ------
    UsageError
        If it is none, or of another run or a format that this version does not read.
    """
    import msgspec

    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} can't be read as a manifest of mlstor: {error}") from None
    if manifest.format != FORMAT or manifest.run_id != run_id:
        raise UsageError(f"{path} is not a manifest of run {run_id} in a format that this version reads ({FORMAT})")
    return manifest


def save(target: str, manifest: Manifest) -> None:
    """Put the manifest under `target`, durably and whole."""
    directory = os.path.join(target, manifest.run_id)
    new = not os.path.isdir(directory)
    with suppress(FileExistsError):
        os.mkdir(directory)
    path = os.path.join(directory, MANIFEST)
    partial = f"{path}.{os.getpid()}{_PARTIAL}"
    with open(partial, "wb") as file:
        file.write(encoded(manifest))
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)
    _sync(directory)
    if new:
        _sync(target)


def make_checkpoint_dir(target: str, run_id: str, model: str, checkpoint: int, durable: bool) -> None:
    """Make a checkpoint's directory in a run's own, if no other process was faster; with `durable`, sync its parents.

    Raises
    ------
    FileNotFoundError
        If the run's directory has vanished: a target that was unmounted must not be made anew below its mount point.
    """
    for directory in (
        model_dir(target, run_id, model),
        checkpoint_dir(target, run_id, model, checkpoint),
    ):
        with suppress(FileExistsError):
            os.mkdir(directory)
            if durable:
                _sync(os.path.dirname(directory))


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_partial(name: str) -> bool:
    """Whether it is what a process leaves that is killed while it saves a manifest."""
    return name.startswith(MANIFEST) and name.endswith(_PARTIAL)


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def claim(target: str, manifest: Manifest) -> Manifest:
    """Make `manifest`'s run id this run's own under `target`, before anything is written there.

    Returns
    -------
    Manifest
        What was saved: it also names the checkpoints that an earlier run of this id has left.

    Raises
    ------
    UsageError
        If the name is taken by something else, or by a run of other files.
    """
    claimed = succeeding(manifest, load(target, manifest.run_id), target)
    save(target, claimed)
    return claimed


def succeeding(manifest: Manifest, before: Manifest | None, target: str) -> Manifest:
    """`manifest`, where `before` lies under `target` already; see `claim`."""
    if before is not None and not before.same_files(manifest):
        raise UsageError(
            f"run {manifest.run_id} in {target} is of {before.model}, {before.ranks} ranks, scale {before.scale}: "
            "its files are not written over; choose another --run-id, or `mlstor clean` it first"
        )
    return replace(manifest, written=max(manifest.written, before.written if before else 0))


def remove_checkpoint(manifest: Manifest, target: str, checkpoint: int) -> tuple[int, list[str]]:
    """Remove the run's own files of one checkpoint under `target`, with what killed writes have left.

    Returns
    -------
    tuple
        How many files were removed, and paths of what lies there too and is not the run's.
    """
    directory = checkpoint_dir(target, manifest.run_id, manifest.model, checkpoint)
    present = _names(directory)
    own = {file.name for file in manifest.layout().all_files()} if present else set()
    removed = 0
    for name in present:
        if name in own or is_leftover(name):
            with suppress(FileNotFoundError):
                _remove_own(os.path.join(directory, name))
                removed += 1
    return removed, _remove_directory(directory)


def _remove_own(path: str) -> None:
    """Remove a file of the run, or what ``--via dcp`` has made of one: a directory of files."""
    if os.path.isdir(path) and not os.path.islink(path):
        for name in _names(path):
            os.unlink(os.path.join(path, name))
        os.rmdir(path)
    else:
        os.unlink(path)


def remove(manifest: Manifest, target: str) -> tuple[int, list[str]]:
    """Remove all of the run's own files under `target`, the manifest last; returns as `remove_checkpoint`."""
    removed, foreign = 0, []
    for checkpoint in range(1, manifest.written + 1):
        count, others = remove_checkpoint(manifest, target, checkpoint)
        removed += count
        foreign += others
    run_dir = os.path.join(target, manifest.run_id)
    kept = {os.path.dirname(path) for path in foreign}
    foreign += [
        path for path in _remove_directory(model_dir(target, manifest.run_id, manifest.model)) if path not in kept
    ]
    for name in _names(run_dir):
        if name == MANIFEST or _is_partial(name):
            os.unlink(os.path.join(run_dir, name))
    kept |= {os.path.dirname(path) for path in foreign}
    return removed, foreign + [path for path in _remove_directory(run_dir) if path not in kept]


def _remove_directory(directory: str) -> list[str]:
    """Remove a directory if it is empty; else the paths of what is in it."""
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return [os.path.join(directory, name) for name in _names(directory)]
    return []
