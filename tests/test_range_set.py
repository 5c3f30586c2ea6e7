"""Ranges of many files over a bounded number of open handles."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlstor import AlignedBuffer, Engine, Pattern
from mlstor._io import RangeSet, open_range_set
from mlstor.operations import DONE_DTYPE, RANGE_DTYPE

NBYTES = 4096
RECORDS = 8


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(workers=1, depth=16, block_bytes=64 << 10) as made:
        yield made


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Twelve files whose records are all different."""
    paths = []
    for number in range(12):
        data = bytearray(NBYTES * RECORDS + 100)
        Pattern(run_id=1, file_id=number).fill(data)
        path = tmp_path / f"file {number}"
        path.write_bytes(data)
        paths.append(str(path))
    return paths


def ranges_of(files: Any, records: Any) -> Any:
    made = np.zeros(len(files), RANGE_DTYPE)
    made["tag"] = np.arange(len(files)) + 1000
    made["offset"] = records * NBYTES
    made["nbytes"] = NBYTES
    made["dest"] = np.arange(len(files)) * NBYTES
    return made


def reap_all(opened: RangeSet) -> Any:
    done: Any = np.zeros(opened.outstanding, DONE_DTYPE)
    assert opened.reap(done, min_done=len(done), timeout_s=30) == len(done)
    return done


def open_descriptors(paths: list[str]) -> int:
    there = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            there += os.readlink(f"/proc/self/fd/{name}") in paths
        except FileNotFoundError:
            continue
    return there


def only_kept_files_are_open(opened: RangeSet, paths: list[str]) -> bool:
    """A worker lets go of an operation a moment after its last range was reaped."""
    deadline = time.monotonic() + 60
    while open_descriptors(paths) != opened.files_open and time.monotonic() < deadline:
        opened.reap(bytearray(24), 0, 0)
        time.sleep(0.01)
    return open_descriptors(paths) == opened.files_open


@pytest.mark.parametrize("handles", [1, 3, 12, 500])
@pytest.mark.parametrize("ordered", [True, False])
def test_each_range_comes_from_its_file_whatever_the_handles(
    engine: Engine, files: list[str], handles: int, ordered: bool
) -> None:
    draws = np.random.default_rng(handles)
    opened = open_range_set(engine, files, handles)
    buffer = AlignedBuffer(500 * NBYTES)
    for _ in range(3):
        which: Any = draws.integers(0, len(files), 500).astype(np.uint32)
        which = np.sort(which) if ordered else which
        records = draws.integers(0, RECORDS, 500)
        assert opened.submit(ranges_of(which, records), which, buffer) == 500
        done = reap_all(opened)
        assert sorted(done["tag"]) == list(range(1000, 1500))
        assert (done["result"] == NBYTES).all()
        view = memoryview(buffer)
        for at in range(500):
            part = view[at * NBYTES : (at + 1) * NBYTES]
            assert not Pattern(run_id=1, file_id=int(which[at])).check(part, int(records[at]) * NBYTES)
        assert opened.files_open <= min(handles, 12)
        assert only_kept_files_are_open(opened, files)
    assert opened.opens == 12 if handles >= 12 else opened.opens > 12


def test_kept_handles_are_opened_once_and_the_least_used_makes_room(engine: Engine, files: list[str]) -> None:
    opened = open_range_set(engine, files, 2)

    def read(*numbers: int) -> int:
        which: Any = np.array(numbers, np.uint32)
        opened.submit(ranges_of(which, np.zeros(len(which), np.uint64)), which)
        reap_all(opened)
        return opened.opens

    assert [read(0), read(1), read(0), read(2), read(0), read(1)] == [1, 2, 2, 3, 3, 4]
    assert sum(opened.ways_taken.values()) == 4


def test_a_range_that_ends_behind_the_file_says_so(engine: Engine, files: list[str]) -> None:
    opened = open_range_set(engine, files)
    which: Any = np.array([3, 4], np.uint32)
    opened.submit(ranges_of(which, np.array([RECORDS, 0])), which)
    results = {int(one["tag"]): int(one["result"]) for one in reap_all(opened)}
    assert results == {1000: -10001, 1001: NBYTES}


def test_a_file_that_is_gone_is_an_error_and_nothing_was_submitted(engine: Engine, files: list[str]) -> None:
    os.unlink(files[5])
    opened = open_range_set(engine, files)
    which: Any = np.array([4, 5], np.uint32)
    with pytest.raises(FileNotFoundError) as caught:
        opened.submit(ranges_of(which, np.zeros(2)), which)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, files[5])
    assert opened.outstanding == 0
    opened.submit(ranges_of(which[:1], np.zeros(1)), which[:1])
    assert reap_all(opened)["result"].tolist() == [NBYTES]


@pytest.mark.parametrize(
    ("field", "value"),
    [("nbytes", 0), ("nbytes", 1 << 20), ("dest", 3 * NBYTES), ("offset", 2**63)],
)
def test_a_range_that_can_not_be_read_is_refused(engine: Engine, files: list[str], field: str, value: int) -> None:
    opened = open_range_set(engine, files)
    which: Any = np.zeros(2, np.uint32)
    wrong = ranges_of(which, np.zeros(2))
    wrong[field][1] = value
    with pytest.raises(ValueError, match="are accepted"):
        opened.submit(wrong, which, bytearray(2 * NBYTES))
    assert opened.outstanding == 0


def test_arrays_that_do_not_fit_together_are_refused(engine: Engine, files: list[str]) -> None:
    opened = open_range_set(engine, files)
    which: Any = np.zeros(2, np.uint32)
    with pytest.raises(ValueError, match="as many elements"):
        opened.submit(ranges_of(which, np.zeros(2)), which[:1])
    with pytest.raises(ValueError, match="there is no file 12"):
        opened.submit(ranges_of(which, np.zeros(2)), which + np.uint32(12))
    assert opened.submit(ranges_of(which[:0], 0), which[:0]) == 0
    for paths, handles in (([], 4), (files, 0)):
        with pytest.raises(ValueError, match="give one at least"):
            open_range_set(engine, paths, handles)


def test_what_is_cancelled_comes_back(files: list[str]) -> None:
    with Engine(workers=1, depth=1, block_bytes=64 << 10) as engine:
        opened = open_range_set(engine, files)
        which: Any = np.arange(2000, dtype=np.uint32) % 12
        opened.submit(ranges_of(which, np.zeros(2000)), which)
        opened.cancel()
        results = reap_all(opened)["result"]
        assert set(results.tolist()) <= {NBYTES, -errno.ECANCELED}
        assert opened.outstanding == 0
