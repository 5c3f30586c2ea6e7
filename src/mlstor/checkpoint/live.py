"""Progress of a checkpoint's phase: bytes of all that there are."""

from __future__ import annotations

from collections.abc import Sequence

from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from mlstor.live import Live
from mlstor.units import format_gb


class CheckpointLive(Live):
    """Bytes done of those that all processes move."""

    def begin(self, title: str, total: int | None) -> None:
        self._total_nbytes = total or 0
        super().begin(title, total)

    def line(self, elapsed_ns: int, done: Sequence[int]) -> str:
        rate = done[0] / max(1, elapsed_ns)
        return f"{self.title}: {format_gb(done[0])} of {format_gb(self._total_nbytes)}, {rate:.2f} GB/s"

    def columns(self) -> Sequence[ProgressColumn]:
        return (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=False),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
        )
