"""What the printed record says, at 100 columns and away from a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from record_factory import progress, record, report, target
from rich.console import Console

from mlstor.errors import UsageError
from mlstor.results import record as r, table
from mlstor.results.merge import merge_phase
from mlstor.results.phase import Cached, Damage, PathTaken, Verification


def printed(made: r.Record) -> str:
    out = io.StringIO()
    table.print_record(made, Console(file=out, width=100))
    return out.getvalue()


def words(text: str) -> str:
    """The text with its line wrapping undone."""
    return " ".join(text.split())


def test_a_phase_shows_its_rate_to_the_slowest_ranks_end_and_the_skew() -> None:
    text = printed(record())
    # 8 files of 7 GiB in 2.3 s.
    row = next(line for line in text.splitlines() if line.startswith("write 1"))
    assert row.split() == [
        "write",
        "1",
        "60.13",
        "26.1",
        "0.500",
        "2.00",
        "2.10",
        "2.30",
        "0.047",
        "200",
        "no",
        "ok",
    ]
    assert "120.26 GB (112.00 GiB) in 4.6 s: 26.1 GB/s (24.3 GiB/s)" in text
    assert "all phases: io_uring + O_DIRECT confirmed on xfs, 8 files" in text


def test_nothing_is_wider_than_100_columns_or_cut_off() -> None:
    made = record(processes=64, per_host=8, writes=10, reads=10)
    made.phases[3].complete = False
    text = printed(made)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text


def test_away_from_a_terminal_there_are_no_escape_sequences_and_100_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table.print_record(record(processes=1))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert 80 < max(map(len, text.splitlines())) <= 100


def test_a_long_run_shows_operations_merged_per_direction() -> None:
    text = printed(record(processes=2, writes=4, reads=4))
    rows = [line.split() for line in text.splitlines() if line.startswith(("4 writes", "4 reads"))]
    assert [row[:4] for row in rows] == [["4", "writes", "open", "8"], ["4", "reads", "open", "8"]]


def test_memory_is_headed_as_memory() -> None:
    assert "memory, not storage" not in printed(record())
    assert printed(record(targets=[target(is_memory=True, fs_type="tmpfs")])).startswith("memory, not storage")


def test_a_partial_run_is_marked_and_says_how_it_was_recovered() -> None:
    made = record(status="partial", recovered=r.Recovered(journals=3, torn_lines=1, missing_processes=1))
    made.phases = [merge_phase([report(0)], progress=[progress(1)], processes=4)]
    text = printed(made)
    assert "PARTIAL" in text.splitlines()[0]
    assert "from 3 journals; 1 missing; 1 torn line" in text
    assert "write 1 (partial)" in text
    assert "written " not in text  # an unfinished phase is in no total
    assert "MLPerf's fields: none" in text


def test_a_failed_run_names_rank_host_file_and_offset_without_reading_them_as_markup() -> None:
    error = r.RunError(rank=3, host="node1", file="/mnt/[red]x", offset=4096, message="No space left on device")
    text = printed(record(status="failed", error=error, phases=[]))
    assert "rank 3 on node1, /mnt/[red]x at byte 4096: No space left on device" in text
    assert "no phase was begun" in text


def test_a_client_that_was_the_limit_is_said_in_words_with_the_rule() -> None:
    made = record()
    made.phases[0] = merge_phase([report(0, worker_busy_ns=99, worker_wait_ns=1)])
    text = words(printed(made))
    assert "client-bound write 1: the client, not the storage, was the limit: workers of process 0 busy 99 %" in text
    assert words(made.phases[0].client.rule) in text
    assert "client-bound" not in printed(record())


def test_cache_and_path_are_told_per_phase_where_they_differ() -> None:
    made = record()
    made.phases[3] = merge_phase(
        [
            report(
                0,
                op="read",
                checkpoint=2,
                cached=Cached(how="evicted", resident_bytes=1, looked_at_bytes=4),
                paths=[PathTaken(backend="threads", direct="no", reason="refused", fs_type="fuse", nfiles=1)],
            )
        ]
    )
    text = words(printed(made))
    assert "cached write 1, write 2, read 1: no (O_DIRECT confirmed)" in text
    assert "read 2: unknown (evicted), 25.0 % of what was looked at in the page cache" in text
    assert "read 2: threads (pread/pwrite) + buffered, not direct on fuse (refused), 1 file" in text


def test_damage_names_file_offset_kind_and_what_lies_there() -> None:
    made = record()
    places = [
        Damage(
            rank=1,
            file="/mnt/f.pt",
            offset=4096 * i,
            nbytes=4096,
            kind="other-checkpoint",
            found_checkpoint=7,
        )
        for i in range(20)
    ]
    seen = Verification(verified_nbytes=10**9, damaged_blocks=21, damage=places, damage_dropped=1)
    made.phases = [merge_phase([report(0, op="read", verification=seen)])]
    text = printed(made)
    assert "1.00 GB (953.67 MiB) compared byte by byte: 21 blocks of 4 KiB DAMAGED" in text
    assert "read 1, rank 1: /mnt/f.pt" in text
    assert "4,096 bytes at offset 8192: other-checkpoint, found checkpoint 7" in text
    assert "and 13 places more" in text


def test_reads_that_were_not_compared_say_so() -> None:
    made = record()
    made.phases = [merge_phase([report(0, op="read", verification=Verification())])]
    assert "was not compared" in printed(made)


def test_mlperfs_fields_are_labelled_and_the_slowest_ranks_lie_beside() -> None:
    text = printed(record())
    assert "MLPerf's way (rank 0, mean of rates, GiB/s)" in text
    assert "save_checkpoint_io_mean_GB_per_second   28.0000" in text
    assert "slowest rank, mean 24.3 GiB/s" in text
    assert "MLPerf result" not in text


def test_show_prints_a_stored_record_or_its_mlperf_summary(tmp_path: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    r.save(record(), tmp_path)
    assert table.main([str(tmp_path)]) == 0
    assert "write 1" in capsys.readouterr().out
    assert table.main([str(tmp_path / "record.json"), "--mlperf"]) == 0
    assert json.loads(capsys.readouterr().out)["metric"]["checkpoint_size_GB"] == 56
    with pytest.raises(UsageError, match="no record can be read"):
        table.main([str(tmp_path / "nothing")])
