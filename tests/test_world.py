"""Worlds of one process and of real mpirun ranks: agreement, failure, signals, and what a mismatch says."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import launchers
import pytest

from mlstor import launch, world as worlds
from mlstor.errors import UsageError, WorldError
from mlstor.signals import Interrupted, Interrupts

MPIS = ("openmpi", "mpich")


@pytest.fixture(params=MPIS)
def mpi(request: pytest.FixtureRequest) -> launchers.Mpi:
    return launchers.find(request.param)


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "PMIX", "SLURM_", "MPI_LOCAL")):
            monkeypatch.delenv(name)


# --- which launcher


@pytest.mark.parametrize(
    ("env", "name", "rank", "size", "widen"),
    [
        (
            {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3"},
            "Open MPI mpirun", 3, 8, "--bind-to none",
        ),
        (
            {"PMI_SIZE": "4", "PMI_RANK": "1", "MPI_LOCALRANKID": "1"},
            "MPICH mpiexec (Hydra)", 1, 4, "-bind-to none",
        ),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "a PMI launcher", 1, 4, None),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9"}, "Slurm srun", 9, 16, "--cpu-bind=none"),
        (
            {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "PMI_SIZE": "16", "PMI_RANK": "9"},
            "Slurm srun", 9, 16, "--cpu-bind=none",
        ),
        ({"PMIX_RANK": "5"}, "a PMIx launcher", 5, None, None),
        # mpirun inside a Slurm allocation: Slurm's own variables describe mpirun's daemons, one per node
        (
            {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3", "PMIX_RANK": "3",
             "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
            "Open MPI mpirun", 3, 8, "--bind-to none",
        ),
    ],
)  # fmt: skip
def test_launcher_is_told_by_its_variables(
    env: dict[str, str], name: str, rank: int, size: int | None, widen: str | None
) -> None:
    found = launch.detect(env)
    assert found is not None
    assert (found.name, found.rank, found.size, found.widen) == (name, rank, size, widen)


def test_a_batch_script_is_not_a_launcher() -> None:
    assert launch.detect({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}) is None


def test_a_broken_launcher_variable_is_named() -> None:
    with pytest.raises(UsageError, match="OMPI_COMM_WORLD_RANK"):
        launch.detect({"OMPI_COMM_WORLD_SIZE": "2"})


# --- alone


@pytest.mark.usefixtures("unlaunched")
def test_a_process_started_by_hand_is_alone_and_keeps_its_errors() -> None:
    with worlds.connect() as world:
        assert (world.rank, world.size, world.local_rank, world.nhosts) == (0, 1, 0, 1)
        assert (world.launcher, world.mpi_library) == (None, None)
        world.barrier("write 0")
        assert world.phase == "write 0"
        assert world.gather(b"a") == world.allgather(b"a") == [world.bcast(b"a")]
        world.agree(None)
        with pytest.raises(UsageError, match="no such drive"):
            world.agree(UsageError("no such drive"))


@pytest.mark.usefixtures("unlaunched")
def test_abort_alone_raises_the_error() -> None:
    with pytest.raises(FileNotFoundError), worlds.connect() as world:
        world.abort(FileNotFoundError(2, "gone", "/x"))


@pytest.mark.usefixtures("unlaunched")
@pytest.mark.parametrize(("nodes", "ranks", "option"), [(2, None, "--expect-nodes 2"), (1, 8, "--expect-ranks 8")])
def test_expectations_hold_for_one_process_too(nodes: int, ranks: int | None, option: str) -> None:
    with pytest.raises(UsageError, match=f"{option}.*1 rank on 1 host"):
        worlds.connect(nodes, ranks)


@pytest.mark.usefixtures("unlaunched")
def test_several_ranks_without_mpi4py_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UsageError, match=r"Open MPI mpirun started 2 ranks.*pip install 'mlstor\[mpi\]'"):
        worlds.connect()


def test_hosts_are_numbered_by_their_lowest_rank_whatever_the_placement() -> None:
    class Placed(worlds.Alone):
        def __init__(self, rank: int, keys: list[tuple[str, str]]) -> None:
            worlds.World.__init__(self, rank, keys)

    round_robin = [("a", "1"), ("b", "2"), ("a", "1"), ("b", "2")]
    third = Placed(3, round_robin)
    assert (third.hosts, third.host_index, third.local_rank, third.local_size) == (("a", "b"), 1, 1, 2)
    assert third.host_of_rank == (0, 1, 0, 1)
    namesakes = Placed(1, [("localhost", "boot 1"), ("localhost", "boot 2")])
    assert (namesakes.nhosts, namesakes.host_index, namesakes.local_rank) == (2, 1, 0)


# --- signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_are_keyboard_interrupts_that_know_their_exit_code(signum: int, code: int) -> None:
    before = signal.getsignal(signum)
    interrupts = Interrupts()

    def run() -> None:
        with interrupts:
            os.kill(os.getpid(), signum)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    assert isinstance(caught.value, Interrupted)
    assert (caught.value.exit_code, interrupts.received) == (code, signum)
    assert signal.getsignal(signum) is before


def test_a_second_sigterm_does_not_disturb_what_the_first_began() -> None:
    saved = []

    def run() -> None:
        with Interrupts():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
                saved.append("figures")

    with pytest.raises(Interrupted):
        run()
    assert saved


def test_interrupts_refuse_another_thread() -> None:
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            Interrupts().__enter__()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(errors) == 1


# --- ranks


def test_ranks_know_each_other_and_exchange(mpi: launchers.Mpi, tmp_path: Path) -> None:
    done = mpi.run(3, "world_case.py", "facts", "1", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = {fact["rank"]: fact for fact in map(json.loads, done.stdout.splitlines())}
    assert sorted(facts) == [0, 1, 2]
    assert facts[0]["gather"] == ["g0", "g1", "g2"]
    assert facts[1]["gather"] is None
    for rank, fact in facts.items():
        assert fact["local"] == [rank, 3]
        assert fact["host"][:2] == [0, 1]
        assert fact["allgather"] == ["a0", "a1", "a2"]
        assert fact["bcast"] == "from 0"
        assert fact["library"].startswith("Open MPI" if mpi.name == "openmpi" else "MPICH")


def test_a_waiting_rank_leaves_the_core_to_others(mpi: launchers.Mpi, tmp_path: Path) -> None:
    done = mpi.run(2, "world_case.py", "wait", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    waited = next(line for line in done.stdout.splitlines() if line.startswith("rank=1"))
    # MPI's own barrier takes all of the 3 s
    assert int(waited.split("cpu_ms=")[1]) < 1500


def test_a_failing_rank_ends_the_run_and_names_itself(mpi: launchers.Mpi, tmp_path: Path) -> None:
    started = time.monotonic()
    done = mpi.run(2, "world_case.py", "fail", cwd=tmp_path)
    assert time.monotonic() - started < 30
    assert done.returncode != 0
    line = next(line for line in done.stderr.splitlines() if line.startswith("mlstor: rank 1 on "))
    assert "No such file or directory: '/nonexistent/directory/file'" in line
    assert "Traceback" not in done.stderr


def test_a_defect_shows_its_traceback_and_ends_the_run(mpi: launchers.Mpi, tmp_path: Path) -> None:
    done = mpi.run(2, "world_case.py", "bug", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "KeyError: 'no such key'" in done.stderr


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("disagree", "rank 1 on .*: the drive is full"),
        ("all_fail", "told: no such model"),
        ("leader_fails", "told: no such drive"),
    ],
)
def test_an_error_known_to_all_is_told_once(mpi: launchers.Mpi, tmp_path: Path, case: str, message: str) -> None:
    done = mpi.run(2, "world_case.py", case, cwd=tmp_path)
    assert done.returncode == UsageError.exit_code
    told = [line for line in done.stderr.splitlines() if line.startswith("told: ")]
    assert len(told) == 1
    assert re.search(message, told[0])
    assert "reached" not in done.stdout
    assert "MPI_ABORT" not in done.stderr


def test_expect_nodes_stops_a_run_that_started_on_one(mpi: launchers.Mpi, tmp_path: Path) -> None:
    done = mpi.run(2, "world_case.py", "facts", "2", "2", cwd=tmp_path)
    assert done.returncode == UsageError.exit_code
    assert done.stderr.count("told: --expect-nodes 2, but ") == 1
    assert "2 ranks on 1 host" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_takes_the_others_along(mpi: launchers.Mpi, tmp_path: Path, victim: int) -> None:
    running = mpi.start(2, "world_case.py", "hang", cwd=tmp_path)
    pids = running.rank_pids(2)
    os.kill(pids[victim], signal.SIGKILL)
    done = running.wait(60)
    assert done.returncode != 0
    assert "reached" not in done.stdout
    assert launchers.all_gone(pids.values())


def test_sigterm_to_a_rank_inside_a_barrier_ends_the_run(mpi: launchers.Mpi, tmp_path: Path) -> None:
    running = mpi.start(2, "world_case.py", "hang", cwd=tmp_path)
    pids = running.rank_pids(2)
    time.sleep(0.3)  # rank 1 is in the barrier soon after it has printed
    os.kill(pids[1], signal.SIGTERM)
    done = running.wait(60)
    assert done.returncode == 143
    assert "in 'never': stopped by SIGTERM" in done.stderr
    assert launchers.all_gone(pids.values())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_launcher_lets_every_rank_save_first(mpi: launchers.Mpi, tmp_path: Path, signum: int) -> None:
    running = mpi.start(2, "world_case.py", "hang_all", cwd=tmp_path)
    pids = running.rank_pids(2)
    time.sleep(0.3)
    running.process.send_signal(signum)
    done = running.wait(60)
    assert done.returncode != 0
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert launchers.all_gone(pids.values())


# --- mpi4py and launcher of different MPIs


def test_open_mpi_inside_another_launcher_names_both(tmp_path: Path) -> None:
    mpi = launchers.find("openmpi")
    # What MPICH's Hydra tells its ranks; Open MPI's library knows none of it and starts as a world of one.
    command = [mpi.python, str(launchers.PROGRAMS / "world_case.py"), "facts"]
    done = launchers.run(command, tmp_path, PMI_SIZE="2", PMI_RANK="0", MPI_LOCALRANKID="0")
    assert done.returncode == WorldError.exit_code
    assert "told: MPICH mpiexec (Hydra) started 2 ranks, but mpi4py uses Open MPI" in done.stderr
    assert "suspicious" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(("launcher", "library"), [("mpich", "openmpi"), ("openmpi", "mpich")])
def test_real_launcher_of_the_other_mpi_is_refused_before_any_work(tmp_path: Path, launcher: str, library: str) -> None:
    starter, python = launchers.find(launcher), launchers.find(library).python
    command = [*starter.mpirun, "-n", "2", python, str(launchers.PROGRAMS / "world_case.py"), "facts"]
    done = launchers.run(command, tmp_path)
    assert done.returncode == WorldError.exit_code
    for name in ("Open MPI", "MPICH"):
        assert name in done.stderr
    assert "each rank would run alone" in done.stderr
    assert done.stdout == ""


def test_a_missing_mpi_library_is_one_sentence(tmp_path: Path) -> None:
    mpi = launchers.find("openmpi")
    import mpi4py

    if not list(Path(mpi4py.__file__).parent.glob("MPI.mpi*.so")):
        pytest.skip("this mpi4py is linked to its MPI and looks for none at run time")
    command = [mpi.python, str(launchers.PROGRAMS / "world_case.py"), "facts"]
    done = launchers.run(
        command,
        tmp_path,
        OMPI_COMM_WORLD_SIZE="2",
        OMPI_COMM_WORLD_RANK="0",
        MPI4PY_LIBMPI="/nonexistent/libmpi.so",
    )
    assert done.returncode == WorldError.exit_code
    assert "/nonexistent/libmpi.so" in done.stderr
    assert "mlstor[mpi-wheel]" in done.stderr
    assert "Traceback" not in done.stderr
