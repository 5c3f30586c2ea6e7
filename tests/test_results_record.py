"""The record: its schema is current, records obey it and hold integers only, and its size is bounded."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from record_factory import phase, progress, record, report

from mlstor.errors import UsageError
from mlstor.results import record as r
from mlstor.results.merge import merge_phase
from mlstor.results.merge_parts import MAX_SERIES_CELLS, MIN_INTERVALS
from mlstor.results.percentiles import NBUCKETS
from mlstor.results.phase import Damage, Histogram, RankFigures, Verification

SCHEMA_FILE = Path(r.__file__).with_name("schema.json")


def partial_record() -> r.Record:
    made = record(
        status="failed",
        error=r.RunError(rank=3, host="node0001", file="/mnt/x", offset=4096, message="No space left on device"),
        recovered=r.Recovered(journals=3, torn_lines=1, missing_processes=1),
    )
    damaged = Verification(
        verified_nbytes=9,
        damaged_blocks=1,
        damage=[Damage(rank=0, file="f", offset=0, nbytes=1, kind="other-run", found_run="ab", found_offset=2)],
    )
    made.phases = [
        merge_phase([report(0)], progress=[progress(1)], processes=4),
        merge_phase(
            [
                report(0, op="read", verification=damaged, barrier_unix_ns=10**18),
                report(1, op="read", barrier_unix_ns=10**18 - 7),  # a skew below zero
            ]
        ),
    ]
    return made


def floats_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [found for one in value.values() for found in floats_in(one)]
    if isinstance(value, list):
        return [found for one in value for found in floats_in(one)]
    return [value] if isinstance(value, float) else []


def test_the_committed_schema_is_the_current_one() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "mlstor.results.record"], check=True, capture_output=True, text=True
    ).stdout
    assert printed == SCHEMA_FILE.read_text(), "run: python -m mlstor.results.record > src/mlstor/results/schema.json"


@pytest.mark.parametrize(
    "made", [record(), partial_record(), record(processes=1, reads=0)], ids=["whole", "partial", "one"]
)
def test_records_obey_the_schema_and_come_back_unchanged(made: r.Record, tmp_path: Path) -> None:
    path = r.save(made, tmp_path / "run")
    stored = json.loads(path.read_bytes())
    jsonschema.Draft202012Validator.check_schema(r.schema())
    jsonschema.Draft202012Validator(r.schema()).validate(stored)
    assert stored["schema"] == "mlstor-record/1"
    assert floats_in(stored) == []
    assert r.load(path) == made == r.load(path.parent)


@pytest.mark.parametrize(
    ("change", "at"),
    [
        (lambda stored: stored["phases"][0]["ranks"]["end_ns"].__setitem__(0, 1.5), "end_ns"),
        (lambda stored: stored["phases"][0].__setitem__("nbytes", -1), "nbytes"),
        (lambda stored: stored.__setitem__("status", "fine"), "status"),
        (lambda stored: stored.__setitem__("schema", "mlstor-record/2"), "schema"),
        (lambda stored: stored.__delitem__("hosts"), "hosts"),
    ],
)
def test_what_breaks_the_schema_is_refused_by_both_readers(change: Any, at: str, tmp_path: Path) -> None:
    stored = json.loads(msgspec.json.encode(record()))
    change(stored)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(r.schema()).validate(stored)
    file = tmp_path / "record.json"
    file.write_text(json.dumps(stored))
    with pytest.raises(UsageError, match="not a record that this version reads"):
        r.load(file)


def test_a_missing_or_foreign_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory; name a run's directory"):
        r.load(tmp_path)
    (tmp_path / "record.json").write_text("not json")
    with pytest.raises(UsageError, match="mlstor-record/1"):
        r.load(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_leaves_the_former_record_and_no_leftover(tmp_path: Path) -> None:
    small, large = record(processes=1), record(processes=64)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True)
    try:
        path = r.save(small, tmp_path)
        with pytest.raises(OSError) as caught:
            r.save(large, tmp_path)
        assert caught.value.errno == errno.ENOSPC
        assert r.load(path) == small
        assert [one.name for one in tmp_path.iterdir()] == ["record.json"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (4, 4),
        (True, True),
        (None, None),
        ("a", "a"),
        (0.5, "0.5"),
        (Fraction(1, 16), "1/16"),
        (Path("/x"), "/x"),
    ],
)
def test_settings_keep_plain_values_and_the_text_of_others(value: object, kept: object) -> None:
    assert r.setting(value, "default") == r.Setting(value=kept, source="default")  # type: ignore[arg-type]


def test_the_record_of_16384_ranks_stays_below_the_documented_bound() -> None:
    """The bound in docs/record.md: bytes per rank and process, per cell of the series, per bucket in use."""
    ranks, per_host, operations = 16_384, 8, 5
    hosts = ranks // per_host
    day_ns, shard = 86_400 * 10**9, 20 * 10**9
    full = Histogram(
        count=NBUCKETS * 10**6, sum_ns=10**18, max_ns=day_ns, buckets=[(i, 10**6) for i in range(NBUCKETS)]
    )
    reports = [
        report(
            process,
            per_host=per_host,
            barrier_unix_ns=1_790_000_000_000_000_000 + process,
            ranks=0,
            cpu_user_ns=day_ns,
            cpu_system_ns=day_ns,
            peak_rss_bytes=10**12,
            worker_busy_ns=8 * day_ns,
            worker_wait_ns=8 * day_ns,
            workers=128,
            cores_allowed=256,
            series=[shard] * 100,
        )
        for process in range(ranks)
    ]
    for one in reports:
        one.ranks = [RankFigures(one.process, day_ns, day_ns, day_ns, 10**14, 1000)]
        one.histograms = {}
    reports[0].histograms = {f"operation{i}": full for i in range(operations)}
    largest = merge_phase(reports)
    nbytes = len(msgspec.json.encode(largest))
    cells = max(MAX_SERIES_CELLS, MIN_INTERVALS * hosts)
    assert nbytes <= 193 * ranks + 14 * cells + 20 * NBUCKETS * operations + 100_000
    description = record(processes=2, writes=0, reads=0)
    whole = record(processes=1, writes=0, reads=0, hosts=description.hosts * hosts)
    assert len(msgspec.json.encode(whole)) <= 2048 * hosts + 100_000


def test_a_small_record_is_small() -> None:
    made = record(processes=2, writes=10, reads=10)
    assert len(msgspec.json.encode(made)) < 20 * len(msgspec.json.encode(phase(2))) + 20_000
