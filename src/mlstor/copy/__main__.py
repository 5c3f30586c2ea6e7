"""``python -m mlstor.copy``: the same as ``mlstor copy``."""

import sys

from mlstor.cli import run
from mlstor.copy.cli import main

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
