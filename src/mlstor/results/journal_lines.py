"""The lines of a journal: what each is, and how they are read and become phases. `journal` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from mlstor.results.merge import merge_phase
from mlstor.results.phase import Phase, PhaseReport, Progress
from mlstor.results.record import Record, RunError, StreamRecord
from mlstor.results.stream import StreamPhase, StreamProgress, StreamReport
from mlstor.results.stream_merge import merge_stream


class Start(msgspec.Struct, kw_only=True, tag="start"):
    """First line of every journal: who writes it."""

    process: int
    hostname: str
    boot_id: str


class Run(msgspec.Struct, kw_only=True, tag="run"):
    """Second line of process 0's journal: the run as a record without phases, and what merging needs to know
    of hosts.
    """

    record: Record | StreamRecord
    host_cores: list[int] = []


class Finished(msgspec.Struct, kw_only=True, tag="finished"):
    """A phase that this process has finished, or how it stood (a report that is not complete)."""

    report: PhaseReport | StreamReport


class Under(msgspec.Struct, kw_only=True, tag="progress"):
    """How far this process is in the phase under way."""

    progress: Progress | StreamProgress


class Failed(msgspec.Struct, kw_only=True, tag="failed"):
    """Why this process ended the run."""

    error: RunError


Line = Start | Run | Finished | Under | Failed


def read(journal: Path) -> tuple[list[Line], int]:
    """Lines of a journal, and how many could not be read: the last of a process killed in mid-write, or after
    a power failure any that never reached the disk.
    """
    decoder = msgspec.json.Decoder(Line)
    lines: list[Line] = []
    torn = 0
    for text in journal.read_bytes().split(b"\n"):
        if not text:
            continue
        try:
            lines.append(decoder.decode(text))
        except msgspec.DecodeError:
            torn += 1
    return lines, torn


class Gathered:
    """What the lines of all journals of a run say of its phases."""

    def __init__(self) -> None:
        self._reports: dict[int, dict[int, PhaseReport | StreamReport]] = {}
        self._latest: dict[int, Progress | StreamProgress] = {}

    def add(self, line: Finished | Under) -> None:
        """Take a line, in the order of its journal: the last word of a process on a phase is what counts."""
        match line:
            case Finished(report=report):
                self._reports.setdefault(report.number, {})[report.process] = report
                self._latest.pop(report.process, None)
            case Under(progress=progress):
                self._latest[progress.process] = progress

    def checkpoint_phases(self, host_cores: Sequence[int], processes: int) -> list[Phase]:
        """The phases of a checkpoint run."""
        return [
            merge_phase(
                [one for one in reports if isinstance(one, PhaseReport)],
                progress=[one for one in progress if isinstance(one, Progress)],
                host_cores=host_cores,
                processes=processes,
            )
            for reports, progress in self._of_phases()
        ]

    def stream_phases(self, host_cores: Sequence[int], processes: int) -> list[StreamPhase]:
        """The phases of an object stream."""
        return [
            merge_stream(
                [one for one in reports if isinstance(one, StreamReport)],
                progress=[one for one in progress if isinstance(one, StreamProgress)],
                host_cores=host_cores,
                processes=processes,
            )
            for reports, progress in self._of_phases()
        ]

    def _of_phases(self) -> list[tuple[list[PhaseReport | StreamReport], list[Progress | StreamProgress]]]:
        under: dict[int, list[Progress | StreamProgress]] = {}
        for progress in self._latest.values():
            under.setdefault(progress.number, []).append(progress)
        return [
            (list(self._reports.get(number, {}).values()), under.get(number, []))
            for number in sorted(self._reports.keys() | under.keys())
        ]
