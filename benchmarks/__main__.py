"""``python -m benchmarks``: compare, print, save; ``--fast`` on a RAM-backed file system."""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command, contenders as listing, fio, machine, report
from benchmarks.child import ROOT, Job
from benchmarks.command import progress
from benchmarks.fastfs import ram_backed_xfs
from benchmarks.footprint import Footprint, help_seconds, rank_footprint
from benchmarks.harness import Contender, Sample, drop_caches, remove, require_uncached, run_rounds
from mlstor.errors import UsageError
from mlstor.units import format_gib, parse_size

# Payloads of memory touched before each contender. Two are needed, page cache and tensors, but free memory is
# not handed out in the order in which it came back: with two, a plain write loop varied by 1.9 x in six runs,
# with eight by 1.13 x.
TOUCH = 6


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument(
        "--dir", type=Path, default=Path("/var/tmp"), help="where the disk tests write (default: /var/tmp)"
    )
    made.add_argument(
        "--fast", action="store_true", help="on XFS on a loop device over tmpfs instead of --dir; needs root"
    )
    made.add_argument("--rounds", type=int, default=5, help="rounds, each with every contender (default: 5)")
    made.add_argument("--size", default="1GiB", help="payload of one file, a multiple of 256MiB (default: 1GiB)")
    made.add_argument("--seconds", type=float, default=4.0, help="length of a run of random reads (default: 4)")
    made.add_argument(
        "--only", default="", help="comma-separated shell patterns of contenders, such as 'mlstor-*,fio-*'"
    )
    made.add_argument(
        "--selfcheck",
        action="store_true",
        help="only the check of the harness: each plain loop against itself",
    )
    made.add_argument(
        "--touch", type=int, default=TOUCH, help=f"payloads of memory touched before each (default: {TOUCH})"
    )
    made.add_argument(
        "--seed", type=int, default=None, help="of the order within rounds (default: drawn, and reported)"
    )
    made.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="for report, JSON and picture")
    made.add_argument("--publish", action="store_true", help="also put tables and picture into docs/performance.md")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, 1 if the self-check failed, or the exit code of an error."""
    return command.run(compare, parser().parse_args(arguments))


def compare(options: argparse.Namespace) -> int:
    """Measure what `options` ask for, print and save the report."""
    nbytes = parse_size(options.size)
    if nbytes < fio.GRAIN_BYTES or nbytes % fio.GRAIN_BYTES:
        raise UsageError(f"--size {options.size} is not a multiple of 256MiB")
    if options.rounds < 1:
        raise UsageError("--rounds must be 1 or more; 5 or more for a figure worth telling")
    if options.touch < 2:
        raise UsageError("--touch must be 2 or more: a page cache full, and the tensors")
    if options.selfcheck and options.only:
        raise UsageError("--selfcheck runs the plain loops alone; leave out --only")
    entries, footprints = listing.choose("*-loop-again" if options.selfcheck else options.only)
    report.require_matplotlib()
    version = fio.require_fio() if any(not entry.function for entry in entries) else ""
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    job = Job("", nbytes, options.touch * nbytes, seconds=options.seconds, seed=seed)
    room_bytes = listing.room_bytes(entries, nbytes)
    # Beside the touched memory a contender holds its state and its interpreter.
    memory_bytes = (options.touch + 2) * nbytes + (1 << 30)
    with contextlib.ExitStack() as stack:
        if options.fast:
            progress(f"making a RAM-backed XFS of {format_gib(room_bytes)}")
            base = stack.enter_context(ram_backed_xfs(room_bytes, memory_bytes))
        else:
            base = machine.require_room(options.dir, room_bytes, memory_bytes)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlstor-bench-", dir=base)))
        environment = describe(directory, options, seed, version)
        bound, samples, cells, sweeps = measure(entries, directory, job, options.rounds, seed)
        for path in directory.iterdir():
            remove(path)
        help_times_s = help_seconds() if "help" in footprints else []
        rank: Footprint | None = None
        if "rss" in footprints:
            progress("one rank of llama3-1t: 13.9 GB written and read")
            rank = rank_footprint(directory)
    run = report.Run("fast" if options.fast else "disk", bound, samples, cells, sweeps, help_times_s, rank, environment)
    print(report.markdown(run))
    progress("saved: " + ", ".join(map(str, report.save(run, options.out))))
    if options.publish:
        report.publish(run, ROOT / "docs")
    return 0 if all(check.passed for check in run.checks) else 1


def measure(
    entries: Sequence[listing.Entry], directory: Path, job: Job, rounds: int, seed: int
) -> tuple[list[Contender], dict[str, list[Sample]], dict[str, fio.Cell], dict[str, dict[fio.Cell, list[float]]]]:
    """Make the files, let fio find its best cells, run the rounds."""
    progress("writing the files that are read")
    listing.make_sources(entries, directory, job)
    cells: dict[str, fio.Cell] = {}
    sweeps: dict[str, dict[fio.Cell, list[float]]] = {}
    for entry in entries:
        if not entry.function:
            candidates = fio.RANDOM if entry.group == "random" else fio.SEQUENTIAL
            progress(f"fio's sweep: {entry.group}, {len(candidates)} cells")
            path = directory / (entry.source or "sweep")

            def once(cell: fio.Cell, entry: listing.Entry = entry, path: Path = path) -> Sample:
                drop_caches([path] if entry.source else [])
                sample = fio.run(cell, listing.MODES[entry.group], path, job.nbytes, job.seconds)
                if not entry.source:
                    remove(path)
                return sample

            cells[entry.group], sweeps[entry.group] = fio.sweep(candidates, once, progress)

    def prepare(contender: Contender) -> None:
        drop_caches(contender.reads)
        require_uncached(contender.reads)

    bound = listing.bind(entries, directory, job, cells)
    return bound, run_rounds(bound, rounds, seed, prepare, progress), cells, sweeps


def describe(directory: Path, options: argparse.Namespace, seed: int, fio_version: str) -> dict[str, str]:
    """Host, versions and parameters."""
    text = {
        **machine.describe(directory),
        "size": options.size,
        "rounds": str(options.rounds),
        "seed": str(seed),
        "memory touched": f"{options.touch} x size",
        "caches emptied by": drop_caches([]),
    }
    if fio_version:
        text["fio"] = fio_version.removeprefix("fio-")
    return text | machine.versions(("mlstor", "torch", "safetensors"))


if __name__ == "__main__":
    sys.exit(main())
