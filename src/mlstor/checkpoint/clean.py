"""``mlstor clean RUN PATH...``: removes what a run has written and left, and nothing else."""

from __future__ import annotations

import argparse
import os

from mlstor.checkpoint import rundir
from mlstor.errors import UsageError


def main(argv: list[str]) -> int:
    """Remove the files of a run under each PATH.

    Raises
    ------
    UsageError
        If there is no such run under any PATH.
    """
    parser = argparse.ArgumentParser(
        prog="mlstor clean", description="Remove the checkpoints that a run has left under PATH."
    )
    parser.add_argument("run", metavar="RUN", help="the run's id")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="the directories that the run measured")
    given = parser.parse_args(argv)
    found = False
    for path in given.paths:
        manifest = rundir.load(os.path.abspath(path), given.run)
        if manifest is None:
            continue
        found = True
        removed, kept = rundir.remove(manifest, os.path.abspath(path))
        print(f"{path}: {removed} files of run {given.run} removed")
        for directory in kept:
            print(f"{directory} stays: it holds something that the run did not write")
    if not found:
        raise UsageError(f"no run {given.run!r} under {', '.join(given.paths)}: look for directories with a {rundir.MANIFEST}")
    return 0
