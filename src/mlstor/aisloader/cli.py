"""``mlstor aisloader``: aisloader's options -> a stream -> its table or JSON, and a record."""

from __future__ import annotations

import sys

from mlstor.aisloader import flags
from mlstor.aisloader.options import usage


def main(argv: list[str]) -> int:
    """Run ``mlstor aisloader`` with these arguments; the exit code is 1 if operations failed."""
    from mlstor.world import said_once

    with said_once():
        given = flags.parse(argv)
        if given.asked == "usage":
            print(usage())
            return 0
        if given.asked == "version":
            from mlstor import __version__

            print(f"mlstor {__version__}, with the options of aisloader 2.25")
            return 0
        if given["getloaderid"]:
            return _print_id(given)
        from mlstor.aisloader.translate import translate

        plan = translate(given)
    if given["dry-run"]:
        from mlstor.aisloader.dry import show

        return show(plan)
    from mlstor.aisloader.run import run

    return run(plan, ["mlstor", "aisloader", *argv])


def _print_id(given: flags.Given) -> int:
    from mlstor.aisloader.names import loader

    found = loader(given["loaderid"], given["loadernum"], given["loaderidhashlen"], given["randomname"])
    print(f"{found.id:#x}")
    if found.random:
        print(f"note: {found.id:#x} is in no name, since these are drawn", file=sys.stderr)
    return 0
