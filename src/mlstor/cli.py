"""The `mlstor` command: finds the verb, imports only that verb's module, and turns errors into one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from mlstor.errors import MlstorError, UsageError

VERBS = {
    "checkpoint": (
        "mlstor.checkpoint.cli",
        "measure checkpoints: write, read and verify them, alone or under mpirun",
    ),
    "stream": (
        "mlstor.stream.cli",
        "measure object streams: read, write and verify files, S3 and AIStore, alone or under mpirun",
    ),
    "copy": (
        "mlstor.copy.cli",
        "copy objects between directories, S3 and AIStore: verified, resumable, measured",
    ),
    "verify": ("mlstor.verify", "read checkpoints through and compare them with their checksums"),
    "aisloader": ("mlstor.aisloader.cli", "take aisloader's command lines, for AIStore or S3"),
    "clean": ("mlstor.checkpoint.clean", "remove what a checkpoint or stream run left"),
    "mlpstorage": (
        "mlstor.checkpoint.mlpstorage",
        "take the command lines of MLPerf Storage's checkpointing",
    ),
    "doctor": ("mlstor.doctor", "show what was built in, what the kernel grants and what a path can do"),
    "show": ("mlstor.results.table", "print a result record as a table"),
}
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `mlstor` command; returns its exit code."""
    return run(_dispatch, list(sys.argv[1:] if argv is None else argv))


def run(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run a verb's `main`; its errors become one line on stderr and the exit code.

    A `MlstorError` gives its own code, an `OSError` 1, Ctrl-C 130, SIGTERM in a run 143. Anything else is a bug,
    shown as such.
    """
    try:
        code = main(argv)
        sys.stdout.flush()
        return code
    except MlstorError as error:
        print(f"mlstor: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output is gone (`mlstor show | head`); Python's flush at exit must not fail on it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"mlstor: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        # mlstor.signals.Interrupted, a KeyboardInterrupt, tells which signal it was.
        print(f"mlstor: {str(error) or 'interrupted'}", file=sys.stderr)
        return getattr(error, "exit_code", INTERRUPTED)


def _dispatch(argv: list[str]) -> int:
    verb = argv[0] if argv else ""
    if verb in ("-h", "--help"):
        print(_help())
        return 0
    if verb in ("-V", "--version"):
        from mlstor import __version__

        print(f"mlstor {__version__}")
        return 0
    if verb not in VERBS:
        raise UsageError(_unknown(verb))
    import importlib

    code: int = importlib.import_module(VERBS[verb][0]).main(argv[1:])
    return code


def _unknown(verb: str) -> str:
    import difflib

    near = difflib.get_close_matches(verb, VERBS, n=1)
    if not verb:
        return f"say what to do: mlstor {{{','.join(VERBS)}}}, or mlstor --help"
    advice = f"did you mean `mlstor {near[0]}`?" if near else f"it takes {', '.join(VERBS)}"
    return f"there is no `mlstor {verb}`; {advice}"


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    return (
        "usage: mlstor VERB [OPTION]...\n\n"
        "What your storage gives a training job.\n\n"
        f"{verbs}\n\n"
        "mlstor VERB --help shows a verb's options; mlstor --version the version."
    )
