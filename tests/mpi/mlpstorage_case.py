"""``mlstor mlpstorage``, with models made small enough for a test and without the profile's pauses."""

from __future__ import annotations

import os
import sys

from mlstor.checkpoint.mlpstorage import translate
from mlstor.checkpoint.mlpstorage_run import carry_out
from mlstor.cli import run


def main(argv: list[str]) -> int:
    asked = translate(argv)
    path = asked.options.pop()
    asked.options += ["--scale", "1/8192", "--pause", os.environ.get("CASE_PAUSE", "0s"), path]
    return carry_out(asked)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
