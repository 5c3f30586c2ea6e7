"""The same store and transfers by Amazon's s3torchconnector, on a real S3 server with identities."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from engine_support import noise
from s3_support import NAMES, forget_aws, listed, make_bucket, open_bucket, reap_all, run, transfers_of, use_keys
from servers.weed import OWNER, Keys, Weed, signed_weed  # noqa: F401

from mlstor._io import Pattern
from mlstor.errors import UsageError
from mlstor.storage import s3
from mlstor.storage.s3_connector import S3ConnectorStore
from mlstor.storage.transfers import COMPLETION_DTYPE, WHOLE, Digest, Kind, Memory, Op

pytest.importorskip("s3torchconnector")
KEPT = [name for name in NAMES if "\\" not in name]
MIB = 1 << 20


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    # The connector looks for credentials itself, with each request.
    forget_aws(monkeypatch)
    use_keys(monkeypatch, OWNER)


@pytest.fixture
def store(signed_weed: Weed, keys: None) -> Iterator[S3ConnectorStore]:  # noqa: F811
    made = connector(signed_weed, make_bucket(signed_weed))
    yield made
    made.close()


def connector(server: Weed, bucket: str, **options: Any) -> S3ConnectorStore:
    made = s3.open(f"s3://{bucket}/pre fix", endpoint=server.endpoint, client="s3torchconnector", **options)
    assert isinstance(made, S3ConnectorStore)
    return made


def test_names_are_those_of_the_native_client(store: S3ConnectorStore, signed_weed: Weed) -> None:  # noqa: F811
    native = open_bucket(signed_weed, store.place.bucket, prefix="pre fix")
    for name in KEPT:
        store.write(name, name.encode())
    assert listed(store) == listed(native) == {name: len(name.encode()) for name in KEPT}
    for name in KEPT:
        assert store.read(name) == native.read(name) == name.encode()
    assert store.stat("plain").nbytes == 5
    assert store.read("plain", offset=1, nbytes=3) == b"lai"
    store.delete([*KEPT, "never there"])
    assert listed(native) == {}
    native.close()


def test_patterns_are_written_and_compared(store: S3ConnectorStore) -> None:
    sizes = [17 * MIB + 500, 100]
    pattern = Pattern(9, 3, 1, 50)
    with store.transfers(workers=1, in_flight=4) as transfers:
        done = run(transfers, Op.WRITE, ["a", "b"], pattern=pattern, nbytes=sizes, place=[5, 6])
        assert done["result"].tolist() == sizes
        fields: dict[str, Any] = {"object_nbytes": sizes, "place": [5, 6]}
        done = run(transfers, Op.READ, ["a", "b"], pattern=pattern, **fields)
        assert done["result"].tolist() == sizes
        assert done["damaged_blocks"].tolist() == [0, 0]
        done = run(transfers, Op.READ, ["a", "b"], pattern=Pattern(8, 3, 1, 50), **fields)
        assert done["damaged_blocks"].tolist() == [17 * 256 + 1, 1]
        assert (done["first_byte_ns"] >= done["start_ns"]).all()
        assert (done["end_ns"] >= done["first_byte_ns"]).all()
        counters = transfers.counters()
        assert (counters.sent_bytes, counters.received_bytes) == (sum(sizes), 2 * sum(sizes))
    due = bytearray(sizes[0])
    Pattern(9, 3, 5, 50).fill(due)
    assert store.read("a") == bytes(due)


def test_memory_ranges_stat_and_delete(store: S3ConnectorStore) -> None:
    content = noise(1000)
    with store.transfers(workers=1, in_flight=4) as transfers:
        run(transfers, Op.WRITE, ["a", "b"], content, nbytes=500, place=[0, 500])
        got = bytearray(1000)
        run(transfers, Op.READ, ["a", "b"], got, place=[0, 500], room=500)
        assert got == content
        got = bytearray(100)
        done = run(transfers, Op.READ, ["a"], got, offset=50, nbytes=100, object_nbytes=500, room=100)
        assert got == content[50:150]
        assert done["result"].tolist() == [100]
        done = run(transfers, Op.STAT, ["a", "b"])
        assert done["object_nbytes"].tolist() == [500, 500]
        done = run(transfers, Op.READ, ["a", "a"], got, room=[100, 100], nbytes=WHOLE)
        assert done["kind"].tolist() == [Kind.LENGTH] * 2
        transfers.failures()
        run(transfers, Op.DELETE, ["a"])
        done = run(transfers, Op.READ, ["a"])
        assert done["kind"].tolist() == [Kind.OTHER]
        (failure,) = transfers.failures()
        assert failure.message.startswith("s3torchconnector: ")
        assert failure.url == f"s3://{store.place.bucket}/pre fix/a"


def test_an_object_of_another_size_than_the_catalog_says_is_an_error(store: S3ConnectorStore) -> None:
    store.write("o", noise(500))
    with store.transfers(workers=1, in_flight=1) as transfers:
        done = run(transfers, Op.READ, ["o", "o", "o"], object_nbytes=[500, 499, 501])
    assert done["kind"].tolist() == [Kind.OK, Kind.LENGTH, Kind.SHORT]


def test_cancelled_ones_come_back(store: S3ConnectorStore) -> None:
    later = time.monotonic_ns() + 10**12
    with store.transfers(workers=1, in_flight=2) as transfers:
        array, names = transfers_of(Op.READ, ["a", "b", "c"], not_before_ns=later)
        transfers.submit(array, names)
        out: Any = np.zeros(3, COMPLETION_DTYPE)
        assert transfers.reap(out, 1, 0.02) == 0
        transfers.cancel()
        assert reap_all(transfers)["kind"].tolist() == [Kind.CANCELLED] * 3


def test_what_it_cannot_do_is_refused(store: S3ConnectorStore) -> None:
    with store.transfers(workers=1, in_flight=1) as transfers:
        array, names = transfers_of(Op.READ, ["a"], digest=Digest.CRC32C)
        with pytest.raises(UsageError, match="no checksums"):
            transfers.submit(array, names)
        array, names = transfers_of(Op.WRITE, ["a"], nbytes=10, memory=Memory.BUFFER)
        with pytest.raises(ValueError, match="outside its buffer"):
            transfers.submit(array, names, b"short")
        assert transfers.outstanding == 0


def test_refusals_are_os_errors_without_keys(
    signed_weed: Weed,  # noqa: F811
    store: S3ConnectorStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("absent")
    absent = connector(signed_weed, "no-such-bucket")
    for call in (lambda: list(absent.list()), lambda: absent.write("x", b"y"), lambda: absent.stat("x")):
        with pytest.raises(FileNotFoundError) as missing:
            call()
        assert "MetaRequestResult" not in str(missing.value)
    wrong = Keys(OWNER.access_key, "another-secret")
    use_keys(monkeypatch, wrong)
    denied = connector(signed_weed, store.place.bucket)
    for call in (lambda: list(denied.list()), lambda: denied.write("x", b"y"), lambda: denied.stat("x")):
        with pytest.raises(PermissionError) as caught:
            call()
        assert not any(secret in str(caught.value) for secret in wrong)


def test_it_pickles_and_tells_what_it_is(store: S3ConnectorStore) -> None:
    again = pickle.loads(pickle.dumps(store))
    assert again.describe() == store.describe()
    assert store.describe()["client"].startswith("s3torchconnector 1.")
    assert OWNER.secret_key not in repr(store.describe())


def test_without_the_package_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['s3torchconnector'] = None\n"
        "from mlstor.storage import s3\n"
        "s3.open('s3://b', anonymous=True, client='s3torchconnector')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install mlstor[s3]" in done.stderr
