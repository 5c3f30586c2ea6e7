"""What a checkpoint run will write and need, found without any I/O: the plan, its tables and its JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from mlstor.checkpoint.deal import deal
from mlstor.checkpoint.layout import Layout, ShardFile, step_dir
from mlstor.errors import UsageError
from mlstor.units import format_both, format_gb, format_gib

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Beside the checkpoints themselves: the run's directory, the model's in it, and the manifest.
_RUN_INODES = 3


class HostShare(NamedTuple):
    """What one host writes and needs; the figures of files and bytes are those of one checkpoint."""

    host: int
    ranks: list[int]
    nfiles: int
    nbytes: int
    capacity_nbytes: int
    ninodes: int
    memory_nbytes: int


@dataclass(frozen=True)
class Plan:
    """A checkpoint run as planned.

    Parameters
    ----------
    layout
        Files of one checkpoint.
    writes
        Checkpoints to write; all of them lie on the storage at once.
    nhosts
        Hosts that the ranks are dealt to.
    how
        ``"block"`` or ``"round-robin"``: how ranks are dealt to hosts, as launchers do when they fill hosts
        in turn or by node.
    only
        The ranks that take part; default: all.
    process_nbytes
        Memory of one process, of which each rank is one (`Profile.process_nbytes`).

    Raises
    ------
    UsageError
        If a count is below what makes sense.
    """

    layout: Layout
    writes: int = 1
    nhosts: int = 1
    how: str = "block"
    only: Sequence[int] | None = None
    process_nbytes: int = 0

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--writes", self.writes, 0),
            ("--hosts", self.nhosts, 1),
        ):
            if value < least:
                raise UsageError(f"{option} {value} is too low; give {least} or more")
        if not self.ranks:
            raise UsageError("no rank takes part; name at least one with --only-ranks")

    @cached_property
    def ranks(self) -> list[int]:
        """Ranks that take part, in order."""
        return list(range(self.layout.nranks)) if self.only is None else list(self.only)

    def files(self) -> Iterator[ShardFile]:
        """Files of one checkpoint, by rank and then in write order."""
        for rank in self.ranks:
            yield from self.layout.files(rank)

    @cached_property
    def nfiles(self) -> int:
        """Files of one checkpoint."""
        return sum(self.layout.rank_nfiles(rank) for rank in self.ranks)

    @cached_property
    def total_nbytes(self) -> int:
        """Bytes of one checkpoint."""
        return sum(self.layout.rank_nbytes(rank) for rank in self.ranks)

    @property
    def capacity_nbytes(self) -> int:
        """Room that the run needs, bytes."""
        return self.writes * self.total_nbytes

    @property
    def ninodes(self) -> int:
        """Inodes that the run needs on a shared file system."""
        return self._ninodes(self.nfiles)

    def _ninodes(self, nfiles: int) -> int:
        return self.writes * (nfiles + 1) + _RUN_INODES if self.writes else 0

    @cached_property
    def hosts(self) -> list[HostShare]:
        """Share of each host; room and inodes count where each host has a file system of its own."""
        dealt = deal(self.layout.nranks, self.nhosts, self.how, self.ranks)
        shares = []
        for host, ranks in enumerate(dealt):
            nfiles = sum(self.layout.rank_nfiles(rank) for rank in ranks)
            nbytes = sum(self.layout.rank_nbytes(rank) for rank in ranks)
            capacity = self.writes * nbytes
            memory = len(ranks) * self.process_nbytes
            shares.append(HostShare(host, ranks, nfiles, nbytes, capacity, self._ninodes(nfiles), memory))
        return shares


def span(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: ``"0-7, 9, 12-15"``, or ``"0-504 by 8"`` for a steady stride."""
    step = numbers[1] - numbers[0] if len(numbers) > 2 else 1
    if step > 1 and list(numbers) == list(range(numbers[0], numbers[-1] + 1, step)):
        return f"{numbers[0]}-{numbers[-1]} by {step}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:7], f"... {texts[-1]}"])


def plan_json(plan: Plan) -> str:
    """The plan as JSON; ``files`` are those of one checkpoint in write order, all sizes are in bytes."""
    layout = plan.layout
    document = {
        "model": layout.shape.name,
        "parameters": layout.shape.nparameters,
        "meaning": layout.meaning,
        "tensor_parallel": layout.shape.tp,
        "pipeline_parallel": layout.shape.pp,
        "data_parallel": layout.dp,
        "zero_stage": layout.shape.zero_stage,
        "scale": str(layout.scale),
        "ranks": layout.nranks,
        "planned_ranks": len(plan.ranks),
        "writes": plan.writes,
        "step_directory": step_dir(1),
        "nfiles": plan.nfiles,
        "checkpoint_bytes": plan.total_nbytes,
        "capacity_bytes": plan.capacity_nbytes,
        "inodes": plan.ninodes,
        "memory_bytes_per_process": plan.process_nbytes,
        "per_rank": [
            {
                "rank": rank,
                "files": layout.rank_nfiles(rank),
                "bytes": layout.rank_nbytes(rank),
                "capacity_bytes": plan.writes * layout.rank_nbytes(rank),
                "memory_bytes": plan.process_nbytes,
            }
            for rank in plan.ranks
        ],
        "per_host": [
            {
                "host": share.host,
                "ranks": share.ranks,
                "files": share.nfiles,
                "bytes": share.nbytes,
                "capacity_bytes": share.capacity_nbytes,
                "inodes": share.ninodes,
                "memory_bytes": share.memory_nbytes,
            }
            for share in plan.hosts
        ],
        "files": [{"name": file.name, "bytes": file.nbytes, "rank": file.rank} for file in plan.files()],
    }
    return json.dumps(document, indent=1)


def _kind(name: str) -> str:
    """A file's name with its numbers left out, by which like files are counted together."""
    return re.sub(r"[0-9]+", "*", name)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _table(title: str, *headings: str) -> Table:
    """A table whose first column gives way where it is too wide: names are folded, figures stay whole."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
    return table


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan as tables; ranks and hosts that are alike share a row."""
    layout, shape = plan.layout, plan.layout.shape
    parameters = f"{shape.nparameters:,} parameters, " if shape.nparameters else ""
    scale = f", every tensor x {layout.scale}" if layout.scale != 1 else ""
    console.print(
        f"[bold]{shape.name}[/bold]: {parameters}ZeRO stage {shape.zero_stage}{scale}", highlight=False, soft_wrap=True
    )
    console.print(f"Ranks: {layout.meaning}", highlight=False, soft_wrap=True)
    if len(plan.ranks) < layout.nranks:
        console.print(f"Only rank {span(plan.ranks)} of these takes part", highlight=False, soft_wrap=True)

    kinds = Counter((_kind(file.name), file.nbytes) for file in plan.files())
    table = _table("Files of one checkpoint", "file", "count", "bytes each", "bytes")
    for (kind, nbytes), count in kinds.items():
        table.add_row(kind, str(count), f"{nbytes:,}", f"{nbytes * count:,}")
    table.add_section()
    table.add_row("total", str(plan.nfiles), "", f"{plan.total_nbytes:,}")
    console.print(table)

    alike: dict[tuple[int, int], list[int]] = {}
    for rank in plan.ranks:
        alike.setdefault((layout.rank_nfiles(rank), layout.rank_nbytes(rank)), []).append(rank)
    table = _table("Per rank", "ranks", "count", "files", "bytes", "room", "memory")
    for (nfiles, nbytes), ranks in alike.items():
        table.add_row(
            span(ranks),
            str(len(ranks)),
            str(nfiles),
            f"{nbytes:,}",
            format_gb(plan.writes * nbytes),
            format_gib(plan.process_nbytes),
        )
    console.print(table)

    similar: dict[tuple[int, ...], list[HostShare]] = {}
    for share in plan.hosts:
        similar.setdefault((len(share.ranks), *share[2:]), []).append(share)
    title = f"Per host ({plan.nhosts} x {plan.how})"
    table = _table(title, "hosts", "ranks", "files", "bytes", "room", "inodes", "memory")
    for shares in similar.values():
        share = shares[0]
        table.add_row(
            span([like.host for like in shares]),
            str(len(share.ranks)),
            str(share.nfiles),
            f"{share.nbytes:,}",
            format_gb(share.capacity_nbytes),
            str(share.ninodes),
            format_gib(share.memory_nbytes),
        )
    console.print(table)

    memory = f"; {format_gib(plan.process_nbytes)} of memory per process" if plan.process_nbytes else ""
    console.print(
        f"One checkpoint: {_counted(plan.nfiles, 'file')}, {format_both(plan.total_nbytes)}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"Needed for {_counted(plan.writes, 'checkpoint')}: "
        f"{format_both(plan.capacity_nbytes)} of room, "
        f"{_counted(plan.ninodes, 'inode')}{memory}",
        highlight=False,
    )
