"""Large objects on a real S3 server: in parts, in ranges; nothing is left where they are broken off."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np
import pytest
from s3_support import bucket, listed, reap_all, run, transfers_of
from servers.weed import Weed, signed_weed  # noqa: F401

from mlstor._io import Pattern
from mlstor.storage import crc32c
from mlstor.storage.s3 import S3Store
from mlstor.storage.transfers import COMPLETION_DTYPE, Digest, Kind, Memory, Op

MIB = 1 << 20
NBYTES = 16 * MIB + 4097
OPTIONS: dict[str, Any] = {"part_bytes": 5 * MIB, "part_threshold_bytes": 5 * MIB}


@pytest.fixture
def store(signed_weed: Weed) -> Iterator[S3Store]:  # noqa: F811
    with bucket(signed_weed, prefix="a+b", **OPTIONS) as made:
        yield made


def content(nbytes: int = NBYTES, file_id: int = 0) -> bytearray:
    made = bytearray(nbytes)
    Pattern(11, file_id=file_id).fill(made)
    return made


def test_a_large_object_is_written_in_parts_and_read_in_ranges(store: S3Store) -> None:
    due = content()
    store.write("large", due)
    found = store.stat("large")
    assert found.nbytes == NBYTES
    assert found.etag.endswith("-4")
    # of the whole object: what who reads it can compare
    assert found.checksum == ("crc32c", crc32c.to_base64(google_crc32c.value(bytes(due))))
    assert store.read("large") == bytes(due)
    assert store.read("large", offset=3 * MIB + 1, nbytes=12 * MIB) == bytes(due[3 * MIB + 1 : 15 * MIB + 1])
    assert list(store.unfinished_uploads()) == []


def test_several_at_once_give_one_completion_each(store: S3Store) -> None:
    sizes = [NBYTES, 100, NBYTES - 7, 5 * MIB]
    keys = [f"{number} %" for number in range(4)]
    with store.transfers(workers=2, in_flight=4) as transfers:
        fields: dict[str, Any] = {"pattern": Pattern(11), "place": range(4), "digest": Digest.CRC32C}
        done = run(transfers, Op.WRITE, keys, nbytes=sizes, **fields)
        assert done["kind"].tolist() == [Kind.OK] * 4
        assert done["result"].tolist() == sizes
        due = [google_crc32c.value(bytes(content(nbytes, i))) for i, nbytes in enumerate(sizes)]
        assert done["digest_value"].tolist() == due
        done = run(transfers, Op.READ, keys, object_nbytes=sizes, **fields)
        assert done["result"].tolist() == sizes
        assert done["damaged_blocks"].tolist() == [0] * 4
        assert done["digest_value"].tolist() == due
        assert (done["flags"] & 2).all()  # compared with what the server has, also of those read in ranges
    assert listed(store) == dict(zip(keys, sizes, strict=True))


def test_ranges_compare_with_the_pattern_where_they_lie(store: S3Store) -> None:
    store.write("o", content())
    fields: dict[str, Any] = {"offset": MIB + 123, "nbytes": 14 * MIB}
    with store.transfers(workers=1) as transfers:
        (done,) = run(transfers, Op.READ, ["o"], pattern=Pattern(11), **fields)
        assert (done["kind"], done["damaged_blocks"]) == (Kind.OK, 0)
        (done,) = run(transfers, Op.READ, ["o"], pattern=Pattern(12), **fields)
        assert done["damaged_blocks"] == 14 * MIB // 4096 + 1


def test_split_reads_off_makes_a_get_one_request(signed_weed: Weed) -> None:  # noqa: F811
    with bucket(signed_weed, split_reads=False, **OPTIONS) as store:
        store.write("o", content())
        with store.transfers(workers=1) as transfers:
            (done,) = run(transfers, Op.READ, ["o"], object_nbytes=NBYTES, digest=Digest.CRC32C)
            assert done["flags"] & 2
            assert transfers.counters().requests == 1


def uploads(store: S3Store) -> list[str]:
    return sorted(upload.key for upload in store.unfinished_uploads())


def until(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_cancelled_uploads_are_aborted(store: S3Store) -> None:
    array, names = transfers_of(
        Op.WRITE, ["one", "two"], nbytes=60 * MIB, memory=Memory.PATTERN, place=[1, 2], digest=Digest.CRC32C
    )
    with store.transfers(workers=1, in_flight=2) as transfers:
        transfers.submit(array, names, None, Pattern(1))
        out: Any = np.zeros(2, COMPLETION_DTYPE)
        while transfers.counters().sent_bytes < 6 * MIB:
            assert transfers.reap(out, 1, 0.05) == 0
        assert uploads(store)
        transfers.cancel()
        done = reap_all(transfers)
        assert done["kind"].tolist() == [Kind.CANCELLED] * 2
    assert uploads(store) == []
    assert listed(store) == {}


def test_closing_in_the_middle_aborts_uploads(store: S3Store) -> None:
    array, names = transfers_of(Op.WRITE, ["one"], nbytes=60 * MIB, memory=Memory.PATTERN)
    with store.transfers(workers=1, in_flight=2) as transfers:
        transfers.submit(array, names, None, Pattern(1))
        out: Any = np.zeros(2, COMPLETION_DTYPE)
        while transfers.counters().sent_bytes < 6 * MIB:
            transfers.reap(out, 1, 0.05)
        assert uploads(store) == ["one"]
    assert uploads(store) == []
    assert listed(store) == {}


def test_ctrl_c_in_a_write_aborts_its_upload(store: S3Store) -> None:
    due = content(200 * MIB)

    def interrupt() -> None:
        until(lambda: uploads(store))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        store.write("interrupted", due)
    thread.join()
    assert uploads(store) == []
    assert listed(store) == {}
    store.write("after", b"still works")
    assert store.read("after") == b"still works"


def test_uploads_of_other_runs_are_found_and_aborted(store: S3Store) -> None:
    client = store._here().client
    ids = [client.begin_upload(key, Digest.NONE) for key in ("left behind", "another+one")]
    found = {upload.key: upload.upload_id for upload in store.unfinished_uploads()}
    assert found == dict(zip(("left behind", "another+one"), ids, strict=True))
    for key, upload_id in found.items():
        store.abort_upload(key, upload_id)
        store.abort_upload(key, upload_id)  # one that is gone is no error
    assert uploads(store) == []
