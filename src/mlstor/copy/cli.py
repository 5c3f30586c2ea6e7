"""``mlstor copy``: options -> run -> record and table."""

from __future__ import annotations

from mlstor.copy.options import parse


def main(argv: list[str]) -> int:
    """Run ``mlstor copy`` with these arguments; the exit code is 1 if objects failed, 3 if damage was found."""
    from mlstor.world import said_once

    with said_once():
        options = parse(argv)
    from mlstor.copy.run import run

    return run(options, ["mlstor", "copy", *argv])
