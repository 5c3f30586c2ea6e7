"""Real launchers: Open MPI's mpirun beside this Python or on PATH, MPICH's where MLSTOR_TEST_MPICH says.

MLSTOR_TEST_MPICH is a `bin` directory with mpiexec.hydra and a python that has mpi4py and loads MPICH:
``python -m venv D; D/bin/pip install mpich mpi4py; export MLSTOR_TEST_MPICH=D/bin``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "mpi"
_MPICH = os.environ.get("MLSTOR_TEST_MPICH")  # read at import: a fixture takes MLSTOR_* out of the environment
_TIMEOUT_S = 90


@dataclass(frozen=True)
class Mpi:
    """One MPI: how to start ranks, and the Python whose mpi4py belongs to it."""

    name: str
    mpirun: list[str]
    python: str
    unbound: list[str] = field(default_factory=list)

    def command(self, nranks: int, program: str, *args: str, options: tuple[str, ...] = ()) -> list[str]:
        return [
            *self.mpirun,
            *self.unbound,
            *options,
            "-n",
            str(nranks),
            self.python,
            str(PROGRAMS / program),
            *args,
        ]

    def run(self, nranks: int, program: str, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return run(self.command(nranks, program, *args), cwd)

    def start(self, nranks: int, program: str, *args: str, cwd: Path) -> Running:
        return Running(self.command(nranks, program, *args), cwd)


def find(name: str) -> Mpi:
    """The MPI called "openmpi" or "mpich"; skips the test where it is missing."""
    if name == "mpich":
        if not _MPICH or not Path(_MPICH, "mpiexec.hydra").exists():
            pytest.skip("MLSTOR_TEST_MPICH names no bin directory with mpiexec.hydra")
        return Mpi(name, [str(Path(_MPICH, "mpiexec.hydra"))], str(Path(_MPICH, "python")))
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if mpirun is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpirun or mpi4py is not installed: pip install 'mlstor[mpi-wheel]'")
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return Mpi(name, [mpirun, *as_root, "--oversubscribe"], sys.executable, ["--bind-to", "none"])


def environment(cwd: Path, **extra: str) -> dict[str, str]:
    # The library as the tests import it, whether it is installed or on PYTHONPATH.
    import mlstor

    source = str(Path(mlstor.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": source, "CASE_DIRECTORY": str(cwd), **extra}


def run(command: list[str], cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    running = Running(command, cwd, **extra)
    return running.wait(_TIMEOUT_S)


class Running:
    """A launcher under way. Its output goes to files, so that ranks which outlive it can't block the test."""

    def __init__(self, command: list[str], cwd: Path, **extra: str) -> None:
        self._command = command
        self._out = cwd / "stdout"
        self._err = cwd / "stderr"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment(cwd, **extra),
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
            )

    def rank_pids(self, nranks: int) -> dict[int, int]:
        """Process ids that the ranks have printed as ``rank=R pid=P``."""
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            found = {int(r): int(p) for r, p in re.findall(r"rank=(\d+) pid=(\d+)\n", self._out.read_text())}
            if len(found) == nranks:
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self._end()
        raise AssertionError(f"ranks didn't start: {self._out.read_text()}{self._err.read_text()}")

    def wait(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._end()
            raise
        return subprocess.CompletedProcess(self._command, code, self._out.read_text(), self._err.read_text())

    def _end(self) -> None:
        self.process.send_signal(signal.SIGTERM)  # the launcher's own child processes end with it
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def alive(pid: int) -> bool:
    """Whether `pid` runs; a zombie doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or while it was read
        return False


def all_gone(pids: Iterable[int], within_s: float = 30.0) -> bool:
    """Whether none of `pids` runs any more, soon: a launcher may end before the ranks that it has killed."""
    deadline = time.monotonic() + within_s
    pids = list(pids)
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))
