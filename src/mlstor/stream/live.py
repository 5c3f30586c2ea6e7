"""Progress of a stream: objects and bytes per second, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from mlstor.live import Live
from mlstor.units import format_gb, format_ns

if TYPE_CHECKING:
    from mlstor.world import World

_NOTHING = (0, 0, 0)


class StreamLive(Live):
    """Operations and bytes that all processes have done; the epoch is that of process 0."""

    def __init__(self, world: World, shown: bool) -> None:
        super().__init__(world, shown, numbers=2)
        self._name = ""
        self._epoch: int | None = None
        #: ns, operations and bytes at the last line, and where the epoch began
        self._before = self._began = _NOTHING

    def begin(self, title: str, total: int | None) -> None:
        self._name, self._epoch = title, None
        self._before = self._began = _NOTHING
        super().begin(title, total)

    def at(self, epoch: int | None, elapsed_ns: int, count: int, nbytes: int) -> None:
        """This process has done so much, and is now in an epoch (None: it does not read)."""
        if epoch is not None and epoch != self._epoch:
            ended, self._epoch = self._epoch, epoch
            self.title = f"{self._name}, epoch {epoch}"
            if self._shown and ended is not None:
                all_count, all_nbytes = self.total(count, nbytes)
                now = elapsed_ns, all_count, all_nbytes
                self.say(f"epoch {ended} of process 0: {_rates(self._began, now)}")
                self._began = now
        self.update(elapsed_ns, count, nbytes)

    def line(self, elapsed_ns: int, done: Sequence[int]) -> str:
        count, nbytes = done
        now = elapsed_ns, count, nbytes
        text = f"{self.title}: {count:,} operations, {format_gb(nbytes)}; {_rates(self._before, now)}"
        self._before = now
        return text

    def columns(self) -> Sequence[ProgressColumn]:
        return TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()


def _rates(before: tuple[int, int, int], now: tuple[int, int, int]) -> str:
    duration_ns = max(1, now[0] - before[0])
    per_second = (now[1] - before[1]) * 1e9 / duration_ns
    return f"{per_second:,.0f} objects/s, {(now[2] - before[2]) / duration_ns:.2f} GB/s in {format_ns(duration_ns)}"
