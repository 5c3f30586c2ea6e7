"""Ctrl-C, SIGTERM and SIGKILL in every phase, alone and under mpirun: the run ends, and what it had reached is kept."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import signal
import time
from typing import Any

import launchers
import pytest
from checkpoint_support import Bench, Ran, Underway, journals_in_phase

from mlstor.meter import Series
from mlstor.operations import is_leftover

SIGNALS = [signal.SIGINT, signal.SIGTERM]
#: Number of the phase that is stopped: writes come first.
PHASES = {"write": 0, "read": 1}


def check_partial(bench: Bench, ran: Ran, phase: str | None) -> None:
    """A partial record with the phase that was under way, and files that `mlstor clean` removes."""
    assert "Traceback" not in ran.err + ran.out, ran.err
    record = ran.record
    assert (record.status, record.error) == ("partial", None)
    assert record.recovered is not None
    assert [one.op for one in record.phases] == (list(PHASES)[: PHASES[phase] + 1] if phase else [])
    if phase:
        last = record.phases[-1]
        assert not last.complete
        assert all(nbytes < last.nbytes + 1 for nbytes in last.unfinished.nbytes)
        assert all(one.complete for one in record.phases[:-1])
    shown = bench.command("show", next(bench.results.glob("*/record.json")))
    assert "PARTIAL" in shown.out
    assert not list(bench.results.glob("*/journal"))
    check_clean(bench)


def check_clean(bench: Bench) -> None:
    cleaned = bench.command("clean", "run", bench.target)
    assert cleaned.code == 0, cleaned.err
    assert list(bench.target.iterdir()) == []


def recover_by_next_run(bench: Bench) -> None:
    after = bench("--run-id", "next")
    assert "run run had ended without a record; one was made of its journals, marked partial" in after.out
    (bench.results / "next/record.json").unlink()


def check_stopped(bench: Bench, ran: Ran, phase: str, pids: dict[int, int]) -> None:
    """All ranks of an mpirun are gone, and there is a partial record, made by process 0 or by the next run."""
    assert ran.code != 0
    assert launchers.all_gone(pids.values())
    if not list(bench.results.glob("run/record.json")):  # mpirun leaves process 0 half a second for it
        recover_by_next_run(bench)
    check_partial(bench, ran, phase)


def begin(bench: Bench, phase: str, nranks: int = 0, *options: object) -> Underway:
    """A run in the middle of a phase."""
    underway = bench.start("--run-id", "run", *options, bench.target, nranks=nranks)
    underway.wait_for_phase(PHASES[phase], max(1, nranks))
    time.sleep(0.05)  # some transfers
    return underway


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_a_phase(bench: Bench, phase: str, signum: signal.Signals) -> None:
    underway = begin(bench, phase)
    underway.send(signum)
    began = time.monotonic()
    ran = underway.wait()
    assert time.monotonic() - began < 30
    assert ran.code == 128 + signum
    assert ran.err.count("mlstor: ") == 1
    assert f"record, partial: {bench.results}/run/record.json" in ran.out
    assert f"mlstor clean run {bench.target}" in ran.out
    check_partial(bench, ran, phase)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_in_a_pause(bench: Bench, signum: signal.Signals) -> None:
    underway = bench.start("--run-id", "run", "--pause", "30s", bench.target)
    underway.wait_for(lambda: any(bench.results.glob("run/journal/0.jsonl")))
    time.sleep(0.3)
    underway.send(signum)
    ran = underway.wait()
    assert ran.code == 128 + signum
    check_partial(bench, ran, None)


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize(
    ("moment", "recorded"),
    [
        ("mlstor.checkpoint.rundir.save", False),
        ("mlstor.results.journal.find_unfinished", False),
        ("mlstor.checkpoint.run.Runner._phase", True),
    ],
)
def test_a_signal_between_the_claim_and_the_first_phase(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, moment: str, recorded: bool, signum: signal.Signals
) -> None:
    module, name = moment.rsplit(".", 1)
    owner = pkgutil.resolve_name(module)
    former = getattr(owner, name)

    def stop(*args: Any, **named: Any) -> Any:
        result = former(*args, **named) if name == "save" else None
        os.kill(os.getpid(), signum)
        time.sleep(10)  # the signal ends this
        return result

    monkeypatch.setattr(owner, name, stop)
    ran = bench.run("--run-id", "run", bench.target)
    monkeypatch.undo()
    assert ran.code == 128 + signum
    assert ran.err == f"mlstor: stopped by {signum.name}\n"
    assert f"mlstor clean run {bench.target}" in ran.out
    assert bench.files() == {"run/manifest.json": (bench.target / "run/manifest.json").stat().st_size}
    if recorded:
        check_partial(bench, ran, None)
    else:
        assert list(bench.results.rglob("*")) == []
        check_clean(bench)


@pytest.mark.parametrize(("phase", "signum"), [("write", signal.SIGTERM), ("read", signal.SIGINT)])
def test_a_signal_to_mpirun_in_a_phase(bench: Bench, phase: str, signum: signal.Signals) -> None:
    underway = begin(bench, phase, 2)
    pids = journals_in_phase(bench.results, PHASES[phase])
    assert set(pids) == {0, 1}
    underway.send(signum)
    ran = underway.wait()
    check_stopped(bench, ran, phase, pids)


def test_sigterm_to_mpirun_while_a_rank_waits_for_another_in_a_barrier(bench: Bench) -> None:
    underway = begin(bench, "write", 2)
    pids = journals_in_phase(bench.results, 0)
    os.kill(pids[1], signal.SIGSTOP)
    # process 0 ends its share of the phase and waits in the barrier behind it
    journal = bench.results / "run/journal/0.jsonl"
    underway.wait_for(lambda: '"finished"' in journal.read_text())
    underway.send(signal.SIGTERM)
    ran = underway.wait()
    check_stopped(bench, ran, "write", pids)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_under_mpirun_ends_the_others(bench: Bench, victim: int) -> None:
    underway = begin(bench, "write", 2)
    pids = journals_in_phase(bench.results, 0)
    os.kill(pids[victim], signal.SIGKILL)
    began = time.monotonic()
    ran = underway.wait()
    assert time.monotonic() - began < 30
    assert victim or not list(bench.results.glob("run/record.json"))
    check_stopped(bench, ran, "write", pids)


@pytest.mark.parametrize("phase", PHASES)
def test_sigkill_leaves_journals_for_the_next_run(bench: Bench, phase: str) -> None:
    underway = begin(bench, phase)
    while True:
        underway.send(signal.SIGSTOP)
        left = any(is_leftover(path.name) for path in bench.target.rglob("*"))
        if left or phase == "read":
            break
        underway.send(signal.SIGCONT)  # it was between two files
        time.sleep(0.005)
    underway.send(signal.SIGKILL)
    ran = underway.wait()
    assert ran.code == -signal.SIGKILL
    assert not list(bench.results.glob("*/record.json"))
    assert any(is_leftover(path.name) for path in bench.target.rglob("*")) == left == (phase == "write")
    recover_by_next_run(bench)
    check_partial(bench, ran, phase)


def test_a_run_that_was_killed_is_begun_again_under_its_id(bench: Bench) -> None:
    underway = begin(bench, "write")
    underway.send(signal.SIGKILL)
    underway.wait()
    incomplete = bench.run("--run-id", "run", "--writes", 0, bench.target, scale="1/1024")
    assert incomplete.code == 2
    assert "has no complete checkpoint: it was interrupted" in incomplete.sentence
    again = bench("--run-id", "run", scale="1/1024")
    assert again.record.status == "complete"
    assert list(bench.target.iterdir()) == []


def test_journals_that_tell_nothing_do_not_keep_the_next_run_from_running(bench: Bench) -> None:
    journal = bench.results / "old/journal/0.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text('{"type":"start","process":0,"hostname":"gone","boot_id":""}\n')
    os.utime(journal, (0, 0))
    ran = bench()
    assert "warning: run old ended without a record, and none could be made" in ran.out


def test_an_interrupt_that_was_dropped_on_its_way_ends_the_run_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As numpy drops one that comes while it looks at an enumeration."""
    sample = Series.sample

    def interrupted(series: Series) -> int:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return sample(series)

    monkeypatch.setattr(Series, "sample", interrupted)
    ran = bench.run("--run-id", "run", bench.target)
    assert ran.code == 130
    assert ran.record.status == "partial"
