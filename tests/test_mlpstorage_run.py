"""mlstor mlpstorage: the processes that it starts, with a real launcher and without one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launchers import PROGRAMS, alive, environment, find

from mlstor import cli
from mlstor.checkpoint import mlpstorage_run
from mlstor.checkpoint.mlpstorage import translate
from mlstor.errors import UsageError

RUN = "open checkpointing run file --model llama3-8b -np 2 -ncw 1 -ncr 1 -cm 1"
AS_ROOT = ["--allow-run-as-root"] if os.geteuid() == 0 else []


@pytest.fixture
def outside(monkeypatch):
    """As if no launcher had started this test, whatever did."""
    for name in [name for name in os.environ if name.startswith(("OMPI_", "PMIX_", "PMI_", "SLURM_"))]:
        monkeypatch.delenv(name)


def command(tmp_path: Path, line: str, *more: str) -> list[str]:
    (tmp_path / "ckpt").mkdir(exist_ok=True)
    words = [*line.split(), *more, "-cf", str(tmp_path / "ckpt"), "--results-dir", str(tmp_path / "results")]
    return [sys.executable, str(PROGRAMS / "mlpstorage_case.py"), *words]


def done(tmp_path: Path, words: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, check=False, capture_output=True, text=True, timeout=120, env=environment(tmp_path, **extra)
    )


def records(tmp_path: Path) -> list[dict]:
    found = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*/record.json")]
    return sorted(found, key=lambda record: record["start_unix_ns"])


def test_a_run_is_started_with_mpirun_and_its_processes_are_counted(tmp_path, outside):
    find("openmpi")
    ended = done(tmp_path, command(tmp_path, RUN, *AS_ROOT, "--hosts", "localhost", "--oversubscribe"))
    assert ended.returncode == 0, ended.stderr
    [record] = records(tmp_path)
    assert record["world"]["processes"] == 2
    assert record["workload"]["profile"] == "mlperf"
    assert [phase["op"] for phase in record["phases"]] == ["write", "read"]
    assert list((tmp_path / "ckpt").iterdir()) == []


def test_loops_are_runs_of_their_own(tmp_path, outside):
    find("openmpi")
    ended = done(tmp_path, command(tmp_path, RUN.replace("-ncr 1", "-ncr 0"), *AS_ROOT, "--loops", "2"))
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == [
        "mlpstorage-llama3-8b-2-loop1",
        "mlpstorage-llama3-8b-2-loop2",
    ]
    read = done(tmp_path, command(tmp_path, RUN.replace("-ncw 1", "-ncw 0"), *AS_ROOT, "--loops", "2"))
    assert read.returncode == 0, read.stderr
    assert [record["phases"][0]["op"] for record in records(tmp_path)] == ["write", "write", "read", "read"]


def test_the_exit_code_under_mpirun_is_passed_on_and_ends_the_loops(tmp_path, outside):
    find("openmpi")
    (tmp_path / "results").touch()
    ended = done(tmp_path, command(tmp_path, RUN, *AS_ROOT, "--loops", "3"))
    assert ended.returncode == 2
    assert ended.stderr.count("can't be made") == 1
    assert "Traceback" not in ended.stderr


def test_a_missing_checkpoint_folder_is_made_once_and_said(tmp_path, outside):
    mpi = find("openmpi")
    words = command(tmp_path, RUN)
    shutil.rmtree(tmp_path / "ckpt")
    words[words.index("-cf") + 1] += "/below"
    ended = done(tmp_path, [*mpi.mpirun, *mpi.unbound, "-n", "2", *words])
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count(f"note: {tmp_path}/ckpt/below did not exist and was made") == 1
    assert list((tmp_path / "ckpt").iterdir()) == [tmp_path / "ckpt/below"]
    assert len(records(tmp_path)) == 1


def test_a_checkpoint_folder_that_cannot_be_made_is_one_sentence(tmp_path, outside, capsys):
    (tmp_path / "file").touch()
    line = f"{RUN} -cf {tmp_path}/file/ckpt --results-dir {tmp_path}/results"
    assert cli.main(["mlpstorage", *line.split()]) == 2
    said = capsys.readouterr().err
    assert "can't be made: Not a directory" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_the_launcher_and_its_ranks(tmp_path, outside, signum, code):
    find("openmpi")
    words = command(tmp_path, RUN, *AS_ROOT)
    errors = tmp_path / "errors"
    with errors.open("wb") as file:
        child = subprocess.Popen(
            words, env=environment(tmp_path, CASE_PAUSE="60s"), stdout=subprocess.DEVNULL, stderr=file
        )
    try:
        ranks = wait_for_ranks(tmp_path, child)
        child.send_signal(signum)
        assert child.wait(90) == code
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    deadline = time.monotonic() + 60
    while any(map(alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, ranks))
    assert "Traceback" not in errors.read_text()


def wait_for_ranks(tmp_path: Path, child: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of both ranks, once both have opened their journals."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        if len(list(tmp_path.glob("results/*/journal/*.jsonl"))) == 2:
            ranks = ranks_of(str(tmp_path / "ckpt"))
            assert len(ranks) == 2
            return ranks
        time.sleep(0.05)
    raise AssertionError("the ranks didn't start")


def ranks_of(target: str) -> list[int]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if target in words and "mlstor.checkpoint" in words and "mpirun" not in words[0] and "prterun" not in words[0]:
            found.append(int(directory.name))
    return found


def test_without_a_launcher_one_process_runs_all_ranks_and_says_so(tmp_path, outside, monkeypatch, capsys):
    asked = translate([*RUN.split(), "-cf", str(tmp_path), "--results-dir", str(tmp_path / "results")], {})
    path = asked.options.pop()
    asked.options += ["--scale", "1/8192", "--pause", "0s", path]
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert mlpstorage_run.carry_out(asked) == 0
    assert "there is no mpirun: all 2 ranks run in this one process" in capsys.readouterr().err
    [record] = records(tmp_path)
    assert (record["world"]["processes"], record["world"]["ranks"]) == (1, 2)


def test_without_mpi4py_one_process_runs_all_ranks(tmp_path, outside, monkeypatch, capsys):
    find("openmpi")
    asked = translate([*RUN.split(), "-cf", str(tmp_path)], {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    started: list[list[str]] = []
    monkeypatch.setattr(mlpstorage_run.cli, "main", lambda options: started.append(options) or 0)
    assert mlpstorage_run.carry_out(asked) == 0
    assert started == [asked.options]
    assert "mpi4py is not installed" in capsys.readouterr().err


def test_other_hosts_cannot_be_reached_without_a_launcher(tmp_path, outside, monkeypatch):
    asked = translate([*RUN.split(), "--hosts", "node7", "-cf", str(tmp_path)], {})
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UsageError, match=r"there is no mpirun, .*on node7: pip install"):
        mlpstorage_run.carry_out(asked)


def test_inside_a_launcher_its_processes_run_the_ranks(tmp_path, outside):
    mpi = find("openmpi")
    words = command(tmp_path, RUN.replace("-np 2", "-np 4"), "--systemname", "big")
    ended = done(tmp_path, [*mpi.mpirun, *mpi.unbound, "-n", "2", *words])
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("Open MPI mpirun started 2 ranks: the 4 ranks run in those") == 1
    assert ended.stderr.count("--systemname has no effect") == 1
    [record] = records(tmp_path)
    assert (record["world"]["processes"], record["world"]["ranks"]) == (2, 4)


def test_inside_a_launcher_loops_are_refused(tmp_path, outside, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    asked = translate([*RUN.split(), "--loops", "2", "-cf", str(tmp_path)], {})
    with pytest.raises(UsageError, match="MPI begins once in a process"):
        mlpstorage_run.carry_out(asked)


def test_datasize_prints_a_plan_and_notes_go_to_stderr(capfd):
    line = "checkpointing datasize -m llama3-70b -np 64 -cm 256 --debug"
    assert cli.main(["mlpstorage", *line.split()]) == 0
    said = capfd.readouterr()
    assert "978,406,572,032" in said.out
    assert said.err == "mlstor: note: --debug has no effect: mlstor has no log levels\n"


def test_a_line_that_is_not_mlpstorages_is_one_sentence(capsys):
    assert cli.main(["mlpstorage", "training", "run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
