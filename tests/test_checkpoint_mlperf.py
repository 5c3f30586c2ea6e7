"""The mlperf profile does the very I/O of MLPerf Storage v3.0, as strace sees it; and what native does instead."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoint_support import MODEL, Bench, Ran, need

from mlstor.checkpoint import rundir
from mlstor.checkpoint.layout import Layout

MIB = 1 << 20
#: One rank: a model file of 13.9 MB, and an optimizer file of 83.7 MB: two whole chunks and a rest.
SCALE = "1/144"
NAMES = [f"zero_pp_rank_0_mp_rank_0_{kind}_states.pt" for kind in ("model", "optim")]
CALLS = (
    "openat,pwrite64,write,pread64,read,preadv2,pwritev2,fsync,fdatasync,fadvise64,fallocate,ftruncate,"
    "rename,renameat,renameat2"
)
_LINE = re.compile(r"^(\d+) +([\d.]+) (\w+)\((.*?)(?:\) += (-?\d+).*)?$")
_RESUMED = re.compile(r"^(\d+) +[\d.]+ <\.\.\. (\w+) resumed>(.*)$")


class Call(NamedTuple):
    """A system call on a checkpoint's file."""

    name: str
    arguments: str
    result: int

    @property
    def numbers(self) -> list[int]:
        """Its last numeric arguments: length and offset of a transfer, offset and length of advice."""
        return [int(word) for word in self.arguments.split(", ") if word.isdecimal()]


def traced(bench: Bench, *options: object, scale: str = SCALE) -> tuple[Ran, dict[str, list[Call]]]:
    """A run of rank 0 under strace, and the calls on each of its files, in the order in which they began."""
    log = bench.directory / "strace"
    before = [need("strace"), "-f", "-y", "-ttt", "-s", "0", "-e", f"trace={CALLS}", "-o", str(log)]
    ran = bench.program("--only-ranks", 0, *options, bench.target, before=before, scale=scale)
    if "PTRACE" in ran.err or "ptrace" in ran.err:
        pytest.skip("this machine allows no tracing")
    assert ran.code == 0, ran.err
    return ran, parse(log.read_text())


def parse(log: str) -> dict[str, list[Call]]:
    calls: dict[str, list[Call]] = defaultdict(list)
    begun: dict[str, tuple[str, int]] = {}
    for line in log.splitlines():
        resumed = _RESUMED.match(line)
        if resumed:
            name, index = begun.pop(resumed[1], ("", -1))
            if name:
                former = calls[name][index]
                result = re.search(r"= (-?\d+)", resumed[3])
                arguments = former.arguments + resumed[3].rsplit(") ", 1)[0]
                calls[name][index] = Call(former.name, arguments, int(result[1]) if result else -1)
            continue
        found = _LINE.match(line.replace(" <unfinished ...>", ""))
        file = re.search(r"zero_pp_rank_0_mp_rank_0_\w+_states\.pt", line)
        if not found or not file:
            continue
        calls[file[0]].append(Call(found[3], found[4], int(found[5] or -1)))
        if "<unfinished" in line:
            begun[found[1]] = (file[0], len(calls[file[0]]) - 1)
    return calls


def sizes() -> dict[str, int]:
    from fractions import Fraction

    from mlstor.checkpoint import models

    return {file.name: file.nbytes for file in Layout(models.get(MODEL), scale=Fraction(SCALE)).files(0)}


def test_writes_are_32_mib_in_sequence_each_dropped_with_one_fsync_at_the_end(bench: Bench) -> None:
    ran, calls = traced(bench, "--profile", "mlperf", "--writes", 1, "--reads", 0, "--pause", 0)
    assert list(calls) == NAMES  # one file after the other
    for name, nbytes in sizes().items():
        opened, *rest = calls[name]
        assert opened.name == "openat"
        assert "O_CREAT" in opened.arguments
        assert "O_DIRECT" not in opened.arguments
        expected: list[tuple[str, list[int]]] = []
        for offset in range(0, nbytes, 32 * MIB):
            length = min(32 * MIB, nbytes - offset)
            expected += [("pwrite64", [length, offset]), ("fadvise64", [offset, length])]
        expected += [("fsync", [])]
        assert [(call.name, call.numbers) for call in rest] == expected
        assert all("POSIX_FADV_DONTNEED" in call.arguments for call in rest if call.name == "fadvise64")
        assert all(call.result == call.numbers[0] for call in rest if call.name == "pwrite64")
    record = ran.record
    work = record.workload
    assert work.steps == ["write", "fadvise_dontneed", "fsync"]
    assert (work.block_bytes, work.depth, work.backend) == (32 * MIB, 1, "threads")
    assert not {"block_bytes", "depth", "workers", "backend", "direct"} & record.settings.keys()
    assert [path.direct for path in record.phases[0].paths] == ["no"]


def test_a_file_that_is_there_is_emptied_first(bench: Bench) -> None:
    options = ("--profile", "mlperf", "--writes", 1, "--reads", 0, "--pause", 0, "--run-id", "run")
    small = ("--only-ranks", 0, *options, bench.target)
    assert bench.run(*small, scale="1/4096").code == 0
    _, calls = traced(bench, *options, scale="1/4096")
    for name in NAMES:
        names = [call.name for call in calls[name]]
        opened = calls[name][0]
        assert "O_TRUNC" in opened.arguments or names[1] == "ftruncate"
        assert names[-3:] == ["pwrite64", "fadvise64", "fsync"]


def test_reads_are_four_quarters_without_readahead_each_dropped(bench: Bench) -> None:
    options = ("--profile", "mlperf", "--pause", 0, "--run-id", "run")
    assert bench.run("--only-ranks", 0, *options, "--reads", 0, "--writes", 1, bench.target, scale=SCALE).code == 0
    _, calls = traced(bench, *options, "--writes", 0, "--reads", 1, "--no-evict")
    assert list(calls) == NAMES
    for name, nbytes in sizes().items():
        quarter = -(-nbytes // 4)
        parts = [(offset, min(quarter, nbytes - offset)) for offset in range(0, nbytes, quarter)]
        assert len(parts) == 4
        assert sorted({call.name for call in calls[name]}) == ["fadvise64", "openat", "pread64"]
        reads = [call for call in calls[name] if call.name == "pread64"]
        assert sorted((call.numbers[-1], call.result) for call in reads) == parts
        advice = [call for call in calls[name] if call.name == "fadvise64"]
        assert sum("POSIX_FADV_RANDOM" in call.arguments for call in advice) == 4
        dropped = [call.numbers for call in advice if "DONTNEED" in call.arguments]
        assert sorted(map(tuple, dropped)) == parts


def test_a_quarter_above_128_mib_is_read_in_pieces(bench: Bench) -> None:
    """With files of zeros and no room taken: nothing is compared."""
    from fractions import Fraction

    from mlstor.checkpoint import models

    scale = "1/20"
    layout = Layout(models.get(MODEL), scale=Fraction(scale))
    manifest = rundir.Manifest(
        rundir.FORMAT, "run", 1, MODEL, None, 8, scale, 0, None, (str(bench.target),), written=1, complete=(1,)
    )
    rundir.save(str(bench.target), manifest)
    for file in layout.files(0):
        path = bench.file("run", file.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as made:
            made.truncate(file.nbytes)
    largest = max(layout.files(0), key=lambda file: file.nbytes)
    _, calls = traced(
        bench, "--profile", "mlperf", "--pause", 0, "--run-id", "run", "--writes", 0, "--reads", 1, scale=scale
    )
    quarter = -(-largest.nbytes // 4)
    assert 128 * MIB < quarter < 256 * MIB
    expected = [
        (offset, min(128 * MIB, start + quarter - offset, largest.nbytes - offset))
        for start in range(0, largest.nbytes, quarter)
        for offset in range(start, min(start + quarter, largest.nbytes), 128 * MIB)
    ]
    reads = [call for call in calls[largest.name] if call.name == "pread64"]
    assert sorted((call.numbers[-1], call.result) for call in reads) == expected


def test_native_preallocates_syncs_and_renames_without_the_page_cache(bench: Bench) -> None:
    options = ("--reads", 0, "--run-id", "run", "--backend", "threads", "--workers", 1)
    ran, calls = traced(bench, *options, scale="1/4096")
    kind = next(iter({path.fs_type for path in ran.record.phases[0].paths}))
    if kind not in ("ext4", "xfs"):
        pytest.skip(f"the steps of ext4 and xfs; this is {kind}")
    for name in NAMES:
        made = [call.name for call in calls[name]]
        assert made.index("fallocate") < made.index("pwrite64") < made.index("fdatasync") < len(made) - 1
        assert made[-1].startswith("rename")
        assert any("O_DIRECT" in call.arguments for call in calls[name] if call.name == "openat")
        assert "fsync" not in made
    assert ran.record.workload.steps == ["preallocate", "write", "fdatasync", "rename", "fsync_dir"]


def test_defaults_are_ten_of_each_with_pauses_of_five_seconds(bench: Bench) -> None:
    from mlstor.checkpoint.options import parse
    from mlstor.checkpoint.profiles import PROFILES

    given = parse(["--profile", "mlperf", "--model", MODEL, str(bench.target)])
    assert (given.writes, given.reads) == (10, 10)
    assert PROFILES["mlperf"].pause_s == 5
    assert not PROFILES["mlperf"].verify


def test_a_pause_comes_before_each_phase_and_is_in_no_figure(bench: Bench) -> None:
    began = time.monotonic()
    ran = bench("--profile", "mlperf", "--writes", 2, "--reads", 1, "--pause", "300ms")
    assert time.monotonic() - began >= 0.9
    record = ran.record
    assert record.workload.pause_ns == 300_000_000
    starts = [phase.barrier_unix_ns for phase in record.phases]
    ends = [phase.barrier_unix_ns + max(phase.ranks.end_ns) for phase in record.phases]
    assert record.start_unix_ns + 300_000_000 <= starts[0]
    assert all(end + 290_000_000 <= start for end, start in zip(ends, starts[1:], strict=False))


def test_mlperf_figures_are_labelled_as_such(bench: Bench) -> None:
    ran = bench("--profile", "mlperf", "--writes", 1, "--reads", 1, "--pause", 0)
    assert "save_checkpoint_io_mean_GB_per_second" in ran.out
    assert "MLPerf's way (rank 0, mean of rates, GiB/s)" in ran.out
    assert "slowest rank" in ran.out
    path = next(bench.results.glob("*/record.json"))
    shown = bench.command("show", "--mlperf", path)
    assert '"load_checkpoint_duration_mean_seconds"' in shown.out


def test_the_readers_of_one_rank_share_a_process_whatever_its_ranks(bench: Bench) -> None:
    ran = bench("--profile", "mlperf", "--writes", 1, "--reads", 1, "--pause", 0, "--only-ranks", "0-2")
    phases = ran.record.phases
    assert [phase.processes.workers for phase in phases] == [[3], [12]]
    assert {path.backend for phase in phases for path in phase.paths} == {"threads"}
    assert not list(Path(bench.target).iterdir())
