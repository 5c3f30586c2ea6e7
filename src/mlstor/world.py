"""Who else runs: one process alone, or the ranks of an MPI launcher.

    with Interrupts(), connect() as world:  # in this order: a failing rank still handles signals
        world.barrier("write 0")

Under MPI the `with` block is where a rank's failure ends the run: an error of one rank prints one line that
names the rank and calls MPI_Abort. An error that all ranks know (`World.agree`, the guards of `connect`)
leaves the block at rank 0 alone, to be printed by its caller; the other ranks exit with the same code and say
nothing.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NoReturn

from mlstor import launch, mpi_library
from mlstor.errors import MlstorError, UsageError, WorldError
from mlstor.signals import Interrupted, end_silently

# Pauses of a polled barrier. The first keeps a short wait short, the last keeps a rank that waits for minutes
# at well under 1% of a core.
_FIRST_PAUSE_S = 0.0001
_LAST_PAUSE_S = 0.005

# mpirun sends SIGKILL 0.5 s after SIGTERM. Within that, ranks may still be saving what they have measured,
# and rank 0 is to speak first: then the others need not.
_GRACE_S = 0.25

_TELL_TAG = 1


class World(ABC):
    """The processes of a run, as seen by one of them.

    Attributes
    ----------
    rank, size : int
        This process among all, and how many there are.
    hosts : tuple of str
        Host names, in order of their lowest rank. A host is a host name and a boot id: pods are hosts of
        their own, and so are two nodes that have one name.
    host_index, nhosts : int
        This process's host among `hosts`.
    local_rank, local_size : int
        This process among those of its host.
    hostname : str
    launcher : str or None
        The launcher's name, None if the process was started by hand.
    mpi_library : str or None
        Name and version of the MPI library, None if none is used.
    phase : str
        The barrier that was entered last; messages of failures name it.
    """

    launcher: str | None = None
    mpi_library: str | None = None

    def __init__(self, rank: int, keys: list[tuple[str, str]]) -> None:
        distinct = list(dict.fromkeys(keys))
        self.rank = rank
        self.size = len(keys)
        self.hosts = tuple(hostname for hostname, _ in distinct)
        self.nhosts = len(distinct)
        self.host_index = distinct.index(keys[rank])
        self.hostname = keys[rank][0]
        self.local_rank = keys[:rank].count(keys[rank])
        self.local_size = keys.count(keys[rank])
        #: Host index of every rank, in rank order.
        self.host_of_rank = tuple(map({key: i for i, key in enumerate(distinct)}.__getitem__, keys))
        self.phase = "start"
        self._agreed: MlstorError | None = None

    def __enter__(self) -> World:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @abstractmethod
    def barrier(self, phase: str) -> None:
        """Wait until every rank has entered; sleeps between looks, and signals are handled meanwhile.

        Parameters
        ----------
        phase : str
            What begins behind the barrier, for the message of a rank that fails in it.

        Raises
        ------
        WorldError
            If MPI reports that another rank is gone.
        Interrupted
            On SIGINT and SIGTERM, within `Interrupts`.
        """

    @abstractmethod
    def gather(self, payload: bytes) -> list[bytes] | None:
        """Every rank's `payload` at rank 0, in rank order; None at the others. Raises as `barrier` does."""

    @abstractmethod
    def allgather(self, payload: bytes) -> list[bytes]:
        """Every rank's `payload` at every rank, in rank order. Raises as `barrier` does."""

    @abstractmethod
    def bcast(self, payload: bytes) -> bytes:
        """Rank 0's `payload` at every rank. Raises as `barrier` does."""

    def tell(self, payload: bytes) -> None:  # noqa: B027 - alone there is nobody to tell
        """Let rank 0 know something in passing, without waiting; what is told too fast is left out."""

    def heard(self) -> dict[int, bytes]:
        """At rank 0: what each rank has told last."""
        return {}

    @abstractmethod
    def abort(self, error: BaseException) -> NoReturn:
        """End the run on every rank because of `error` of this rank; alone, raise it."""

    def agree(self, error: MlstorError | None, *, took_part: bool = True) -> None:
        """Tell all ranks of this rank's error, or that it has none, and raise on all if any has one.

        Every rank calls this, after a step that may fail for a user's mistake, so that the run ends with one
        message and not with one a rank.

        Parameters
        ----------
        took_part : bool
            False on a rank that had no share in the step, so that its silence contradicts nobody.

        Raises
        ------
        UsageError
            If the first rank that failed did so with a `UsageError`.
        WorldError
            If it failed with another error. The message names rank and host unless all that took part say the
            same.
        """
        mine = None if error is None else [isinstance(error, UsageError), str(error)]
        said = [json.loads(text) for text in self.allgather(json.dumps([took_part, mine]).encode())]
        failed = [rank for rank, (_, text) in enumerate(said) if text is not None]
        if not failed:
            return
        first = failed[0]
        is_usage, message = said[first][1]
        if any(part and text != said[first][1] for part, text in said):
            others = f" ({len(failed)} ranks failed)" if len(failed) > 1 else ""
            message = f"rank {first} on {self.hosts[self.host_of_rank[first]]}: {message}{others}"
        self._agreed = UsageError(message) if is_usage else WorldError(message)
        raise self._agreed


class Alone(World):
    """One process, started by hand or as the only rank of a launcher."""

    def __init__(self, launcher: str | None = None) -> None:
        super().__init__(0, [_host_key()])
        self.launcher = launcher

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None  # the error, if any, goes on to the caller

    def barrier(self, phase: str) -> None:
        self.phase = phase

    def gather(self, payload: bytes) -> list[bytes]:
        return [payload]

    def allgather(self, payload: bytes) -> list[bytes]:
        return [payload]

    def bcast(self, payload: bytes) -> bytes:
        return payload

    def abort(self, error: BaseException) -> NoReturn:
        raise error


class MpiWorld(World):
    """The ranks of MPI_COMM_WORLD. MPI is initialised already, and finalised by leaving the `with` block."""

    def __init__(self, mpi: ModuleType, launcher: str | None) -> None:
        self._mpi = mpi
        self._comm = mpi.COMM_WORLD
        self._comm.Set_errhandler(mpi.ERRORS_RETURN)
        super().__init__(self._comm.rank, self._comm.allgather(_host_key()))
        self.launcher = launcher
        self.mpi_library = mpi_library.name(mpi)
        self._told: object | None = None
        self._heard: dict[int, bytes] = {}

    def barrier(self, phase: str) -> None:
        self.phase = phase
        self._meet()

    def gather(self, payload: bytes) -> list[bytes] | None:
        self._meet()
        result: list[bytes] | None = self._comm.gather(payload)
        return result

    def allgather(self, payload: bytes) -> list[bytes]:
        self._meet()
        result: list[bytes] = self._comm.allgather(payload)
        return result

    def bcast(self, payload: bytes) -> bytes:
        self._meet()
        result: bytes = self._comm.bcast(payload)
        return result

    def tell(self, payload: bytes) -> None:
        if self._told is None or self._told.Test():  # type: ignore[attr-defined]  # mpi4py's Request
            self._told = self._comm.isend(payload, dest=0, tag=_TELL_TAG)

    def heard(self) -> dict[int, bytes]:
        status = self._mpi.Status()
        while self._comm.Iprobe(source=self._mpi.ANY_SOURCE, tag=_TELL_TAG, status=status):
            self._heard[status.source] = self._comm.recv(source=status.source, tag=_TELL_TAG)
        return self._heard

    def _meet(self) -> None:
        # MPI's own barrier burns a core while it waits, and no Python signal handler runs inside it. Blocking
        # collectives follow only behind this one: they find every rank there and are short.
        try:
            self._poll(_LAST_PAUSE_S)
            # Ranks wake up to _LAST_PAUSE_S x log2(size) apart; all are here now, so a second barrier without
            # pauses costs little and lets them start together.
            self._poll(0)
        except self._mpi.Exception as error:
            raise WorldError(f"MPI lost a rank while waiting for {self.phase!r}: {error}") from error

    def _poll(self, longest_pause_s: float) -> None:
        request = self._comm.Ibarrier()
        pause_s = min(_FIRST_PAUSE_S, longest_pause_s)
        while not request.Test():
            if self.rank == 0:
                self.heard()  # a message that nobody takes would keep its sender from finalising
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_pause_s)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            while self._told is not None and not self._told.Test():  # type: ignore[attr-defined]
                time.sleep(_FIRST_PAUSE_S)
            self.barrier("end")  # MPI_Finalize waits too, but can't be interrupted
            self._mpi.Finalize()
        elif error is self._agreed:
            if self.rank != 0:
                end_silently()  # rank 0 may exit while this one is still in there
            self._mpi.Finalize()
            _leave_to_rank_0(self.rank, self._agreed)
        else:
            self.abort(error)

    def abort(self, error: BaseException) -> NoReturn:
        exit_code = _exit_code(error)
        if isinstance(error, KeyboardInterrupt):
            # mpirun interrupts all ranks at once: then rank 0 speaks and the others are killed in their
            # sleep. A rank that was interrupted by itself outlives it and says so.
            if self.rank == 0:
                self._say(error)
            time.sleep(_GRACE_S if self.rank == 0 else 2 * _GRACE_S)
        if self.rank != 0 or not isinstance(error, KeyboardInterrupt):
            self._say(error)
        sys.stdout.flush()
        sys.stderr.flush()
        if not isinstance(error, KeyboardInterrupt):
            time.sleep(_GRACE_S)  # MPICH's launcher drops what it has not read when a rank aborts
        self._mpi.COMM_WORLD.Abort(exit_code)
        raise SystemExit(exit_code)  # MPI_Abort doesn't return; this tells the type checker so

    def _say(self, error: BaseException) -> None:
        if not isinstance(error, (MlstorError, OSError, KeyboardInterrupt, SystemExit)):
            import traceback  # a defect of mlstor: the line alone would not help to mend it

            traceback.print_exception(error)
        # One write: lines of several ranks must not mix.
        sys.stderr.write(f"mlstor: rank {self.rank} on {self.hostname}, in {self.phase!r}: {_one_line(error)}\n")
        sys.stderr.flush()


def connect(expect_nodes: int | None = None, expect_ranks: int | None = None) -> World:
    """The world of this process: MPI's if an MPI launcher started it among others, else itself alone.

    Parameters
    ----------
    expect_nodes, expect_ranks : int, optional
        Refuse to run on another number of hosts or ranks: an mpirun that misses its host file starts all
        ranks on one node and the job "succeeds".

    Raises
    ------
    UsageError
        If the counts are not as expected, or a launcher started several ranks and mpi4py is not installed.
    WorldError
        If mpi4py finds no MPI library, or one of another family than the launcher's, so that each rank is
        alone.
    SystemExit
        At ranks other than 0, where all ranks know the error and rank 0 raises it.
    """
    launcher = launch.detect()
    world: World
    if launcher is None or launcher.size == 1:
        world = Alone(launcher.name if launcher else None)
    else:
        world = MpiWorld(mpi_library.start(launcher), launcher.name)
    for expected, found, option in (
        (expect_nodes, world.nhosts, "--expect-nodes"),
        (expect_ranks, world.size, "--expect-ranks"),
    ):
        if expected is not None and expected != found:
            hint = "; Open MPI 5 reads --hostfile or PRTE_MCA_prte_default_hostfile, not OMPI_MCA_orte_*"
            found_text = f"{_count(world.size, 'rank')} on {_count(world.nhosts, 'host')} ({_some(world.hosts)})"
            remedy = f"check the launcher's host list or correct {option}"
            error = UsageError(
                f"{option} {expected}, but without a launcher there is {found_text}: start it with mpirun"
                if world.launcher is None
                else f"{option} {expected}, but {world.launcher} started {found_text}: {remedy}"
                f"{hint if launcher and launcher.family == 'open-mpi' else ''}"
            )
            world._agreed = error
            world.__exit__(UsageError, error, None)
            raise error
    return world


@contextmanager
def said_once() -> Iterator[None]:
    """For what every rank does alike before it is connected, such as reading the command line.

    Raises
    ------
    UsageError
        The one from within, at rank 0 and in a process started by hand.
    SystemExit
        In its place at the other ranks, with its exit code.
    """
    try:
        yield
    except UsageError as error:
        launcher = launch.detect()
        _leave_to_rank_0(0 if launcher is None else launcher.rank, error)
        raise


def _leave_to_rank_0(rank: int, error: MlstorError) -> None:
    if rank != 0:
        end_silently()
        # A launcher kills the other ranks when one exits with a failure, and rank 0 has not yet spoken.
        time.sleep(2 * _GRACE_S)
        raise SystemExit(error.exit_code)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, (MlstorError, Interrupted)):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 1


def _one_line(error: BaseException) -> str:
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error, SystemExit):
        return f"exit {text}"
    return (
        text if text and isinstance(error, (MlstorError, OSError, Interrupted)) else f"{type(error).__name__}: {text}"
    )


def _host_key() -> tuple[str, str]:
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot_id = ""  # hidden in some sandboxes; then the name alone tells hosts apart
    return socket.gethostname(), boot_id


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 4 else ", ".join(names[:3]) + f", ... {names[-1]}"
