"""``python -m mlstor.stream``: the same as ``mlstor stream``."""

import sys

from mlstor.cli import run
from mlstor.stream.cli import main

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
