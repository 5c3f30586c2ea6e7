"""MLPerf's fields are computed its way, beside the figures to the slowest rank's end."""

from __future__ import annotations

import statistics

import pytest
from record_factory import FILE_NBYTES, progress, record, report

from mlstor.results import figures, mlperf
from mlstor.results.figures import GIB
from mlstor.results.merge import merge_phase
from mlstor.results.phase import Op, Phase, RankFigures
from mlstor.results.record import Record


def timed(checkpoint: int, ends_s: list[float], *, op: Op = "write", ranks_per_process: int = 1) -> Phase:
    reports = []
    for process in range(len(ends_s) // ranks_per_process):
        one = report(process, op=op, checkpoint=checkpoint)
        mine = range(process * ranks_per_process, (process + 1) * ranks_per_process)
        one.ranks = [RankFigures(rank, 0, 1, int(ends_s[rank] * 1e9), GIB, 1) for rank in mine]
        reports.append(one)
    return merge_phase(reports)


def run(*phases: Phase) -> Record:
    made = record(processes=4, writes=0, reads=0)
    made.phases = list(phases)
    made.workload.nbytes = 4 * GIB
    return made


def test_rates_are_rank_0s_and_their_mean_and_population_deviation() -> None:
    made = run(timed(1, [1.0, 4, 4, 4]), timed(2, [2.0, 4, 4, 8]))
    metric = mlperf.metric(made)
    assert metric["save_checkpoint_io_mean_GB_per_second"] == pytest.approx((4 + 2) / 2)
    assert metric["save_checkpoint_io_stdev_GB_per_second"] == pytest.approx(statistics.pstdev([4, 2]))
    assert metric["save_checkpoint_duration_mean_seconds"] == pytest.approx(1.5)
    assert metric["save_checkpoint_duration_stdev_seconds"] == pytest.approx(0.5)
    assert metric["checkpoint_size_GB"] == 4


def test_the_slowest_ranks_figures_lie_beside_them() -> None:
    made = run(timed(1, [1.0, 4, 4, 4]), timed(2, [2.0, 4, 4, 8]))
    assert figures.slowest_rank_rates(made, "write", GIB) == pytest.approx([1.0, 0.5])
    assert figures.total_rate(made, "write", GIB) == pytest.approx(8 / 12)
    own = mlperf.summary_json(made)["mlstor"]
    assert own["save_slowest_rank_mean_GiB_per_second"] == pytest.approx(0.75)
    assert own["save_total_bytes_over_total_time_GiB_per_second"] == pytest.approx(8 / 12)
    assert own["label"] == "MLPerf's way (rank 0, mean of rates, GiB/s)"


def test_rank_0s_clock_is_its_processs_where_a_process_runs_several_ranks() -> None:
    assert mlperf.rank0_duration_ns(timed(1, [1.0, 3, 2, 9], ranks_per_process=2)) == 3 * 10**9


def test_a_run_that_only_read_has_only_its_own_four_fields_and_the_size() -> None:
    assert sorted(mlperf.metric(run(timed(1, [1.0] * 4, op="read")))) == [
        "checkpoint_size_GB",
        "load_checkpoint_duration_mean_seconds",
        "load_checkpoint_duration_stdev_seconds",
        "load_checkpoint_io_mean_GB_per_second",
        "load_checkpoint_io_stdev_GB_per_second",
    ]


def test_without_rank_0_or_a_whole_phase_there_are_no_fields() -> None:
    without = merge_phase([report(1)])
    assert 0 not in without.ranks.rank
    assert mlperf.metric(run(without)) == {}
    assert mlperf.metric(run(merge_phase([report(0)], progress=[progress(1)]))) == {}


def test_published_figures_come_out_of_published_durations() -> None:
    """UBIX's llama3-1t save of MLPerf Storage v3.0: 15426.589264154434 GiB; 52.54 s at 293.6 GiB/s."""
    phase = timed(1, [52.5414264, 52.5, 52.5, 52.5])
    phase.nbytes = round(15426.589264154434 * GIB)
    fields = mlperf.fields(run(phase), "write")
    assert fields is not None
    assert fields.io_mean == pytest.approx(293.608, abs=0.01)


def test_the_summary_has_mlperfs_keys_and_dlios_times() -> None:
    made = record()
    summary = mlperf.summary_json(made)
    assert {
        "start",
        "end",
        "num_accelerators",
        "num_hosts",
        "hostname",
        "metric",
        "host_memory_GB",
    } <= summary.keys()
    assert summary["start"] == "2026-09-21T14:13:20.123456"
    assert summary["host_memory_GB"] == [64.0, 64.0]
    assert summary["metric"]["checkpoint_size_GB"] == 8 * FILE_NBYTES / GIB
