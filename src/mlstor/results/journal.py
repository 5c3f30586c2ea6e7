"""What a killed run had reached: each process appends its figures to ``<run>/journal/<process>.jsonl``.
 A run that ends by itself writes its record and removes its journals. Of a run that was killed,
`find_unfinished` finds the journals and `recover` makes a record of them, marked partial. SIGKILL leaves what
was written in the page cache, so lines are flushed at once and fsynced only every few seconds, for the
machine that goes down with the run.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from mlstor.errors import UsageError
from mlstor.results.journal_lines import Failed, Finished, Gathered, Line, Run, Start, Under, read
from mlstor.results.phase import PhaseReport, Progress
from mlstor.results.record import RECORD_FILE, Record, Recovered, RunError, StreamRecord, save
from mlstor.results.stream import StreamProgress, StreamReport

JOURNAL_DIR = "journal"
PROGRESS_INTERVAL_S = 5.0
"""A progress line is due this often: half of the 10 s that a killed run may lose, so that a late caller still
keeps it.
"""
FSYNC_INTERVAL_S = 3.0
QUIET_S = 60.0
"""A journal written on another host counts as abandoned after this: six progress intervals of the slowest
caller.
"""

SNAPSHOT_GROWTH = 1.25
"""Each snapshot of a stream's figures is due when its phase has lasted that much longer: a killed run loses at most a
fifth of them, and two hours make 34 lines.
"""

_SEALING = "sealing"  # made by the one process of a failing run that makes its record
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """The id of this host's present boot; empty where the kernel shows none."""
    try:
        return _BOOT_ID.read_text().strip()
    except FileNotFoundError:
        return ""


class Journal:
    """One process's journal of a run; use it as a context manager, or call `close`.

    Process 0 keeps its own open until the record is saved (`seal`), so that no other run takes this one for
    killed; then each process calls `discard`, which matters where the results lie on a directory per node.

    Parameters
    ----------
    run_dir
        ``<results>/<run id>``; made if need be.
    process
        Index of this process in the run.
    record
        The run's description, a record without phases; process 0 gives it.
    host_cores
        With `record`: cores usable on each host, see `client.judge`.

    Raises
    ------
    OSError
        If the journal can't be written; also from the methods.
    UsageError
        If `run_dir` holds a record, or such a journal, already: another run has this run id.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        process: int,
        record: Record | StreamRecord | None = None,
        host_cores: Sequence[int] = (),
    ) -> None:
        self.path = Path(run_dir) / JOURNAL_DIR / f"{process}.jsonl"
        if (Path(run_dir) / RECORD_FILE).exists():
            raise UsageError(f"{run_dir} holds a run's record; choose another run id or results directory")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            raise UsageError(
                f"{self.path} exists: run {Path(run_dir).name} was begun before; take another run id"
            ) from None
        try:
            _lock(self._fd, wait=True)  # `find_unfinished` of another run holds it for a moment only
            self._written_s = self._synced_s = 0.0
            self._snapshot = (-1, 0)  # phase and ns
            self._append(Start(process=process, hostname=socket.gethostname(), boot_id=boot_id()))
            if record is not None:
                self._append(Run(record=record, host_cores=list(host_cores)))
            self._sync()
        except BaseException:
            self.close()
            raise

    def progress(self, progress: Progress | StreamProgress, *, now: bool = False) -> bool:
        """Append `progress` if `PROGRESS_INTERVAL_S` has passed since the last line, or in any case `now`; whether it
        was appended.

        To be called from the loop that waits for I/O, at least every few seconds.
        """
        if not now and time.monotonic() - self._written_s < PROGRESS_INTERVAL_S:
            return False
        self._append(Under(progress=progress))
        return True

    def finished(self, report: PhaseReport | StreamReport) -> None:
        """Append the figures of a phase that this process has finished, or that was ended early."""
        self._append(Finished(report=report))

    def snapshot_due(self, number: int, elapsed_ns: int) -> bool:
        """Whether phase `number` has grown by `SNAPSHOT_GROWTH` since its last `snapshot`."""
        before_ns = self._snapshot[1] if self._snapshot[0] == number else 0
        return elapsed_ns >= max(int(PROGRESS_INTERVAL_S * 1e9), int(before_ns * SNAPSHOT_GROWTH))

    def snapshot(self, report: StreamReport, elapsed_ns: int) -> None:
        """Append all figures of a stream's phase as they are after `elapsed_ns`, in a report that is not complete.

        Without one, a stream that is killed after hours would have no percentiles. To be called when `snapshot_due`.
        """
        self._append(Finished(report=report))
        self._snapshot = (report.number, elapsed_ns)

    def failed(self, error: RunError) -> None:
        """Append why this process ends the run, and make it durable."""
        self._append(Failed(error=error))
        self._sync()

    def close(self) -> None:
        """Close the file and keep it; again is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Remove this process's journal, once the run's record is durable."""
        self.close()
        self.path.unlink(missing_ok=True)
        _remove_if_empty(self.path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: Line) -> None:
        data = memoryview(msgspec.json.encode(line) + b"\n")
        while data:
            data = data[os.write(self._fd, data) :]
        self._written_s = time.monotonic()
        if self._written_s - self._synced_s >= FSYNC_INTERVAL_S:
            self._sync()

    def _sync(self) -> None:
        os.fdatasync(self._fd)
        self._synced_s = time.monotonic()


def _lock(fd: int, *, wait: bool = False) -> bool:
    """Whether `fd` could be locked; False where another holds the lock. The lock ends with its process.

    On a file system without locks (Lustre without -o flock) every lock is granted: `_alive` doesn't rely on
    it alone.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return True


def _alive(journal: Path, start: Start | None) -> bool:
    """Whether the process that writes `journal` may still run.

    A held lock says yes. A free one says no for a process of this very boot; another host's lock may not be
    visible here (local locks, a file system without them), so that its journal must have been quiet for
    `QUIET_S` as well.
    """
    fd = os.open(journal, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not _lock(fd):
            return True
        here = start is not None and start.boot_id == boot_id() != ""
        return not here and time.time() - os.fstat(fd).st_mtime < QUIET_S
    finally:
        os.close(fd)


def _journals(run_dir: Path) -> list[Path]:
    return sorted((run_dir / JOURNAL_DIR).glob("*.jsonl"), key=lambda path: (len(path.name), path.name))


def _start(journal: Path) -> Start | None:
    """The journal's first line, without reading the rest."""
    with open(journal, "rb") as file:
        text = file.readline()
    try:
        return msgspec.json.decode(text, type=Start)
    except msgspec.DecodeError:
        return None


def find_unfinished(results_dir: str | os.PathLike[str]) -> list[Path]:
    """Directories of runs under `results_dir` that ended without a record, oldest first; none where there is
    no directory.

    A run of which any process may still be alive isn't among them, nor one whose process 0 left its journal
    elsewhere (results on a directory per node): only there can a record be made.
    """
    root = Path(results_dir)
    found: list[tuple[float, Path]] = []
    for run_dir in root.iterdir() if root.is_dir() else ():
        try:
            if _is_unfinished(run_dir):
                found.append((run_dir.stat().st_mtime, run_dir))
        except FileNotFoundError:
            continue  # the run has ended by itself while it was looked at
    return [run_dir for _, run_dir in sorted(found)]


def _is_unfinished(run_dir: Path) -> bool:
    journals = _journals(run_dir)
    if not any(path.name == "0.jsonl" for path in journals):
        return False
    if not all(os.access(path, os.R_OK | os.W_OK) for path in [run_dir, *journals]):
        return False  # another user's run, which is theirs to recover
    # In this order: process 0 keeps its journal locked until the record is there.
    return not any(_alive(path, _start(path)) for path in journals) and not (run_dir / RECORD_FILE).exists()


def recover(run_dir: str | os.PathLike[str]) -> Record | StreamRecord:
    """A record of what the journals in `run_dir` hold: status failed if a process said why it ended, else
    partial.

    Phases that some processes had not finished have `complete` false, with the finished ones' figures in the
    columns and the last word of the others in `unfinished`. `seal` makes it the run's record.

    Raises
    ------
    UsageError
        If there is no journal of process 0 with the run's description.
    """
    directory = Path(run_dir)
    run: Run | None = None
    errors: list[RunError] = []
    gathered = Gathered()
    torn_lines = 0
    last_unix_s = 0.0
    journals = _journals(directory)
    for journal in journals:
        lines, torn = read(journal)
        torn_lines += torn
        last_unix_s = max(last_unix_s, journal.stat().st_mtime)
        for line in lines:
            match line:
                case Run():
                    run = line
                case Finished() | Under():
                    gathered.add(line)
                case Failed(error=error):
                    errors.append(error)
    if run is None:
        raise UsageError(
            f"no record can be made of {directory}: there is no journal of process 0 with the run's "
            f"description; name the results directory that process 0 wrote to"
        )
    record = run.record
    processes = record.world.processes
    record.status = "failed" if errors else "partial"
    record.error = errors[0] if errors else None
    record.end_unix_ns = int(last_unix_s * 10**9)
    if isinstance(record, Record):
        record.phases = gathered.checkpoint_phases(run.host_cores, processes)
    else:
        record.phases = gathered.stream_phases(run.host_cores, processes)
    record.recovered = Recovered(
        journals=len(journals), torn_lines=torn_lines, missing_processes=max(0, processes - len(journals))
    )
    return record


def seal(run_dir: str | os.PathLike[str], record: Record | StreamRecord) -> Path:
    """Write `record` durably as the run's and then remove all its journals; the record's path."""
    path = save(record, run_dir)
    for name in [*_journals(Path(run_dir)), Path(run_dir) / JOURNAL_DIR / _SEALING]:
        name.unlink(missing_ok=True)
    _remove_if_empty(Path(run_dir) / JOURNAL_DIR)
    return path


def seal_early(run_dir: str | os.PathLike[str]) -> tuple[Path, Record | StreamRecord] | None:
    """Make the record of a run that ends before its time, by one of its own processes; its path and itself.

    None if another process is at it or has done it, or if process 0's journal lies elsewhere (results on a
    directory per node). A process that is killed within this leaves the journals to the next run.
    """
    directory = Path(run_dir) / JOURNAL_DIR
    if not (directory / "0.jsonl").exists():
        return None
    try:
        os.close(os.open(directory / _SEALING, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except (FileExistsError, FileNotFoundError):
        return None
    record = recover(run_dir)
    return seal(run_dir, record), record


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError as error:
        # Other processes' journals are still there, or the last of them has just removed it.
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise
