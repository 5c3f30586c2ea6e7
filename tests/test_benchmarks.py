"""The benchmarks' own arithmetic, parsing and clean-up. Nothing here looks at how fast anything is."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks lie in the repository, not in the package")

from benchmarks import __main__ as command, contenders, fastfs, fio, goals, machine, report
from benchmarks.child import Job, measure, run_child, touch_memory
from benchmarks.footprint import Footprint
from benchmarks.harness import (
    BenchmarkError,
    Contender,
    Sample,
    cached_pages,
    drop_caches,
    files_below,
    paired_ratios,
    remove,
    require_uncached,
    run_rounds,
    self_checks,
)
from mlstor.errors import UsageError

MIB = 1 << 20
GB = 10**9


def sample(rate_gb_s: float, cpu_s: float = 0.1) -> Sample:
    return Sample(1 / rate_gb_s, cpu_s, GB)


def contender(key: str, twin_of: str = "", **more: object) -> Contender:
    return Contender(key, "write", key, lambda: sample(1.0), twin_of=twin_of, **more)  # type: ignore[arg-type]


def quiet(_: object) -> None:
    return


# Rounds and statistics


def test_every_contender_runs_once_per_round_in_an_order_that_the_seed_repeats() -> None:
    def order(seed: int) -> list[str]:
        seen: list[str] = []
        chosen = [contender(key) for key in "abcdef"]
        samples = run_rounds(chosen, 4, seed, lambda each: seen.append(each.key), quiet)
        assert {key: len(values) for key, values in samples.items()} == dict.fromkeys("abcdef", 4)
        return seen

    first = order(7)
    rounds = [first[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(each) == list("abcdef") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert order(7) == first
    assert order(8) != first


def test_files_and_directories_that_a_contender_leaves_are_gone_before_the_next_one(tmp_path: Path) -> None:
    file, directory = tmp_path / "file", tmp_path / "directory"

    def leave() -> Sample:
        file.write_bytes(b"x")
        directory.mkdir()
        (directory / "shard").write_bytes(b"x")
        return sample(1.0)

    chosen = [Contender("a", "write", "a", leave, leaves=(file, directory))]
    run_rounds(chosen, 2, 0, lambda _: None if not list(tmp_path.iterdir()) else pytest.fail("left"), quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_contender_that_leaves_nothing_where_a_file_was_promised_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run_rounds([contender("a", leaves=(tmp_path / "absent",))], 1, 0, quiet, quiet)


def test_ratios_are_taken_round_by_round() -> None:
    # The machine halves its speed in the second round: the pairs do not see it.
    assert paired_ratios([sample(2.0), sample(1.0)], [sample(1.0), sample(0.5)]) == pytest.approx([2.0, 2.0])
    with pytest.raises(ValueError, match="shorter"):
        paired_ratios([sample(1.0)], [])


def test_random_reads_are_rated_by_operations_and_streams_by_bytes() -> None:
    assert Sample(2.0, 0.5, 4 * GB).rate == 2 * GB
    assert Sample(2.0, 0.5, 4 * GB).cpu_s_per_gb == 0.125
    assert Sample(2.0, 0.5, 4096_000, operations=1000).rate == 500


@pytest.mark.parametrize(("again", "passed"), [(0.91, True), (1.09, True), (0.89, False), (1.11, False)])
def test_the_self_check_allows_ten_percent(again: float, passed: bool) -> None:
    chosen = [contender("loop"), contender("loop-again", twin_of="loop")]
    samples = {"loop": [sample(1.0)] * 3, "loop-again": [sample(5.0), sample(again), sample(0.1)]}
    (check,) = self_checks(chosen, samples)
    assert check.ratio == pytest.approx(again)
    assert check.passed is passed
    assert ("**not within" in report.self_check_text([check])) is not passed


# The page cache


def test_pages_of_a_file_in_the_cache_are_counted_and_a_cached_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.randbytes(MIB))
    assert cached_pages(path) == (256, 256)
    with pytest.raises(UsageError, match="256 of 256 pages"):
        require_uncached([tmp_path])


def test_an_evicted_file_is_found_to_be_out_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.randbytes(MIB))
    # As an ordinary user: the whole machine's cache stays as it is.
    monkeypatch.setattr("benchmarks.harness.DROP_CACHES", tmp_path / "absent")
    assert drop_caches([tmp_path]) == "fadvise"
    if cached_pages(path)[0] == 256:
        pytest.skip("this file system keeps its pages: tmpfs")
    require_uncached([tmp_path])


def test_an_empty_file_has_no_pages(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert cached_pages(path) == (0, 0)
    require_uncached([path])


def test_files_below_a_directory_are_found_and_removed(tmp_path: Path) -> None:
    inner = tmp_path / "dcp" / "deep"
    inner.mkdir(parents=True)
    (inner / "b").touch()
    (tmp_path / "dcp" / "a").touch()
    assert files_below([tmp_path / "dcp"]) == [tmp_path / "dcp" / "a", inner / "b"]
    remove(tmp_path / "dcp")
    assert not (tmp_path / "dcp").exists()


# Contenders in a process of their own


def test_the_child_measures_bytes_time_and_memory_of_the_work_alone() -> None:
    found, value = measure(Job("", 123, 4 * MIB), lambda: len(bytearray(64 * MIB)))
    assert value == 64 * MIB
    assert found.nbytes == 123
    assert found.elapsed_s > 0
    assert 60 * MIB <= found.extra_rss_bytes < 96 * MIB


def test_a_plain_loop_writes_and_reads_what_it_says(tmp_path: Path) -> None:
    job = Job(str(tmp_path / "file"), 4 * MIB, MIB)
    assert run_child("peers:write_loop", job).nbytes == 4 * MIB
    assert (tmp_path / "file").stat().st_size == 4 * MIB
    assert run_child("peers:read_loop", job).nbytes == 4 * MIB


def test_a_contender_that_fails_ends_the_run_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    with pytest.raises(BenchmarkError, match="ends at byte 1048576"):
        run_child("peers:read_loop", Job(str(tmp_path / "file"), 2 * MIB, 0))


def test_memory_of_any_size_can_be_touched() -> None:
    for nbytes in (0, 1, 4096, 4097, MIB + 1):
        touch_memory(nbytes)


# fio

FIO_JSON = """fio: this is a note
{"fio version": "fio-3.33", "jobs": [{"error": 0, "job_runtime": 2000, "usr_cpu": 5.0, "sys_cpu": 20.0,
 "write": {"io_bytes": 1073741824, "runtime": 500, "short_ios": 0},
 "read": {"io_bytes": 0, "runtime": 0, "short_ios": 0}}]}
"""


def test_fio_json_gives_bytes_seconds_and_cpu() -> None:
    found = fio.parse(FIO_JSON, "write")
    assert (found.nbytes, found.elapsed_s) == (1 << 30, 0.5)
    assert found.cpu_s == pytest.approx(0.5)  # 25% of the 2 s that four processes took together


@pytest.mark.parametrize(
    ("old", "new", "direction"),
    [
        ('"error": 0', '"error": 28', "write"),
        ('"short_ios": 0', '"short_ios": 3', "write"),
        ("", "", "read"),
    ],
)
def test_fio_that_failed_or_did_nothing_is_an_error(old: str, new: str, direction: str) -> None:
    with pytest.raises(BenchmarkError):
        fio.parse(FIO_JSON.replace(old, new) if old else FIO_JSON, direction)


def test_the_sweep_holds_each_block_depth_and_engine_and_every_cell_divides_the_size() -> None:
    assert len(set(fio.SEQUENTIAL)) == 18
    assert {cell.block_bytes for cell in fio.SEQUENTIAL} == {MIB, 4 * MIB, 16 * MIB}
    for cell in fio.SEQUENTIAL:
        words = fio.command(cell, "write", Path("file"), fio.GRAIN_BYTES)
        jobs = cell.depth if cell.engine == "psync" else 1
        assert fio.GRAIN_BYTES % (jobs * cell.block_bytes) == 0
        assert f"--size={fio.GRAIN_BYTES // jobs}" in words
        assert {"--direct=1", "--end_fsync=1", "--fallocate=native"} <= set(words)


def test_random_reads_keep_64_in_flight_by_one_job() -> None:
    for cell in fio.RANDOM:
        words = fio.command(cell, "randread", Path("file"), 1 << 30, 4.0)
        assert {"--iodepth=64", "--bs=4096", "--ioengine=io_uring", "--direct=1", "--runtime=4"} <= set(words)
        assert not any(word.startswith("--numjobs") for word in words)


def test_a_lucky_first_look_does_not_win_the_sweep() -> None:
    cells = fio.SEQUENTIAL[:5]
    rates = {cells[0]: [9.0, 1.0, 1.0], cells[1]: [5.0, 5.0, 5.0], cells[2]: [4.0, 4.0, 4.0]}
    looks = {cell: iter(rates.get(cell, [1.0])) for cell in cells}
    best, found = fio.sweep(cells, lambda cell: sample(next(looks[cell])), quiet)
    assert best == cells[1]
    assert [len(found[cell]) for cell in cells] == [3, 3, 3, 1, 1]


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
def test_fio_writes_all_bytes_with_several_processes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    found = fio.run(fio.Cell("psync", MIB, 4), "write", path, 8 * MIB)
    assert found.nbytes == 8 * MIB
    assert path.stat().st_size == 8 * MIB
    path.unlink()
    (tmp_path / "place").mkdir()
    with pytest.raises(BenchmarkError, match="failed with status"):
        fio.run(fio.Cell("psync", MIB, 4), "write", tmp_path / "place", 8 * MIB)


# The list of contenders


def test_every_key_is_there_once_and_every_function_exists() -> None:
    keys = [entry.key for entry in contenders.ENTRIES]
    assert len(set(keys)) == len(keys)
    for function in [entry.function for entry in contenders.ENTRIES if entry.function] + [*contenders.SOURCES.values()]:
        module, name = function.split(":")
        source = (Path(contenders.__file__).parent / f"{module}.py").read_text()
        assert f"\ndef {name}(job: Job) -> Sample:" in source


def test_a_choice_brings_the_self_check_along_and_a_typing_error_is_named() -> None:
    entries, footprints = contenders.choose("fio-write")
    assert {entry.key for entry in entries} == {
        "fio-write",
        "write-loop",
        "write-loop-again",
        "read-loop",
        "read-loop-again",
    }
    assert footprints == []
    assert contenders.choose("help") == ([], ["help"])
    everything, both = contenders.choose("")
    assert len(everything) == len(contenders.ENTRIES)
    assert both == ["help", "rss"]
    with pytest.raises(UsageError, match="'fio-wirte' matches no contender"):
        contenders.choose("fio-wirte")


def test_room_counts_the_files_that_are_read_and_one_that_is_written() -> None:
    everything, _ = contenders.choose("")
    assert contenders.room_bytes(everything, 1 << 30) == int(5 * 1.05 * (1 << 30)) + 256 * MIB
    readers = [entry for entry in contenders.ENTRIES if entry.key == "fio-read"]
    assert contenders.room_bytes(readers, 1 << 30) == int(1.05 * (1 << 30)) + 256 * MIB


# Goals


def test_each_goal_is_met_missed_or_not_measured() -> None:
    samples = {
        "mlstor-write": [sample(2.0, cpu_s=0.10)] * 5,
        "fio-write": [sample(2.0)] * 5,
        "torch-save": [sample(0.5)] * 5,
        "mlstor-read-verified": [sample(1.0, cpu_s=0.20)] * 5,
        "fio-read": [sample(1.5)] * 5,
    }
    rank = Footprint(401 << 20, 1)
    rows = {goal.what: goal for goal in goals.goals(samples, "disk", [0.2, 0.3, 0.2], rank)}
    assert rows["write, pattern generated / fio"].met is True
    assert rows["read, verified / fio"].met is False
    assert rows["read, unverified / fio"].met is None
    assert rows["write / torch.save + fsync"].figure == "4.00"
    assert rows["CPU, write incl. generation"].met is True
    assert rows["CPU, read incl. verification"].met is False
    assert rows["python -m mlstor.checkpoint --help"].met is True
    assert [goal.met for goal in rows.values() if "peak RSS" in goal.what] == [False]
    assert len(rows) == 11


@pytest.mark.parametrize(
    ("mlstor", "fio_rate", "torch", "met"),
    [(3.1, 3.3, 1.0, True), (2.0, 3.3, 1.0, False), (1.0, 1.0, 0.9, True), (0.9, 1.0, 0.9, False)],
)
def test_against_torch_save_the_device_may_be_the_limit(
    mlstor: float, fio_rate: float, torch: float, met: bool
) -> None:
    samples = {
        "mlstor-write": [sample(mlstor)],
        "fio-write": [sample(fio_rate)],
        "torch-save": [sample(torch)],
    }
    assert goals.torch_goal(samples).met is met


def test_the_targets_on_the_ram_backed_file_system_are_those_of_two_cores_that_play_the_device() -> None:
    samples = {"mlstor-write": [sample(0.9)], "fio-write": [sample(1.0)]}
    assert [goals.goals(samples, kind, [], None)[0].met for kind in ("disk", "fast")] == [False, True]


# Report


def whole_run() -> report.Run:
    keys = ("mlstor-write", "fio-write", "write-loop", "write-loop-again", "mlstor-random", "fio-random")
    bound = []
    for entry in contenders.ENTRIES:
        if entry.key in keys:
            bound.append(Contender(entry.key, entry.group, entry.label, lambda: sample(1.0), twin_of=entry.twin_of))
    samples = {
        each.key: [Sample(1.0, 0.1, GB, 1000 if each.group == "random" else 0, 0, {"path": "io_uring"})] * 3
        for each in bound
    }
    cell = fio.SEQUENTIAL[0]
    return report.Run("disk", bound, samples, {"write": cell}, {"write": {cell: [1.0]}}, [0.2], None, {"kernel": "6.1"})


def test_a_report_holds_the_self_check_goals_and_tables_and_its_record_is_json(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the picture")
    text, data, picture = report.save(whole_run(), tmp_path / "out")
    found = text.read_text()
    assert "ratio 1.000 (1.00-1.00), within 10% of 1" in found
    assert "| write, pattern generated / fio | 1.000 | >= 0.95 | yes |" in found
    assert "| mlstor, pattern generated | 1.00 | 1.00-1.00 | 1.00 | 0.100 | 0 | io_uring |" in found
    assert "**Write** (fio: io_uring, 1 MiB x 4)" in found
    record = json.loads(data.read_text())
    assert record["self_checks"][0]["passed"] is True
    assert len(record["samples"]["fio-write"]) == 3
    assert picture.read_text().startswith("<?xml")


def test_tables_go_between_their_markers_and_nothing_else_changes() -> None:
    page = "head\n{}\nold\n{}\nmiddle\n{}\n{}\ntail\n".format(*report.markers("disk"), *report.markers("fast"))
    once = report.insert(page, "disk", "| new |\n")
    assert once == page.replace("\nold\n", "\n| new |\n")
    assert report.insert(once, "disk", "| new |") == once
    with pytest.raises(UsageError, match="once each"):
        report.insert("no markers", "fast", "x")


def test_the_page_in_the_repository_takes_both_reports() -> None:
    page = (Path(report.__file__).parents[1] / "docs" / "performance.md").read_text()
    for kind in ("disk", "fast"):
        assert "| new |" in report.insert(page, kind, "| new |")


# The command


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--size", "1GB"], "not a multiple of 256MiB"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--touch", "1"], "--touch must be 2 or more"),
        (["--only", "nothing-like-it"], "matches no contender"),
        (["--selfcheck", "--only", "fio-*"], "leave out --only"),
        (["--selfcheck", "--dir", "/nonexistent"], "is not a directory"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(report, "require_matplotlib", lambda: None)
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_the_file_system_is_that_of_the_longest_mount_point(tmp_path: Path) -> None:
    mountinfo = (
        "1 0 8:1 / / rw - ext4 /dev/a rw\n"
        f"2 1 8:2 / {tmp_path} rw shared:1 - xfs /dev/b rw\n"
        f"3 1 8:3 / {tmp_path}-other rw - btrfs /dev/c rw\n"
    )
    assert machine.file_system(tmp_path / "below", mountinfo) == "xfs"
    assert machine.file_system(Path("/"), mountinfo) == "ext4"


def test_the_setting_of_huge_pages_is_the_word_in_brackets(tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert machine.huge_pages(tmp_path / "enabled") == "madvise"
    assert machine.huge_pages(tmp_path / "of a kernel without them") == "never"


# The RAM-backed file system


def mounts_and_loops() -> tuple[str, str]:
    loops = subprocess.run(["losetup", "--all", "--noheadings"], capture_output=True, text=True, check=True).stdout
    own = [line for line in loops.splitlines() if "mlstor-bench-fast-" in line]
    return Path("/proc/self/mountinfo").read_text(), "\n".join(own)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
@pytest.mark.skipif(not shutil.which("mkfs.xfs"), reason="needs xfsprogs")
def test_the_ram_backed_file_system_waits_for_a_file_that_is_open_a_moment_longer() -> None:
    before = mounts_and_loops()
    with fastfs.ram_backed_xfs(320 * MIB, 0) as mount, (mount / "file").open("wb") as held:
        threading.Timer(0.5, os.close, [os.dup(held.fileno())]).start()
    assert mounts_and_loops() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
@pytest.mark.skipif(not shutil.which("mkfs.xfs"), reason="needs xfsprogs")
def test_the_ram_backed_file_system_is_taken_down_after_a_failure() -> None:
    before = mounts_and_loops()
    with pytest.raises(RuntimeError, match="in the middle"), fastfs.ram_backed_xfs(320 * MIB, 0) as mount:  # noqa: PT012
        assert machine.file_system(mount, Path("/proc/self/mountinfo").read_text()) == "xfs"
        (mount / "file").write_bytes(bytes(MIB))
        image = mount.parent / "memory" / "image"
        assert image.stat().st_blocks * 512 >= 320 * MIB  # all of its memory is there
        raise RuntimeError("in the middle")
    assert mounts_and_loops() == before
    assert not mount.parent.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_too_little_memory_is_said_before_anything_is_mounted() -> None:
    with pytest.raises(UsageError, match="smaller --size"), fastfs.ram_backed_xfs(1 << 50, 0):
        pytest.fail("mounted")


def test_available_memory_is_read_from_meminfo() -> None:
    assert fastfs.available_bytes("MemTotal: 9 kB\nMemAvailable:    2048 kB\n") == 2 * MIB
    with pytest.raises(ValueError, match="MemAvailable"):
        fastfs.available_bytes("MemTotal: 9 kB\n")
