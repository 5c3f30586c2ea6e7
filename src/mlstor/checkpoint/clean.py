"""``mlstor clean RUN [PATH...]``: removes what a run has written and left, and nothing else."""

from __future__ import annotations

import argparse
import glob
import os
import re
from typing import TYPE_CHECKING, Any, NoReturn

from mlstor.checkpoint import options as checkpoint_options, rundir
from mlstor.errors import UsageError
from mlstor.storage.arguments import add_store_options, store_options
from mlstor.storage.store import scheme_of

if TYPE_CHECKING:
    from mlstor.results.record import StreamRecord

_FIELD = re.compile(r"\{(?:rank|local_rank|host)\}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; write it as mlstor clean RUN [PATH ...]")


def main(argv: list[str]) -> int:
    """Remove the files of a run under each PATH, or where its record says that it has written.

    Raises
    ------
    UsageError
        If there is no such run under any PATH, or no PATH was given and there is no record.
    """
    parser = _Parser(
        prog="mlstor clean", description="Remove the checkpoints, or the objects of a stream, that a run has left."
    )
    parser.add_argument("run", metavar="RUN", help="the run's id")
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="*",
        help="the directories or URLs that the run measured (default: those in its record); {local_rank}, {rank} and "
        "{host} stand for any directory",
    )
    add_store_options(parser)
    parser.add_argument("--results", metavar="DIR", help="where the run's record is (results)")
    given = parser.parse_intermixed_args(argv)
    options = store_options(given)
    if given.run in ("", ".", "..") or "/" in given.run:
        raise UsageError(f"{given.run!r} is no run's id: those are names of directories, as --run-id has them")
    if given.paths:
        paths = [path for pattern in given.paths for path in _matches(pattern)]
    else:
        paths, recorded = _recorded(given.run, given.results)
        options = {**recorded, **options}
    found = False
    for path in dict.fromkeys(paths):
        count = _remove_stream(path, given.run, options)
        if count is not None:
            found = True
            print(f"{path}: {count} objects of run {given.run} removed")
            continue
        remove = _remove_objects if scheme_of(path) != "file" else _remove_files
        result = remove(path, given.run, options)
        if result is None:
            continue
        found = True
        removed, foreign = result
        print(f"{path}: {removed} files of run {given.run} removed")
        for other in foreign:
            print(f"{other} stays: the run did not write it")
    if not found:
        from mlstor.stream import manifest as manifests

        raise UsageError(
            f"no run {given.run!r} under {', '.join(given.paths or paths)}: "
            f"look for directories with a {rundir.MANIFEST} or {manifests.NAME}"
        )
    return 0


def _remove_files(path: str, run_id: str, store_options: dict[str, Any]) -> tuple[int, list[str]] | None:
    manifest = rundir.load(path, run_id)
    return None if manifest is None else rundir.remove(manifest, path)


def _remove_objects(url: str, run_id: str, store_options: dict[str, Any]) -> tuple[int, list[str]] | None:
    from mlstor.checkpoint import objectdir
    from mlstor.stream.group import open_url

    store = open_url(url, store_options)
    try:
        manifest = objectdir.load(store, run_id)
        return None if manifest is None else objectdir.remove(manifest, store)
    finally:
        store.close()


def _remove_stream(url: str, run_id: str, store_options: dict[str, Any]) -> int | None:
    """Objects that a stream has written there, removed; None if it has not written there."""
    from mlstor.stream import manifest as manifests
    from mlstor.stream.group import open_url

    if scheme_of(url) == "file" and not os.path.isdir(url):
        return None
    store = open_url(url, store_options)
    try:
        manifest = manifests.load(store, run_id)
        if manifest is None:
            return None
        count = manifests.remove_objects(store, manifest)
        manifests.remove_marks(store, manifest)
        return count
    finally:
        store.close()


def _recorded(run_id: str, results_dir: str | None) -> tuple[list[str], dict[str, Any]]:
    """Where the run has written to, and how stores were reached, as its record says."""
    from mlstor.results import record
    from mlstor.settings import Settings

    results_dir = Settings.resolve(results_dir=results_dir).results_dir
    run_dir = os.path.join(results_dir, run_id)
    if not os.path.exists(os.path.join(run_dir, record.RECORD_FILE)):
        raise UsageError(
            f"there is no record of run {run_id!r} under {results_dir}: name the directories that it measured, as "
            "mlstor clean RUN PATH, or where its record is, with --results"
        )
    loaded = record.load_any(run_dir)
    if isinstance(loaded, record.StreamRecord):
        return _recorded_stream(run_id, loaded)
    if loaded.workload.read_run is not None:
        raise UsageError(
            f"{run_id} only read the files of run {loaded.workload.read_run}; name that one to remove them"
        )
    if len({target.host for target in loaded.targets if target.sharing == "per-node"}) > 1:
        print(
            f"run {run_id} had storage of its own on each of {len(loaded.hosts)} hosts: this cleans the one it runs on"
        )
    said = checkpoint_options.parse(loaded.command[2:]).store_options if loaded.stores else {}
    return [target.resolved_path for target in loaded.targets], said


def _recorded_stream(run_id: str, loaded: StreamRecord) -> tuple[list[str], dict[str, Any]]:
    from mlstor.results.stream_workload import StreamWorkload
    from mlstor.stream import options as stream_options

    verb = loaded.command[1] if len(loaded.command) > 1 else ""
    if verb != "stream" or not isinstance(loaded.workload, StreamWorkload):
        raise UsageError(f"{run_id} is a run of mlstor {verb}, whose objects are no run's own: remove them yourself")
    paths = [path for url in loaded.workload.urls for path in _matches(url)]
    return paths, stream_options.parse(loaded.command[2:]).store_options


def _matches(pattern: str) -> list[str]:
    """Directories that a PATH of a run may have stood for, on this host; a URL stands for itself."""
    if scheme_of(pattern) != "file":
        if _FIELD.search(pattern):
            raise UsageError(f"{pattern}: name each URL, or leave all out: the run's record has them")
        return [pattern.rstrip("/")]
    if not _FIELD.search(pattern):
        return [os.path.abspath(pattern)]
    escaped = "*".join(glob.escape(part) for part in _FIELD.split(pattern))
    return sorted(map(os.path.abspath, glob.glob(escaped)))
