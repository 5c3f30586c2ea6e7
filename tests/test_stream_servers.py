"""Streams on a real SeaweedFS and a real AIStore: alone, as ranks of an mpirun, interrupted, a server that dies."""

from __future__ import annotations

import shlex
import signal
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import launchers
import pytest
from ais_support import bucket
from s3_support import make_bucket
from servers.aistore import Cluster, aistore
from servers.weed import Weed, running, weed
from stream_support import MODULE, StreamBench

__all__ = ["aistore", "weed"]


@pytest.fixture
def on_s3(weed: Weed, tmp_path: Path) -> StreamBench:
    return _on(weed, tmp_path)


def _on(server: Weed, directory: Path) -> StreamBench:
    bench = StreamBench(directory, f"s3://{make_bucket(server)}/train")
    bench.options = ("--endpoint", server.endpoint, "-o", "anonymous=yes")
    return bench


@pytest.fixture
def on_ais(aistore: Cluster, tmp_path: Path) -> Iterator[StreamBench]:
    with bucket(aistore) as store:
        bench = StreamBench(tmp_path, store.url.rstrip("/"))
        bench.options = ("--endpoint", aistore.endpoint)
        yield bench


def _keys(server: Weed, bench: StreamBench, query: str) -> str:
    name = bench.url.removeprefix("s3://").split("/")[0]
    with urllib.request.urlopen(f"{server.endpoint}/{name}?{query}") as answer:
        text: str = answer.read().decode()
    return text


def test_s3_is_written_listed_read_verified_and_cleaned(on_s3, weed):
    sizes = ("--min-size", 1, "--max-size", "200KiB")
    wrote = on_s3("--put", 100, *sizes, "--ops", 300, "--run-id", "one", "--prefix-dirs", 4)
    listed = on_s3("--epochs", 2).stream
    assert (listed.workload.catalog_source, listed.workload.catalog_count) == ("listing", 300)
    assert [one.count for one in listed.phases[0].epochs] == [300, 300]
    written = listed.phases[0].nbytes // 2
    verified = on_s3("--verify").stream.phases[0]
    assert (verified.verification.verified_nbytes, verified.verification.damaged_blocks) == (written, 0)
    checked = on_s3("--verify", "checksum").stream.phases[0].ops["get"]
    assert (checked.count, checked.failed) == (300, 0)
    ranged = on_s3("--verify", "--read-bytes", 8192, "--range", "random", "--range-align", 512).stream.phases[0]
    assert ranged.verification.verified_nbytes == ranged.ops["get-range"].nbytes > 0
    words = shlex.split(wrote.out.rpartition("`")[0].rpartition("`")[2])
    assert words[:3] == ["mlstor", "stream", "--clean"]
    done = launchers.run(
        [sys.executable, "-m", *words], on_s3.directory
    )  # as it stands there: it says all that is needed
    assert "300 objects of run one removed" in done.stdout, done.stderr
    assert "<Key>" not in _keys(weed, on_s3, "list-type=2")


def test_a_mix_on_s3_writes_in_parts_and_leaves_what_was_there(on_s3, weed):
    on_s3("--put", 100, "--size", 1000, "--ops", 20, "--run-id", "kept")
    before = _keys(weed, on_s3, "list-type=2").count("<Key>")
    options = ("--get", 50, "--put", 30, "--head", 10, "--delete", 10, "--size", "18MiB", "--ops", 40, "--cleanup")
    phase = on_s3(*options).stream.phases[0]
    assert sum(one.count for one in phase.ops.values()) == 40
    assert phase.ops["put"].nbytes == phase.ops["put"].count * (18 << 20)
    assert _keys(weed, on_s3, "list-type=2").count("<Key>") == before
    assert "<Upload>" not in _keys(weed, on_s3, "uploads=")


def test_ranks_read_s3_once_together(on_s3):
    on_s3.mpi(3, "--put", 100, "--size", 5000, "--ops", 100, "--run-id", "one")
    ran = on_s3.mpi(3, "--verify", "--epochs", 2)
    assert ran.code == 0, ran.err
    phase = ran.stream.phases[0]
    assert phase.ops["get"].count == 200
    assert sorted(phase.ranks.nfiles) == [66, 66, 68]
    assert phase.verification.verified_nbytes == 200 * 5000


def test_an_interrupted_stream_leaves_a_partial_record_and_no_upload(on_s3, weed):
    words = [sys.executable, *MODULE, *on_s3.arguments("--put", 100, "--size", "40MiB", "--duration", "60s")]
    words += ["--run-id", "stopped"]
    running_now = on_s3.start(words)
    running_now.wait_for(lambda: "<UploadId>" in _keys(weed, on_s3, "uploads="))
    running_now.send(signal.SIGINT)
    ran = running_now.wait(60)
    assert ran.code == 130
    assert "Traceback" not in ran.err
    assert "<UploadId>" not in _keys(weed, on_s3, "uploads=")
    record = on_s3.run("--clean", "stopped")
    assert record.code == 0, record.err
    found = on_s3.newest
    assert found.status == "partial"
    assert not found.phases[0].complete
    assert "<Key>" not in _keys(weed, on_s3, "list-type=2")


@pytest.mark.slow
def test_a_server_that_dies_is_counted_and_the_run_goes_on_or_ends_with_errors(tmp_path):
    with running(tmp_path / "own") as server:
        bench = _on(server, tmp_path)
        bench("--put", 100, "--size", 1000, "--ops", 50, "--run-id", "one")
        words = [sys.executable, *MODULE, *bench.arguments("--duration", "3s", "-o", "tries=1")]
        under_way = bench.start(words)
        under_way.wait_for(lambda: any(bench.results.glob("*/journal/0.jsonl")))
        server.stop()
        ran = under_way.wait(60)
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert {"connect", "reset"} & set(bench.newest.phases[0].ops["get"].errors)


def test_aistore_is_written_read_verified_and_cleaned_by_target(on_ais):
    on_ais("--put", 100, "--size", "64KiB", "--ops", 200, "--run-id", "one")
    phase = on_ais("--verify", "--epochs", 2).stream.phases[0]
    figures = phase.ops["get"]
    assert (figures.count, phase.verification.verified_nbytes) == (400, 400 << 16)
    assert sum(one.count for one in figures.targets) == 400
    assert len([one for one in figures.targets if one.count]) == 2
    checked = on_ais("--verify", "checksum").stream.phases[0].ops["get"]
    assert (checked.count, checked.compared) == (200, 200)
    record = on_ais("--epochs", 1).stream
    assert record.phases[0].server_cache.verdict == "possible"
    assert record.workload.server_memory_source == "the cluster's own sysinfo"
    assert "200 objects of run one removed" in on_ais("--clean", "one").out


def test_aistore_by_its_proxy_has_the_way_there_apart(on_ais):
    on_ais("--put", 100, "--size", 4096, "--ops", 40, "-o", "via_proxy=yes")
    figures = on_ais("-o", "via_proxy=yes").stream.phases[0].ops["get"]
    assert figures.redirect.count == figures.count == 40
    assert figures.redirect.max_ns < figures.total.max_ns
