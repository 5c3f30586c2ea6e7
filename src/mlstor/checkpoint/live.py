"""Progress while a phase runs: on process 0, of all processes."""

from __future__ import annotations

import os
import struct
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from mlstor.units import format_gb
from mlstor.world import World

# Pauses between lines of progress: the first is short, for those who watch; later ones double, for logs.
_FIRST_LINE_S, _LAST_LINE_S = 1.0, 10.0
_TELL_EVERY_S = 0.5
_WORD = struct.Struct("<QQ")


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read the output is gone (``| head``): the run goes on, records and tidies up."""
        self.quiet = True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


class Live:
    """A bar where standard output is a terminal, else a line now and then; nothing with `shown` false.

    A launcher may give its ranks terminals and put their output into a log: under one there are lines.

    Processes other than 0 tell process 0 how far they are, twice a second, without waiting for it.
    """

    def __init__(self, world: World, shown: bool) -> None:
        self._world = world
        self._shown = shown and world.rank == 0
        self._tells = shown and world.size > 1 and world.rank != 0
        plain = world.launcher is not None or not sys.stdout.isatty()
        self._console = _Output(highlight=False, width=100 if plain else None, force_terminal=False if plain else None)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._phase = 0
        self._title = ""
        self._total_nbytes = 0
        self._spoken_s = 0.0
        self._pause_s = _FIRST_LINE_S

    def say(self, sentence: str, *, any_process: bool = False) -> None:
        """Print a sentence, on process 0 or on the one that calls."""
        if any_process or self._world.rank == 0:
            self._console.print(sentence, soft_wrap=True, markup=False)

    def begin(self, title: str, total_nbytes: int) -> None:
        """A phase begins that moves `total_nbytes` over all processes."""
        self._phase += 1
        self._title, self._total_nbytes = title, total_nbytes
        self._spoken_s, self._pause_s = time.monotonic(), _FIRST_LINE_S
        if self._shown and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=False),
                TransferSpeedColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(title, total=total_nbytes)

    def update(self, elapsed_ns: int, nbytes: int) -> None:
        """This process has done `nbytes` of the phase."""
        now_s = time.monotonic()
        if self._tells and now_s - self._spoken_s >= _TELL_EVERY_S:
            self._spoken_s = now_s
            self._world.tell(_WORD.pack(self._phase, nbytes))
        if not self._shown:
            return
        done = nbytes + sum(
            told for phase, told in map(_WORD.unpack, self._world.heard().values()) if phase == self._phase
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=done)
        elif now_s - self._spoken_s >= self._pause_s:
            self._spoken_s, self._pause_s = now_s, min(2 * self._pause_s, _LAST_LINE_S)
            rate = done / max(1, elapsed_ns)
            self.say(f"{self._title}: {format_gb(done)} of {format_gb(self._total_nbytes)}, {rate:.2f} GB/s")

    @property
    def console(self) -> Console:
        """Where the record's tables go too."""
        return self._console

    def end(self, sentence: str) -> None:
        """The phase is over; `sentence` says what came of it."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._shown:
            self.say(sentence)

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
