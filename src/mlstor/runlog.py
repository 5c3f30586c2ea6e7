"""A run's journals and its record: from the first word of a phase to the record, however the run ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from mlstor.agreement import agreed
from mlstor.errors import MlstorError, UsageError
from mlstor.results import journal
from mlstor.results.record import Record, RunError, StreamRecord

if TYPE_CHECKING:
    from mlstor.live import Live
    from mlstor.results.phase import Phase, PhaseReport, Progress
    from mlstor.results.stream import StreamPhase, StreamProgress, StreamReport
    from mlstor.world import World

R = TypeVar("R", Record, StreamRecord)

# mpirun kills 0.5 s after SIGTERM; by then all journals hold their last word and process 0 has made a record of them.
_LAST_WORDS_S = 0.1


class RunLog(Generic[R]):
    """What one process writes down of a run.

    Parameters
    ----------
    results_dir, results_id
        The run's directory is ``<results_dir>/<results_id>``.
    stack
        Closes the journal at the end.

    Attributes
    ----------
    header : Record or StreamRecord or None
        At process 0, from `open` on: the record without phases.
    host_cores : list of int
        At process 0: cores usable on each host.
    recorded : bool
        Whether the record is written.
    """

    def __init__(self, world: World, live: Live, results_dir: str, results_id: str, stack: ExitStack) -> None:
        self.world, self.live = world, live
        self.run_dir = Path(results_dir, results_id)
        self.header: R | None = None
        self.host_cores: list[int] = []
        self.recorded = False
        self._stack = stack
        self._journal: journal.Journal | None = None
        self._progress: Progress | StreamProgress | None = None

    def recover_others(self) -> None:
        """At process 0: make records of former runs under the results directory that were killed."""
        if self.world.rank != 0:
            return
        for left in journal.find_unfinished(self.run_dir.parent):
            try:
                recovered = journal.recover(left)
                journal.seal(left, recovered)
            except (MlstorError, OSError) as error:  # no reason not to run this one
                self.live.say(f"warning: run {left.name} ended without a record, and none could be made: {error}")
                continue
            self.live.say(
                f"note: run {left.name} had ended without a record; one was made of its journals, "
                f"marked {recovered.status}"
            )

    def open(self, header: R | None, host_cores: Sequence[int]) -> None:
        """Begin the journal; every process calls this, process 0 with the record's header."""
        self.header, self.host_cores = header, list(host_cores)

        def begin() -> journal.Journal:
            opened = journal.Journal(self.run_dir, self.world.rank, header, self.host_cores)
            self._stack.callback(opened.close)
            return opened

        self._journal = agreed(self.world, begin)

    @property
    def journal(self) -> journal.Journal:
        """This process's, once it is open."""
        assert self._journal is not None
        return self._journal

    def reached(self, progress: Progress | StreamProgress, *, now: bool = False) -> None:
        """How far this process is in the phase under way; journalled every few seconds, or `now`."""
        self._progress = progress
        self.journal.progress(progress, now=now)

    def finished(self, report: PhaseReport | StreamReport) -> None:
        """This process has finished a phase, or ends it early."""
        self.journal.finished(report)
        self._progress = None

    def seal(self, phases: list[Phase] | list[StreamPhase], show: Callable[[R], None]) -> None:
        """Write the record, at process 0, and show it; then nobody needs the journals."""
        header = self.header
        if header is not None:
            header.status = "complete"
            header.phases = phases  # type: ignore[assignment]  # of the record's own kind
            header.end_unix_ns = time.time_ns()
            path = journal.seal(self.run_dir, header)
            self.live.say("")
            show(header)
            self.live.say(f"record: {path}")
        self.world.barrier("record")
        self.journal.discard()
        self.recorded = True

    def last_words(self, error: BaseException, left: str) -> None:
        """The run ends here: journal what this process has, and where it can be done make a record of all journals.

        Parameters
        ----------
        left
            What is to be said of files that the run leaves, as the end of a sentence; empty if there are none.
        """
        if self.recorded:
            self.live.say(f"stopped while tidying up{left}")
            return
        if self._journal is None:
            if left:
                alone = not isinstance(error, KeyboardInterrupt | MlstorError)
                self.live.say(f"stopped before the first phase, without a record{left}", any_process=alone)
            return
        interrupted = isinstance(error, KeyboardInterrupt)
        if self._progress is not None:
            self._journal.progress(self._progress, now=True)
        if not interrupted:
            self._journal.failed(self._error(error))
        elif self.world.rank != 0:
            return
        elif self.world.size > 1:
            time.sleep(_LAST_WORDS_S)
        sealed = journal.seal_early(self.run_dir)
        if sealed is not None:
            path, record = sealed
            self.live.say(f"record, {record.status}: {path}{left}", any_process=True)

    def _error(self, error: BaseException) -> RunError:
        return RunError(
            rank=self.world.rank,
            host=self.world.hostname,
            message=str(error) or type(error).__name__,
            file=getattr(error, "filename", None),
            offset=getattr(error, "offset", None),
        )


def check_results_dir(world: World, directory: str) -> None:
    """Make the directory of the results, and refuse one that can't be used; every process calls this.

    Raises
    ------
    UsageError
        On every process.
    """
    from mlstor.checkpoint.targets import check_directory

    def check() -> None:
        if world.local_rank != 0:
            return
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"the results directory {directory} can't be made: {error.strerror}; name another with --results"
            ) from None
        check_directory(directory)

    agreed(world, check, world.local_rank == 0)
