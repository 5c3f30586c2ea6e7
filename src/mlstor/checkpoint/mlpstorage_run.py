"""Carries out what a command line of mlpstorage asks for: a plan, or the processes that mlpstorage starts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

from mlstor import launch
from mlstor.checkpoint import cli
from mlstor.checkpoint.mlpstorage import Translated
from mlstor.errors import UsageError
from mlstor.signals import Interrupted, Interrupts

# mpirun gives its ranks 0.5 s after SIGTERM, and takes a few seconds with many hosts to notice that they are gone.
_CHILD_ENDS_WITHIN_S = 15.0


def carry_out(asked: Translated) -> int:
    """Print the plan, or run; the exit code is that of ``mlstor checkpoint``, or of the launcher.

    A run is started with mpirun or mpiexec where there is one. In one process, all logical ranks run in it: where one
    process was asked for, where no launcher is found, and where one has already started this process. ``--loops``
    ends with the first run that fails.

    Raises
    ------
    UsageError
        If the checkpoint folder is missing and can't be made, if other hosts were named and there is no launcher to
        reach them, or if a launcher has started this process and ``--loops`` asks for several runs.
    """
    around = launch.detect()
    several = around is not None and around.size != 1
    if around is None or around.rank == 0:
        for note in asked.notes:
            _say(note)
    if asked.action == "datasize":
        return cli.main(asked.options)
    assert asked.folder is not None
    if _made(asked.folder):
        _say(f"{asked.folder} did not exist and was made, as mlpstorage does: is storage mounted there?")
    run: Callable[[list[str]], int] = cli.main
    if several:
        assert around is not None
        if asked.loops > 1:
            raise UsageError(
                f"--loops {asked.loops}: {around.started}, and MPI begins once in a process; start mlstor mlpstorage "
                "without the launcher, or repeat the whole command"
            )
        if around.rank == 0:
            _say(f"{around.started}: the {asked.nprocs} ranks run in those, and no launcher is started")
    else:
        command = _launcher(asked)
        if command is not None:
            run = _Launched(command, asked.expect)
    for loop in range(1, asked.loops + 1):
        code = run(_options_of_loop(asked, loop))
        if code:
            return code
    return 0


def _made(folder: str) -> bool:
    """Whether this process made the checkpoint folder, which was missing. A path with fields is not one folder."""
    if os.path.isdir(folder) or "{" in folder:
        return False
    try:
        os.makedirs(folder)
    except OSError as error:
        if os.path.isdir(folder):  # another rank was faster
            return False
        raise UsageError(
            f"--checkpoint-folder {folder} can't be made: {error.strerror}; name a directory, or where one can be"
        ) from None
    return True


def _options_of_loop(asked: Translated, loop: int) -> list[str]:
    """Options of one of the runs: a run id that was given is numbered, so that no run takes another's files."""
    options = list(asked.options)
    if asked.loops > 1 and "--run-id" in options:
        options[options.index("--run-id") + 1] += f"-loop{loop}"
    return options


def _launcher(asked: Translated) -> list[str] | None:
    """Words that start the processes, the program found; None to run in this process."""
    elsewhere = [host for host in asked.hosts if not _is_here(host)]
    if asked.nprocs == 1 and not elsewhere:
        return None
    program, *words = asked.mpirun
    # A launcher of a virtual environment that is not activated lies beside its Python.
    found = shutil.which(program, path=os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", ""))))
    lacking = None
    if found is None:
        lacking = f"there is no {program}"
    elif importlib.util.find_spec("mpi4py") is None:
        lacking = "mpi4py is not installed"
    if lacking is None:
        assert found is not None
        return [found, *words]
    advice = "pip install 'mlstor[mpi-wheel]', or 'mlstor[mpi]' where there is an MPI"
    if elsewhere:
        raise UsageError(f"{lacking}, which it takes to start processes on {', '.join(elsewhere)}: {advice}")
    _say(f"{lacking}: all {asked.nprocs} ranks run in this one process ({advice})")
    return None


class _Launched:
    """Runs ``mlstor.checkpoint`` under a launcher; Ctrl-C and SIGTERM are passed on to it."""

    def __init__(self, launcher: Sequence[str], expect: Sequence[str]) -> None:
        self._launcher = list(launcher)
        self._expect = list(expect)

    def __call__(self, options: list[str]) -> int:
        command = [*self._launcher, sys.executable, "-m", "mlstor.checkpoint", *options, *self._expect]
        with Interrupts():
            # A session of its own: the terminal's Ctrl-C would reach mpirun beside ours, and two of them make it
            # leave at once, without giving the ranks their time.
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                code = child.wait()
            except Interrupted as interrupted:
                self._end(child, interrupted.signum)
                raise
        return code if code >= 0 else 128 - code

    def _end(self, child: subprocess.Popen[bytes], signum: int) -> None:
        child.send_signal(signum)
        try:
            child.wait(_CHILD_ENDS_WITHIN_S)
        except (subprocess.TimeoutExpired, Interrupted):  # it hangs, or the user insists
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _is_here(host: str) -> bool:
    return host in (
        "127.0.0.1",
        "::1",
        "localhost",
        socket.gethostname(),
        socket.gethostname().partition(".")[0],
    )


def _say(note: str) -> None:
    print(f"mlstor: note: {note}", file=sys.stderr, flush=True)
