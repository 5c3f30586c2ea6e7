"""How tables of figures are drawn, for every kind of record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 100
"""Columns when the output is no terminal."""
Justify = Literal["left", "right"]
Column = tuple[str, Justify]
Row = tuple[str, ...]


def number(value: float | None, digits: int = 2) -> str:
    """With a fixed number of digits; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def seconds(value_ns: int) -> str:
    """Seconds: two digits behind the point from one second on, else three."""
    return f"{value_ns / 1e9:.2f}" if value_ns >= 10**9 else f"{value_ns / 1e9:.3f}"


def print_table(
    out: Console, title: str, columns: Sequence[Column], rows: Iterable[tuple[Row, str]], *, tight: bool = False
) -> None:
    """A title over a table without vertical lines; nothing where there are no rows. The title is not the
    table's own, which rich would wrap at the table's width. `tight` is for many columns.
    """
    # An ellipsis in a figure would be no figure.
    padding = (0, 1, 0, 0) if out.width >= PLAIN_WIDTH and not tight else 0
    table = Table(box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=True)
    for cells, style in rows:
        table.add_row(*map(Text, cells), style=style)  # Text: AIStore's targets are named "t[id]", which is no markup
    if table.row_count:
        out.print()
        out.print(title, style="bold")
        out.print(table)
        out.print()
