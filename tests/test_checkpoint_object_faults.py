"""Checkpoints on object stores that go wrong: damage, what is missing, signals, servers that die."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import launchers
import pytest
from checkpoint_s3_support import OnS3, s3
from checkpoint_support import Underway
from s3_support import forget_aws, use_keys
from servers.weed import OWNER, READER, Keys, Weed, running, signed_weed, weed

from mlstor.results.record import load

__all__ = ["s3", "signed_weed", "weed"]


def test_a_flipped_byte_is_found_and_named(s3):
    s3("--reads", 0, "--run-id", "one")
    name = s3.layout().files(2)[1].name
    s3.change(s3.key("one", name), lambda data: data.__setitem__(70_001, data[70_001] ^ 1))
    ran = s3.run("--writes", 0, "--run-id", "one", *s3.reach, s3.url)
    assert ran.code == 3, ran.err
    found = ran.record.phases[0].verification
    assert (found.damaged_blocks, found.damage_dropped) == (1, 0)
    (one,) = found.damage
    assert (one.rank, one.file) == (2, f"{s3.url}/{s3.key('one', name)}")
    assert (one.kind, one.offset // 4096) == ("corrupt", 70_001 // 4096)
    assert name in ran.sentence


def test_an_object_that_holds_another_ones_bytes_is_told(s3):
    s3("--reads", 0, "--writes", 2, "--run-id", "one")
    name = s3.layout().files(1)[0].name
    older = s3.store.read(s3.key("one", name, 1))
    s3.put(s3.key("one", name, 2), older)
    ran = s3.run("--writes", 0, "--reads", 2, "--run-id", "one", *s3.reach, s3.url)
    assert ran.code == 3, ran.err
    first, second = (phase.verification for phase in ran.record.phases)
    assert first.damaged_blocks == 0
    assert second.damaged_blocks == -(-len(older) // 4096)
    assert {(one.kind, one.found_checkpoint) for one in second.damage} == {("other-checkpoint", 1)}
    assert {one.offset % 4096 for one in second.damage} == {0}


def test_an_object_of_another_size_or_none_is_refused_before_the_first_byte(s3):
    s3("--reads", 0, "--run-id", "one")
    name = s3.layout().files(3)[0].name
    s3.change(s3.key("one", name), lambda data: data.pop())
    read = ("--writes", 0, "--run-id", "one")
    assert "it is damaged or was written over" in s3.refused(*read)
    s3.store.delete([s3.key("one", name)])
    assert "lacks" in s3.refused(*read)


def test_what_others_have_written_is_not_touched(s3):
    s3.put("one/theirs", b"1234")
    assert "nothing in it is touched" in s3.refused("--run-id", "one")
    s3("--reads", 0, "--run-id", "two")
    assert "its files are not written over" in s3.refused("--run-id", "two", "--model", "llama3-8b", "--scale", "1/99")
    assert s3.objects["one/theirs"] == 4


def test_a_missing_bucket_is_named(s3):
    s3.url = "s3://no-such-bucket-at-all/ckpt"
    assert "there is no bucket 'no-such-bucket-at-all'" in s3.refused()
    assert "there is no bucket 'no-such-bucket-at-all'" in s3.refused("--writes", 0, "--run-id", "one")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (Keys("NOBODY", "secret-of-nobody"), "does not know the access key"),
        (READER, "not allowed"),
    ],
)
def test_wrong_credentials_are_told_and_not_shown(signed_weed, tmp_path, monkeypatch, keys, said):
    bench = OnS3(tmp_path, signed_weed)
    forget_aws(monkeypatch)
    use_keys(monkeypatch, keys)
    ran = bench.run(*bench.reach, bench.url)
    assert ran.code == 2
    assert said in ran.sentence
    assert keys.secret_key not in ran.err + ran.out


def test_a_signed_run_keeps_its_keys_to_itself(signed_weed, tmp_path, monkeypatch):
    bench = OnS3(tmp_path, signed_weed)
    forget_aws(monkeypatch)
    use_keys(monkeypatch, OWNER)
    ran = bench("--keep", "--run-id", "one")
    assert ran.record.stores[0].facts["signed"] == "SigV4"
    store = bench.store
    manifest = store.read("one/manifest.json").decode()
    store.close()
    record = next(bench.results.glob("*/record.json")).read_text()
    for text in (manifest, record, ran.out, ran.err):
        assert OWNER.secret_key not in text
        assert OWNER.access_key not in text


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_write_aborts_its_uploads(s3, signum):
    ran = s3.disturbed(signum)
    assert ran.code == 128 + signum, ran.err
    assert "mlstor clean one" in ran.out + ran.err
    assert ran.record.status == "partial"
    assert s3.unfinished() == []
    cleaned = s3.clean("one", *s3.reach, s3.url)
    assert cleaned.code == 0, cleaned.err
    assert s3.objects == {}


def test_uploads_of_a_killed_run_are_removed_by_clean(s3):
    ran = s3.disturbed(signal.SIGKILL)
    assert ran.code == -signal.SIGKILL
    assert s3.unfinished()
    cleaned = s3.clean("one", *s3.reach, s3.url)
    assert cleaned.code == 0, cleaned.err
    assert s3.unfinished() == []
    assert s3.objects == {}


@contextmanager
def _before(server: Weed, wrong: str) -> Iterator[str]:
    """Stands before a server, and does something wrong with the first request of a kind for every object of a
    checkpoint: a PUT gets 503, the answer to a GET has one bit flipped. Its URL.
    """
    seen: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            first = self.command == wrong and self.path not in seen and "/global_epoch1_" in self.path
            if first:
                seen.add(self.path)
            if first and wrong == "PUT":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            behind = HTTPConnection(server.endpoint.removeprefix("http://"))
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            data = bytearray(answer.read())
            if first:
                data[5000] ^= 4
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            if self.command != "HEAD" and not answer.getheader("Content-Length"):
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            behind.close()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    class Proxy(ThreadingHTTPServer):
        request_queue_size = 64

    with Proxy(("127.0.0.1", 0), Handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{proxy.server_port}"
        proxy.shutdown()
        thread.join()


def test_what_is_sent_again_is_counted_and_told_apart(s3):
    with _before(s3.server, "PUT") as url:
        ran = s3.run("--endpoint", url, "-o", "anonymous=yes", s3.url)
    assert ran.code == 0, ran.err
    write, read = ran.record.phases
    assert (write.requests.retries, write.requests.retried_by) == (16, {"HTTP 503": 16})
    assert write.histograms["retried"].count == write.histograms["put"].count == 16
    assert (read.requests.retries, "retried" in read.histograms) == (0, False)
    assert "16 of them sent again" in " ".join(ran.out.split())


def test_what_was_damaged_on_its_way_alone_is_told_as_that(s3):
    with _before(s3.server, "GET") as url:
        ran = s3.run("--endpoint", url, "-o", "anonymous=yes", "--only-ranks", 1, "--run-id", "one", s3.url)
    assert ran.code == 3, ran.err
    found = ran.record.phases[1].verification
    assert (found.damaged_blocks, found.damage, found.damage_dropped) == (2, [], 2)
    said = " ".join((ran.out + ran.err).split())
    for file in s3.layout().files(1):
        assert f"{s3.url}/{s3.key('one', file.name)}: 1 damaged block of 4 KiB, of which 0 can be told" in said
    assert "damaged on its way" in said


def test_an_interrupted_mpirun_aborts_the_uploads_of_its_ranks(s3):
    """mpirun leaves its ranks half a second, which a busy machine may not give them: then clean has to do it."""
    for number in range(6):
        run_id = f"run{number}"
        words = s3.mpi_words(2, "--run-id", run_id, "--depth", 1, "--workers", 1, *s3.reach, s3.url, scale="1/8")
        under_way = Underway(s3, launchers.Running(words, s3.directory))
        under_way.wait_for_phase(0, processes=2)
        under_way.wait_for(lambda: bool(s3.unfinished()))
        under_way.send(signal.SIGTERM)
        assert under_way.wait().code != 0
        in_time = (s3.results / run_id / "record.json").exists() and not s3.unfinished()
        if in_time:
            assert load(s3.results / run_id / "record.json").status == "partial"
            return
        after = s3("--run-id", f"after{number}")
        assert f"run {run_id} had ended without a record" in after.out or (s3.results / run_id / "record.json").exists()
        assert s3.clean(run_id, *s3.reach, s3.url).code == 0
        assert s3.unfinished() == []
    pytest.fail("six times the ranks left uploads")


def test_a_stored_block_is_of_files_alone(s3, monkeypatch):
    profile = s3.directory / "config" / "mlstor" / "profile.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("block_bytes: 1MiB\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(s3.directory / "config"))
    record = s3().record
    assert record.targets[0].block_bytes == 8 << 20
    assert "block_bytes" not in record.settings


def test_a_server_that_dies_ends_the_run_and_is_named(tmp_path):
    with running(tmp_path / "weed") as server:
        bench = OnS3(tmp_path, server)
        under_way = bench.slow()
        under_way.wait_for(lambda: bool(bench.unfinished()))
        server.stop()
        ran = under_way.wait(60)
    assert ran.code == 1, ran.err
    assert "s3://" in ran.err or server.endpoint in ran.err
    assert ran.record.status == "failed"
