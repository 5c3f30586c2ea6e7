"""Objects as blobs on real servers: the same as files, in parts and ranges; nothing is left of what was broken off."""

from __future__ import annotations

import errno
import os
import pickle
import re
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from blob_support import LARGE, Case, Row, cases, check_round_trip, digest, noise_array, one_piece
from engine_support import python
from http_faults import SERVER_ERROR, FaultServer, Request, body_of
from hypothesis import given, settings, strategies as st
from s3_support import OWNER, bucket, listed, use_keys
from servers.weed import Weed, signed_weed  # noqa: F401
from test_engine_fork import in_child

from mlstor.blob import compose, download, upload
from mlstor.blob.target import open_blob, open_directory
from mlstor.blob.types import Blob, LatePiece, make_pieces
from mlstor.errors import UsageError
from mlstor.storage import s3
from mlstor.storage.s3 import S3Store

MIB = 1 << 20
FEW = settings(max_examples=8)


@pytest.fixture
def store(signed_weed: Weed) -> Iterator[S3Store]:  # noqa: F811
    with bucket(signed_weed, prefix="run 1/step") as made:
        yield made


@pytest.fixture
def blob(store: S3Store) -> Blob:
    return open_blob("a/blob.pt", store=store)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As small as S3 takes them, and smaller ranges; two threads make the digests."""
    monkeypatch.setattr(compose, "_THREADED_BYTES", MIB)
    monkeypatch.setattr(compose, "_STRETCH_BYTES", MIB)
    monkeypatch.setattr(upload, "PART_BYTES", 5 * MIB)
    monkeypatch.setattr(download, "RANGE_BYTES", MIB)


@FEW
@given(case=cases(6), dropped=st.frozensets(st.integers(0, 5), max_size=2))
def test_random_pieces_come_back_with_their_digests(blob: Blob, case: Case, dropped: frozenset[int]) -> None:
    check_round_trip(blob, case, dropped)


@pytest.mark.parametrize("kind", ["crc32", "crc32c", "crc32+crc32c"])
def test_large_blobs_go_in_parts_and_come_in_ranges(blob: Blob, store: S3Store, small_parts: None, kind: str) -> None:
    check_round_trip(blob, LARGE._replace(kind=kind), frozenset({3}))
    assert blob.stat().etag.endswith("-3")
    assert list(store.unfinished_uploads()) == []


def test_a_part_in_one_piece_is_not_copied(blob: Blob, small_parts: None) -> None:
    data, into = noise_array(11 * MIB), np.zeros(11 * MIB, "u1")
    pieces = make_pieces([(0, 5 * MIB, data.ctypes.data + 6 * MIB, 0), (5 * MIB, 6 * MIB, data.ctypes.data, 1)])
    published = blob.publish(11 * MIB, pieces, keep=data)
    assert (published.zero_copy_bytes, published.staged_bytes) == (11 * MIB, 0)
    fetched = blob.fetch(one_piece(into), keep=into)
    assert (fetched.zero_copy_bytes, fetched.staged_bytes) == (11 * MIB, 0)
    assert np.array_equal(into, np.concatenate((data[6 * MIB :], data[: 6 * MIB])))


def test_many_small_pieces_come_by_few_requests(blob: Blob, store: S3Store) -> None:
    count, nbytes = 2000, 2100
    source, into = noise_array(count * nbytes), np.zeros((count, 2048), "u1")
    blob.publish(source.nbytes, one_piece(source, -1), keep=source)
    pieces = make_pieces(count)
    pieces["offset"], pieces["nbytes"] = np.arange(count) * nbytes + 52, 2048
    pieces["group"], pieces["address"] = np.arange(count), into.ctypes.data + np.arange(count) * 2048
    fetched = blob.fetch(pieces, keep=into)
    due = source.reshape(count, nbytes)[:, 52:]
    assert np.array_equal(into, due)
    assert fetched.digests == {i: digest("crc32", due[i].tobytes()) for i in range(count)}
    (transfers,) = blob._channel._here().idle  # type: ignore[attr-defined]
    assert transfers.counters().requests < 10


def test_a_blob_that_is_short_missing_or_another_is_an_error(blob: Blob) -> None:
    data = noise_array(MIB)
    for attempt in (blob.stat, lambda: blob.read(0, 10)):
        with pytest.raises(FileNotFoundError, match=r"blob\.pt"):
            attempt()
    first = blob.publish(1000, one_piece(data[:1000]), keep=data)
    for rows in ([(0, 1001)], [(2000, 10)], [(0, 10), (900, MIB - 900)]):
        address = data.ctypes.data
        with pytest.raises(OSError) as caught:
            blob.fetch(make_pieces([(offset, nbytes, address + offset, -1) for offset, nbytes in rows]), keep=data)
        assert caught.value.errno == errno.ENODATA
    blob.publish(1000, one_piece(data[1000:2000]), keep=data)
    with pytest.raises(OSError, match="changed") as caught:
        blob.fetch(one_piece(data[:1000]), keep=data, etag=first.etag)
    assert caught.value.errno == errno.ESTALE
    blob.delete()
    blob.delete()
    with pytest.raises(FileNotFoundError):
        blob.stat()


def check_nothing_left(store: S3Store, blob: Blob, old: bytes) -> None:
    assert list(store.unfinished_uploads()) == []
    assert listed(store) == {"a/blob.pt": len(old)}
    assert blob.read(0, len(old)) == old


def test_cancelled_or_interrupted_an_upload_is_aborted(blob: Blob, store: S3Store, small_parts: None) -> None:
    old = b"what was there before"
    store.write("a/blob.pt", old)
    data, cancel = noise_array(12 * MIB), threading.Event()
    slowly: dict[str, Any] = {"keep": data, "max_bandwidth": 10 * MIB}
    timer = threading.Timer(0.2, cancel.set)
    timer.start()
    with pytest.raises(OSError, match="cancelled") as caught:
        blob.publish(12 * MIB, one_piece(data), cancel=cancel, **slowly)
    timer.join()
    assert caught.value.errno == errno.ECANCELED
    check_nothing_left(store, blob, old)

    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        blob.publish(12 * MIB, one_piece(data), **slowly)
    timer.join()
    check_nothing_left(store, blob, old)
    assert blob.publish(12 * MIB, one_piece(data), keep=data).etag == blob.stat().etag


@pytest.mark.parametrize("nbytes", [MIB, 5 * MIB // 2])
def test_a_limit_holds_for_what_goes_at_once_and_for_the_last_part(blob: Blob, small_parts: None, nbytes: int) -> None:
    data = noise_array(nbytes)
    done = blob.publish(nbytes, one_piece(data), keep=data, max_bandwidth=4 * MIB)
    assert done.end_ns - done.start_ns >= nbytes / (4 * MIB) * 1e9


def test_a_late_piece_that_fails_begins_no_upload(blob: Blob, store: S3Store, small_parts: None) -> None:
    data = noise_array(2 * MIB)
    with pytest.raises(ZeroDivisionError):
        blob.publish(2 * MIB + 4, one_piece(data), [LatePiece(2 * MIB, 4, lambda digests: bytes(1 // 0))], keep=data)
    with pytest.raises(ValueError, match="was given 5"):
        blob.publish(2 * MIB + 4, one_piece(data), [LatePiece(2 * MIB, 4, lambda digests: b"five.")], keep=data)
    assert list(store.unfinished_uploads()) == []
    assert listed(store) == {}


def test_it_pickles_and_works_in_a_fork(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    use_keys(monkeypatch, OWNER)
    blob = pickle.loads(pickle.dumps(open_blob("x", store=store)))
    data = noise_array(MIB)
    blob.publish(MIB, one_piece(data), keep=data)

    def work() -> None:
        into = np.zeros(MIB, "u1")
        assert blob.fetch(one_piece(into), keep=into).digests == {0: digest("crc32", data.tobytes())}
        into = into[::-1].copy()
        blob.publish(MIB, one_piece(into), keep=into)

    in_child(work)
    assert blob.read(0, MIB) == data[::-1].tobytes()


@pytest.mark.parametrize("end", ["", "store.close()", "store.close(); del blob", "del blob; store.close()"])
def test_a_process_ends_quietly(store: S3Store, signed_weed: Weed, end: str) -> None:  # noqa: F811
    code = f"""
        import sys, weakref
        weakref.finalize(sys, str)  # the first says when at exit those of all are called: after the engines' end
        from mlstor.blob.target import open_blob
        from mlstor.storage.s3 import open
        store = open(sys.argv[1], endpoint=sys.argv[2])
        store.write("x", b"abc")
        blob = open_blob("x", store=store)
        assert blob.read(1, 2) == b"bc"
        {end}
    """
    keys = {"AWS_ACCESS_KEY_ID": OWNER.access_key, "AWS_SECRET_ACCESS_KEY": OWNER.secret_key}
    child = python(code, store.url, signed_weed.endpoint, env=keys)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (0, "", "")


def test_several_threads_use_one_blob(blob: Blob) -> None:
    data = noise_array(3 * MIB)
    blob.publish(3 * MIB, one_piece(data), keep=data)
    found = []

    def fetch() -> None:
        into = np.zeros(3 * MIB, "u1")
        found.append(blob.fetch(one_piece(into), keep=into).digests == {0: digest("crc32", into.tobytes())})

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_directories_and_names(store: S3Store, signed_weed: Weed, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    use_keys(monkeypatch, OWNER)
    directory = open_directory(store.url, endpoint=signed_weed.endpoint)
    directory.make()
    assert directory.names() == []
    for name in ("b", "a", "below/c"):
        blob = directory.blob(name)
        assert blob.name == f"{store.url}/{name}"
        blob.publish(3, one_piece(np.frombuffer(b"abc", "u1")))
        assert open_blob(blob.name, endpoint=signed_weed.endpoint).read(1, 2) == b"bc"
    assert directory.names() == ["a", "b"]
    directory.remove(["a", "never there"])
    assert listed(store) == {"b": 3, "below/c": 3}
    assert open_blob(f"{store.url}/b", store=store).read(0, 1) == b"a"
    for name in ("s3://other/b", "/b", f"{store.url}/"):
        with pytest.raises(UsageError, match="is not in"):
            open_blob(name, store=store)


def test_s3torchconnector_carries_them(signed_weed: Weed, store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    pytest.importorskip("s3torchconnector")
    use_keys(monkeypatch, OWNER)
    blob = open_blob(f"{store.url}/x", endpoint=signed_weed.endpoint, client="s3torchconnector")
    check_round_trip(blob, Case([Row(0, 1, 300_001, 0), Row(9, 1, 5000, 1)], [1, 0], 8, 1, "crc32"), frozenset({0}))


# ---- servers that do what a real one won't ----


class Server(FaultServer):
    """With objects that change or end early, and uploads in which a part is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.aborts = 0

    def do_changing(self, connection: socket.socket, request: Request, nbytes: str) -> bool:
        """Each answer is of another object."""
        self.extra = {"ETag": f'"{len(self.requests)}"'}
        return self.do_object(connection, request, nbytes)

    def do_truncating(self, connection: socket.socket, request: Request, nbytes: str) -> bool:
        """Each range ends in its middle."""
        first, last = map(int, re.findall(r"\d+", request.headers["range"]))
        said = f"HTTP/1.1 206 OK\r\nContent-Length: {last + 1 - first}\r\nContent-Range: bytes {first}-{last}/{nbytes}"
        connection.sendall(said.encode() + b"\r\n\r\n" + body_of((last + 1 - first) // 2))
        return False

    def do_refusing(self, connection: socket.socket, request: Request, name: str) -> bool:
        """The second part, and with the name `wedged` also that the upload be aborted."""
        if request.method == "POST":
            return self.send(
                connection,
                200,
                b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>",
            )
        if request.method == "DELETE":
            self.aborts += 1
            return self.send(connection, 403 if name == "wedged" else 204, SERVER_ERROR % b"AccessDenied")
        if "partNumber=2" in request.query:
            return self.send(connection, 403, SERVER_ERROR % b"AccessDenied")
        return self.send(connection, 200, ETag='"of a part"')


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        yield made


def opened(server: Server, kind: str, key: str) -> Blob:
    store = s3.open(f"s3://{kind}", endpoint=server.url, anonymous=True, tries=2)
    return open_blob(key, store=store)


@pytest.mark.parametrize(("kind", "code"), [("changing", errno.ESTALE), ("truncating", errno.ENODATA)])
def test_an_object_that_changes_or_ends_early_is_an_error(
    server: Server, small_parts: None, kind: str, code: int
) -> None:
    blob = opened(server, kind, str(3 * MIB))
    into = np.zeros(3 * MIB, "u1")
    with pytest.raises(OSError, match=str(3 * MIB)) as caught:
        blob.fetch(one_piece(into), keep=into)
    assert caught.value.errno == code


def test_a_part_that_is_refused_aborts_the_upload(server: Server, small_parts: None) -> None:
    data = noise_array(12 * MIB)
    with pytest.raises(PermissionError, match="name"):
        opened(server, "refusing", "name").publish(12 * MIB, one_piece(data), keep=data)
    assert server.aborts == 1
    with pytest.warns(RuntimeWarning, match="left behind"), pytest.raises(PermissionError):
        opened(server, "refusing", "wedged").publish(12 * MIB, one_piece(data), keep=data)
