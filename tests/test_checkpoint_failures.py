"""Storage that fails in the middle of a run: it ends within seconds, naming rank, host, file and offset."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import launchers
import pytest
from checkpoint_support import MIB, MODULE, Bench, Ran, need

from mlstor.results.record import RunError

LoopFactory = Callable[..., Path]


def failed(ran: Ran) -> RunError:
    """The error in the record of a run that failed."""
    assert ran.code not in (0, 2), (ran.code, ran.out)
    assert "Traceback" not in ran.err
    record = ran.record
    assert record.status == "failed"
    assert record.error is not None
    assert record.error.host == socket.gethostname()
    assert not list(ran.results.glob("*/journal"))
    assert "record, failed: " in ran.out
    return record.error


def test_a_limit_of_file_sizes(bench: Bench) -> None:
    before = [need("prlimit"), "--fsize=100000"]
    ran = bench.program("--run-id", "run", bench.target, before=before)
    error = failed(ran)
    assert ran.code == 1
    assert "see `ulimit -f`" in ran.sentence
    assert error.file is not None
    assert re.search(r"mp_rank_0_optim_states\.pt$", error.file)
    assert error.file in ran.sentence
    assert bench.command("clean", "run", bench.target).code == 0
    assert list(bench.target.iterdir()) == []


def test_a_limit_that_is_met_in_mid_write_gives_the_offset(bench: Bench) -> None:
    """mlperf's writes do not preallocate: the third chunk of 32 MiB is the one that is refused."""
    before = [need("prlimit"), f"--fsize={64 * MIB}"]
    options = ("--profile", "mlperf", "--writes", 1, "--reads", 0, "--pause", 0, "--only-ranks", 0)
    ran = bench.program("--run-id", "run", *options, bench.target, before=before, scale="1/144")
    error = failed(ran)
    assert (error.rank, error.offset) == (0, 64 * MIB)
    assert f"transfer at offset {64 * MIB}" in ran.sentence
    phase = ran.record.phases[0]
    assert (phase.op, phase.complete) == ("write", False)


def after_the_first_checkpoint(bench: Bench, target: Path, change: Callable[[], None], *options: object) -> Ran:
    """A run of two writes; its storage changes while it pauses before the second."""
    underway = bench.start("--run-id", "run", "--writes", 2, "--pause", "1s", *options, target, scale="1/65536")
    manifest = target / "run/manifest.json"
    underway.wait_for(lambda: manifest.exists() and b'"complete": [\n  1' in manifest.read_bytes())
    change()
    return underway.wait()


@pytest.mark.parametrize("profile", ["native", "mlperf"])
def test_a_file_system_that_fills(bench: Bench, loop_fs: LoopFactory, profile: str) -> None:
    mount = loop_fs("ext4", 32 * MIB)

    def fill() -> None:
        with (
            open("/dev/zero", "rb") as zeros,
            (mount / "fill").open("wb", buffering=0) as file,
            pytest.raises(OSError, match="No space"),
        ):
            shutil.copyfileobj(zeros, file)

    began = time.monotonic()
    ran = after_the_first_checkpoint(bench, mount, fill, "--profile", profile)
    assert time.monotonic() - began < 30
    error = failed(ran)
    assert error.file is not None
    assert error.file.startswith(f"{mount}/run/llama3-8b/global_epoch1_step2")
    assert "No space left on device" in ran.sentence
    assert [(phase.op, phase.checkpoint, phase.complete) for phase in ran.record.phases] == [
        ("write", 1, True), ("write", 2, False),
    ]  # fmt: skip
    cleaned = bench.command("clean", "run", mount)
    assert cleaned.code == 0
    assert {path.name for path in mount.iterdir()} == {"fill", "lost+found"}


def test_a_directory_that_vanishes_is_not_made_anew(bench: Bench) -> None:
    ran = after_the_first_checkpoint(bench, bench.target, lambda: shutil.rmtree(bench.target))
    error = failed(ran)
    assert "No such file or directory" in ran.sentence
    assert error.file is not None
    assert error.file.startswith(str(bench.target))
    assert not bench.target.exists()


def test_one_ranks_failure_under_mpirun_stops_all_and_is_named(bench: Bench, loop_fs: LoopFactory) -> None:
    """Ranks 4 to 7, of the second process, find their drive read-only."""
    mount = loop_fs("ext4", 32 * MIB)
    drives = [bench.directory / f"drive{index}" for index in range(8)]
    for drive in drives[:4]:
        drive.mkdir()
    for drive in drives[4:]:
        (mount / drive.name).mkdir()
        drive.symlink_to(mount / drive.name)
    pattern = bench.directory / "drive{local_rank}"
    options = ("--run-id", "run", "--writes", 2, "--pause", "1s", pattern)
    underway = bench.start(*options, nranks=2, scale="1/65536")
    manifest = drives[7] / "run/manifest.json"
    underway.wait_for(lambda: manifest.exists() and b'"complete": [\n  1' in manifest.read_bytes())
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    began = time.monotonic()
    ran = underway.wait()
    assert time.monotonic() - began < 30
    error = failed(ran)
    assert error.rank == 1
    assert error.file is not None
    assert error.file.startswith(tuple(map(str, drives[4:])))
    assert re.search(
        rf"mlstor: rank 1 on {re.escape(socket.gethostname())}, in 'write 2': .*Read-only file system", ran.err
    )
    subprocess.run(["mount", "-o", "remount,rw", mount], check=True)
    assert bench.command("clean", "run", pattern).code == 0
    assert [list(drive.iterdir()) for drive in drives] == [[]] * 8


def test_a_reader_of_the_output_that_goes_away_does_not_stop_the_run(bench: Bench) -> None:
    words = [sys.executable, *MODULE, *bench.arguments(bench.target)]
    done = launchers.run(["sh", "-c", f"({shlex.join(words)}; echo $? > code) | head -n 1"], bench.directory)
    assert (bench.directory / "code").read_text() == "0\n"
    assert done.stderr == ""
    assert Ran(0, "", "", bench.results).record.status == "complete"
    assert list(bench.target.iterdir()) == []


def test_another_failure_is_shown_as_the_defect_that_it_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlstor.checkpoint import honesty

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(honesty, "verification", broken)
    with pytest.raises(ZeroDivisionError):
        bench.run(bench.target)
    assert Ran(1, "", "", bench.results).record.status == "failed"
