"""The AIStore store against a real cluster of one proxy and two targets."""

from __future__ import annotations

import errno
import io
import pickle
import tarfile
from typing import Any

import numpy
import pytest
from ais_support import NAMES, ask_target, batch, bucket, carry_out, read_all, write_all
from servers.aistore import Cluster, aistore  # noqa: F401

from mlstor._io import Pattern
from mlstor.errors import UsageError
from mlstor.storage import ais
from mlstor.storage.ais_batch import Member
from mlstor.storage.transfers import COMPLETION_DTYPE, Digest, Kind, Op, zeros

Store = ais.AisStore


@pytest.fixture(scope="module")
def cluster(aistore: Cluster) -> Cluster:  # noqa: F811
    return aistore


def shard(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


@pytest.mark.parametrize("via_proxy", [False, True], ids=["direct", "proxy"])
@pytest.mark.parametrize("direct_writes", [False, True], ids=["", "direct-writes"])
def test_any_name_is_written_read_listed_and_deleted(cluster: Cluster, via_proxy: bool, direct_writes: bool) -> None:
    contents = {name: name.encode() * 3 for name in NAMES}
    with bucket(cluster, "pre/fix", via_proxy=via_proxy, direct_writes=direct_writes) as store:
        for name, content in contents.items():
            store.write(name, content)
        assert {name: store.read(name) for name in NAMES} == contents
        assert {name: store.stat(name).nbytes for name in NAMES} == {n: len(c) for n, c in contents.items()}
        listed = {key: size for page in store.list() for key, size in zip(*page, strict=True)}
        assert listed == {name: len(content) for name, content in contents.items()}
        store.delete([*NAMES, "never was"])
        assert [page for page in store.list() if page.keys] == []


@pytest.mark.parametrize("name", ["a//b", "/a", "//"])
def test_names_that_aistore_loses_are_refused(cluster: Cluster, name: str) -> None:
    with bucket(cluster) as store, store.transfers(workers=1) as transfers:
        with pytest.raises(OSError, match="find it again") as caught:
            store.write(name, b"x")
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, name)
        with pytest.raises(OSError):
            write_all(transfers, ["fine", name], [b"x", b"y"])
        assert transfers.outstanding == 0
        assert list(store.list()) == []
        with pytest.raises(OSError):
            store.write("ends/", b"x")


def test_each_object_lies_where_the_map_says_and_is_read_there(cluster: Cluster) -> None:
    keys = [f"{name}-{number}" for name in NAMES for number in range(6)]
    with bucket(cluster) as store, store.transfers(workers=1) as transfers:
        write_all(transfers, keys, [key.encode() for key in keys])
        done, got = read_all(transfers, keys, 600)
        assert got == [key.encode() for key in keys]
        assert not done["redirect_ns"].any()
        urls = {target.id: target.urls[0] for target in store.cluster.targets}
        served = {store.access.servers[endpoint] for endpoint in done["endpoint"].tolist()}
        assert served == set(urls)
        name = str(store.describe()["bucket"])
        for key, endpoint in zip(keys, done["endpoint"].tolist(), strict=True):
            mine = store.access.servers[endpoint]
            assert {target: ask_target(url, name, key) for target, url in urls.items()} == {
                target: 200 if target == mine else 404 for target in urls
            }
        assert store.access.resent == 0


def test_by_the_proxy_each_transfer_is_redirected_and_the_way_timed_apart(cluster: Cluster) -> None:
    keys = [f"o{number}" for number in range(20)]
    with bucket(cluster, via_proxy=True) as store, store.transfers(workers=1) as transfers:
        assert store.describe()["reads"] == "proxy"
        written = write_all(transfers, keys, [b"x" * 70000] * 20)
        done, got = read_all(transfers, keys, 70000)
        assert got == [b"x" * 70000] * 20
        for completions in (written, done):
            assert (completions["kind"] == Kind.OK).all()
            assert (completions["redirect_ns"] > 0).all()
            assert (completions["attempt_ns"] + completions["redirect_ns"] <= completions["first_byte_ns"]).all()


def test_ranges_and_what_lies_beyond_the_end(cluster: Cluster) -> None:
    content = bytes(range(256)) * 40
    with bucket(cluster) as store:
        store.write("o", content)
        for offset, nbytes in ((0, 1), (5, 100), (10239, 1), (10000, 500), (0, 99999)):
            assert store.read("o", offset=offset, nbytes=nbytes) == content[offset : offset + nbytes]
        assert store.read("o", offset=10200) == content[10200:]
        assert store.read("o", offset=20000) == b""
        room = bytearray(300)
        assert store.read("o", room, 100, 300) == 300
        assert room == content[100:400]
        with pytest.raises(OSError):
            store.read("o", bytearray(100))


def test_an_object_of_no_bytes(cluster: Cluster) -> None:
    with bucket(cluster) as store, store.transfers(workers=1) as transfers:
        store.write("empty", b"")
        assert store.read("empty") == b""
        assert store.stat("empty").nbytes == 0
        done = carry_out(transfers, *batch(Op.STAT, ["empty"]))
        assert (int(done["kind"][0]), int(done["object_nbytes"][0])) == (Kind.OK, 0)


@pytest.mark.parametrize("digest", [Digest.CRC32C, Digest.XXH64])
def test_the_stores_checksum_of_a_whole_read_is_compared(cluster: Cluster, digest: Digest) -> None:
    content = b"checked" * 9000
    with bucket(cluster) as store, store.transfers(workers=1) as transfers:
        store.write("o", content)
        kind = "crc32c" if digest == Digest.CRC32C else "xxhash"
        if digest == Digest.CRC32C:
            name = str(store.describe()["bucket"])
            props = {"action": "set-bprops", "value": {"checksum": {"type": "crc32c"}}}
            cluster.call("PATCH", f"/v1/buckets/{name}", props)
            store.write("o", content + b".")
            content += b"."
        checksum = store.stat("o").checksum
        assert checksum is not None
        assert checksum[0].startswith(kind)
        done, got = read_all(transfers, ["o"], len(content), digest=digest)
        assert got == [content]
        assert done["flags"][0] & 2
        assert f"{int(done['digest_value'][0]):x}" == checksum[1].lstrip("0")
        # a range has no checksum of its own: AIStore sends that of the whole object with it
        part, _ = read_all(transfers, ["o"], 100, nbytes=100, digest=digest)
        assert part["kind"][0] == Kind.OK
        assert not part["flags"][0] & 2


def test_what_was_damaged_on_the_targets_disk_is_noticed(cluster: Cluster) -> None:
    content = b"to be damaged" * 1000
    with bucket(cluster) as store, store.transfers(workers=1) as transfers:
        store.write("damaged", content)
        (path,) = [path for path in cluster.directory.rglob("damaged") if path.is_file()]
        with path.open("r+b") as file:
            file.seek(100)
            file.write(b"!")
        done, _ = read_all(transfers, ["damaged"], len(content), digest=Digest.XXH64)
        assert done["kind"][0] == Kind.CHECKSUM
        with pytest.raises(OSError) as caught:
            store.read("damaged")
        assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize("digest", [Digest.CRC32C, Digest.XXH64])
@pytest.mark.parametrize("direct_writes", [False, True])
def test_a_write_with_a_wrong_checksum_is_refused(cluster: Cluster, digest: Digest, direct_writes: bool) -> None:
    with bucket(cluster, tries=1, direct_writes=direct_writes) as store, store.transfers(workers=1) as transfers:
        good = write_all(transfers, ["o"], [b"right"], digest=digest)
        assert good["kind"][0] == Kind.OK
        done = write_all(transfers, ["o"], [b"wrong"], digest=digest, flags=1, digest_value=12345)
        assert done["kind"][0] == Kind.HTTP
        (failure,) = transfers.failures()
        assert (failure.tag, "CHECKSUM" in failure.message.upper()) == (1000, True)
        assert store.read("o") == b"right"


def test_a_listing_of_many_pages_is_complete(cluster: Cluster) -> None:
    count = 21_000
    keys = [f"d{number % 7}/{number:05d}" for number in range(count)]
    with bucket(cluster) as store, store.transfers(workers=2, in_flight=16) as transfers:
        for start in range(0, count, 3000):
            part = keys[start : start + 3000]
            made, names = batch(Op.WRITE, part, nbytes=numpy.arange(len(part)) % 3)
            made["memory"] = 1
            done = carry_out(transfers, made, names, bytes(8))
            assert (done["kind"] == Kind.OK).all()
        listed: dict[str, int] = {}
        pages = 0
        for page in store.list():
            pages += 1
            for key, nbytes in zip(*page, strict=True):
                assert key not in listed
                listed[key] = nbytes
        assert pages >= 3
        assert set(listed) == set(keys)
        assert store.summary() == (count, sum(listed.values()))
        under = [key for page in store.list("d3/") for key in page.keys]
        assert sorted(under) == sorted(key for key in keys if key.startswith("d3/"))
        assert store.summary("d3/")[0] == len(under)


def test_a_large_object_is_written_in_parts_and_read_back(cluster: Cluster) -> None:
    pattern = Pattern(9, 1)
    nbytes = (5 << 20) + 12345
    options: dict[str, Any] = {"part_bytes": 1 << 20, "part_threshold_bytes": 2 << 20, "split_reads": True}
    with bucket(cluster, **options) as store, store.transfers(workers=2) as transfers:
        made, names = batch(Op.WRITE, ["large", "small"], nbytes=[nbytes, 4096], memory=2, place=[7, 8])
        written = carry_out(transfers, made, names, None, pattern)
        assert written["kind"].tolist() == [Kind.OK, Kind.OK]
        assert written["result"].tolist() == [nbytes, 4096]
        assert store.stat("large").nbytes == nbytes
        made, names = batch(Op.READ, ["large"], memory=2, place=7, object_nbytes=nbytes)
        done = carry_out(transfers, made, names, None, pattern)
        assert (int(done["result"][0]), int(done["damaged_blocks"][0])) == (nbytes, 0)
        assert transfers.counters().requests > 10
        expected = bytearray(nbytes)
        Pattern(9, 1, 7).fill(expected)
        assert store.read("large") == bytes(expected)


def test_an_upload_that_is_given_up_leaves_nothing(cluster: Cluster) -> None:
    options: dict[str, Any] = {"part_bytes": 1 << 20, "part_threshold_bytes": 2 << 20}
    with bucket(cluster, **options) as store:
        with store.transfers(workers=1, in_flight=1) as transfers:
            made, names = batch(Op.WRITE, ["never"], nbytes=8 << 30, memory=2)
            transfers.submit(made, names, None, Pattern(1))
            assert transfers.reap(zeros(1, COMPLETION_DTYPE), 1, 0.2) == 0
            assert transfers.counters().sent_bytes > 1 << 20
            transfers.cancel()
        with pytest.raises(FileNotFoundError):
            store.stat("never")
        assert list(store.list()) == []
        name = str(store.describe()["bucket"])
        parts = [path for path in cluster.directory.rglob("*") if path.is_file() and f"/{name}/" in str(path)]
        assert [path for path in parts if path.stat().st_size >= 1 << 20] == []


def test_many_objects_by_one_request_in_the_order_asked(cluster: Cluster) -> None:
    keys = [f"b/{name}-{number}" for name in NAMES for number in range(3)]
    contents = [key.encode() * (number + 1) for number, key in enumerate(keys)]
    with bucket(cluster, "p") as store, store.transfers(workers=1) as transfers, store.batches() as batches:
        write_all(transfers, keys, contents)
        order = numpy.random.default_rng(1).permutation(len(keys)).tolist()
        got = batches.get([keys[index] for index in order])
        assert [bytes(member) for member in got] == [contents[index] for index in order]
        assert not got.missing.any()
        assert got.nbytes == sum(map(len, contents))
        assert got.end_ns > got.start_ns
        ranged = batches.get([Member(keys[3], offset=2, nbytes=4), Member(keys[4], offset=3), keys[5]], colocated=1)
        assert [bytes(member) for member in ranged] == [contents[3][2:6], contents[4][3:], contents[5]]


def test_missing_members_of_a_batch_are_marked_or_an_error(cluster: Cluster) -> None:
    with bucket(cluster) as store, store.batches() as batches:
        store.write("a", b"A")
        store.write("empty", b"")
        store.write("b", b"B" * 600)
        asked = ["a", "gone", "empty", "ümläut-gone", "b", "x" * 150 + "/gone"]
        got = batches.get(asked, missing_ok=True)
        assert [bytes(member) for member in got] == [b"A", b"", b"", b"", b"B" * 600, b""]
        assert got.missing.tolist() == [False, True, False, True, False, True]
        with pytest.raises(OSError, match="missing") as caught:
            batches.get(asked)
        assert caught.value.errno in (errno.EIO, errno.ENOENT)  # it may also only mark them
        assert caught.value.filename
        with pytest.raises(OSError, match="max_soft_errs"):
            batches.get([f"gone{number}" for number in range(20)], missing_ok=True)


def test_a_member_of_an_archive_is_read_alone(cluster: Cluster) -> None:
    members = {f"dir/ü {number}.bin": bytes([number]) * (1000 * number) for number in range(1, 5)}
    with bucket(cluster) as store, store.transfers(workers=1) as transfers, store.batches() as batches:
        store.write("shard.tar", shard(members))
        for name, content in members.items():
            assert store.read_member("shard.tar", name) == content
        with pytest.raises(FileNotFoundError):
            store.read_member("shard.tar", "dir/none")
        names = b"shard.tar" + ais.member_query("dir/ü 3.bin").encode()
        made, _ = batch(Op.READ, ["shard.tar"], memory=1, room=4000, query_start=9, query_nbytes=len(names) - 9)
        buffer = bytearray(4000)
        done = carry_out(transfers, made, names, buffer)
        assert (int(done["result"][0]), bytes(buffer[:3000])) == (3000, members["dir/ü 3.bin"])
        got = batches.get([Member("shard.tar", name) for name in reversed(members)])
        assert [bytes(member) for member in got] == list(reversed(members.values()))


@pytest.mark.parametrize("via_proxy", [False, True], ids=["direct", "proxy"])
def test_what_is_missing_is_said_to_be(cluster: Cluster, via_proxy: bool) -> None:
    with bucket(cluster, via_proxy=via_proxy) as store, store.transfers(workers=1) as transfers:
        for ask in (store.stat, store.read):
            with pytest.raises(FileNotFoundError) as caught:
                ask("none")
            assert "none" in str(caught.value.filename)
        store.write("there", b"x")
        done, _ = read_all(transfers, ["there", "none"], 10)
        assert done["kind"].tolist() == [Kind.OK, Kind.HTTP]
        assert done["status"].tolist()[1] == 404
        (failure,) = transfers.failures()
        assert (failure.tag, failure.status) == (1001, 404)


def test_a_missing_bucket_is_said_to_be(cluster: Cluster) -> None:
    with ais.open("ais://no-such-bucket", endpoint=cluster.endpoint) as store:
        with pytest.raises(FileNotFoundError, match="no-such-bucket"):
            list(store.list())
        for ask in (lambda: store.write("o", b"x"), lambda: store.read("o"), store.summary, store.destroy_bucket):
            with pytest.raises(FileNotFoundError):
                ask()


def test_a_store_pickles_without_its_token(cluster: Cluster) -> None:
    with bucket(cluster, "p", token="not-checked-by-this-cluster") as store:
        store.write("o", b"x")
        packed = pickle.dumps(store)
        assert b"not-checked" not in packed
        assert "not-checked" not in repr(store) + str(store.describe())
        with pickle.loads(packed) as other:
            assert (other.url, other.read("o")) == (store.url, b"x")


def test_the_targets_memory_is_told_each_host_once(cluster: Cluster) -> None:
    with ais.open("ais://any", endpoint=cluster.endpoint) as store, open("/proc/meminfo") as meminfo:
        total = 1024 * int(meminfo.readline().split()[1])
        told = store.memory_bytes()
        assert told is not None
        assert 0 < told <= total


def test_an_address_where_nothing_or_something_else_answers() -> None:
    with pytest.raises(OSError):
        ais.open("ais://b", endpoint="http://127.0.0.1:9", tries=1)
    with pytest.raises(UsageError, match="URL"):
        ais.open("ais://b", endpoint="127.0.0.1:9")
