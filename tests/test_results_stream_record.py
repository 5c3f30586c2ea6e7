"""The record of a stream: it obeys the schema, holds integers only, its size is bounded, and journals make one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from record_factory import host
from stream_factory import COUNT, NBYTES, copy_workload, op, phase, progress, record, report, rich_op, times
from test_results_record import floats_in

from mlstor.errors import UsageError
from mlstor.results import journal as j, record as r, stream as s
from mlstor.results.merge_parts import MAX_SERIES_CELLS, MIN_INTERVALS
from mlstor.results.percentiles import NBUCKETS
from mlstor.results.phase import Histogram, RankFigures
from mlstor.results.stream_merge import merge_stream

RECORDS = {
    "whole": record(),
    "rich": record(phases=[phase(2, ops={"get": rich_op(), "put": op(times())}, fetched_bytes=1)]),
    "copy": record(workload=copy_workload()),
    "partial": record(status="partial", phases=[merge_stream([], progress=[progress(0)], processes=2)]),
}


@pytest.mark.parametrize("made", RECORDS.values(), ids=RECORDS.keys())
def test_records_obey_the_schema_and_come_back_unchanged(made: r.StreamRecord, tmp_path: Path) -> None:
    path = r.save(made, tmp_path / "run")
    stored = json.loads(path.read_bytes())
    jsonschema.Draft202012Validator(r.schema()).validate(stored)
    assert stored["schema"] == "mlstor-stream-record/1"
    assert floats_in(stored) == []
    assert r.load_any(path) == made


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored["phases"][0]["ops"]["get"]["total"].__setitem__("sum_ns", 1.5),
        lambda stored: stored["phases"][0].__setitem__("name", "nap"),
        lambda stored: stored["workload"].__setitem__("kind", "checkpoint"),
        lambda stored: stored["phases"][0]["epochs"][0].__setitem__("temperature", "tepid"),
        lambda stored: stored.__setitem__("schema", "mlstor-stream-record/2"),
        lambda stored: stored.__delitem__("stores"),
    ],
)
def test_what_breaks_the_schema_is_refused_by_both_readers(change: Any, tmp_path: Path) -> None:
    stored = json.loads(msgspec.json.encode(record()))
    change(stored)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(r.schema()).validate(stored)
    (tmp_path / "record.json").write_text(json.dumps(stored))
    with pytest.raises(UsageError, match="not a record that this version reads"):
        r.load_any(tmp_path)


def test_the_record_of_16384_ranks_stays_below_the_documented_bound() -> None:
    """The bound in docs/record.md, with two operations on a cluster of more targets than are kept."""
    ranks, per_host, day_ns = 16_384, 8, 86_400 * 10**9
    hosts = ranks // per_host
    full = Histogram(
        count=NBUCKETS * 10**6, sum_ns=10**18, max_ns=day_ns, buckets=[(i, 10**6) for i in range(NBUCKETS)]
    )
    part: dict[str, Any] = {"count": 10**12, "nbytes": 10**15, "total": full}
    largest_op = s.OpFigures(
        **part,
        errors={f"HTTP {i}": 10**9 for i in range(100, 600)},
        retried_by={f"HTTP {i}": 10**9 for i in range(100, 600)},
        ttfb=full,
        redirect=full,
        from_intended=full,
        retried=full,
        cold=s.Slice(**part),
        warm=s.Slice(**part),
        sizes=[s.SizeClass(from_bytes=lowest, **part) for lowest in s.SIZE_CLASSES_FROM],
        targets=[s.TargetSlice(name=f"t[{i:08d}]", failed=10**9, **part) for i in range(s.MAX_TARGETS + 50)],
    )
    names = ("get", "put")
    reports = []
    for process in range(ranks):
        one = report(process, per_host=per_host, ops={}, epochs=[], series=[20 * 10**9] * 100)
        one.ranks = [RankFigures(process, day_ns, day_ns, day_ns, 10**14, 10**6)]
        one.cpu_user_ns = one.cpu_system_ns = day_ns
        one.worker_busy_ns = one.worker_wait_ns = 8 * day_ns
        one.failures = [
            s.failed_transfer(rank=process, op="get", url="\u20ac" * 999, fault="x", message="\u20ac" * 999)
        ]
        reports.append(one)
    reports[0].ops = dict.fromkeys(names, largest_op)
    reports[0].epochs = [
        s.Epoch(epoch=i, temperature="unknown", start_ns=day_ns, end_ns=day_ns, count=10**12, nbytes=10**15)
        for i in range(s.MAX_EPOCHS)
    ]
    merged = merge_stream(reports)
    nbytes = len(msgspec.json.encode(merged))
    cells = max(MAX_SERIES_CELLS, MIN_INTERVALS * hosts)
    histograms = len(names) * (7 + len(s.SIZE_CLASSES_FROM) + s.MAX_TARGETS)
    assert nbytes <= 193 * ranks + 14 * cells + 20 * NBUCKETS * histograms + 500_000
    assert nbytes < 16 * 10**6
    whole = record(hosts=[host(0)] * hosts, phases=[])
    assert len(msgspec.json.encode(whole)) <= 2048 * hosts + 100_000


def begin(run_dir: Path) -> j.Journal:
    return j.Journal(run_dir, 0, record(1, phases=[]), [8])


def test_a_stream_that_was_killed_keeps_its_figures_up_to_the_last_snapshot(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as journal:
        journal.finished(report(0, name="fill"))
        journal.progress(progress(0, number=1, nbytes=5), now=True)
        journal.snapshot(report(0, number=1, complete=False, ops={"get": op([5])}), 10**10)
        journal.snapshot(report(0, number=1, complete=False), 2 * 10**10)
        journal.progress(progress(0, number=1, elapsed_ns=3 * 10**10), now=True)
    made = j.recover(tmp_path / "run")
    assert isinstance(made, r.StreamRecord)
    assert [(one.name, one.complete) for one in made.phases] == [("fill", True), ("stream", False)]
    last = made.phases[1]
    assert last.ops["get"].count == COUNT
    assert (last.nbytes, last.unfinished.elapsed_ns) == (10**9, [3 * 10**10])
    assert r.load_any(j.seal(tmp_path / "run", made)) == made


def test_a_report_of_a_phase_that_was_ended_early_is_the_last_word(tmp_path: Path) -> None:
    with begin(tmp_path) as journal:
        journal.progress(progress(0), now=True)
        journal.finished(report(0, complete=False))
    (only,) = j.recover(tmp_path).phases
    assert not only.complete
    assert only.nbytes == COUNT * NBYTES
    assert only.unfinished.elapsed_ns == [2 * 10**9]


def test_snapshots_are_due_ever_less_often_and_anew_in_each_phase(tmp_path: Path) -> None:
    due: dict[int, list[int]] = {0: [], 1: []}
    with begin(tmp_path) as journal:
        for number, taken in due.items():
            for second in range(7201):
                if journal.snapshot_due(number, second * 10**9):
                    journal.snapshot(report(0, number=number, complete=False), second * 10**9)
                    taken.append(second)
    assert due[0] == due[1]
    assert due[0][:3] == [5, 7, 9]
    assert len(due[0]) < 40
    assert all(later <= 1.25 * before + 1 for before, later in zip(due[0], due[0][1:], strict=False))
