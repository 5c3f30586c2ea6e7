"""Progress while a phase runs: on process 0, of all processes."""

from __future__ import annotations

import os
import struct
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskID

if TYPE_CHECKING:
    from typing_extensions import Self

    from mlstor.world import World

# Pauses between lines of progress: the first is short, for those who watch; later ones double, for logs.
_FIRST_LINE_S, _LAST_LINE_S = 1.0, 10.0
_TELL_EVERY_S = 0.5


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read the output is gone (``| head``): the run goes on, records and tidies up."""
        self.quiet = True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


class Live(ABC):
    """A bar where standard output is a terminal, else a line now and then; nothing with `shown` false.

    A launcher may give its ranks terminals and put their output into a log: under one there are lines.

    Processes other than 0 tell process 0 how far they are, twice a second, without waiting for it.

    Parameters
    ----------
    numbers
        How many each process tells; process 0 adds them up. The first is what the bar is of.
    """

    def __init__(self, world: World, shown: bool, numbers: int = 1) -> None:
        self._world = world
        self._shown = shown and world.rank == 0
        self._tells = shown and world.size > 1 and world.rank != 0
        plain = world.launcher is not None or not sys.stdout.isatty()
        self._console = _Output(highlight=False, width=100 if plain else None, force_terminal=False if plain else None)
        self._word = struct.Struct(f"<{1 + numbers}Q")
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._phase = 0
        self.title = ""
        self._spoken_s = 0.0
        self._pause_s = _FIRST_LINE_S

    @abstractmethod
    def line(self, elapsed_ns: int, done: Sequence[int]) -> str:
        """A line of progress: what all processes have done since the phase began."""

    @abstractmethod
    def columns(self) -> Sequence[ProgressColumn]:
        """Of the bar."""

    def say(self, sentence: str, *, any_process: bool = False) -> None:
        """Print a sentence, on process 0 or on the one that calls."""
        if any_process or self._world.rank == 0:
            self._console.print(sentence, soft_wrap=True, markup=False)

    def begin(self, title: str, total: int | None) -> None:
        """A phase begins; `total` is what its first number will be over all processes, if that is known."""
        self._phase += 1
        self.title = title
        self._spoken_s, self._pause_s = time.monotonic(), _FIRST_LINE_S
        if self._shown and self._console.is_terminal:
            self._progress = Progress(*self.columns(), console=self._console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task(title, total=total)

    def update(self, elapsed_ns: int, *mine: int) -> None:
        """This process has come so far with the phase."""
        now_s = time.monotonic()
        if self._tells and now_s - self._spoken_s >= _TELL_EVERY_S:
            self._spoken_s = now_s
            self._world.tell(self._word.pack(self._phase, *mine))
        if not self._shown:
            return
        done = self.total(*mine)
        if self._progress is not None:
            self._progress.update(self._task, completed=done[0], description=self.title)
        elif now_s - self._spoken_s >= self._pause_s:
            self._spoken_s, self._pause_s = now_s, min(2 * self._pause_s, _LAST_LINE_S)
            self.say(self.line(elapsed_ns, done))

    def total(self, *mine: int) -> list[int]:
        """This process's numbers, and at process 0 what the others have told, added up."""
        done = list(mine)
        for phase, *told in map(self._word.unpack, self._world.heard().values()):
            if phase == self._phase:
                done = [one + other for one, other in zip(done, told, strict=True)]
        return done

    @property
    def console(self) -> Console:
        """Where all of this goes, for tables."""
        return self._console

    def end(self, sentence: str) -> None:
        """The phase is over; `sentence` says what came of it."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._shown:
            self.say(sentence)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
