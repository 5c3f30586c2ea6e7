"""Where a run's files lie, and whose they are: ``PATH/<run id>/manifest.json`` and ``PATH/<run id>/<model>/...``.

The manifest is the claim: nothing is written over or deleted that a manifest of this run id does not name.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

from mlstor.checkpoint.layout import Layout, step_dir
from mlstor.errors import UsageError
from mlstor.operations import is_leftover

MANIFEST = "manifest.json"
FORMAT = "mlstor-checkpoint/1"


@dataclass(frozen=True)
class Manifest:
    """What a run has written, enough to read and verify it and to remove it.

    Attributes
    ----------
    run_key : int
        64 random bits, stamped into the data: two runs never share one, not even of the same id.
    workload : str or None
        The workload file's absolute path, in place of a built-in model.
    written : int
        Checkpoints begun, which may lie there in part.
    complete : tuple of int
        Checkpoints that all ranks have made durable.
    targets : tuple of str
        PATH as the user gave it, with its fields unresolved.
    """

    run_id: str
    run_key: int
    model: str
    workload: str | None
    ranks: int
    scale: str
    compressibility: int
    only_ranks: tuple[int, ...] | None
    targets: tuple[str, ...]
    written: int = 0
    complete: tuple[int, ...] = field(default=())

    def same_files(self, other: Manifest) -> bool:
        """Whether both name the same files with the same sizes."""
        return (self.model, self.workload, self.ranks, self.scale) == (
            other.model,
            other.workload,
            other.ranks,
            other.scale,
        )

    def layout(self) -> Layout:
        """The layout that the run's files have."""
        from mlstor.checkpoint import models
        from mlstor.checkpoint.workload_file import from_workload_yaml

        shape = models.get(self.model) if self.workload is None else from_workload_yaml(self.workload)
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
        with open(path, encoding="utf-8") as file:
            content: dict[str, Any] = json.load(file)
    except FileNotFoundError:
        if os.path.exists(directory) and os.listdir(directory):
            raise UsageError(
                f"{directory} exists and holds no {MANIFEST} of mlstor: nothing in it is touched; "
                "choose another --run-id"
            ) from None
        return None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} can't be read as a manifest of mlstor: {error}") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UsageError(f"{path} is not a manifest that this version reads ({FORMAT}); choose another --run-id")
    for name in ("only_ranks", "targets", "complete"):
        content[name] = None if content[name] is None else tuple(content[name])
    return Manifest(**content)


def save(target: str, manifest: Manifest) -> None:
    """Put the manifest under `target`, durably and whole."""
    directory = os.path.join(target, manifest.run_id)
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, MANIFEST)
    partial = f"{path}.{os.getpid()}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **asdict(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
    before = load(target, manifest.run_id)
    if before is not None and not before.same_files(manifest):
        raise UsageError(
            f"run {manifest.run_id} in {target} is of {before.model}, {before.ranks} ranks, scale {before.scale}: "
            "its files are not written over; choose another --run-id, or `mlstor clean` it first"
        )
    claimed = replace(manifest, written=max(manifest.written, before.written if before else 0))
    save(target, claimed)
    return claimed


def own_files(manifest: Manifest, target: str, first: int = 1, last: int | None = None) -> Iterator[str]:
    """Paths that the run may have written under `target`, of checkpoints `first` to `last` (default: all)."""
    layout = manifest.layout()
    names = [file.name for file in layout.all_files()]
    for checkpoint in range(first, (manifest.written if last is None else last) + 1):
        directory = checkpoint_dir(target, manifest.run_id, manifest.model, checkpoint)
        for name in names:
            yield os.path.join(directory, name)


def remove(manifest: Manifest, target: str, last: int | None = None) -> tuple[int, list[str]]:
    """Remove the run's own files under `target`, of checkpoints 1 to `last` (default: all, and the manifest).

    Returns
    -------
    tuple
        How many files were removed, and the directories that stay because they hold something else.
    """
    removed, kept = 0, []
    for path in own_files(manifest, target, last=last):
        with suppress(FileNotFoundError):
            os.unlink(path)
            removed += 1
    directories = [
        checkpoint_dir(target, manifest.run_id, manifest.model, checkpoint)
        for checkpoint in range(1, (manifest.written if last is None else last) + 1)
    ]
    for directory in directories:
        with suppress(FileNotFoundError):
            for name in os.listdir(directory):
                if is_leftover(name):
                    os.unlink(os.path.join(directory, name))
                    removed += 1
    if last is None or last >= manifest.written:
        run_dir = os.path.join(target, manifest.run_id)
        directories.append(model_dir(target, manifest.run_id, manifest.model))
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(run_dir, MANIFEST))
        directories.append(run_dir)
    for directory in directories:
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            continue
        except OSError:
            kept.append(directory)
    return removed, kept
