"""`python -m mlstor` is the `mlstor` command."""

from __future__ import annotations

import sys

from mlstor.cli import main

if __name__ == "__main__":
    sys.exit(main())
