"""A benchmark's command: what it says meanwhile, and how it ends: by itself, by an error in words, or by a signal."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from mlstor.errors import MlstorError


def run(compare: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """`compare` of `options`, with SIGTERM as Ctrl-C. Its result, 130 for a stop, or the exit code of an error."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return compare(options)
    except MlstorError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("benchmarks: stopped", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def progress(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)
