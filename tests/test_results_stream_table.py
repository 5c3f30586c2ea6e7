"""What the printed record of a stream, or of a copy, says, at 100 columns and away from a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import record_factory
from rich.console import Console
from stream_factory import COUNT, NBYTES, copy_workload, op, phase, progress, record, report, rich_op, times, workload

from mlstor.errors import UsageError
from mlstor.results import record as r, stream as s, table
from mlstor.results.phase import Damage, Verification
from mlstor.results.stream_merge import merge_stream
from mlstor.results.stream_table import class_text
from mlstor.results.stream_verdicts import server_cache
from mlstor.results.stream_workload import StoreUsed


def printed(made: r.StreamRecord) -> str:
    out = io.StringIO()
    table.print_record(made, Console(file=out, width=100))
    return out.getvalue()


def words(text: str) -> str:
    """The text with its line wrapping undone."""
    return " ".join(text.split())


def row(text: str, label: str, after: str = "") -> list[str]:
    """The cells of the first line that begins with `label` behind the title that begins with `after`."""
    lines = text.splitlines()
    start = next(i for i, one in enumerate(lines) if one.startswith(after))
    return next(one for one in lines[start:] if one.strip().startswith(label)).split()


def test_a_line_per_operation_has_counts_rates_and_faults() -> None:
    made = record(phases=[phase(2, ops={"get": rich_op(), "head": op(times(), 0)})])
    text = printed(made)
    # 200 GETs of 1,527,680 bytes per process in 2 s
    assert row(text, "get", "Throughput") == ["get", "200", "100", "0.00153", "0.00142", "6", "10", "8"]
    assert row(text, "head", "Throughput") == ["head", "200", "100", "0", "0", "0", "0", "8"]
    assert row(text, "all", "Throughput") == ["all", "400", "200", "0.00153", "0.00142", "6", "10", "16"]
    assert "stream: 3.06 MB (2.91 MiB) in 2 s: 0.00153 GB/s (0.00142 GiB/s); 400 operations, 200/s" in text


def test_times_have_the_tail_and_the_parts_that_would_hide_in_it() -> None:
    text = printed(record(phases=[phase(1, ops={"get": rich_op()})]))
    whole = row(text, "get", "Times")
    # Of 1.00, 1.01, ... 1.99 ms; a percentile is at most 1/64 above the value of its rank.
    assert whole[:2] == ["get", "100"]
    assert " ".join(whole[2:]) == "1.5 ms 1.49 ms 1.9 ms 1.98 ms 1.99 ms 1.99 ms 1.99 ms 745 us 991 us"
    assert row(text, "retried", "Times")[:2] == ["retried", "4"]
    assert row(text, "redirect", "Times")[-4:] == ["200", "us", "-", "-"]
    assert row(text, "intended", "Times")[:2] == ["intended", "100"]
    assert row(text, "cold", "Times")[:2] == ["cold", "40"]
    assert row(text, "warm", "Times")[:2] == ["warm", "60"]


def test_epochs_size_classes_and_targets_have_tables_where_there_is_more_than_one() -> None:
    epochs = [
        s.Epoch(epoch=0, temperature="cold", start_ns=0, end_ns=10**9, count=50, nbytes=10**9),
        s.Epoch(epoch=1, temperature="warm", start_ns=10**9, end_ns=15 * 10**8, count=50, nbytes=10**9, failed=2),
    ]
    text = printed(record(phases=[phase(1, ops={"get": rich_op()}, epochs=epochs)]))
    assert row(text, "0", "Epochs") == ["0", "cold", "50", "1.00", "50.0", "1.00", "1.00", "0"]
    assert row(text, "1", "Epochs") == ["1", "warm", "50", "0.500", "100", "1.00", "2.00", "2"]
    assert row(text, "4 KiB", "Sizes of get")[:6] == ["4", "KiB", "-", "16", "KiB", "40"]
    assert row(text, "16 KiB", "Sizes of get")[:6] == ["16", "KiB", "-", "64", "KiB", "60"]
    # The slower one first.
    assert [one.split()[0] for one in text.splitlines() if one.startswith("t[")] == ["t[two]", "t[one]"]
    plain = printed(record())
    assert "Sizes of" not in plain
    assert "Targets of" not in plain


@pytest.mark.parametrize(
    ("lowest", "text"),
    [
        (0, "< 4 KiB"),
        (4096, "4 KiB - 16 KiB"),
        (2**20, "1 MiB - 4 MiB"),
        (2**38, "256 GiB - 1 TiB"),
        (2**40, ">= 1 TiB"),
    ],
)
def test_size_classes_are_named_by_their_bounds(lowest: int, text: str) -> None:
    assert class_text(lowest) == text


def test_nothing_is_wider_than_100_columns_or_cut_off() -> None:
    big = rich_op()
    big.total.buckets = [(bucket, count * 1_234_567) for bucket, count in big.total.buckets]
    big.count = big.total.count = 100 * 1_234_567
    big.failed = big.retries = big.connections = 1_234_567
    big.nbytes = 10**15
    big.targets = [s.TargetSlice(name=f"target-with-a-long-name-{i:05d}", **vars_of(big.warm)) for i in range(40)]
    many = [
        s.Epoch(epoch=i, temperature="warm", start_ns=0, end_ns=10**13, count=10**8, nbytes=10**15) for i in range(99)
    ]
    ops = dict.fromkeys(s.OPS, big)
    text = printed(record(phases=[phase(2, ops=ops, epochs=many), phase(1, name="fill", ops=ops)]))
    wide = [one for one in text.splitlines() if len(one) > 100 and not one.startswith(("stream:", "fill:"))]
    assert wide == []
    assert "…" not in text
    assert "and 83 epochs more in the record" in text
    assert text.count("and 24 targets more in the record") == 2 * len(s.OPS)


def vars_of(part: s.Slice) -> dict[str, Any]:
    return {"count": part.count, "nbytes": part.nbytes, "total": part.total}


def test_the_skew_of_the_ranks_is_seen() -> None:
    several = merge_stream([report(i, end_ns=(2 + i) * 10**9) for i in range(3)])
    assert "ranks' ends  2 s to 4 s, median 3 s; rank 2 was the last" in printed(record(phases=[several]))
    assert "ranks' ends" not in printed(record(1))


def test_failures_and_retries_are_told_by_kind_and_the_first_ones_by_name() -> None:
    failures = [
        s.failed_transfer(
            rank=1, op="get", url=f"s3://bucket/[red]{i}", fault="HTTP 404", attempts=1 + i, message="NoSuchKey"
        )
        for i in range(10)
    ]
    text = words(printed(record(phases=[phase(1, ops={"get": rich_op()}, failures=failures, failures_dropped=3)])))
    assert "failed 3 of 103 get: HTTP 404 2, reset 1" in text
    assert "retried 4 get were tried again (HTTP 503 4), 5 further attempts; they took p50 1.98 ms" in text
    assert "cancelled 1 get at the end of the run" in text
    assert "rank 1, get s3://bucket/[red]0: HTTP 404 after 1 attempt: NoSuchKey" in text
    assert "[red]1: HTTP 404 after 2 attempts" in text
    assert "and 5 failures more" in text
    assert "failed" not in printed(record())


def test_the_clients_cost_is_told_per_gb_and_per_operation() -> None:
    text = words(printed(record(phases=[phase(1)])))
    # 50 ms of CPU for 100 GETs of 64 KiB
    assert "client 7.629 s of CPU per GB; 500 us of CPU per operation; 4 connections made; peak RSS 100 MiB" in text
    assert "not the limit: workers of process 0 busy 25 % of their time" in text


def test_a_client_or_network_that_was_the_limit_is_said_in_words_with_the_rule() -> None:
    full = {"nic_received_bytes": 2_400_000_000, "nic_sent_bytes": 1, "nic_line_bits_per_s": 10**10}
    limited = phase(1, worker_busy_ns=99, worker_wait_ns=1, **full)
    text = words(printed(record(phases=[limited])))
    assert "client-bound the client, not the storage, was the limit: workers of process 0 busy 99 %" in text
    assert words(limited.client.rule) in text
    assert "the client's network, not the storage, was the limit: host 0 received 96 % of its line rate" in text
    assert words(limited.network.rule) in text
    assert "client-bound" not in printed(record())


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (30 * 10**9, "server cache exceeded: 100.00 GB (93.13 GiB) of distinct objects read, servers' memory 30.00 GB"),
        (40 * 10**9, "server cache possible: 100.00 GB"),
        (
            None,
            "server cache unknown: 100.00 GB (93.13 GiB) of distinct objects read, the servers' memory is not known",
        ),
    ],
)
def test_whether_the_servers_memory_may_have_answered_is_said(memory: int | None, expected: str) -> None:
    cache = server_cache(100 * 10**9, memory, "--server-memory")
    text = words(printed(record(phases=[phase(1, server_cache=cache)])))
    assert expected in text
    assert (words(cache.rule) in text) == (cache.verdict != "exceeded")


def test_token_reads_tell_opens_and_what_was_really_fetched_apart() -> None:
    tokens = workload(pattern="tokens", keep_handles=False, ranges="4096-byte records", catalog_count=0)
    one = phase(1, ops={"get-range": op(times(), 4096)}, opens=100, fetched_bytes=8 * 100 * 4096)
    text = words(printed(record(workload=tokens, phases=[one])))
    assert "token reads, a file opened per read, 4096-byte records" in text
    assert "100 files opened, 50.0/s; 3.28 MB (3.12 MiB) really fetched, 8.00 x what was asked for" in text
    silent = phase(1, ops={"get-range": op(times(), 4096)}, opens=100)
    assert "bytes really fetched: unknown" in words(printed(record(phases=[silent])))


@pytest.mark.parametrize(
    ("goal_ns", "over", "word"),
    [
        (2_100_000, {}, "goal holds: p99"),
        (1_000_000, {}, "goal DOES NOT HOLD: p99"),
        (2_100_000, {"failed": 1}, "goal DOES NOT HOLD: p99"),
        (2_100_000, {"from_intended": None}, "goal unknown"),
    ],
)
def test_a_pace_that_was_to_be_kept_is_judged_from_the_intended_start(
    goal_ns: int, over: dict[str, Any], word: str
) -> None:
    paced = rich_op()
    paced.failed = 0
    for name, value in over.items():
        setattr(paced, name, value if value is not None else type(paced.from_intended)())
    made = record(
        workload=workload(rate_milliops_per_s=50_000, p99_goal_ns=goal_ns), phases=[phase(1, ops={"get": paced})]
    )
    text = words(printed(made))
    assert word in text
    assert "open loop at 50.0 operations/s" in text


def test_what_was_asked_for_is_said_at_the_top() -> None:
    work = workload(
        mix_ppm={"get": 900_000, "put": 100_000},
        uneven="pad",
        update_ppm=5_000,
        sizes="1 MiB",
        duration_ns=2 * 10**9,
        warmup_ns=10**9,
    )
    text = words(printed(record(workload=work)))
    assert text.startswith("mlstor 0.1.0 stream, run 20261122-060822-1f3a: complete")
    assert (
        "s3://bucket/train, 90 % get, 10 % put, 0.5 % of the GETs updated, 1 MiB, order permutation, seed 7, uneven pad"
        in text
    )
    assert "until 1 epoch or 2 s; 2 workers a process, 8 in flight each, warm-up of 1 s not counted" in text
    assert "catalog 200 objects, 13.11 MB (12.50 MiB) (listing)" in text
    assert "store s3://bucket/train, endpoint http://localhost:8333, signed True" in text


def test_a_copy_tells_what_arrived_and_both_sides() -> None:
    sides = {"get": op(times()), "put": op([one + 10 for one in times()])}
    one = report(0, name="copy", ops=sides, skipped_count=3, skipped_nbytes=3 * NBYTES)
    one.ranks[0].nbytes, one.ranks[0].nfiles = COUNT * NBYTES, COUNT
    stores = [StoreUsed(url="s3://b", role="source"), StoreUsed(url="/mnt/x", role="destination")]
    text = words(printed(record(workload=copy_workload(), stores=stores, phases=[merge_stream([one])])))
    assert "mlstor 0.1.0 copy" in text
    assert "s3://bucket/train to /mnt/nvme/train: 100 objects, 6.55 MB (6.25 MiB), checksums compared" in text
    assert "copy: 6.55 MB (6.25 MiB) in 2 s: 0.00328 GB/s (0.00305 GiB/s); 100 objects, 50.0/s" in text
    assert "3 objects (196.61 kB (192.00 KiB)) left alone, already there" in text
    assert "source s3://b" in text
    assert "destination /mnt/x" in text
    assert " all 2" not in text


def test_comparing_bytes_and_checksums_is_told_with_what_was_found() -> None:
    assert "was not compared" in printed(record())
    place = Damage(rank=0, file="k", offset=0, nbytes=5, kind="zeroed")
    seen = Verification(verified_nbytes=10**9, damaged_blocks=2, damage=[place], damage_dropped=1)
    bad = printed(record(workload=workload(verify="pattern"), phases=[phase(1, verification=seen)]))
    assert "2 blocks of 4 KiB DAMAGED" in bad
    assert "5 bytes at offset 0: zeroed" in bad
    checked = workload(verify="checksum")
    good = printed(record(workload=checked, phases=[phase(1, ops={"get": op(times(), compared=90)})]))
    assert "the store's checksum of 90 of 100 transfers: no difference" in good
    wrong = op(times(), compared=90, failed=1, errors={"checksum": 1})
    assert "of 101 transfers: 1 DIFFER" in printed(record(workload=checked, phases=[phase(1, ops={"get": wrong})]))


def test_a_run_that_was_ended_is_marked() -> None:
    half = merge_stream([report(0, complete=False)], progress=[progress(0)], processes=2)
    text = printed(
        record(status="partial", phases=[half], recovered=r.Recovered(journals=1, torn_lines=0, missing_processes=1))
    )
    assert "PARTIAL" in text.splitlines()[0]
    assert "stream (partial): 1.00 GB (953.67 MiB) in 3 s" in text
    assert "no phase was begun" in printed(record(status="failed", phases=[]))


def test_several_phases_have_a_section_each() -> None:
    fill = phase(2, name="fill", ops={"put": op(times())}, epochs=[], server_cache=None)
    text = printed(record(phases=[fill, phase(2)]))
    assert text.index("fill: ") < text.index("stream: ")
    assert text.count("Throughput") == 2
    assert "all phases: no (objects come over the network)" in text


def test_show_prints_either_kind_and_refuses_the_other_kinds_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    stream_dir, checkpoint_dir = tmp_path / "stream", tmp_path / "checkpoint"
    r.save(record(), stream_dir)
    r.save(record_factory.record(), checkpoint_dir)
    assert table.main([str(stream_dir)]) == 0
    assert "200 operations" in capsys.readouterr().out
    assert table.main([str(stream_dir), "--aisloader"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["get"]["count"] == "200"
    with pytest.raises(UsageError, match="is no checkpoint run"):
        table.main([str(stream_dir), "--mlperf"])
    with pytest.raises(UsageError, match="is no object stream"):
        table.main([str(checkpoint_dir), "--aisloader"])
    with pytest.raises(UsageError, match="is the record of an object stream"):
        r.load(stream_dir)


def test_what_was_never_begun_does_not_keep_a_pace() -> None:
    paced = rich_op()
    paced.failed, paced.cancelled = 0, paced.count // 50
    work = workload(rate_milliops_per_s=50_000, p99_goal_ns=1 << 40)
    text = words(printed(record(workload=work, phases=[phase(1, ops={"get": paced})])))
    assert "goal DOES NOT HOLD: p99" in text
    assert f"{paced.cancelled} never begun" in text
