"""The stream benchmark's lists, verdicts, sweeps and small helpers. Nothing here looks at how fast anything is."""

from __future__ import annotations

import json
import random
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks lie in the repository, not in the package")

from benchmarks.child import run_child
from benchmarks.harness import BenchmarkError, Contender, Sample
from benchmarks.report import markers
from benchmarks.streams import __main__ as command, catalogs, contenders, files, memory, ratios, report, small_files
from benchmarks.streams.goals import goals
from benchmarks.streams.job import StreamJob
from benchmarks.streams.parts import Place, Sweep, key_of, sweep, sweep_for, wanted
from benchmarks.streams.servers import Server
from mlstor.errors import UsageError
from mlstor.storage.store import Page
from mlstor.stream.catalog import Catalog

MIB = 1 << 20
EVERYTHING = contenders.Choice()


def place(server: str, directory: Path = Path()) -> Place:
    return Place(server, "s3://bench", "http://127.0.0.1:1", directory, 2.0, 0, 7, lambda _: None)


def sample(rate: float, cpu_s: float = 0.1, nbytes: int = 64 << 10) -> Sample:
    return Sample(1.0, cpu_s, int(rate) * nbytes, int(rate))


# Who takes part


@pytest.mark.parametrize("server", contenders.SERVERS)
def test_every_key_is_there_once_and_matches_itself(server: str) -> None:
    clients, parts = contenders.chosen(server, EVERYTHING)
    keys = contenders.keys(server, clients, parts, EVERYTHING)
    assert keys
    assert len(set(keys)) == len(keys)
    assert all(wanted(key, key) for key in keys)


def test_get_and_put_of_every_size_are_measured_on_both_servers() -> None:
    for server, peers in (("s3", 4), ("ais", 3)):
        clients, _ = contenders.chosen(server, EVERYTHING)
        for size in ("4KiB", "64KiB", "1MiB", "8MiB", "256MiB"):
            for op in ("get", "put"):
                there = [entry.client for entry, label in clients if label == size and entry.op == op]
                assert len(there) >= peers, (server, size, op)


def test_every_function_of_a_contender_exists() -> None:
    names = {entry.function for entry in contenders.ENTRIES} | {"streams.memory:streamed", "streams.memory:stalled"}
    names |= {"streams.files:fio", "streams.files:dataloader", "streams.catalogs:opened"}
    for name in names:
        module, function = name.split(":")
        source = Path(command.__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py").read_text()
        assert f"\ndef {function}(job: " in source, name


def test_where_a_goal_is_there_are_all_seconds_and_the_same_client_twice() -> None:
    for server in ("s3", "ais"):
        clients, _ = contenders.chosen(server, EVERYTHING)
        bound = contenders.bind(clients, Server("s3://bench", "http://127.0.0.1:1", "s3://puts"), place(server))
        twins = [one for one in bound if one.twin_of]
        assert {one.group for one in twins} == {group for group in contenders.WITH_GOALS if group.startswith(server)}
        assert {one.twin_of for one in twins} <= {one.key for one in bound}
        assert all(one.label.startswith("mlstor") for one in twins)
    assert contenders.job_of(place("s3"), "get", "8MiB").seconds == 2.0
    assert contenders.job_of(place("s3"), "get", "1MiB").seconds == pytest.approx(0.6)


def test_sizes_operations_and_patterns_choose_together() -> None:
    clients, parts = contenders.chosen("s3", contenders.Choice("*KiB*boto3", ("4KiB", "8MiB"), ("put",)))
    assert [(entry.client, entry.op, size) for entry, size in clients] == [("boto3", "put", "4KiB")]
    assert parts == []
    with pytest.raises(UsageError, match="5KiB: there are 4KiB"):
        contenders.chosen("s3", contenders.Choice("", ("5KiB",)))
    with pytest.raises(UsageError, match="'nothing' matches no contender"):
        contenders.chosen("s3", contenders.Choice("nothing"))


def test_only_sizes_that_are_read_are_written_first() -> None:
    clients, parts = contenders.chosen("s3", contenders.Choice("*put*"))
    assert contenders.to_fill(clients, parts) == []
    clients, parts = contenders.chosen("s3", contenders.Choice("*stream*,*get-4KiB*"))
    assert contenders.to_fill(clients, parts) == ["4KiB", "256MiB"]


def test_keys_are_dealt_to_directories_where_these_are_asked_for() -> None:
    job = StreamJob("d", 1, 0, prefix="p", nobjects=40)
    assert job.key(17) == "p/000017"
    assert replace(job, directories=16).key(17) == "p/01/000017"


# Verdicts


def test_fewer_than_five_rounds_give_a_figure_and_no_verdict() -> None:
    ours, theirs = [sample(200)] * 5, [sample(100)] * 5
    assert ratios.rate({"a": ours, "b": theirs}, "w", "a", ["b"], 1.5).met is True
    assert ratios.rate({"a": ours, "b": theirs}, "w", "a", ["b"], 2.5).met is False
    short = ratios.rate({"a": ours[:4], "b": theirs[:4]}, "w", "a", ["b"], 1.5)
    assert (short.met, short.figure) == (None, "2.00, of 4 rounds")


def test_a_ratio_to_the_best_is_not_given_when_a_peer_is_missing() -> None:
    keys = [key_of("s3", "get", "64KiB", client) for client in ("mlstor", "boto3", "obstore, threads")]
    there = {keys[0]: [sample(200)] * 5, keys[1]: [sample(100)] * 5}
    row = ratios.rate(there, "w", keys[0], keys[1:], 1.0)
    assert (row.met, row.figure) == (None, "not measured: without s3-get-64KiB-obstore-threads")
    assert ratios.cost(there, "w", keys[0], keys[1:], 1.0).met is None
    whole = {**there, keys[2]: [sample(400)] * 5}
    row = ratios.rate(whole, "w", keys[0], keys[1:], 1.0)
    assert (row.met, row.figure) == (False, "0.50 (obstore-threads)")
    assert ratios.rate({}, "w", keys[0], keys[1:], 1.0).figure == "not measured"


def test_costs_are_compared_per_operation_with_the_cheapest_peer() -> None:
    samples = {
        "s3-get-x-a": [sample(100, 0.1)] * 5,
        "s3-get-x-b": [sample(50, 0.1)] * 5,
        "s3-get-x-c": [sample(100, 0.4)] * 5,
    }
    row = ratios.cost(samples, "w", "s3-get-x-a", ["s3-get-x-b", "s3-get-x-c"], 0.5)
    assert (row.met, row.figure) == (True, "0.50 (b)")


@pytest.mark.parametrize("server", contenders.SERVERS)
def test_an_empty_run_has_all_rows_and_none_is_met(server: str) -> None:
    rows = goals({}, server)
    assert rows
    assert all(row.met is None and row.figure == "not measured" for row in rows)


@pytest.mark.parametrize(
    ("peak_mib", "ahead_mib", "met"),
    [(530, 256, [True, True]), (600, 513.5, [False, False]), (530, 0, [True, False])],
)
def test_memory_is_bounded_by_the_setting_and_a_stall_must_show_something(
    peak_mib: float, ahead_mib: float, met: list[bool]
) -> None:
    streamed, stalled = memory.keys("s3")
    samples = {
        streamed: [Sample(1.0, 1.0, 1, 6, 100 * MIB), Sample(1.0, 1.0, 1, 6, int(peak_mib * MIB))],
        stalled: [Sample(1.0, 1.0, int(ahead_mib * MIB), 6, 0)],
    }
    assert [row.met for row in memory.goals(samples, "s3")] == met


@pytest.mark.parametrize(("open_s", "heap_bytes", "met"), [(0.9, 10**6, [True, True]), (1.1, 10**8, [False, False])])
def test_the_catalog_has_a_second_and_no_heap_per_object(open_s: float, heap_bytes: int, met: list[bool]) -> None:
    (key,) = catalogs.keys("files")
    samples = {key: [Sample(open_s, 0.1, 1, 1, heap_bytes)] * 5}
    assert [row.met for row in catalogs.goals(samples, "files")] == met


# Sweeps


def test_a_lucky_first_look_does_not_win_a_sweep() -> None:
    rates = {"lucky": [9, 1, 1], "steady": [5, 5, 5], "slow": [4, 4, 4], "last": [2]}
    looks = {name: iter(values) for name, values in rates.items()}
    where = place("files")
    settings = {name: lambda name=name: sample(next(looks[name])) for name in rates}
    assert sweep_for(2, "it", settings, where) == ["steady", "slow"]
    (found,) = where.sweeps
    assert {name: len(values) for name, values in found.rates.items()} == {
        "lucky": 3, "steady": 3, "slow": 3, "last": 1,
    }  # fmt: skip
    again = {name: lambda name=name: sample(rates[name][0]) for name in rates}
    assert sweep("it", again, where) == "lucky"


# The children


def test_a_catalog_written_by_columns_is_the_one_that_is_built(tmp_path: Path) -> None:
    n = 2500
    catalogs.build(tmp_path / "fast", n, per_prefix=1000)
    names = [f"{index // 1000:07d}/{index % 1000:07d}" for index in range(n)]
    pages = [Page(names, [catalogs.OBJECT_BYTES] * n)]
    Catalog.build(pages, tmp_path / "own")
    assert (tmp_path / "fast").read_bytes() == (tmp_path / "own").read_bytes()


def test_opening_a_catalog_of_other_objects_is_an_error(tmp_path: Path) -> None:
    catalogs.build(tmp_path / "catalog", 3000)
    job = StreamJob(str(tmp_path / "catalog"), 0, 0, nobjects=3000)
    found = run_child("streams.catalogs:opened", job)
    assert found.nbytes == (tmp_path / "catalog").stat().st_size
    assert found.detail["objects"] == "3,000"
    with pytest.raises(BenchmarkError, match="has 3000"):
        run_child("streams.catalogs:opened", replace(job, nobjects=3001))


def test_bytes_on_this_process_connections_are_counted() -> None:
    before = memory.received_bytes()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        other, _ = listener.accept()
        with other:
            other.sendall(bytes(100_000))
            left = 100_000
            while left:
                left -= len(one.recv(left))
            assert memory.received_bytes() - before == 100_000


@pytest.fixture
def some_files(tmp_path: Path) -> files.FilesJob:
    job = files.FilesJob(str(tmp_path), 4096, 0, prefix="p", nobjects=48, directories=16, in_flight=8, threads=2)
    for number in range(job.nobjects):
        path = tmp_path / job.key(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.randbytes(job.nbytes))
    return job


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
@pytest.mark.parametrize("threads", [1, 4, 16])
def test_fio_reads_every_file_once_whatever_its_jobs(some_files: files.FilesJob, threads: int) -> None:
    found = run_child("streams.files:fio", replace(some_files, engine="psync", open_files=4, threads=threads))
    assert (found.operations, found.nbytes) == (48, 48 * 4096)
    with pytest.raises(BenchmarkError, match="fio read"):
        run_child("streams.files:fio", replace(some_files, engine="psync", open_files=4, nobjects=47))


def test_jobs_of_fio_share_the_directories_and_the_depth() -> None:
    job = files.FilesJob("/d", 4096, 0, prefix="p", directories=16, in_flight=64, engine="io_uring", threads=4)
    words = files.command(job)
    opened = [word for word in words if word.startswith("--opendir")]
    assert sorted(opened) == [f"--opendir=/d/p/{number:02d}" for number in range(16)]
    assert "--iodepth=16" in words
    assert len([word for word in words if word.startswith("--name")]) == 4


def test_a_dataloader_reads_every_file_and_its_workers_cpu_counts(some_files: files.FilesJob) -> None:
    pytest.importorskip("torch")
    found = run_child("streams.files:dataloader", some_files)
    assert (found.operations, found.nbytes) == (48, 48 * 4096)
    assert found.cpu_s > 0
    with pytest.raises(BenchmarkError, match="gave"):
        run_child("streams.files:dataloader", replace(some_files, nbytes=4097))


# Report and command


def whole_run() -> report.Run:
    def bound(key: str, group: str, label: str, twin_of: str = "") -> Contender:
        return Contender(key, group, label, lambda: sample(1), twin_of=twin_of)

    ours, theirs = key_of("s3", "get", "64KiB", "mlstor"), key_of("s3", "get", "64KiB", "boto3")
    streamed, stalled = memory.keys("s3")
    chosen = [
        bound(ours, "s3 get 64KiB", "mlstor"),
        bound(theirs, "s3 get 64KiB", "boto3"),
        bound(ours + "-again", "s3 get 64KiB", "mlstor (again)", ours),
        bound(streamed, "s3 stream 256MiB", memory.STREAMED),
        bound(stalled, "s3 stream 256MiB", memory.STALLED),
    ]
    large = Sample(1.0, 1.0, 512 * MIB, 2, 300 * MIB, {"setting": "in_flight_bytes 256 MiB, the default"})
    samples = {one.key: [large if "stream" in one.key else sample(1000)] * 5 for one in chosen}
    return report.Run("s3", chosen, samples, {"kernel": "6.1"}, [Sweep("it", {"x": [1.0], "y": [2000.0]}, ["y"])])


def test_a_report_holds_self_checks_goals_tables_and_sweeps_and_its_record_is_json(tmp_path: Path) -> None:
    text, data = report.save(whole_run(), tmp_path / "out")
    found = text.read_text()
    assert "get 64KiB mlstor (again): ratio 1.000 (1.00-1.00), within 10% of 1" in found
    assert "| get 64KiB | boto3 | 1,000 | 1,000-1,000 | 0.07 | 100 | 1.526 |" in found
    assert "| ObjectStream | in_flight_bytes 256 MiB, the default | 0.54 | 300 | - |" in found
    assert "| ObjectStream, stalled | in_flight_bytes 256 MiB, the default | - | 300 | 512.0 |" in found
    assert "Sweep of it before the rounds, objects/s: x: 1; y: 2,000. Best: y." in found
    assert found.count("ObjectStream |") == 1  # not in the table of rates too
    record = json.loads(data.read_text())
    assert record["self_checks"][0]["passed"] is True
    assert record["sweeps"][0]["chosen"] == ["y"]


@pytest.mark.parametrize("server", contenders.SERVERS)
def test_the_page_in_the_repository_takes_the_report_of_each_server(server: str, tmp_path: Path) -> None:
    page = Path(report.__file__).parents[2] / "docs" / "performance.md"
    (tmp_path / "performance.md").write_text(page.read_text())
    report.publish(replace(whole_run(), server=server), tmp_path)
    begin, end = markers(f"streams {server}")
    assert "Sweep of it before the rounds" in (tmp_path / "performance.md").read_text().split(begin)[1].split(end)[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rounds", "0"], "must be positive"),
        (["--dir", "/nonexistent"], "is not a directory"),
        (["--publish", "--rounds", "4"], "--publish takes --rounds 5 or more"),
        (["--sizes", "5KiB"], "there are 4KiB"),
        (["--ops", "delete"], "there are get, put"),
        (["--only", "nothing-like-it"], "matches no contender"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_the_list_of_contenders_needs_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--server", "files", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert set(small_files.keys("files")) <= set(listed)
