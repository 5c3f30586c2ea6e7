"""Processes' reports of a stream become one phase, whatever their order; percentiles are of merged histograms only."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, strategies as st
from stream_factory import COUNT, NBYTES, op, part, progress, report, rich_op, times

from mlstor.errors import WorldError
from mlstor.results import stream as s
from mlstor.results.percentiles import of_values, percentile
from mlstor.results.stream_merge import OTHERS, add_ops, merge_stream
from mlstor.results.stream_verdicts import distinct_nbytes, judge_network, server_cache
from mlstor.storage.transfers import Kind


def test_a_report_survives_the_way_over_mpi() -> None:
    sent = report(3, ops={"get": rich_op()}, failures=[s.failed_transfer(rank=3, op="get", url="u", fault="reset")])
    assert s.StreamReport.decode(sent.encode()) == sent


def test_the_phase_does_not_depend_on_the_order_of_reports() -> None:
    reports = [report(process, ops={"put": op(times(process)), "get": rich_op(process)}) for process in range(8)]
    expected = merge_stream(reports)
    assert list(expected.ops) == ["get", "put"]
    for seed in range(5):
        assert merge_stream(random.Random(seed).sample(reports, len(reports))) == expected


durations = st.lists(st.integers(min_value=0, max_value=2**40), min_size=1, max_size=60)


@given(st.lists(durations, min_size=1, max_size=6), st.sampled_from([50, 90, 99, 99.9, 99.99]))
def test_percentiles_of_merged_ranks_are_those_of_all_transfers(ranks: list[list[int]], percent: float) -> None:
    merged = add_ops([op(mine) for mine in ranks])
    everything = [one for mine in ranks for one in mine]
    assert merged.total == of_values(everything)
    assert percentile(merged.total, percent) == percentile(of_values(everything), percent)
    assert merged.count == len(everything)


@given(st.lists(durations, min_size=3, max_size=3))
def test_adding_is_associative(ranks: list[list[int]]) -> None:
    a, b, c = (op(mine) for mine in ranks)
    assert add_ops([add_ops([a, b]), c]) == add_ops([a, add_ops([b, c])]) == add_ops([a, b, c])


def test_all_counts_are_summed_and_all_parts_kept_apart() -> None:
    merged = merge_stream([report(0, ops={"get": rich_op(0)}), report(1, ops={"get": rich_op(1)})]).ops["get"]
    assert (merged.count, merged.failed, merged.cancelled) == (2 * COUNT, 6, 2)
    assert merged.errors == {"HTTP 404": 4, "reset": 2}
    assert (merged.retries, merged.retried_by) == (10, {"HTTP 503": 8})
    assert (merged.connections, merged.retried.count, merged.redirect.count) == (8, 8, 200)
    assert merged.from_intended.max_ns == merged.total.max_ns + 5_000
    assert (merged.cold.count, merged.warm.count) == (80, 120)
    assert [(one.from_bytes, one.count, one.nbytes) for one in merged.sizes] == [
        (4096, 80, 80 * 8192),
        (16384, 120, 120 * 20000),
    ]
    assert [(one.name, one.count, one.failed) for one in merged.targets] == [("t[one]", 80, 6), ("t[two]", 120, 0)]
    assert merged.sizes[0].total == of_values([*times(0)[:40], *times(1)[:40]])


def test_epochs_last_from_the_first_start_to_the_last_end_and_doubts_win() -> None:
    def epochs(start: int, word: s.Temperature) -> list[s.Epoch]:
        return [
            s.Epoch(epoch=0, temperature="cold", start_ns=start, end_ns=start + 10, count=1, nbytes=5),
            s.Epoch(epoch=1, temperature=word, start_ns=start + 10, end_ns=start + 20, count=2, nbytes=7, failed=1),
        ]

    merged = merge_stream([report(0, epochs=epochs(5, "warm")), report(1, epochs=epochs(9, "cold"))])
    first, second = merged.epochs
    assert (first.start_ns, first.end_ns, first.count, first.nbytes, first.temperature) == (5, 19, 2, 10, "cold")
    assert (second.start_ns, second.end_ns, second.failed, second.temperature) == (15, 29, 2, "unknown")


def test_epochs_beyond_the_bound_share_the_last_entry_on_every_rank() -> None:
    assert [s.epoch_entry(one) for one in (0, 126, 127, 128, 10**6)] == [0, 126, 127, 127, 127]


def test_of_a_large_cluster_the_slowest_targets_stay_and_nothing_is_lost() -> None:
    slow = s.TargetSlice(name="zslow", failed=2, **part([10**9]))
    several = [s.TargetSlice(name=f"t{i:04d}", **part([1000 + i])) for i in range(3 * s.MAX_TARGETS)]
    merged = add_ops([op(targets=several), op(targets=[slow])])
    assert len(merged.targets) == s.MAX_TARGETS
    assert [one.name for one in merged.targets[-2:]] == ["zslow", OTHERS]
    assert sum(one.count for one in merged.targets) == 3 * s.MAX_TARGETS + 1
    again = add_ops([merged, op(targets=[slow])])
    assert len(again.targets) == s.MAX_TARGETS
    assert sum(one.count for one in again.targets) == 3 * s.MAX_TARGETS + 2


def test_described_failures_are_bounded_in_number_and_length_and_the_rest_counted() -> None:
    def some(rank: int) -> list[s.FailedTransfer]:
        text = "no such key " * 100
        return [s.failed_transfer(rank=rank, op="get", url="s3://b/" + "k" * 2000, fault="HTTP 404", message=text)] * 40

    merged = merge_stream([report(i, failures=some(i), failures_dropped=2) for i in range(3)])
    assert len(merged.failures) == s.MAX_FAILURES
    assert merged.failures_dropped == 120 - s.MAX_FAILURES + 6
    assert {len(one.url) for one in merged.failures} == {len(one.message) for one in merged.failures} == {s.MAX_TEXT}
    broken = report(0, failures=[s.FailedTransfer(rank=0, op="get", url="x" * 301, fault="reset")]).encode()
    with pytest.raises(msgspec.ValidationError):
        s.StreamReport.decode(broken)


def test_the_phases_bytes_and_time_are_those_of_all_ranks() -> None:
    merged = merge_stream([report(0), report(1, end_ns=3 * 10**9, skipped_count=4, skipped_nbytes=44, opens=7)])
    assert merged.nbytes == 2 * COUNT * NBYTES
    assert merged.ranks.nfiles == [COUNT, COUNT]
    assert max(merged.ranks.end_ns) == 3 * 10**9
    assert (merged.skipped_count, merged.skipped_nbytes, merged.opens) == (4, 44, 7)
    assert merged.series.nbytes == [[COUNT * NBYTES, COUNT * NBYTES]]
    assert merged.complete


def test_fetched_bytes_are_unknown_unless_every_process_knew_them() -> None:
    assert merge_stream([report(0, fetched_bytes=5), report(1, fetched_bytes=6)]).fetched_bytes == 11
    assert merge_stream([report(0, fetched_bytes=5), report(1)]).fetched_bytes is None


def test_a_phase_that_was_ended_early_says_how_far_each_process_was() -> None:
    early = report(1, complete=False)
    merged = merge_stream([report(0), early])
    assert not merged.complete
    assert (merged.unfinished.process, merged.unfinished.nbytes) == ([1], [COUNT * NBYTES])
    assert merged.nbytes == 2 * COUNT * NBYTES
    assert merged.ops["get"].count == 2 * COUNT


def test_of_a_killed_process_the_later_word_counts_for_bytes_and_the_report_for_percentiles() -> None:
    merged = merge_stream([report(0, complete=False)], progress=[progress(0), progress(1)], processes=2)
    assert not merged.complete
    assert merged.nbytes == 2 * 10**9
    assert (merged.unfinished.process, merged.unfinished.elapsed_ns) == ([0, 1], [3 * 10**9] * 2)
    assert merged.ops["get"].count == COUNT
    only = merge_stream([], progress=[progress(0)])
    assert (only.ops, only.client.limited, only.network.limited) == ({}, "unknown", "unknown")


@pytest.mark.parametrize(
    ("reports", "others", "match"),
    [
        ([], [], "no process reported"),
        ([report(0), report(1, name="fill")], [], r"different phases: fill \(phase 0\), stream \(phase 0\)"),
        ([report(0), report(0)], [], "process 0 reported twice on stream"),
        ([report(0)], [progress(0)], "process 0 reported twice on stream"),
        ([report(0, complete=False)], [progress(0), progress(0)], "process 0 reported twice on stream"),
    ],
)
def test_reports_that_contradict_each_other_are_refused(reports: Any, others: Any, match: str) -> None:
    with pytest.raises(WorldError, match=match):
        merge_stream(reports, progress=others)


@pytest.mark.parametrize(
    ("nbytes", "lowest"),
    [(0, 0), (4095, 0), (4096, 4096), (16383, 4096), (16384, 16384), (65536, 65536), (2**20, 2**20), (2**62, 2**40)],
)
def test_size_classes_begin_at_powers_of_four(nbytes: int, lowest: int) -> None:
    assert s.SIZE_CLASSES_FROM[s.size_class(nbytes)] == lowest


@given(st.integers(min_value=0, max_value=2**64 - 1))
def test_a_transfer_is_in_the_last_class_that_is_not_larger(nbytes: int) -> None:
    expected = max(i for i, lowest in enumerate(s.SIZE_CLASSES_FROM) if lowest <= nbytes)
    assert s.size_class(nbytes) == expected


@pytest.mark.parametrize(
    ("kind", "status", "result", "word"),
    [
        (Kind.HTTP, 503, 0, "HTTP 503"),
        (Kind.SYSTEM, 0, -28, "ENOSPC"),
        (Kind.SYSTEM, 0, -9999, "errno 9999"),
        (Kind.SYSTEM, 0, 0, "system"),
        (Kind.CHECKSUM, 200, 0, "checksum"),
    ],
)
def test_faults_are_named_by_what_one_looks_up(kind: Kind, status: int, result: int, word: str) -> None:
    assert s.fault(kind, status, result) == word


@pytest.mark.parametrize(
    ("memory", "verdict"), [(None, "unknown"), (10, "exceeded"), (33, "exceeded"), (34, "possible")]
)
def test_the_servers_memory_is_exceeded_by_the_written_rule(memory: int | None, verdict: str) -> None:
    assert server_cache(100, memory, "told").verdict == verdict


def test_of_contradicting_verdicts_on_the_servers_memory_the_worst_is_kept() -> None:
    cautious = server_cache(100, None)
    given = [report(0), report(1, server_cache=cautious), report(2, server_cache=None)]
    assert merge_stream(given).server_cache == cautious
    assert merge_stream([report(0, server_cache=None)]).server_cache is None


NIC: dict[str, Any] = {"nic_received_bytes": 10**9, "nic_sent_bytes": 5, "nic_line_bits_per_s": 10 * 10**9}


@pytest.mark.parametrize(
    ("over", "limited", "words"),
    [
        ([NIC, {}], "no", "host 0 received 40 % of its line rate of 10 Gbit/s"),
        ([NIC | {"nic_sent_bytes": 2_250_000_000}, {}], "yes", "host 0 sent 90 % of its line rate"),
        ([NIC | {"nic_line_bits_per_s": None}, {}], "unknown", "doesn't show its line rate"),
        ([NIC | {"nic_sent_bytes": None}, {}], "unknown", "doesn't show its line rate"),
        ([{}, {}], "unknown", "doesn't show its line rate"),
    ],
)
def test_the_network_is_the_limit_by_the_written_rule(over: list[dict[str, Any]], limited: str, words: str) -> None:
    verdict = judge_network([report(process, **one) for process, one in enumerate(over)])
    assert verdict.limited == limited
    assert words in verdict.reason
    assert "line rates" in verdict.rule


def test_one_host_that_does_not_show_its_network_leaves_the_verdict_open_unless_another_is_at_its_limit() -> None:
    silent = report(1, per_host=1)
    assert judge_network([report(0, per_host=1, **NIC), silent]).limited == "unknown"
    full = NIC | {"nic_received_bytes": 2_300_000_000}
    assert judge_network([report(0, per_host=1, **full), silent]).limited == "yes"
    both = [report(0, per_host=1, **NIC), report(1, per_host=1, **NIC)]
    assert judge_network(both).received_bytes == 2 * 10**9
    assert "the most of any host" in judge_network(both).reason


def test_workers_of_all_processes_count_where_the_last_one_to_end_was_idle() -> None:
    busy: dict[str, Any] = {"worker_busy_ns": 10**9, "worker_wait_ns": 0}
    idle = report(3, end_ns=2_000_000_001, worker_busy_ns=1, worker_wait_ns=10**8)
    client = merge_stream([*(report(i, **busy) for i in range(3)), idle]).client
    assert client.limited == "yes"
    assert "of all processes" in client.reason
    assert merge_stream([report(0), report(1)]).client.limited == "no"


def test_the_share_of_the_cores_is_that_of_the_time_that_counts() -> None:
    over: dict[str, Any] = {"cpu_user_ns": 10**9, "cpu_system_ns": 0, "cores_allowed": 1}
    cold_start, warmed_up = report(0, **over), report(0, **over)
    warmed_up.ranks[0].start_ns = 10**9
    assert merge_stream([cold_start]).client.limited == "no"
    assert merge_stream([warmed_up]).client.limited == "yes"


def test_the_working_set_is_what_was_read_of_distinct_objects() -> None:
    rng = np.random.default_rng(1)
    n, size = 1000, 10
    assert [distinct_nbytes(read, n * size) for read in (0, 2500, 10_000, 70_000)] == [0, 2500, 10_000, 10_000]
    drawn = [len(np.unique(rng.integers(0, n, 1500))) for _ in range(200)]
    assert distinct_nbytes(1500 * size, n * size, draws_of=n) == pytest.approx(np.mean(drawn) * size, rel=0.01)
    shared = [len(np.unique(np.concatenate([rng.permutation(n)[:300] for _ in range(4)]))) for _ in range(200)]
    assert distinct_nbytes(4 * 300 * size, n * size, clients=4) == pytest.approx(np.mean(shared) * size, rel=0.01)
    assert distinct_nbytes(50, 10, draws_of=1) == distinct_nbytes(10, 10, draws_of=1) == 10
