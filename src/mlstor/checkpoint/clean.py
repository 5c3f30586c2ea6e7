"""``mlstor clean RUN [PATH...]``: removes what a run has written and left, and nothing else."""

from __future__ import annotations

import argparse
import glob
import os
import re
from typing import Any, NoReturn

from mlstor.checkpoint import options as checkpoint_options, rundir
from mlstor.errors import UsageError
from mlstor.storage.arguments import add_store_options, store_options
from mlstor.storage.store import scheme_of

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
    parser = _Parser(prog="mlstor clean", description="Remove the checkpoints that a run has left under PATH.")
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
    if given.paths:
        paths = [path for pattern in given.paths for path in _matches(pattern)]
    else:
        paths, recorded = _recorded(given.run, given.results)
        options = {**recorded, **options}
    found = False
    for path in dict.fromkeys(paths):
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
        raise UsageError(
            f"no run {given.run!r} under {', '.join(given.paths or paths)}: "
            f"look for directories with a {rundir.MANIFEST}"
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
    loaded = record.load(run_dir)
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
