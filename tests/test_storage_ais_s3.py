"""AIStore's S3 front end (``/s3``), which redirects to targets, with the S3 store."""

from __future__ import annotations

import time

import pytest
from ais_support import NAMES, bucket, read_all, write_all
from servers.aistore import Cluster, aistore  # noqa: F401

from mlstor._io import Pattern
from mlstor.storage import s3
from mlstor.storage.transfers import Kind

# AIStore's /s3 takes what follows an escaped question mark for a query (cmn/cos: ReparseQuery).
S3_NAMES = [name for name in NAMES if "?" not in name]


@pytest.fixture(scope="module")
def cluster(aistore: Cluster) -> Cluster:  # noqa: F811
    return aistore


def test_objects_are_written_listed_read_and_deleted_through_redirects(cluster: Cluster) -> None:
    contents = {name: name.encode() * 5 for name in S3_NAMES}
    with bucket(cluster) as native:
        name = native.describe()["bucket"]
        store = s3.open(f"s3://{name}", endpoint=f"{cluster.endpoint}/s3", anonymous=True)
        try:
            for key, content in contents.items():
                store.write(key, content)
            assert {key: store.read(key) for key in contents} == contents
            assert {key: native.read(key) for key in contents} == contents
            listed = {key: size for page in store.list() for key, size in zip(*page, strict=True)}
            assert listed == {key: len(content) for key, content in contents.items()}
            assert store.stat("plain").nbytes == 25
            store.delete(contents)
            # AIStore answers before the targets are done
            deadline = time.monotonic() + 60
            while any(page.keys for page in store.list()):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            with pytest.raises(FileNotFoundError):
                store.read("plain")
        finally:
            store.close()


def test_many_at_once_and_in_parts(cluster: Cluster) -> None:
    nbytes = (20 << 20) + 5
    expected = bytearray(nbytes)
    Pattern(3).fill(expected)
    with bucket(cluster) as native:
        name = native.describe()["bucket"]
        store = s3.open(f"s3://{name}", endpoint=f"{cluster.endpoint}/s3", anonymous=True)
        try:
            transfers = store.transfers(workers=2)
            with transfers:  # type: ignore[attr-defined]
                keys = [f"many/{number}" for number in range(200)]
                written = write_all(transfers, keys, [key.encode() * 100 for key in keys])
                assert (written["kind"] == Kind.OK).all()
                assert (written["redirect_ns"] > 0).all()
                done, got = read_all(transfers, keys, 2000)
                assert got == [key.encode() * 100 for key in keys]
                assert (done["redirect_ns"] > 0).all()
            store.write("large", expected)
            assert store.read("large") == bytes(expected)
            assert native.read("large") == bytes(expected)
        finally:
            store.close()


def test_a_missing_bucket_or_object_is_said_to_be(cluster: Cluster) -> None:
    for name in ("no-such-bucket",):
        store = s3.open(f"s3://{name}", endpoint=f"{cluster.endpoint}/s3", anonymous=True)
        try:
            with pytest.raises(FileNotFoundError):
                list(store.list())
            with pytest.raises(FileNotFoundError):
                store.read("o")
        finally:
            store.close()
