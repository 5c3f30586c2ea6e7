"""``mlstor stream``: options -> run -> record and table."""

from __future__ import annotations

from mlstor.stream.options import parse


def main(argv: list[str]) -> int:
    """Run ``mlstor stream`` with these arguments; the exit code is 1 if transfers failed, 3 if damage was found."""
    from mlstor.world import said_once

    with said_once():
        options = parse(argv)
    from mlstor.stream.run import run

    return run(options, ["mlstor", "stream", *argv])
