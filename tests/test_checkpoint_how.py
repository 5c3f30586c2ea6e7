"""How a run reached the storage is said: backend, direct, cached, affinity, and how often it is journalled."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import launchers
import pytest
from checkpoint_support import MIB, MODULE, Bench, Ran, Underway, journal_lines, need

from mlstor.host import describe
from mlstor.results import journal

SECCOMP = Path(__file__).parent / "seccomp.py"


def backends(ran: Ran) -> set[str]:
    assert ran.code == 0, ran.err
    return {path.backend for phase in ran.record.phases for path in phase.paths}


def test_threads_by_the_environment(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLSTOR_BACKEND", "threads")
    ran = bench()
    assert backends(ran) == {"threads"}
    setting = ran.record.settings["backend"]
    assert (setting.value, setting.source) == ("threads", "environment")
    assert "threads (pread/pwrite)" in ran.out
    assert "backend threads (environment)" in ran.out


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_io_uring_refused_by_seccomp(bench: Bench, error: str) -> None:
    ran = bench.program(bench.target, before=[sys.executable, str(SECCOMP), error])
    assert backends(ran) == {"threads"}
    assert ran.record.phases[1].verification.damaged_blocks == 0
    required = bench.program("--backend", "io_uring", bench.target, before=[sys.executable, str(SECCOMP), error])
    assert required.code != 0
    assert "io_uring" in required.sentence


def test_buffered_reads_are_evicted_and_checked(bench: Bench) -> None:
    record = bench("--direct", "off").record
    assert {path.direct for phase in record.phases for path in phase.paths} == {"no"}
    cached = record.phases[1].cached
    kind = record.phases[1].paths[0].fs_type
    if kind in ("tmpfs", "overlay"):
        pytest.skip(f"{kind} gives no pages back")
    assert cached.verdict == "no"
    assert cached.how == "evicted, and every page checked"
    assert cached.looked_at_bytes >= bench.layout().total_nbytes
    unevicted = bench("--direct", "off", "--no-evict").record.phases[1].cached
    assert (unevicted.verdict, unevicted.how) == ("unknown", "neither direct nor evicted")


def test_direct_reads_are_confirmed(bench: Bench) -> None:
    record = bench().record
    ways = {path.direct for phase in record.phases for path in phase.paths}
    if ways != {"yes"}:
        pytest.skip(f"no direct I/O here: {ways}")
    assert record.phases[1].cached.verdict == "no"
    assert record.phases[1].cached.how.startswith("O_DIRECT")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core can't be bound more narrowly")
def test_a_narrow_binding_is_warned_of_with_what_widens_it(bench: Bench) -> None:
    mpi = launchers.find("openmpi")
    words = [*mpi.mpirun, "--bind-to", "core", "-n", "2", mpi.python, *MODULE, *bench.arguments(bench.target)]
    done = launchers.run(words, bench.directory)
    if "not supported" in done.stderr or "binding" in done.stderr.lower():
        pytest.skip("this machine does not let mpirun bind")
    ran = Ran(done.returncode, done.stdout, done.stderr, bench.results)
    assert ran.code == 0, ran.err
    host = ran.record.hosts[0]
    assert host.affinity_narrow
    assert ran.record.phases[0].processes.cores_allowed == [1, 1]
    assert ran.out.count("warning: bound to 1 core") == 1
    assert "--bind-to none" in ran.out


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core can't be bound more narrowly")
def test_a_narrow_process_is_warned_of_whichever_it_is(bench: Bench) -> None:
    mpi = launchers.find("openmpi")
    wide = describe().affinity
    rank = [mpi.python, *MODULE, *bench.arguments(bench.target)]
    core = str(min(os.sched_getaffinity(0)))
    words = [*mpi.mpirun, *mpi.unbound, "-n", "1", *rank, ":", "-n", "1", need("taskset"), "-c", core, *rank]
    done = launchers.run(words, bench.directory)
    ran = Ran(done.returncode, done.stdout, done.stderr, bench.results)
    assert ran.code == 0, ran.err
    host = ran.record.hosts[0]
    assert (host.affinity, host.affinity_narrow, host.affinities) == (wide, True, [wide, core])
    assert ran.out.count("warning: bound to 1 core") == 1
    assert "(1 of 2 processes are bound)" in " ".join(ran.out.split())


def test_each_target_has_its_own_settings(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them is named first."""
    small, plain = bench.directory / "small", bench.directory / "plain"
    small.mkdir()
    plain.mkdir()
    profile = bench.directory / "profile.yaml"
    profile.write_text(f"targets:\n  {small}: {{block_bytes: 8KiB, direct: off}}\n  {plain}: {{direct: auto}}\n")
    monkeypatch.setenv("MLSTOR_PROFILE", str(profile))
    for targets in ((small, plain), (plain, small)):
        ran = bench.run(*targets)
        assert ran.code == 0, ran.err
        record = ran.record
        assert {target.path: (target.block_bytes, target.direct) for target in record.targets} == {
            str(small): (8192, "off"), str(plain): (automatic_block(plain), "auto"),
        }  # fmt: skip
        assert record.workload.block_bytes == automatic_block(plain)
        layout = bench.layout()
        of_small = [file.nbytes for rank in range(targets.index(small), 8, 2) for file in layout.files(rank)]
        blocks = sum(-(-nbytes // 8192) for nbytes in of_small)
        for phase in record.phases:
            # elsewhere each file is a block, and under O_DIRECT its last bytes
            assert blocks < phase.histograms[phase.op].count <= blocks + 3 * 8
            buffered = sum(path.nbytes for path in phase.paths if path.direct == "no")
            assert buffered in (sum(of_small), layout.total_nbytes)


def test_the_record_has_what_was_automatic(bench: Bench) -> None:
    work = bench("--workers", 1).record.workload
    assert (work.block_bytes, work.depth, work.workers) == (automatic_block(bench.target), 8, 1)
    assert bench("--block", "64KiB", "--depth", 3).record.workload.block_bytes == 65536


def automatic_block(directory: Path) -> int:
    """1 MiB, or up to 4 MiB where the file system prefers more."""
    return min(max(1 * MIB, directory.stat().st_blksize), 4 * MIB)


def test_more_processes_than_ranks(bench: Bench) -> None:
    ran = bench.mpi(3, "--only-ranks", "0-1", bench.target)
    assert ran.code == 0, ran.err
    assert "3 processes for 2 ranks: some have nothing to do" in ran.out
    assert "warning: bound" not in ran.out  # with --bind-to none
    assert not ran.record.hosts[0].affinity_narrow
    assert ran.record.phases[0].ranks.process == [0, 1]
    assert ran.record.phases[0].complete


def test_every_rank_journals_often_enough(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is due half as late as the 10 s that a killed run may lose, and the loop looks four times a second."""
    from mlstor.checkpoint import phase

    assert journal.PROGRESS_INTERVAL_S <= 5
    assert phase.INTERVAL_NS <= 10**9
    underway: Underway = bench.start("--run-id", "run", bench.target)
    underway.wait_for_phase(0)
    path = bench.results / "run/journal/0.jsonl"
    first = [line["type"] for line in journal_lines(path)]
    assert first == ["start", "run", "progress"]
    assert underway.wait().code == 0
    monkeypatch.setattr(journal, "PROGRESS_INTERVAL_S", 0.0)
    seen: list[int] = []
    append = journal.Journal._append

    def spy(self: journal.Journal, line: journal.Line) -> None:
        if isinstance(line, journal.Under):
            seen.append(line.progress.nbytes)
        append(self, line)

    monkeypatch.setattr(journal.Journal, "_append", spy)
    bench("--writes", 1, "--reads", 0)
    assert len(seen) >= 2  # at the begin, and at each look of the loop
    assert seen[0] == 0
