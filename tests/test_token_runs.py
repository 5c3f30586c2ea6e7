"""Token reads as a part of a run: what was fetched, and what the report says."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from token_support import RECORD, RUN, Data, Run, catalog_of, data, pattern_of

from mlstor import signals
from mlstor.errors import UsageError
from mlstor.mounts import mount_of
from mlstor.results.phase import RankFigures
from mlstor.results.stream import StreamReport
from mlstor.stream import fetched as fetched_module, token_records, token_run
from mlstor.stream.fetched import Fetched
from mlstor.stream.token_loop import TokenTally
from mlstor.stream.token_records import TokenRecords
from mlstor.stream.tokens import Tokens

__all__ = ["data"]


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
