"""What a killed run leaves: journals that survive SIGKILL, and the partial record that is made of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from record_factory import progress, record, report

from mlstor.errors import UsageError
from mlstor.results import journal as j
from mlstor.results.phase import Progress
from mlstor.results.record import Record, RunError, load


def described(processes: int = 2) -> Record:
    return record(processes, writes=0, reads=0)


def begin(run_dir: Path, processes: int = 2) -> list[j.Journal]:
    made = [j.Journal(run_dir, 0, described(processes), [8])]
    return made + [j.Journal(run_dir, process) for process in range(1, processes)]


def hurry(journal: j.Journal, one: Progress) -> None:
    """Append `one` as if the interval had passed."""
    journal._written_s = -j.PROGRESS_INTERVAL_S
    assert journal.progress(one)


def test_finished_and_unfinished_phases_are_recovered(tmp_path: Path) -> None:
    first, second = begin(tmp_path / "run")
    for process, journal in enumerate((first, second)):
        hurry(journal, progress(process))
        journal.finished(report(process))
    first.finished(report(0, checkpoint=2))
    hurry(second, progress(1, checkpoint=2, nbytes=5))
    hurry(second, progress(1, checkpoint=2, nbytes=77))
    for journal in (first, second):
        journal.close()
    made = j.recover(tmp_path / "run")
    assert made.status == "partial"
    assert [(phase.checkpoint, phase.complete) for phase in made.phases] == [(1, True), (2, False)]
    assert made.phases[0].unfinished.process == []
    assert made.phases[1].unfinished.nbytes == [77]
    assert made.recovered is not None
    assert (made.recovered.journals, made.recovered.torn_lines, made.recovered.missing_processes) == (2, 0, 0)


def test_progress_is_appended_only_when_due(tmp_path: Path) -> None:
    with j.Journal(tmp_path, 0, described(1)) as journal:
        assert not journal.progress(progress(0))
        hurry(journal, progress(0))
        assert not journal.progress(progress(0))
    assert journal.path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_torn_last_line_is_counted_and_the_rest_kept(tmp_path: Path, cut: int) -> None:
    (journal,) = begin(tmp_path, 1)
    journal.finished(report(0))
    journal.finished(report(0, checkpoint=2))
    journal.close()
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[: -1 - cut])
    made = j.recover(tmp_path)
    assert [phase.checkpoint for phase in made.phases] == [1]
    assert made.recovered is not None
    assert made.recovered.torn_lines == 1


def test_lines_that_never_reached_the_disk_are_counted_too(tmp_path: Path) -> None:
    (journal,) = begin(tmp_path, 1)
    journal.close()
    with open(journal.path, "ab") as file:
        file.write(b"\0" * 4096 + b"\n")
    with j.Journal(tmp_path / "other", 0) as other:
        other.finished(report(0))
    with open(journal.path, "ab") as file:
        file.write(other.path.read_bytes())
    made = j.recover(tmp_path)
    assert len(made.phases) == 1
    assert made.recovered is not None
    assert made.recovered.torn_lines == 1


def test_a_run_that_said_why_it_ended_is_failed_and_names_it(tmp_path: Path) -> None:
    first, second = begin(tmp_path)
    error = RunError(rank=1, host="node0001", file="/mnt/x", offset=0, message="Input/output error")
    second.failed(error)
    first.close()
    second.close()
    made = j.recover(tmp_path)
    assert (made.status, made.error) == ("failed", error)


def test_missing_journals_are_counted(tmp_path: Path) -> None:
    with j.Journal(tmp_path, 0, described(4)) as journal:
        journal.finished(report(0))
    made = j.recover(tmp_path)
    assert made.recovered is not None
    assert made.recovered.missing_processes == 3
    assert not made.phases[0].complete


def test_without_process_0s_description_there_is_a_clear_refusal(tmp_path: Path) -> None:
    j.Journal(tmp_path, 1).close()
    with pytest.raises(UsageError, match="no journal of process 0"):
        j.recover(tmp_path)
    with pytest.raises(UsageError, match="no journal of process 0"):
        j.recover(tmp_path / "nothing")


def test_a_run_id_is_used_once(tmp_path: Path) -> None:
    for journal in begin(tmp_path, 1):
        journal.close()
    with pytest.raises(UsageError, match="was begun before"):
        j.Journal(tmp_path, 0)
    j.seal(tmp_path, j.recover(tmp_path))
    with pytest.raises(UsageError, match="holds a run's record"):
        j.Journal(tmp_path, 0)


def test_sealing_writes_the_record_and_removes_the_journals(tmp_path: Path) -> None:
    for journal in begin(tmp_path / "run"):
        journal.close()
    path = j.seal(tmp_path / "run", j.recover(tmp_path / "run"))
    assert load(path).status == "partial"
    assert [one.name for one in (tmp_path / "run").iterdir()] == ["record.json"]
    assert j.find_unfinished(tmp_path) == []


def test_each_process_can_discard_its_own_journal(tmp_path: Path) -> None:
    first, second = begin(tmp_path)
    first.discard()
    assert (tmp_path / j.JOURNAL_DIR).is_dir()
    second.discard()
    assert not (tmp_path / j.JOURNAL_DIR).exists()


def test_runs_in_progress_are_not_taken_for_killed_ones(tmp_path: Path) -> None:
    first, second = begin(tmp_path / "run")
    first.close()
    assert j.find_unfinished(tmp_path) == []
    second.close()
    assert j.find_unfinished(tmp_path) == [tmp_path / "run"]
    assert j.find_unfinished(tmp_path / "nothing") == []


def test_another_hosts_journal_must_have_been_quiet_since_its_lock_may_not_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(j, "boot_id", lambda: "another host's boot")
        (journal,) = begin(tmp_path / "run", 1)
    journal.close()
    assert j.find_unfinished(tmp_path) == []
    long_ago = journal.path.stat().st_mtime - j.QUIET_S - 1
    os.utime(journal.path, (long_ago, long_ago))
    assert j.find_unfinished(tmp_path) == [tmp_path / "run"]


def test_a_process_killed_in_mid_run_leaves_a_partial_record(tmp_path: Path) -> None:
    """A real SIGKILL, while the journal is open and locked and a line is half written."""
    program = textwrap.dedent(
        """
        import os, sys, time
        from mlstor.results import journal as j
        from record_factory import record, report
        journal = j.Journal(sys.argv[1], 0, record(1, writes=0, reads=0))
        journal.finished(report(0))
        os.write(journal._fd, b'{"type":"progress","progr')
        print("ready", flush=True)
        time.sleep(60)
        """
    )
    run_dir = tmp_path / "run"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    child = subprocess.Popen([sys.executable, "-c", program, str(run_dir)], stdout=subprocess.PIPE, text=True, env=env)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "ready\n"
        assert j.find_unfinished(tmp_path) == []
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=30)
    assert j.find_unfinished(tmp_path) == [run_dir]
    made = j.recover(run_dir)
    assert made.status == "partial"
    assert [(phase.op, phase.checkpoint, phase.complete) for phase in made.phases] == [("write", 1, True)]
    assert made.recovered is not None
    assert made.recovered.torn_lines == 1


def test_a_full_disk_is_an_oserror_and_not_a_silent_loss(tmp_path: Path) -> None:
    (journal,) = begin(tmp_path, 1)
    real, journal._fd = journal._fd, os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left"):
            journal.finished(report(0))
    finally:
        journal.close()
        os.close(real)
