"""What the tests of token reads share: files of records, and a phase of reads on one rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlstor import Pattern
from mlstor.results.stream import OpFigures
from mlstor.storage.store import Page
from mlstor.stream import token_records
from mlstor.stream.catalog import Catalog
from mlstor.stream.compose import Limits, Pace
from mlstor.stream.handles import Handles
from mlstor.stream.reads import Reads
from mlstor.stream.token_loop import TokenLoop, TokenTally
from mlstor.stream.token_records import TokenRecords
from mlstor.stream.tokens import Tokens

RECORD = 4096
RUN = 77


def pattern_of(file_id: int) -> Pattern:
    return Pattern(RUN, 0, file_id)


def catalog_of(sizes: list[int], path: Path) -> Catalog:
    return Catalog.build([Page([f"part-{i:05d}.npy" for i in range(len(sizes))], sizes)], path)


class Run:
    """One phase of token reads on one rank, and what its tally says."""

    def __init__(self, handles: Handles, records: TokenRecords, **options: Any) -> None:
        self.handles = handles
        self.reads = Reads(
            records,
            seed=options.get("seed", 3),
            kind="permutation",
            rank=options.get("rank", 0),
            size=options.get("size", 1),
            uneven="exact",
            scope="world",
            epochs=options.get("epochs", 1),
        )
        limits = Limits(options.get("ops"), options.get("nbytes"))
        self.loop = TokenLoop(handles, self.reads, limits, options.get("verify", False))
        self.start_ns = time.monotonic_ns()
        self.tally = TokenTally(
            self.loop.slots, self.start_ns, 0, lambda epoch: "unknown", options.get("verify", False)
        )
        self.ticks = 0
        rate = options.get("rate")
        duration_s = options.get("duration_s")
        self.ends_ns = None if duration_s is None else self.start_ns + int(duration_s * 1e9)
        if rate is not None:
            self.loop.pace = Pace(self.start_ns, 1e9 / rate)
            self.loop.ends_ns = self.ends_ns

    def go(self) -> OpFigures:
        self.loop.run(self.tally, self.ends_ns, self.tick)
        assert self.handles.outstanding == 0
        assert self.handles.room == self.handles.capacity
        return self.figures()

    def figures(self) -> OpFigures:
        return self.tally.figures([]).get("get-range", OpFigures())

    def tick(self) -> None:
        self.ticks += 1


class Data:
    """Sixteen real files of 32 records, each with a tail that is no record."""

    def __init__(self, root: Path) -> None:
        self.root = root / "data"
        self.root.mkdir()
        sizes = []
        for number in range(16):
            data = bytearray(32 * RECORD + 500)
            pattern_of(number).fill(data)
            (self.root / f"part-{number:05d}.npy").write_bytes(data)
            sizes.append(len(data))
        self.catalog = catalog_of(sizes, root / "catalog")
        self.records = TokenRecords(self.catalog)
        self._opened: list[Handles] = []

    def kept(self, most: int = 512, in_flight: int = 8) -> Handles:
        made = token_records.kept(str(self.root), self.catalog, Tokens("kept", most), in_flight, pattern_of)
        self._opened.append(made)
        return made

    def close(self) -> None:
        for made in self._opened:
            made.close()


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Data]:
    made = Data(tmp_path)
    yield made
    made.close()
