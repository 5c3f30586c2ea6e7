"""``python -m mlstor.checkpoint``: the same as ``mlstor checkpoint``."""

import sys

from mlstor.checkpoint.cli import main
from mlstor.cli import run

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
