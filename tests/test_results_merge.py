"""Processes' reports become one phase, whatever their order; and the rule that calls the client the limit."""

from __future__ import annotations

import random
from typing import Any

import pytest
from record_factory import FILE_NBYTES, START_UNIX_NS, progress, report

from mlstor.errors import WorldError
from mlstor.results import client
from mlstor.results.merge import merge_phase
from mlstor.results.merge_parts import MAX_INTERVALS, MIN_INTERVALS, merge_series
from mlstor.results.phase import (
    MAX_DAMAGE,
    Cached,
    CachedWord,
    Damage,
    PathTaken,
    PhaseReport,
    RankFigures,
    Verification,
)


def damage(rank: int, offset: int) -> Damage:
    return Damage(rank=rank, file="f", offset=offset, nbytes=1, kind="zeroed")


def test_a_report_survives_the_way_over_mpi() -> None:
    sent = report(
        3, op="read", verification=Verification(verified_nbytes=5, damaged_blocks=1, damage=[damage(0, 4096)])
    )
    assert PhaseReport.decode(sent.encode()) == sent


def test_the_phase_does_not_depend_on_the_order_of_reports() -> None:
    reports = [report(process, ranks=3) for process in range(8)]
    expected = merge_phase(reports)
    for seed in range(5):
        shuffled = random.Random(seed).sample(reports, len(reports))
        assert merge_phase(shuffled) == expected


def test_columns_are_in_rank_order_also_when_ranks_were_dealt_round_robin() -> None:
    reports = [report(process, per_host=1) for process in range(2)]
    for process, one in enumerate(reports):
        one.ranks = [RankFigures(r, 0, 10 + r, 20 + r, 100 + r, 1) for r in range(process, 6, 2)]
    columns = merge_phase(reports).ranks
    assert columns.rank == [0, 1, 2, 3, 4, 5]
    assert columns.process == [0, 1, 0, 1, 0, 1]
    assert columns.host == [0, 1, 0, 1, 0, 1]
    assert columns.end_ns == [20, 21, 22, 23, 24, 25]
    assert columns.nbytes == [100, 101, 102, 103, 104, 105]


def test_bytes_series_and_paths_are_summed() -> None:
    merged = merge_phase([report(process) for process in range(4)])
    assert merged.nbytes == 8 * FILE_NBYTES == sum(merged.ranks.nbytes)
    assert merged.series.host == [0, 1]
    assert merged.series.nbytes == [[2 * FILE_NBYTES, 2 * FILE_NBYTES - 10, 10]] * 2
    assert [(path.nfiles, path.nbytes) for path in merged.paths] == [(8, 8 * FILE_NBYTES)]


def test_different_paths_stay_apart() -> None:
    refused = PathTaken(
        backend="threads", direct="no", reason="EINVAL at the first write", fs_type="xfs", nfiles=1, nbytes=9
    )
    merged = merge_phase([report(0), report(1, paths=[refused])])
    assert {path.backend for path in merged.paths} == {"io_uring", "threads"}


def test_barrier_skew_is_relative_to_the_lowest_process_and_may_be_negative() -> None:
    merged = merge_phase([report(0, barrier_unix_ns=START_UNIX_NS), report(1, barrier_unix_ns=START_UNIX_NS - 7)])
    assert merged.barrier_unix_ns == START_UNIX_NS
    assert merged.processes.barrier_skew_ns == [0, -7]


def test_short_series_are_padded_and_finer_ones_brought_to_the_coarser_interval() -> None:
    series = merge_series(
        [
            report(0, per_host=1, interval_ns=1000, series=[1, 2, 3, 4, 5]),
            report(1, per_host=1, interval_ns=2000, series=[10]),
        ]
    )
    assert series.interval_ns == 2000
    assert series.nbytes == [[3, 7, 5], [10, 0, 0]]


def test_series_of_intervals_that_do_not_fit_are_refused() -> None:
    with pytest.raises(WorldError, match="process 0 counts bytes per 1500 ns"):
        merge_series([report(0, interval_ns=1500), report(1, interval_ns=2000)])


@pytest.mark.parametrize(("hosts", "limit"), [(1, MAX_INTERVALS), (2100, MIN_INTERVALS)])
def test_a_long_series_is_coarsened_without_losing_a_byte(hosts: int, limit: int) -> None:
    reports = [report(h, per_host=1, ranks=1, interval_ns=10, series=[1] * 1500) for h in range(hosts)]
    series = merge_series(reports)
    assert {len(row) for row in series.nbytes} <= set(range(limit // 2, limit + 1))
    assert {sum(row) for row in series.nbytes} == {1500}
    assert series.interval_ns % 10 == 0
    assert series.interval_ns * len(series.nbytes[0]) >= 15_000


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["no", "no"], "no"),
        (["no", "unknown"], "unknown"),
        (["unknown", "yes"], "yes"),
        (["no", "yes"], "yes"),
    ],
)
def test_the_worst_verdict_on_the_page_cache_wins_with_its_own_reason(
    verdicts: list[CachedWord], expected: str
) -> None:
    reports = [
        report(i, cached=Cached(verdict=v, how=f"how {v}", resident_bytes=i, looked_at_bytes=10))
        for i, v in enumerate(verdicts)
    ]
    cached = merge_phase(reports).cached
    assert (cached.verdict, cached.how) == (expected, f"how {expected}")
    assert (cached.resident_bytes, cached.looked_at_bytes) == (1, 20)


def test_damage_is_bounded_and_the_rest_counted() -> None:
    reports = [
        report(
            i,
            op="read",
            verification=Verification(
                verified_nbytes=10,
                damaged_blocks=41,
                damage=[damage(i, 4096 * k) for k in range(40)],
                damage_dropped=1,
            ),
        )
        for i in range(3)
    ]
    seen = merge_phase(reports).verification
    assert len(seen.damage) == MAX_DAMAGE
    assert (seen.damaged_blocks, seen.damage_dropped, seen.verified_nbytes) == (123, 120 - MAX_DAMAGE + 3, 30)
    assert [one.rank for one in seen.damage] == [0] * 40 + [1] * 24


def test_an_unfinished_phase_keeps_both_the_finished_and_the_others_last_word() -> None:
    merged = merge_phase([report(0)], progress=[progress(1)], processes=3)
    assert not merged.complete
    assert merged.ranks.rank == [0]
    assert (merged.unfinished.process, merged.unfinished.elapsed_ns) == ([1], [1_500_000_000])
    assert merged.nbytes == 2 * FILE_NBYTES + FILE_NBYTES // 2
    assert merge_phase([], progress=[progress(0)]).client.limited == "unknown"


@pytest.mark.parametrize(
    ("reports", "match"),
    [
        ([], "no process reported"),
        ([report(0), report(1, checkpoint=2)], r"different phases: write 1 \(phase 0\), write 2 \(phase 1\)"),
        ([report(0), report(1, number=5)], r"different phases: write 1 \(phase 0\), write 1 \(phase 5\)"),
        ([report(0), report(0)], "process 0 reported twice on write 1"),
    ],
)
def test_reports_that_contradict_each_other_are_refused(reports: list[PhaseReport], match: str) -> None:
    with pytest.raises(WorldError, match=match):
        merge_phase(reports)


def test_two_processes_that_claim_one_rank_are_refused() -> None:
    other = report(1)
    other.ranks = report(0).ranks
    with pytest.raises(WorldError, match="processes 0 and 1 both report on rank 0"):
        merge_phase([report(0), other])


WALL_NS = 2_000_000_000
IDLE: dict[str, Any] = {
    "cpu_user_ns": 1,
    "cpu_system_ns": 0,
    "worker_busy_ns": 1,
    "worker_wait_ns": 99,
    "cores_allowed": 2,
}


@pytest.mark.parametrize(
    ("over", "host_cores", "limited", "words"),
    [
        (IDLE, [8], "no", "busy 1 %"),
        (IDLE | {"worker_busy_ns": 75, "worker_wait_ns": 25}, [8], "yes", "busy 75 %"),
        (IDLE | {"worker_busy_ns": 74, "worker_wait_ns": 26}, [8], "no", "busy 74 %"),
        (
            IDLE | {"cpu_user_ns": WALL_NS, "cpu_system_ns": WALL_NS * 8 // 10},
            [8],
            "yes",
            "90 % of its 2 core",
        ),
        (
            IDLE | {"cpu_user_ns": WALL_NS, "cpu_system_ns": WALL_NS * 79 // 100},
            [8],
            "no",
            "89 % of its 2 core",
        ),
        (IDLE | {"cpu_user_ns": WALL_NS}, [1], "yes", "100 % of host 0's 1 core"),
        (IDLE | {"cpu_user_ns": WALL_NS}, [], "no", "50 %"),
        (IDLE | {"cpu_user_ns": 0, "worker_busy_ns": 0, "worker_wait_ns": 0}, [8], "unknown", "neither"),
    ],
)
def test_the_client_is_the_limit_by_the_written_rule(
    over: dict[str, Any], host_cores: list[int], limited: str, words: str
) -> None:
    verdict = client.judge([report(0, **over)], host_cores)
    assert verdict.limited == limited
    assert words in verdict.reason
    assert verdict.rule == client.RULE


def test_two_processes_that_share_a_core_are_seen_on_the_host_though_neither_is_at_its_limit() -> None:
    half = IDLE | {"cpu_user_ns": WALL_NS // 2, "cores_allowed": 1}
    reports = [report(0, **half), report(1, **half)]
    for one in reports:
        one.ranks[0].end_ns = WALL_NS
    assert client.judge(reports).limited == "no"
    assert client.judge(reports, [1]).limited == "yes"


def test_only_the_process_that_ended_last_is_asked_for_its_workers() -> None:
    busy = IDLE | {"worker_busy_ns": 99, "worker_wait_ns": 1}
    assert client.judge([report(0, **busy), report(1, **IDLE)]).limited == "no"
    assert client.judge([report(0, **IDLE), report(1, **busy)]).limited == "yes"


def test_host_wide_traffic_is_unknown_unless_every_host_gave_it() -> None:
    both = [report(0, per_host=1, nic_bytes=5), report(1, per_host=1, nic_bytes=6)]
    assert client.judge(both).nic_bytes == 11
    assert client.judge([both[0], report(1, per_host=1)]).nic_bytes == "unknown"
    assert client.judge(both).memory_traffic_bytes == "unknown"


def test_of_a_phase_in_which_no_rank_had_work_nothing_is_said_about_the_client() -> None:
    assert client.judge([report(0, ranks=0, **IDLE)], [8]).limited == "unknown"
