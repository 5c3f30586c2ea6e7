"""Streams on directories: real files, direct reads, full file systems, ranks, and interruptions."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from stream_support import MODULE, StreamBench

from mlstor import cli
from mlstor.results.record import load_any
from mlstor.stream.run import Runner

MIB = 1 << 20


@pytest.fixture
def stream(tmp_path: Path) -> StreamBench:
    target = tmp_path / "target"
    target.mkdir()
    return StreamBench(tmp_path, str(target))


def files(stream: StreamBench) -> dict[str, int]:
    root = Path(stream.url)
    found = {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}
    return {name: size for name, size in found.items() if ".mlstor-" not in name}


def test_files_are_written_read_verified_and_removed(stream):
    stream("--put", 100, "--min-size", 0, "--max-size", "300KiB", "--ops", 200, "--run-id", "one", "--prefix-dirs", 5)
    written = files(stream)
    assert len(written) == 200
    read = stream("--epochs", 2).stream
    phase = read.phases[0]
    assert (phase.ops["get"].count, phase.ops["get"].nbytes) == (400, 2 * sum(written.values()))
    assert read.targets[0].path == stream.url
    assert sum(path.nfiles for path in phase.paths) == 400
    verified = stream("--verify").stream.phases[0]
    assert verified.verification.verified_nbytes == sum(written.values())
    ranged = stream("--verify", "--read-bytes", "8KiB", "--range", "random", "--range-align", 4096).stream.phases[0]
    assert ranged.verification.damaged_blocks == 0
    assert ranged.verification.verified_nbytes == ranged.ops["get-range"].nbytes > 0
    stream("--clean", "one")
    assert list(Path(stream.url).iterdir()) == []


def test_files_that_were_there_stay(stream):
    (Path(stream.url) / "sub").mkdir()
    (Path(stream.url) / "sub/mine").write_bytes(b"x" * 5000)
    stream("--fill", 30, "--size", "10KiB", "--verify", "--epochs", 2, "--cleanup")
    assert files(stream) == {"sub/mine": 5000}
    assert [path.name for path in Path(stream.url).iterdir()] == ["sub"]


def test_a_mix_on_files_adds_up(stream):
    for index in range(40):
        (Path(stream.url) / f"{index}").write_bytes(bytes(1000))
    phase = stream("--get", 40, "--put", 40, "--head", 10, "--delete", 10, "--size", 3000, "--ops", 1000).stream.phases[
        0
    ]
    counts = {name: figures.count for name, figures in phase.ops.items()}
    assert sum(counts.values()) == 1000
    assert all(figures.failed == 0 for figures in phase.ops.values())
    assert len(files(stream)) == 40 + counts["put"] - counts["delete"]
    assert phase.ops["put"].nbytes == counts["put"] * 3000


def test_damage_on_disk_is_found_and_named(stream):
    stream("--put", 100, "--size", "64KiB", "--ops", 20, "--run-id", "one")
    victim = Path(stream.url, sorted(files(stream))[7])
    with victim.open("r+b") as file:
        file.seek(20480)
        file.write(bytes(4096))
    ran = stream.run("--verify")
    assert ran.code == 3
    assert victim.name in ran.sentence
    found = ran.stream.phases[0].verification
    assert [(one.offset, one.nbytes, one.kind) for one in found.damage] == [(20480, 4096, "zeroed")]


def test_a_full_file_system_is_counted_and_ends_the_run_with_errors(tmp_path, tmpfs_mount):
    target = tmpfs_mount(8 * MIB)
    stream = StreamBench(tmp_path, str(target))
    ran = stream.run("--put", 100, "--size", "1MiB", "--ops", 30, "--run-id", "one")
    assert ran.code == 1
    figures = ran.stream.phases[0].ops["put"]
    assert figures.errors == {"ENOSPC": figures.failed}
    assert figures.count + figures.failed == 30
    assert "ENOSPC" in ran.sentence
    assert ran.stream.phases[0].cached.verdict == "yes", "memory is not storage"
    stream("--clean", "one")
    assert list(target.iterdir()) == []


def test_a_file_that_vanished_is_an_error_of_its_kind(stream):
    for index in range(300):
        (Path(stream.url) / f"{index:03d}").write_bytes(bytes(1000))
    names = stream.directory / "names"
    names.write_text("".join(f"{index:03d}\t1000\n" for index in range(300)))
    stream("--list-file", names)
    os.unlink(Path(stream.url, "007"))  # which is not among the few that are looked up first
    ran = stream.run("--list-file", names)
    assert ran.code == 1
    assert ran.stream.phases[0].ops["get"].errors == {"ENOENT": 1}
    assert "007" in ran.sentence


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_partial_record_with_its_figures(stream, signum):
    for index in range(200):
        (Path(stream.url) / f"{index:03d}").write_bytes(bytes(10_000))
    under_way = stream.start([sys.executable, *MODULE, *stream.arguments("--duration", "60s", "--rate", 500)])
    under_way.wait_for(lambda: any(b'"progress"' in path.read_bytes() for path in journals(stream)))
    under_way.send(signum)
    ran = under_way.wait()
    assert ran.code == 128 + signum
    assert "Traceback" not in ran.err
    record = stream.newest
    assert record.status == "partial"
    assert not record.phases[0].complete
    assert not list(stream.results.glob("*/journal"))


def test_after_kill_9_cleaning_leaves_nothing_of_the_run(stream):
    (Path(stream.url) / "foreign").write_bytes(b"x")
    words = stream.arguments("--put", 100, "--size", "8MiB", "--ops", 200, "--prefix-dirs", 2, "--run-id", "killed")
    under_way = stream.start([sys.executable, *MODULE, *words])
    under_way.wait_for(lambda: len(list(Path(stream.url).glob("killed/*/0*"))) > 5)
    under_way.send(signal.SIGKILL)
    assert under_way.wait().code == -signal.SIGKILL
    assert list(Path(stream.url).rglob("*.mlstor-tmp")), "it was to be killed while it wrote"
    stream("--clean", "killed")
    assert [path.name for path in Path(stream.url).iterdir()] == ["foreign"]


def test_a_directory_is_made_if_that_is_asked_for_and_its_url_may_be_escaped(stream, tmp_path):
    stream.url = f"file://{tmp_path}/new%20one"
    assert "doesn't exist" in stream.refused("--fill", 5, "--size", 100)
    stream("-o", "create=yes", "--fill", 5, "--size", 100)
    assert len(list((tmp_path / "new one").rglob("0*"))) == 5
    assert stream("--verify").stream.phases[0].verification.verified_nbytes == 500


def test_the_record_says_how_a_directory_was_read(stream):
    (Path(stream.url) / "one").write_bytes(bytes(100_000))
    record = stream().stream
    [taken] = record.phases[0].paths
    assert record.stores[0].facts["direct"] == taken.direct
    assert record.stores[0].facts["reason"] != "nothing was read"
    record = stream("--pattern", "tokens", "--record", "4KiB").stream
    assert not {"direct", "reason"} & record.stores[0].facts.keys()
    assert record.phases[0].paths


def test_interrupted_ranks_leave_one_partial_record(stream):
    for index in range(200):
        (Path(stream.url) / f"{index:03d}").write_bytes(bytes(10_000))
    under_way = stream.start(stream.mpi_words(3, "--duration", "60s", "--rate", 500, "--run-id", "stopped"))
    under_way.wait_for(lambda: sum(b'"progress"' in path.read_bytes() for path in journals(stream)) == 3)
    under_way.send(signal.SIGINT)
    ran = under_way.wait(60)
    assert ran.code != 0
    assert "Traceback" not in ran.err
    if not list(stream.results.glob("*/record.json")):  # mpirun leaves process 0 half a second for it
        after = stream("--ops", 1)
        assert "run stopped had ended without a record" in after.out
    record = load_any(stream.results / "stopped")
    assert record.status == "partial"
    assert not record.phases[0].complete


def journals(stream: StreamBench) -> list[Path]:
    return list(stream.results.glob("*/journal/*.jsonl"))


def test_ranks_share_the_objects_and_their_record(stream):
    written = stream.mpi(3, "--put", 100, "--size", 5000, "--ops", 100, "--run-id", "one")
    assert written.code == 0, written.err
    assert len(files(stream)) == 100
    read = stream.mpi(2, "--verify", "--epochs", 2)
    assert read.code == 0, read.err
    phase = read.stream.phases[0]
    assert phase.ops["get"].count == 200
    assert phase.verification.verified_nbytes == 200 * 5000
    alone = stream.mpi(3, "--epoch-scope", "client")
    assert alone.stream.phases[0].ops["get"].count == 300
    limited = stream.mpi(3, "--ops", 50)
    assert limited.stream.phases[0].ops["get"].count == 50


def test_ranks_with_directories_of_their_own_have_objects_of_their_own(stream):
    for rank in range(2):
        Path(stream.url, f"drive{rank}").mkdir()
    stream.url += "/drive{local_rank}"
    written = stream.mpi(2, "--put", 100, "--size", 1000, "--ops", 31, "--run-id", "one")
    assert written.code == 0, written.err
    both = [len([*Path(stream.url.replace("{local_rank}", str(rank)), "one").glob("0*")]) for rank in range(2)]
    assert both == [16, 15]
    read = stream.mpi(2, "--verify")
    assert read.code == 0, read.err
    assert read.stream.phases[0].ops["get"].count == 31
    listed = stream.mpi(2)
    assert listed.stream.phases[0].ops["get"].count == 31


@pytest.mark.parametrize(
    ("url", "said"),
    [("/no/such/place", "/no/such/place"), ("gs://bucket", "unknown"), ("{drive}", "{rank}, {local_rank} and {host}")],
)
def test_a_place_that_can_not_be_used_is_one_sentence(tmp_path, url, said):
    ran = StreamBench(tmp_path, url).run()
    assert ran.code == 2
    assert said in ran.sentence


def test_the_module_runs_by_name(stream):
    (Path(stream.url) / "one").write_bytes(bytes(10))
    under_way = stream.start([sys.executable, *MODULE, *stream.arguments()])
    ran = under_way.wait()
    assert ran.code == 0, ran.err
    assert "get" in ran.out


def test_checksums_that_nobody_keeps_are_not_said_to_be_compared(stream):
    Path(stream.url, "one").write_bytes(b"x")
    ran = stream.run("--verify", "checksum")
    assert ran.code == 2
    assert "keeps no checksums" in ran.sentence


@pytest.mark.parametrize("name", ["/etc/hostname", "../one", "one/"])
def test_a_list_of_names_that_lie_elsewhere_is_refused_in_a_sentence(stream, name):
    names = stream.directory / "names"
    names.write_text(f"{name}\t1\n")
    ran = stream.run("--list-file", names)
    assert ran.code == 2
    assert "a name in the catalog can't be one" in ran.sentence


def test_a_failure_with_a_name_that_is_not_utf_8_is_told(stream, monkeypatch):
    bad = os.path.join(os.fsencode(stream.url), b"b\xff")
    for path in (bad, os.path.join(os.fsencode(stream.url), b"good")):
        with open(path, "wb") as file:
            file.write(bytes(1000))
    phase = Runner._phase

    def without(self: Runner, *others: Any) -> None:
        os.unlink(bad)
        phase(self, *others)

    monkeypatch.setattr(Runner, "_phase", without)
    assert cli.main(["stream", "--no-live", "--results", str(stream.results), stream.url]) == 1
    (failure,) = stream.newest.phases[0].failures
    assert failure.url.endswith("b\\udcff")
