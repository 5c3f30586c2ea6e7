"""Runs of ``mlstor checkpoint`` for the tests: in this process, as a program, or as ranks of a real mpirun."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launchers
import pytest

from mlstor import cli
from mlstor.checkpoint import rundir
from mlstor.checkpoint.layout import Layout
from mlstor.results.record import Record, load

MIB = 1 << 20
MODEL = "llama3-8b"
#: Of llama3-8b: 8 model files of 30,633 bytes and 8 optimizer files of 183,800 bytes, none a multiple of 512.
SCALE = "1/65536"
#: Options that make a phase of 110 MB last for seconds, without much load: one transfer of 4 KiB after the other.
SLOW = ("--block", "4KiB", "--depth", "1", "--workers", "1", "--backend", "threads")
SLOW_SCALE = "1/1024"
MODULE = ["-m", "mlstor.checkpoint"]


@dataclass(frozen=True)
class Ran:
    """What a run has said and left."""

    code: int
    out: str
    err: str
    results: Path

    @property
    def record(self) -> Record:
        """The newest record."""
        return load(max(self.results.glob("*/record.json"), key=lambda path: path.stat().st_mtime_ns))

    @property
    def sentence(self) -> str:
        """The one line that a refused run says, without a traceback, on standard error."""
        lines = [line for line in self.err.splitlines() if line.startswith("mlstor: ")]
        assert "Traceback" not in self.err
        assert len(lines) == 1, self.err
        return lines[0]


class Bench:
    """A directory to measure and one for results, and ways to run a checkpoint benchmark on them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.target = directory / "target"
        self.results = directory / "results"
        self.target.mkdir()

    def arguments(self, *options: object, scale: str = SCALE) -> list[str]:
        """The command line with the usual model, scale and results; `options` may say otherwise."""
        words = [str(option) for option in options]
        usual = [] if "--model" in words or "--workload" in words else ["--model", MODEL]
        return [*usual, "--scale", scale, "--no-live", "--results", str(self.results), *words]

    def run(self, *options: object, scale: str = SCALE) -> Ran:
        """A run in this process, on `target` unless `options` end with other paths."""
        return self.command("checkpoint", *self.arguments(*options, scale=scale))

    def __call__(self, *options: object, scale: str = SCALE) -> Ran:
        """A run on `target` in this process, which must succeed."""
        ran = self.run(*options, self.target, scale=scale)
        assert ran.code == 0, ran.err
        return ran

    def command(self, *words: object) -> Ran:
        """The `mlstor` command in this process."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.main([str(word) for word in words])
        return Ran(code, out.getvalue(), err.getvalue(), self.results)

    def program(self, *options: object, before: Sequence[str] = (), scale: str = SCALE, **extra: str) -> Ran:
        """A run in a process of its own, started by the command `before`, with `extra` in its environment."""
        words = [*before, sys.executable, *MODULE, *self.arguments(*options, scale=scale)]
        return self._ran(launchers.run(words, self.directory, **extra))

    def mpi_words(self, nranks: int, *options: object, scale: str = SCALE) -> list[str]:
        """The command line of ranks under mpirun."""
        mpi = launchers.find("openmpi")
        words = [*mpi.mpirun, *mpi.unbound, "-n", str(nranks), mpi.python, *MODULE]
        return words + self.arguments(*options, scale=scale)

    def mpi(self, nranks: int, *options: object, scale: str = SCALE) -> Ran:
        """A run of so many ranks."""
        return self._ran(launchers.run(self.mpi_words(nranks, *options, scale=scale), self.directory))

    def _ran(self, done: subprocess.CompletedProcess[str]) -> Ran:
        return Ran(done.returncode, done.stdout, done.stderr, self.results)

    def start(self, *options: object, nranks: int = 0, scale: str = SLOW_SCALE, **extra: str) -> Underway:
        """Begin a slow run that a test will disturb, alone or as ranks under mpirun."""
        options = options if "mlperf" in options else (*SLOW, *options)  # that profile has a queue of its own
        words = [sys.executable, *MODULE, *self.arguments(*options, scale=scale)]
        if nranks:
            words = self.mpi_words(nranks, *options, scale=scale)
        return Underway(self, launchers.Running(words, self.directory, **extra))

    def layout(self, scale: str = SCALE) -> Layout:
        """The layout that the usual options give."""
        from fractions import Fraction

        from mlstor.checkpoint import models

        return Layout(models.get(MODEL), scale=Fraction(scale))

    def file(self, run_id: str, name: str, checkpoint: int = 1) -> Path:
        """A checkpoint's file."""
        return Path(rundir.checkpoint_dir(str(self.target), run_id, MODEL, checkpoint), name)

    def files(self, directory: Path | None = None) -> dict[str, int]:
        """Sizes of all files under the target, by relative path."""
        root = directory or self.target
        return {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}


class Underway:
    """A run that is under way."""

    def __init__(self, bench: Bench, running: launchers.Running) -> None:
        self._bench = bench
        self._running = running

    @property
    def pid(self) -> int:
        return self._running.process.pid

    def wait_for(self, seen: Callable[[], bool], timeout_s: float = 60) -> None:
        """Until `seen`, while the run goes on."""
        deadline = time.monotonic() + timeout_s
        while not seen():
            assert self._running.process.poll() is None, self.wait()
            assert time.monotonic() < deadline, "nothing was seen"
            time.sleep(0.002)

    def wait_for_phase(self, number: int, processes: int = 1) -> None:
        """Until the journals of so many processes say that they have begun the phase."""
        self.wait_for(lambda: len(journals_in_phase(self._bench.results, number)) >= processes)

    def send(self, signum: signal.Signals) -> None:
        self._running.process.send_signal(signum)

    def wait(self, timeout_s: float = 60) -> Ran:
        done = self._running.wait(timeout_s)
        return Ran(done.returncode, done.stdout, done.stderr, self._bench.results)


def journal_lines(journal: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal."""
    lines = []
    for text in journal.read_text().split("\n"):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # its process is writing this line
    return lines


def journals_in_phase(results: Path, number: int) -> dict[int, int]:
    """Process: pid, of those whose journal has a line of the phase. The lock tells whose journal it is."""
    found: dict[int, int] = {}
    for journal in results.glob("*/journal/*.jsonl"):
        try:
            lines = journal_lines(journal)
        except FileNotFoundError:
            continue
        if any(line.get("progress", {}).get("number") == number for line in lines):
            found[int(journal.stem)] = _holder(journal)
    return found


def _holder(journal: Path) -> int:
    inode = str(journal.stat().st_ino)
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].rsplit(":", 1)[1] == inode:
            return int(fields[4])
    raise AssertionError(f"nobody holds {journal}")


def need(program: str) -> str:
    """The path of a program; skips the test where it is missing."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
