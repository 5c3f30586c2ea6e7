"""Checkpoints on object stores: the same runs on a real SeaweedFS and a real AIStore."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import launchers
import pytest
from ais_support import bucket as ais_bucket
from checkpoint_support import MODEL, MODULE, Bench, Ran, Underway
from s3_support import forget_aws, listed, make_bucket, open_bucket, use_keys
from servers.aistore import Cluster, aistore
from servers.weed import OWNER, READER, Keys, Weed, running, signed_weed, weed

__all__ = ["aistore", "signed_weed", "weed"]

#: Of llama3-8b: optimizer files of 23 MB, which go in parts.
PARTED = "1/512"


class OnS3(Bench):
    """A bench whose runs go to a bucket of a test server."""

    def __init__(self, directory: Path, server: Weed, name: str = "") -> None:
        super().__init__(directory)
        self.server = server
        self.bucket = name or make_bucket(server)
        self.url = f"s3://{self.bucket}/ckpt"
        self.reach: tuple[str, ...] = ("--endpoint", server.endpoint)
        if not server.identities:
            self.reach += ("-o", "anonymous=yes")

    def __call__(self, *options: object, **how: Any) -> Ran:
        ran = self.run(*options, *self.reach, self.url, **how)
        assert ran.code == 0, ran.err
        return ran

    def refused(self, *options: object) -> str:
        ran = self.run(*options, *self.reach, self.url)
        assert ran.code == 2, (ran.code, ran.out, ran.err)
        return ran.sentence

    def clean(self, run_id: str, *words: str) -> Ran:
        return self.command("clean", run_id, *words)

    @property
    def store(self) -> Any:
        return open_bucket(self.server, self.bucket, prefix="ckpt/")

    @property
    def objects(self) -> dict[str, int]:
        store = self.store
        try:
            return listed(store)
        finally:
            store.close()

    def key(self, run_id: str, name: str, checkpoint: int = 1) -> str:
        return f"{run_id}/{MODEL}/global_epoch1_step{checkpoint}/{name}"

    def change(self, key: str, change: Callable[[bytearray], object]) -> None:
        """Write an object over with a changed copy of itself."""
        store = self.store
        try:
            data = bytearray(store.read(key))
            change(data)
            store.write(key, bytes(data))
        finally:
            store.close()

    def put(self, key: str, data: bytes) -> None:
        store = self.store
        try:
            store.write(key, data)
        finally:
            store.close()

    def slow(self) -> Underway:
        """A run of gigabytes that go in parts: it is far from its end when the first of them are there."""
        words = self.arguments("--run-id", "one", "--depth", 2, "--workers", 1, *self.reach, self.url, scale="1/8")
        return Underway(self, launchers.Running([sys.executable, *MODULE, *words], self.directory))

    def disturbed(self, signum: signal.Signals) -> Ran:
        """A run that gets a signal while it writes parts."""
        under_way = self.slow()
        under_way.wait_for_phase(0)
        under_way.wait_for(lambda: bool(self.unfinished()))
        under_way.send(signum)
        return under_way.wait(60)

    def unfinished(self) -> list[str]:
        store = self.store
        try:
            return [upload.key for upload in store.unfinished_uploads()]
        finally:
            store.close()


@pytest.fixture
def s3(weed: Weed, tmp_path: Path) -> OnS3:
    return OnS3(tmp_path, weed)


def test_a_checkpoint_goes_to_s3_and_comes_back_verified(s3):
    record = s3("--writes", 2, "--reads", 2).record
    assert [(p.op, p.checkpoint) for p in record.phases] == [("write", 1), ("write", 2), ("read", 1), ("read", 2)]
    nbytes = record.workload.nbytes
    assert nbytes > 8 * (30_000 + 180_000)
    assert [(phase.nbytes, sum(phase.ranks.nfiles)) for phase in record.phases] == [(nbytes, 16)] * 4
    assert [phase.verification.verified_nbytes for phase in record.phases] == [0, 0, nbytes, nbytes]
    assert not any(phase.verification.damaged_blocks for phase in record.phases)
    assert {phase.cached.verdict for phase in record.phases} == {"no"}
    assert "its own caches are unknown" in record.phases[2].cached.how
    assert s3.objects == {}


def test_the_record_says_what_was_asked_of_which_store(s3):
    ran = s3()
    record = ran.record
    (target,) = record.targets
    assert (target.path, target.fs_type, target.device) == (s3.url, "s3", s3.server.endpoint)
    assert (target.sharing, target.is_memory) == ("one-host", False)
    (store,) = record.stores
    assert (store.url, store.facts["endpoint"], store.facts["signed"]) == (s3.url, s3.server.endpoint, "anonymous")
    verdicts = {check.name: check.verdict for check in record.preflight.checks}
    assert verdicts == {"room": "unknown", "inodes": "unknown", "memory": "ok"}
    assert not {"direct", "backend"} & record.settings.keys()
    write, read = record.phases
    assert (write.histograms["put"].count, read.histograms["get"].count) == (16, 16)
    assert read.histograms["first byte"].count == 16
    assert write.requests.sent >= 16
    assert write.requests.retries == read.requests.retries == 0
    assert write.requests.connections > 0
    assert "requests" in ran.out


def test_objects_have_the_names_that_files_have(s3, tmp_path):
    on_s3 = s3("--reads", 0, "--run-id", "one")
    directory = tmp_path / "files"
    directory.mkdir()
    files = Bench(directory)
    files("--reads", 0, "--run-id", "one")
    assert on_s3.code == 0
    without = {name: size for name, size in files.files().items() if not name.endswith("manifest.json")}
    found = s3.objects
    assert found.pop("one/manifest.json") > 0
    assert found == without


def test_large_objects_go_and_come_in_parts(s3):
    record = s3("--subset", 8, "--only-ranks", "0-1", "--block", "5MiB", scale=PARTED).record
    write, read = record.phases
    largest = max(file.nbytes for file in s3.layout(PARTED).files(0))
    assert largest > 4 * (5 << 20)
    # of a large object begin and complete, and a request for each part
    assert write.requests.sent >= 2 * (2 + largest // (5 << 20))
    assert read.requests.sent >= 2 * (largest // (5 << 20))
    assert record.stores[0].facts["part_bytes"] == record.targets[0].block_bytes == 5 << 20
    assert read.verification.verified_nbytes == record.workload.nbytes
    assert s3.unfinished() == []


def test_amazons_connector_may_carry_the_objects(s3):
    pytest.importorskip("s3torchconnector")
    record = s3("-o", "client=s3torchconnector").record
    assert str(record.stores[0].facts["client"]).startswith("s3torchconnector")
    assert record.phases[1].verification.verified_nbytes == record.workload.nbytes
    assert record.phases[0].requests is None


def test_a_part_that_s3_does_not_take_is_refused(s3):
    assert "S3 takes" in s3.refused("--block", "1MiB")


def test_a_read_only_run_finds_what_another_wrote(s3):
    s3("--reads", 0, "--writes", 2, "--run-id", "monday", "--compressibility", 30)
    before = s3.objects
    record = s3("--writes", 0, "--reads", 3, "--run-id", "monday", "--rank-shift", 3).record
    assert [phase.checkpoint for phase in record.phases] == [1, 2, 1]
    assert {phase.verification.verified_nbytes for phase in record.phases} == {record.workload.nbytes}
    assert (record.workload.read_run, record.workload.compressibility_percent) == ("monday", 30)
    assert s3.objects == before


def test_ranks_of_an_mpirun_write_and_then_other_ones_read(s3):
    wrote = s3.mpi(2, "--reads", 0, "--run-id", "one", *s3.reach, s3.url)
    assert wrote.code == 0, wrote.err
    assert sorted(set(wrote.record.phases[0].ranks.process)) == [0, 1]
    read = s3.mpi(2, "--writes", 0, "--run-id", "one", "--rank-shift", 4, *s3.reach, s3.url)
    assert read.code == 0, read.err
    (phase,) = read.record.phases
    assert (phase.verification.verified_nbytes, phase.nbytes) == (read.record.workload.nbytes,) * 2


def test_a_process_without_ranks_has_nothing_to_do(s3):
    ran = s3.mpi(2, "--only-ranks", 3, *s3.reach, s3.url)
    assert ran.code == 0, ran.err
    assert [phase.ranks.rank for phase in ran.record.phases] == [[3], [3]]
    assert ran.record.phases[1].verification.verified_nbytes == ran.record.workload.nbytes


def test_hosts_share_a_bucket_and_may_have_prefixes_of_their_own(s3):
    if subprocess.run(["unshare", "-u", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no namespaces")
    mpi = launchers.find("openmpi")
    words = [*mpi.mpirun, *mpi.unbound]
    options = s3.arguments("--rank-shift", 4, *s3.reach, f"{s3.url}/{{host}}")
    for index in range(2):
        shell = f'hostname node-{index}; exec "$@"'
        rank = ["-n", "1", "unshare", "-u", "sh", "-c", shell, "sh", mpi.python, *MODULE, *options]
        words += [":", *rank] if index else rank
    done = launchers.run(words, s3.directory)
    assert done.returncode == 0, done.stderr
    record = Ran(done.returncode, done.stdout, done.stderr, s3.results).record
    urls = [f"{s3.url}/node-0", f"{s3.url}/node-1"]
    assert [(target.path, target.host, target.sharing) for target in record.targets] == [
        (urls[0], 0, "shared"),
        (urls[1], 1, "shared"),
    ]
    assert [store.url for store in record.stores] == urls
    assert record.phases[1].verification.verified_nbytes == record.workload.nbytes
    assert s3.objects == {}


def test_ranks_take_several_targets_in_turn(s3):
    other = make_bucket(s3.server)
    urls = (s3.url, f"s3://{other}/second/")
    ran = s3.run("--run-id", "one", "--keep", "--profile", "mlperf", "--writes", 1, "--reads", 1, "--verify",
                 "--pause", 0, *s3.reach, *urls)  # fmt: skip
    assert ran.code == 0, ran.err
    record = ran.record
    assert [target.path for target in record.targets] == [urls[0], urls[1].rstrip("/")]
    assert record.phases[1].verification.verified_nbytes == record.workload.nbytes
    there = [name for name in s3.objects if name != "one/manifest.json"]
    assert 0 < len(there) < 16
    cleaned = s3.clean("one", "--results", str(s3.results))
    assert cleaned.code == 0, cleaned.err
    assert cleaned.out.count("files of run one removed") == 2
    assert s3.objects == {}


def test_mlperf_writes_one_object_after_the_other_in_parts(s3):
    options = ("--profile", "mlperf", "--writes", 1, "--reads", 1, "--pause", 0, "--only-ranks", 0)
    record = s3(*options).record
    write, read = record.phases
    assert (record.workload.block_bytes, record.workload.depth, record.workload.workers) == (32 << 20, 16, 1)
    assert read.verification.verified_nbytes == 0
    assert write.requests.sent == 2 * 3  # each of two objects: begin, a part, complete
    assert read.requests.sent == 2


def test_several_ranks_share_mlperfs_parts(s3):
    options = ("--profile", "mlperf", "--writes", 1, "--reads", 1, "--pause", 0)
    record = s3(*options).record
    assert (record.workload.depth, record.workload.workers) == (2, 8)


def test_keep_leaves_the_newest_and_clean_removes_them(s3):
    said = s3("--writes", 3, "--reads", 1, "--keep", 1, "--run-id", "one").out
    words = f"mlstor clean one {s3.url} -o anonymous=yes --endpoint {s3.server.endpoint}"
    assert words in said.replace("\n", " ")
    names = s3.objects
    assert len(names) == 17
    assert all(name == "one/manifest.json" or "/global_epoch1_step3/" in name for name in names)
    s3.put("one/not-of-the-run", b"stays")
    cleaned = s3.clean("one", *s3.reach, s3.url)
    assert cleaned.code == 0, cleaned.err
    assert "16 files of run one removed" in cleaned.out
    assert f"{s3.url}/one/not-of-the-run stays" in cleaned.out
    assert s3.objects == {"one/not-of-the-run": 5}
    assert "no run 'one'" in s3.clean("one", *s3.reach, f"{s3.url}/elsewhere").sentence


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--direct", "require"), "about files"),
        (("--backend", "threads"), "about files"),
        (("--per-node",), "all hosts see the objects"),
        (("-o", "colour=red"), "not for this kind of store"),
        (("-o", "token=abc"), "AIS_AUTHN_TOKEN"),
        (("-o", "client=s3torchconnector", "--profile", "mlperf"), "choose"),
    ],
)
def test_options_that_can_not_be_meant_are_refused(s3, options, said):
    assert said in s3.refused(*options)


def test_kinds_of_places_are_not_mixed(s3):
    ran = s3.run(*s3.reach, s3.url, s3.target)
    assert (ran.code, "different kinds" in ran.sentence) == (2, True)
    ran = s3.run("--endpoint", s3.server.endpoint, s3.target)
    assert (ran.code, "for s3:// and ais://" in ran.sentence) == (2, True)


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
    words = s3.mpi_words(2, "--run-id", "one", "--depth", 1, "--workers", 1, *s3.reach, s3.url, scale="1/8")
    under_way = Underway(s3, launchers.Running(words, s3.directory))
    under_way.wait_for_phase(0, processes=2)
    under_way.wait_for(lambda: bool(s3.unfinished()))
    under_way.send(signal.SIGTERM)
    ran = under_way.wait(60)
    assert ran.code != 0
    assert ran.record.status == "partial"
    assert s3.unfinished() == []


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


@pytest.fixture
def on_ais(aistore: Cluster, tmp_path: Path) -> Iterator[Bench]:
    with ais_bucket(aistore, "ckpt") as store:
        bench = Bench(tmp_path)
        bench.store = store  # type: ignore[attr-defined]
        bench.url = store.url.rstrip("/")  # type: ignore[attr-defined]
        bench.reach = ("--endpoint", aistore.endpoint)  # type: ignore[attr-defined]
        yield bench


def test_a_checkpoint_goes_to_aistore_and_comes_back_verified(on_ais):
    options = ("--only-ranks", "0-1", "--block", "5MiB", "-o", "part_threshold_bytes=8MiB", "--run-id", "one", "--keep")
    ran = on_ais.run(*options, *on_ais.reach, on_ais.url, scale=PARTED)
    assert ran.code == 0, ran.err
    record = ran.record
    read = record.phases[1]
    assert (read.verification.verified_nbytes, read.verification.damaged_blocks) == (record.workload.nbytes, 0)
    assert record.stores[0].facts["reads"] == "direct"
    assert (record.targets[0].fs_type, record.targets[0].block_bytes) == ("ais", 5 << 20)
    names = listed(on_ais.store)
    key = next(name for name, size in names.items() if size > 20 << 20)
    data = bytearray(on_ais.store.read(key))
    data[-1] ^= 0x80
    on_ais.store.write(key, bytes(data))
    again = on_ais.run("--writes", 0, "--run-id", "one", "--only-ranks", "0-1", *on_ais.reach, on_ais.url, scale=PARTED)
    assert again.code == 3, again.err
    (damage,) = again.record.phases[0].verification.damage
    assert (damage.file, damage.offset // 4096) == (f"{on_ais.url}/{key}", (len(data) - 1) // 4096)
    cleaned = on_ais.command("clean", "one", *on_ais.reach, on_ais.url)
    assert cleaned.code == 0, cleaned.err
    assert listed(on_ais.store) == {}


def test_a_missing_bucket_of_aistore_is_named(aistore, tmp_path):
    ran = Bench(tmp_path).run("--endpoint", aistore.endpoint, "ais://no-such-bucket/x")
    assert ran.code == 2
    assert "no-such-bucket" in ran.sentence
