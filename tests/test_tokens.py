"""Token reads: positions in 32 TB of records, over kept handles and opens per read, paced and free."""

from __future__ import annotations

import errno
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_support import RECORD, Data, Run, catalog_of, data, pattern_of

from mlstor.errors import UsageError
from mlstor.operations import DONE_DTYPE
from mlstor.stream import token_records
from mlstor.stream.catalog import Objects
from mlstor.stream.handles import AHEAD, AHEAD_IN_MEMORY, Handles, most_files_open
from mlstor.stream.order import Order, Share
from mlstor.stream.synthetic import Synthetic
from mlstor.stream.token_records import TokenRecords
from mlstor.stream.tokens import Tokens

__all__ = ["data"]


# ---- positions ----


def test_every_record_of_every_file_has_one_position_and_tails_have_none(tmp_path: Path) -> None:
    sizes = [RECORD * 3 + 1, 0, RECORD - 1, RECORD, RECORD * 2]
    records = TokenRecords(catalog_of(sizes, tmp_path / "c"))
    assert records.units == 6
    index, _, offset, nbytes = records.pick(np.arange(6, dtype=np.uint64))
    assert list(zip(index.tolist(), offset.tolist(), strict=True)) == [
        (0, 0),
        (0, RECORD),
        (0, 2 * RECORD),
        (3, 0),
        (4, 0),
        (4, RECORD),
    ]
    assert set(nbytes.tolist()) == {RECORD}


def test_32_tb_have_their_positions_and_ranks_share_them_without_overlap(tmp_path: Path) -> None:
    sizes = [128_514_056_192] * 249  # 32 TB in 249 files of 31,375,502 records
    records = TokenRecords(catalog_of(sizes, tmp_path / "c"))
    assert records.units == 249 * (128_514_056_192 // RECORD) == 7_812_499_998
    order, world = Order(records.units, 6198), 64
    seen: set[tuple[int, int]] = set()
    per_file = np.zeros(249, np.int64)
    for rank in range(world):
        positions = Share(records.units, rank, world).positions()
        for first in (0, len(positions) - 2000):  # the beginning of the epoch and its end
            part = positions[first : first + 2000]
            units = order.indices(0, part.start, part.step, len(part))
            index, _, offset, _ = records.pick(units)
            assert (offset % RECORD == 0).all()
            assert (offset < sizes[0]).all()
            per_file += np.bincount(index.astype(np.intp), minlength=249)
            seen.update(zip(index.tolist(), offset.tolist(), strict=True))
    assert len(seen) == world * 4000
    # 1,028 reads of each file are expected; six standard deviations are 192
    assert abs(per_file - world * 4000 / 249).max() < 200


@pytest.mark.slow
def test_reads_of_sparse_files_of_32_tb_come_from_their_places(tmp_path: Path) -> None:
    """Real stamps lie where the order looks first; everything else is a hole."""
    root = tmp_path / "sparse"
    root.mkdir()
    nbytes = 1 << 37
    sizes = [nbytes] * 233  # 32.02 TB
    catalog = catalog_of(sizes, tmp_path / "c")
    records = TokenRecords(catalog)
    units = Order(records.units, 6198).indices(0, 5, 7, 300)
    index, _, offset, _ = records.pick(units)
    assert int(offset.max()) > 2**36
    try:
        for number in range(233):
            with open(root / catalog.name(number), "wb") as file:
                file.truncate(nbytes)
                for place in offset[index == number].tolist():
                    block = bytearray(RECORD)
                    pattern_of(number).fill(block, place)
                    os.pwrite(file.fileno(), block, place)
    except OSError as error:
        if error.errno == errno.EFBIG:
            pytest.skip("this file system has no files of 128 GiB")
        raise
    handles = token_records.kept(str(root), catalog, Tokens("kept", 64), 16, pattern_of)
    try:
        # one record further there is a hole: the comparison is one
        for further, damaged in ((0, 0), (RECORD, 300)):
            slots = handles.read(index.astype(np.uint32), offset + np.uint64(further))
            done: Any = np.zeros(300, DONE_DTYPE)
            assert handles.reap(done, 300, 30) == 300
            assert (done["result"] == RECORD).all()
            where = zip(slots.tolist(), index.tolist(), (offset + np.uint64(further)).tolist(), strict=True)
            assert sum(handles.damaged(*one) for one in where) == damaged
            handles.give_back(done["tag"])
    finally:
        handles.close()


def test_files_without_a_record_and_too_many_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file holds a record of 4096 bytes"):
        TokenRecords(catalog_of([4095, 0], tmp_path / "c"))
    many: Objects = Synthetic("{index:08d}", token_records.MOST_FILES + 1, RECORD)
    with pytest.raises(UsageError, match="for large files"):
        TokenRecords(many)


# ---- kept handles ----


@pytest.mark.parametrize("most", [1, 5, 512])
@pytest.mark.parametrize("in_flight", [1, 64])
def test_epochs_over_kept_handles_read_every_record_once(data: Data, most: int, in_flight: int) -> None:
    handles = data.kept(most, in_flight)
    run = Run(handles, data.records, epochs=3, verify=True)
    seen: list[tuple[int, int]] = []
    read = handles.read

    def noting(files: Any, offsets: Any) -> Any:
        seen.extend(zip(files.tolist(), offsets.tolist(), strict=True))
        return read(files, offsets)

    handles.read = noting  # type: ignore[method-assign]
    figures = run.go()
    assert (figures.count, figures.nbytes, figures.failed) == (3 * 512, 3 * 512 * RECORD, 0)
    every = {(file, record * RECORD) for file in range(16) for record in range(32)}
    epochs = [seen[at : at + 512] for at in range(0, 3 * 512, 512)]
    assert all(set(epoch) == every for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [one.count for one in run.tally.epochs.values()] == [512] * 3
    assert (run.tally.verified_nbytes, run.tally.damaged_blocks) == (3 * 512 * RECORD, 0)
    assert handles.opens == 16 if most >= 16 else handles.opens > 16
    assert sum(handles.ways_taken.values()) == handles.opens
    assert handles.counters().received_bytes >= 3 * 512 * RECORD


def test_ranks_read_what_is_theirs_and_together_everything(data: Data) -> None:
    counts = [Run(data.kept(), data.records, rank=rank, size=5).go().count for rank in range(5)]
    assert counts == [103, 103, 102, 102, 102]


@pytest.mark.parametrize(
    ("limit", "count"), [({"ops": 700}, 700), ({"nbytes": 700 * RECORD - 1}, 700), ({"ops": 1}, 1)]
)
def test_limits_are_exact(data: Data, limit: dict[str, int], count: int) -> None:
    figures = Run(data.kept(), data.records, epochs=None, **limit).go()
    assert (figures.count, figures.nbytes) == (count, count * RECORD)


def test_a_duration_ends_it_and_progress_is_told(data: Data) -> None:
    run = Run(data.kept(), data.records, epochs=None, duration_s=0.7)
    figures = run.go()
    assert figures.count > 512
    assert run.ticks >= 2
    assert 0.7e9 <= time.monotonic_ns() - run.start_ns < 20e9
    assert figures.total.count == figures.count
    assert figures.from_intended.count == 0


def test_an_open_loop_begins_each_read_when_it_is_meant_to(data: Data) -> None:
    handles = data.kept()
    Run(handles, data.records).go()  # files are open, direct I/O is known
    run = Run(handles, data.records, epochs=None, rate=500, ops=150)
    begun: list[tuple[int, int]] = []
    read = handles.read

    def noting(files: Any, offsets: Any) -> Any:
        begun.append((time.monotonic_ns() - run.start_ns, len(files)))
        return read(files, offsets)

    handles.read = noting  # type: ignore[method-assign]
    figures = run.go()
    assert figures.count == 150
    assert figures.from_intended.count == 150
    done = 0
    for now_ns, count in begun:
        done += count
        assert now_ns >= (done - 1) * 2_000_000, "a read was begun before its time"
    assert figures.from_intended.min_ns >= figures.total.min_ns > 0


def test_damage_is_found_with_its_place(data: Data) -> None:
    with open(data.root / "part-00003.npy", "r+b") as file:
        file.seek(7 * RECORD + 1000)
        file.write(b"x")
    run = Run(data.kept(), data.records, verify=True)
    run.go()
    assert run.tally.damaged == [(3, 7 * RECORD, 1)]
    assert run.tally.damaged_blocks == 1


def test_a_file_that_has_shrunk_fails_reads_by_their_kind_and_the_others_go_on(data: Data) -> None:
    os.truncate(data.root / "part-00002.npy", 10 * RECORD)
    run = Run(data.kept(), data.records)
    figures = run.go()
    assert (figures.count, figures.failed, figures.errors) == (512 - 22, 22, {"short": 22})
    assert {failure.url for failure in run.tally.failures} == {str(data.root / "part-00002.npy")}
    assert all("ends before" in failure.message for failure in run.tally.failures)


def test_when_nothing_ends_well_any_more_the_run_ends(data: Data) -> None:
    for number in range(16):
        os.truncate(data.root / f"part-{number:05d}.npy", 0)
    run = Run(data.kept(), data.records, epochs=None)
    with pytest.raises(OSError, match="failed one after the other") as caught:
        run.go()
    assert caught.value.errno == errno.EIO
    assert run.figures().failed >= 1000


def test_a_file_that_is_gone_ends_the_run_with_its_name(data: Data) -> None:
    os.unlink(data.root / "part-00009.npy")
    run = Run(data.kept(), data.records)
    with pytest.raises(FileNotFoundError) as caught:
        run.go()
    assert caught.value.filename == str(data.root / "part-00009.npy")
    assert run.handles.outstanding == 0


def test_an_interrupted_run_counts_what_was_done(data: Data) -> None:
    run = Run(data.kept(), data.records, epochs=None)

    def interrupt() -> None:
        raise KeyboardInterrupt

    run.tick = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.go()
    assert run.figures().count > 512
    assert run.handles.outstanding == 0


def test_more_reads_wait_in_the_engine_where_they_take_neither_memory_nor_handles(data: Data) -> None:
    for most, pattern, ahead in ((512, None, AHEAD), (512, pattern_of, AHEAD_IN_MEMORY), (4, None, AHEAD_IN_MEMORY)):
        handles = token_records.kept(str(data.root), data.catalog, Tokens("kept", most), 8, pattern)
        try:
            run = Run(handles, data.records, epochs=20)
            largest = 0
            read = handles.read

            def noting(files: Any, offsets: Any, read: Any = read, handles: Handles = handles) -> Any:
                nonlocal largest
                slots = read(files, offsets)
                largest = max(largest, handles.outstanding)
                assert len(set(slots.tolist())) == len(files)
                return slots

            handles.read = noting  # type: ignore[method-assign]
            figures = run.go()
            assert (figures.count, figures.failed) == (20 * 512, 0)
            assert figures.total.min_ns > 0
            assert largest == 8 + ahead == handles.capacity
        finally:
            handles.close()


def test_ends_of_reads_are_those_that_the_worker_saw(data: Data) -> None:
    handles = data.kept()
    Run(handles, data.records).go()  # files are open, direct I/O is known
    before_nbytes, before_ns = handles.counters().received_bytes, time.monotonic_ns()
    slots = handles.read(np.zeros(4, np.uint32), np.arange(4, dtype=np.uint64) * np.uint64(RECORD))
    done: Any = np.zeros(4, DONE_DTYPE)
    while handles.counters().received_bytes < before_nbytes + 4 * RECORD:
        time.sleep(0.001)
    after_ns = time.monotonic_ns()
    time.sleep(0.05)
    assert handles.reap(done, 4, 30) == 4
    assert (before_ns < done["end_ns"] - done["latency_ns"]).all()
    assert (done["end_ns"] < after_ns).all()
    handles.give_back(slots)


def test_without_a_pattern_nothing_can_be_compared(data: Data) -> None:
    handles = token_records.kept(str(data.root), data.catalog, Tokens("kept", 4), 4)
    with pytest.raises(ValueError, match="no pattern"):
        handles.damaged(0, 0, 0)
    handles.close()


def test_open_files_are_bounded_by_what_the_limit_of_the_process_leaves() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        limit = 250 + len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        assert most_files_open(100, under_way=20) == 100
        assert 1 < most_files_open(1000, under_way=100) < 250 - 64 - 99
        assert most_files_open(1000, under_way=1000) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
