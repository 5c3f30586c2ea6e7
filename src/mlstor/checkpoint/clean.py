"""``mlstor clean RUN [PATH...]``: removes what a run has written and left, and nothing else."""

from __future__ import annotations

import argparse
import glob
import os
import re
from typing import NoReturn

from mlstor.checkpoint import rundir
from mlstor.errors import UsageError

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
        help="the directories that the run measured (default: those in its record); {local_rank}, {rank} and {host} "
        "stand for any",
    )
    parser.add_argument("--results", metavar="DIR", help="where the run's record is (results)")
    given = parser.parse_args(argv)
    if given.paths:
        paths = [path for pattern in given.paths for path in _matches(pattern)]
    else:
        paths = _recorded(given.run, given.results)
    found = False
    for path in dict.fromkeys(paths):
        manifest = rundir.load(path, given.run)
        if manifest is None:
            continue
        found = True
        removed, foreign = rundir.remove(manifest, path)
        print(f"{path}: {removed} files of run {given.run} removed")
        for other in foreign:
            print(f"{other} stays: the run did not write it")
    if not found:
        raise UsageError(
            f"no run {given.run!r} under {', '.join(given.paths or paths)}: "
            f"look for directories with a {rundir.MANIFEST}"
        )
    return 0


def _recorded(run_id: str, results_dir: str | None) -> list[str]:
    """Directories that the run has written to, as its record says."""
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
    return [target.resolved_path for target in loaded.targets]


def _matches(pattern: str) -> list[str]:
    """Directories that a PATH of a run may have stood for, on this host."""
    if not _FIELD.search(pattern):
        return [os.path.abspath(pattern)]
    escaped = "*".join(glob.escape(part) for part in _FIELD.split(pattern))
    return sorted(map(os.path.abspath, glob.glob(escaped)))
