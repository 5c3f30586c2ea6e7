"""Checkpoints on object stores: the same runs on a real SeaweedFS and a real AIStore."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import launchers
import pytest
from ais_support import bucket as ais_bucket
from checkpoint_s3_support import PARTED, s3
from checkpoint_support import MODULE, Bench, Ran
from s3_support import listed, make_bucket
from servers.aistore import Cluster, aistore
from servers.weed import signed_weed, weed

__all__ = ["aistore", "s3", "signed_weed", "weed"]


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
