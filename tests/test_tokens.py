"""Token reads: positions in 32 TB of records, over kept handles and opens per read, paced and free."""

from __future__ import annotations

import argparse
import errno
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlstor import Pattern, signals
from mlstor.errors import UsageError
from mlstor.mounts import mount_of
from mlstor.operations import DONE_DTYPE
from mlstor.results.phase import RankFigures
from mlstor.results.stream import OpFigures, StreamReport
from mlstor.storage.store import Page
from mlstor.stream import fetched as fetched_module, token_records, token_run, tokens
from mlstor.stream.catalog import Catalog, Objects
from mlstor.stream.compose import Limits, Pace
from mlstor.stream.fetched import Fetched
from mlstor.stream.handles import AHEAD, AHEAD_IN_MEMORY, Handles, most_files_open
from mlstor.stream.order import Order, Share
from mlstor.stream.reads import Reads
from mlstor.stream.synthetic import Synthetic
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
    run = Run(handles, data.records, epochs=None, rate=500, duration_s=0.3)
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


# ---- options ----


def options(*words: str, **fields: Any) -> Any:
    parser = argparse.ArgumentParser()
    tokens.add_options(parser)
    others = {
        "profile": None,
        "seed": None,
        "rate": None,
        "workers": None,
        "in_flight": None,
        "put": None,
        "head": None,
        "delete": None,
        "read_nbytes": None,
        "read_offset": 0,
        "range": None,
    }
    return SimpleNamespace(**{**others, **fields, **vars(parser.parse_args(words))})


def test_options_become_those_of_records() -> None:
    given = options("--pattern", "tokens", "--record", "8KiB", "--handles", "open", "--max-handles", "9")
    assert tokens.apply(given) == Tokens("open", 9, 8192)
    assert (given.read_nbytes, given.range) == (8192, "records")
    assert tokens.apply(options("--pattern", "tokens")) == Tokens("kept", 512, 4096)
    assert tokens.apply(options()) is None


def test_the_olmo_profile_paces_each_node_and_knows_what_p99_may_be() -> None:
    given = options(profile="olmo-1b")
    assert tokens.apply(given) == Tokens("open", 512, 4096)
    assert (given.in_flight, given.workers, given.seed) == (None, 1, 6198)
    assert [tokens.threads_of(given, rank, 8) for rank in (0, 7)] == [4, 4]
    assert [tokens.threads_of(given, rank, 5) for rank in range(5)] == [7, 7, 6, 6, 6]
    assert (tokens.threads_of(given, 0, 1), tokens.threads_of(given, 63, 64)) == (32, 1)
    assert tokens.threads_of(options(), 0, 1) is None
    assert tokens.rate_of_all(given, hosts=3) == 30_000
    of_zero = options(profile="olmo-1b", seed=0)
    tokens.apply(of_zero)
    assert of_zero.seed == 0
    assert tokens.p99_goal_ns(8 * 4 * 3, 30_000) == 3_200_000
    faster = options("--rate-per-node", "20000", "--handles", "kept", profile="olmo-1b", in_flight=16)
    assert tokens.apply(faster) == Tokens("kept", 512, 4096)
    assert (faster.in_flight, tokens.rate_of_all(faster, hosts=1)) == (16, 20_000)


@pytest.mark.parametrize(
    ("words", "fields", "said"),
    [
        (["--handles", "kept"], {}, "--handles is an option of --pattern tokens"),
        (["--record", "4096"], {}, "--record is an option"),
        (["--pattern", "tokens"], {"put": 100.0}, "only reads"),
        (["--pattern", "tokens"], {"read_nbytes": 1}, "whole records"),
        (["--pattern", "tokens"], {"range": "random"}, "whole records"),
        (["--pattern", "tokens", "--record", "0"], {}, "--record 0"),
        (["--pattern", "tokens", "--max-handles", "0"], {}, "--max-handles 0"),
    ],
)
def test_what_token_reads_exclude_is_refused(words: list[str], fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tokens.apply(options(*words, **fields))


def test_two_rates_exclude_one_another() -> None:
    given = options("--pattern", "tokens", "--rate-per-node", "5", rate=3.0)
    with pytest.raises(UsageError, match="give one of them"):
        tokens.rate_of_all(given, 1)
    assert tokens.rate_of_all(options(rate=3.0), 1) == 3.0
    assert tokens.rate_of_all(options(), 1) is None
    with pytest.raises(UsageError, match="nothing to do"):
        tokens.rate_of_all(options("--rate-per-node", "0"), 1)


# ---- what was fetched ----


def test_fetched_bytes_are_those_of_direct_reads(shared_fs: Callable[[str], Path]) -> None:
    directory = shared_fs("ext4")
    root = directory / "data"
    root.mkdir()
    block = bytearray(RECORD * 64)
    pattern_of(0).fill(block)
    (root / "part-00000.npy").write_bytes(block)
    catalog = catalog_of([len(block)], directory / "c")
    handles = token_records.kept(str(root), catalog, Tokens("kept", 1), 4)
    try:
        records = TokenRecords(catalog)
        Run(handles, records, ops=1).go()
        counted = Fetched(str(root), of_host=True)
        assert Run(handles, records).go().nbytes == 64 * RECORD
        assert counted.source == "read_bytes of /proc/self/io"
        assert counted.nbytes() == 64 * RECORD
    finally:
        handles.close()


def test_where_nothing_tells_fetched_bytes_are_unknown(shared_fs: Callable[[str], Path]) -> None:
    counted = Fetched(str(shared_fs("tmpfs")), of_host=True)
    assert (counted.source, counted.nbytes()) == ("", None)


_MOUNTSTATS = """device rootfs mounted on / with fstype rootfs
device server:/export mounted on /data with fstype nfs4 statvers=1.1
	opts:	rw,vers=4.2
	bytes:	10 0 20 0 {read} 0 7 0
device server:/other mounted on /elsewhere with fstype nfs4 statvers=1.1
	bytes:	1 2 3 4 99999 6 7 8
"""


def test_on_nfs_the_mount_tells_what_its_server_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = mount_of("/")
    assert here is not None
    import dataclasses

    nfs = dataclasses.replace(here, fs_type="nfs4", mount_point="/data")
    monkeypatch.setattr(fetched_module, "mount_of", lambda path: nfs)
    stats = tmp_path / "proc/self/mountstats"
    stats.parent.mkdir(parents=True)
    stats.write_text(_MOUNTSTATS.format(read=1000))
    leader, other = (Fetched("/data/x", of_host, str(tmp_path)) for of_host in (True, False))
    stats.write_text(_MOUNTSTATS.format(read=9192))
    assert (leader.nbytes(), other.nbytes()) == (8192, 0)
    stats.write_text("device server:/gone mounted on /gone with fstype nfs4\n")
    assert leader.nbytes() is None


# ---- as a part of a run ----


def session_of(data: Data, **fields: Any) -> Any:
    given = {"tokens": Tokens("kept", 512), "verify": None, **fields.pop("options", {})}
    others = {
        "objects": data.catalog,
        "read_of": None,
        "group": SimpleNamespace(scheme="file", url=str(data.root)),
        "world": SimpleNamespace(local_rank=0, size=4),
        "workers": 1,
        "in_flight": 8,
        "rate": None,
    }
    return SimpleNamespace(**{**others, **fields, "options": SimpleNamespace(**given)})


def test_a_run_keeps_handles_if_it_is_asked_to_and_can(data: Data) -> None:
    assert token_run.kept_of(session_of(data, options={"tokens": None})) is None
    assert token_run.kept_of(session_of(data, options={"tokens": Tokens("open", 512)})) is None
    with pytest.raises(UsageError, match="no handles to keep"):
        token_run.kept_of(session_of(data, group=SimpleNamespace(scheme="s3", url="s3://bucket")))
    written = SimpleNamespace(run_key=RUN, compressibility=0)
    handles = token_run.kept_of(session_of(data, options={"verify": "pattern"}, read_of=written))
    assert handles is not None
    try:
        assert handles.capacity == 8 + 512
        assert Run(handles, data.records, verify=True).go().count == 512
    finally:
        handles.close()


def test_the_report_says_what_was_opened_and_how(data: Data) -> None:
    session = session_of(data)
    handles = data.kept()
    report = StreamReport(
        number=0,
        name="stream",
        process=0,
        host=0,
        barrier_unix_ns=0,
        ranks=[RankFigures(0, 0, 0, 0, 512 * RECORD, 512)],
    )
    opened = token_run.Opened(session, handles)
    Run(handles, data.records).go()
    opened.write(report)
    assert report.opens == 16
    assert sum(path.nfiles for path in report.paths) == 16
    assert {path.backend for path in report.paths} == {handles.backend}
    expected = "no" if {path.direct for path in report.paths} == {"yes"} else "unknown"
    assert report.cached.verdict == ("yes" if report.paths[0].fs_type == "tmpfs" else expected)
    again = token_run.Opened(session, handles)
    Run(handles, data.records).go()
    again.write(report)
    assert report.opens == 0


def test_what_p99_is_to_keep_follows_from_threads_and_rate(data: Data) -> None:
    assert token_run.p99_goal_ns(session_of(data, rate=10_000.0)) == 3_200_000
    assert token_run.p99_goal_ns(session_of(data)) is None
    assert token_run.p99_goal_ns(session_of(data, rate=10.0, options={"tokens": None})) is None


def test_a_signal_amidst_the_counting_waits_until_that_is_done(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(data.kept(), data.records, epochs=None)
    span = TokenTally._span

    def interrupted(self: TokenTally, *ends: Any) -> None:  # what has been added so far is not all
        signal.raise_signal(signal.SIGINT)
        span(self, *ends)

    monkeypatch.setattr(TokenTally, "_span", interrupted)
    monkeypatch.setattr(signals.Interrupts, "_handle", _once(signals.Interrupts._handle))
    with signals.Interrupts(), pytest.raises(KeyboardInterrupt):
        run.go()
    assert run.tally.count == run.figures().count > 0


def _once(handle: Callable[..., None]) -> Callable[..., None]:
    """The first signal alone is handled."""

    def handled(self: signals.Interrupts, *signal: Any) -> None:
        if self.received is None:
            handle(self, *signal)

    return handled


def test_reads_of_an_open_loop_that_found_no_room_are_told(data: Data) -> None:
    run = Run(data.kept(in_flight=1), data.records, epochs=None, rate=20_000_000, duration_s=0.2)
    figures = run.go()
    assert figures.count + figures.cancelled == pytest.approx(4_000_000, abs=20)
