"""``mlstor clean RUN PATH...``: removes what a run has written and left, and nothing else."""

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
        raise UsageError(f"{message}; write it as mlstor clean RUN PATH")


def main(argv: list[str]) -> int:
    """Remove the files of a run under each PATH.

    Raises
    ------
    UsageError
        If there is no such run under any PATH.
    """
    parser = _Parser(prog="mlstor clean", description="Remove the checkpoints that a run has left under PATH.")
    parser.add_argument("run", metavar="RUN", help="the run's id")
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="the directories that the run measured; {local_rank}, {rank} and {host} stand for any",
    )
    given = parser.parse_args(argv)
    found = False
    for path in dict.fromkeys(path for pattern in given.paths for path in _matches(pattern)):
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
            f"no run {given.run!r} under {', '.join(given.paths)}: look for directories with a {rundir.MANIFEST}"
        )
    return 0


def _matches(pattern: str) -> list[str]:
    """Directories that a PATH of a run may have stood for, on this host."""
    if not _FIELD.search(pattern):
        return [os.path.abspath(pattern)]
    escaped = "*".join(glob.escape(part) for part in _FIELD.split(pattern))
    return sorted(map(os.path.abspath, glob.glob(escaped)))
