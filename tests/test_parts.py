"""Large transfers in parts, over transfers that happen in memory: what is split, and what becomes of it."""

from __future__ import annotations

import errno
import time
import zlib
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, strategies as st
from s3_support import reap_all, run, transfers_of
from transfers_in_memory import PART, THRESHOLD, InMemory, Rig

from mlstor._io import Pattern
from mlstor.errors import UsageError
from mlstor.storage import crc32c
from mlstor.storage.parts import PART_TAG, PartedTransfers
from mlstor.storage.transfers import (
    COMPLETION_DTYPE,
    IN_PARTS,
    WHOLE,
    Digest,
    Failure,
    Kind,
    Memory,
    Op,
)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def noise(nbytes: int, seed: int = 1) -> bytes:
    content = np.random.default_rng(seed).bytes(nbytes)
    assert isinstance(content, bytes)
    return content


def test_small_ones_go_through_as_they_are(rig: Rig) -> None:
    content = noise(THRESHOLD)
    done = run(rig.transfers, Op.WRITE, ["a"], content, nbytes=THRESHOLD)
    assert done["result"].tolist() == [THRESHOLD]
    assert rig.store.objects == {"a": content}
    assert rig.uploads.calls == []
    got = bytearray(THRESHOLD)
    done = run(rig.transfers, Op.READ, ["a"], got, object_nbytes=THRESHOLD, room=THRESHOLD)
    assert got == content
    assert len(rig.store.asked) == 2


@pytest.mark.parametrize("nbytes", [THRESHOLD + 1, 7 * PART, 7 * PART + 5])
def test_a_large_write_is_begun_written_in_parts_and_completed(rig: Rig, nbytes: int) -> None:
    content = noise(nbytes)
    (done,) = run(rig.transfers, Op.WRITE, ["big"], content, nbytes=nbytes, digest=Digest.CRC32C)
    assert rig.uploads.calls == ["begin", "complete"]
    assert rig.uploads.digests == [Digest.CRC32C]
    assert rig.store.objects == {"big": content}
    assert rig.store.uploads == {}
    assert (done["kind"], done["result"], done["status"], done["op"]) == (Kind.OK, nbytes, 200, Op.WRITE)
    assert done["etag"] == b"etag of the whole"
    assert done["digest_value"] == google_crc32c.value(content)
    assert done["object_nbytes"] == nbytes
    assert 0 < done["submit_ns"] <= done["start_ns"] <= done["attempt_ns"] <= done["first_byte_ns"] <= done["end_ns"]
    assert [part.nbytes for part in rig.uploads.parts[:-1]] == [PART] * (len(rig.uploads.parts) - 1)
    assert [part.crc32c for part in rig.uploads.parts] == [
        google_crc32c.value(content[i : i + PART]) for i in range(0, nbytes, PART)
    ]
    assert rig.transfers.counters().requests == len(rig.uploads.parts) + 2


def test_small_and_large_in_one_array_come_back_each_once(rig: Rig) -> None:
    sizes = [10, 5 * PART, 20, 6 * PART + 1, THRESHOLD, THRESHOLD + 1]
    keys = [f"key-{i}" for i in range(len(sizes))]
    memory = noise(sum(sizes))
    places = np.cumsum(sizes) - sizes
    done = run(rig.transfers, Op.WRITE, keys, memory, nbytes=sizes, place=places)
    assert done["tag"].tolist() == list(range(len(sizes)))
    assert done["result"].tolist() == sizes
    expected = {key: memory[at : at + size] for key, at, size in zip(keys, places.tolist(), sizes, strict=True)}
    assert rig.store.objects == expected

    got = bytearray(len(memory))
    done = run(rig.transfers, Op.READ, keys, got, object_nbytes=sizes, room=sizes, place=places)
    assert bytes(got) == memory
    assert done["result"].tolist() == sizes
    assert rig.transfers.outstanding == 0


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 5 * PART), (100, 5 * PART), (PART - 1, 4 * PART), (PART, WHOLE)])
def test_a_large_range_is_read_in_aligned_ranges(rig: Rig, offset: int, nbytes: int) -> None:
    content = noise(9 * PART + 17)
    rig.store.objects["o"] = content
    due = content[offset:] if nbytes == WHOLE else content[offset : offset + nbytes]
    got = bytearray(len(due))
    (done,) = run(
        rig.transfers,
        Op.READ,
        ["o"],
        got,
        offset=offset,
        nbytes=nbytes,
        object_nbytes=len(content),
        room=len(due),
        digest=Digest.CRC32C,
    )
    assert got == due
    assert done["result"] == len(due)
    assert done["object_nbytes"] == len(content)
    assert done["digest_value"] == google_crc32c.value(due)
    starts = [int(record["offset"]) for record in rig.store.asked]
    assert starts[0] == offset
    assert all(start % PART == 0 for start in starts[1:])
    assert len(starts) > 3


def test_a_crc32_of_a_whole_read_in_ranges_is_compared_with_the_one_given(rig: Rig) -> None:
    content = noise(9 * PART + 17)
    rig.store.objects["o"] = content
    want = zlib.crc32(content)
    for expected, kind in ((want, Kind.OK), (want ^ 1, Kind.CHECKSUM)):
        (done,) = run(
            rig.transfers,
            Op.READ,
            ["o"],
            bytearray(len(content)),
            object_nbytes=len(content),
            room=len(content),
            digest=Digest.CRC32,
            flags=1,
            digest_value=expected,
        )
        assert done["kind"] == kind
    assert rig.transfers.failures()[-1].message == f"CRC32 is {want:08x}, should be {want ^ 1:08x}"


def test_what_cannot_be_split_is_not(rig: Rig) -> None:
    rig.store.objects["o"] = noise(9 * PART)
    run(rig.transfers, Op.READ, ["o"])  # of unknown length
    run(rig.transfers, Op.READ, ["o"], object_nbytes=9 * PART, digest=Digest.XXH64)
    assert len(rig.store.asked) == 2
    run(rig.transfers, Op.READ, ["o"], object_nbytes=9 * PART)
    assert len(rig.store.asked) == 2 + 9


def test_the_window_bounds_the_parts_that_are_under_way() -> None:
    rig = Rig(window=2)
    run(rig.transfers, Op.WRITE, ["o"], noise(50 * PART), nbytes=50 * PART)
    assert len(rig.store.asked) == 50
    assert rig.store.most_outstanding <= 2


def test_parts_grow_where_there_would_be_too_many() -> None:
    rig = Rig(most_parts=3)
    nbytes = (5 << 20) + 1
    content = noise(nbytes)
    run(rig.transfers, Op.WRITE, ["o"], content, nbytes=nbytes)
    assert [part.nbytes for part in rig.uploads.parts] == [2 << 20, 2 << 20, (1 << 20) + 1]
    assert rig.store.objects["o"] == content


def test_a_pattern_that_would_need_too_large_parts_is_refused_and_nothing_is_taken() -> None:
    rig = Rig(most_parts=3, payload_bytes=1 << 20)
    array, names = transfers_of(Op.WRITE, ["small", "o"], nbytes=[10, 5 << 20], memory=Memory.PATTERN)
    with pytest.raises(UsageError, match="smaller objects"):
        rig.transfers.submit(array, names, None, Pattern(1))
    assert rig.transfers.outstanding == 0
    assert rig.store.asked == []


def test_each_part_of_a_pattern_is_made_at_its_own_offset(rig: Rig) -> None:
    run(rig.transfers, Op.WRITE, ["o"], pattern=Pattern(7), nbytes=8 * PART + 9)
    assert Pattern(7).check(rig.store.objects["o"]) == []
    assert len(rig.store.objects["o"]) == 8 * PART + 9


def test_a_part_that_fails_ends_the_upload_and_no_more_parts_are_sent(rig: Rig) -> None:
    def spoil(record: Any, key: str, query: str) -> Kind:
        return Kind.HTTP if query.endswith("&3") else Kind.OK

    rig.store.spoil = spoil
    (done,) = run(rig.transfers, Op.WRITE, ["o"], noise(50 * PART), nbytes=50 * PART)
    assert (done["kind"], done["status"], done["result"]) == (Kind.HTTP, 500, -errno.EIO)
    assert rig.uploads.calls == ["begin", "abort"]
    assert rig.store.uploads == {}
    assert rig.store.objects == {}
    assert len(rig.store.asked) < 12
    assert rig.transfers.failures() == [Failure(0, Kind.HTTP, 500, "o", "spoiled")]
    assert rig.transfers.failures() == []


def test_a_range_that_fails_fails_the_whole_read_once(rig: Rig) -> None:
    rig.store.objects["o"] = noise(50 * PART)
    rig.store.spoil = lambda record, key, query: Kind.RESET if record["offset"] >= 2 * PART else Kind.OK
    (done,) = run(rig.transfers, Op.READ, ["o"], object_nbytes=50 * PART)
    assert done["kind"] == Kind.RESET
    assert [(failure.tag, failure.kind) for failure in rig.transfers.failures()] == [(0, Kind.RESET)]


def test_failures_of_small_ones_are_kept_while_parts_fail(rig: Rig) -> None:
    rig.store.spoil = lambda record, key, query: Kind.RESET
    array, names = transfers_of(Op.WRITE, ["a", "big", "b"], nbytes=[1, 9 * PART, 1], memory=Memory.BUFFER)
    rig.transfers.submit(array, names, noise(9 * PART))
    assert reap_all(rig.transfers)["kind"].tolist() == [Kind.RESET] * 3
    assert sorted(failure.tag for failure in rig.transfers.failures()) == [0, 1, 2]


def test_a_begin_that_is_refused_is_the_transfers_failure(rig: Rig) -> None:
    error = OSError(errno.ENOENT, "there is no bucket", "s3://b/o")
    vars(error)["status"] = 404
    rig.uploads.refuse["begin"] = error
    (done,) = run(rig.transfers, Op.WRITE, ["o"], noise(9 * PART), nbytes=9 * PART)
    assert (done["kind"], done["status"], done["result"]) == (Kind.HTTP, 404, -errno.ENOENT)
    assert rig.transfers.failures() == [Failure(0, Kind.HTTP, 404, "s3://b/o", "there is no bucket")]
    assert rig.uploads.calls == ["begin"]


def test_a_complete_that_fails_is_followed_by_an_abort(rig: Rig) -> None:
    rig.uploads.refuse["complete"] = ConnectionResetError(errno.ECONNRESET, "reset", "o")
    (done,) = run(rig.transfers, Op.WRITE, ["o"], noise(9 * PART), nbytes=9 * PART)
    assert done["kind"] == Kind.RESET
    assert rig.uploads.calls == ["begin", "complete", "abort"]
    assert rig.store.uploads == {}


def test_a_checksum_that_was_given_must_be_that_of_the_parts(rig: Rig) -> None:
    content = noise(9 * PART)
    right = google_crc32c.value(content)
    fields = {"nbytes": 9 * PART, "digest": Digest.CRC32C, "flags": 1}
    (done,) = run(rig.transfers, Op.WRITE, ["good"], content, digest_value=right, **fields)
    assert done["kind"] == Kind.OK
    (done,) = run(rig.transfers, Op.WRITE, ["bad"], content, digest_value=right ^ 1, **fields)
    assert done["kind"] == Kind.CHECKSUM
    assert set(rig.store.objects) == {"good"}
    assert rig.uploads.calls[-1] == "abort"
    fields |= {"nbytes": WHOLE, "object_nbytes": 9 * PART}
    (done,) = run(rig.transfers, Op.READ, ["good"], digest_value=right ^ 1, **fields)
    assert done["kind"] == Kind.CHECKSUM


@pytest.mark.parametrize("stored", ["right", "wrong", "none"])
def test_a_whole_object_is_compared_with_the_stores_checksum_a_range_is_not(stored: str) -> None:
    content = noise(9 * PART)
    value: int | None = {"right": google_crc32c.value(content), "wrong": 1, "none": None}[stored]
    asked: list[str] = []

    def checksum(key: str) -> int | None:
        asked.append(key)
        return value

    store = InMemory()
    store.objects["o"] = content
    transfers = PartedTransfers(store, None, part_bytes=PART, threshold_bytes=THRESHOLD, window=4, checksum=checksum)
    fields = {"object_nbytes": 9 * PART, "digest": Digest.CRC32C}
    (done,) = run(transfers, Op.READ, ["o"], nbytes=8 * PART, **fields)
    assert (done["kind"], done["flags"], asked) == (Kind.OK, 0, [])
    (done,) = run(transfers, Op.READ, ["o"], **fields)
    assert asked == ["o"]
    assert done["kind"] == (Kind.CHECKSUM if stored == "wrong" else Kind.OK)
    assert done["flags"] == (0 if stored == "none" else 2)


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(rig: Rig) -> None:
    rig.store.objects["o"] = noise(9 * PART)
    carry_out = rig.store._carry_out

    def replaced(record: Any, *rest: Any) -> Any:
        done = carry_out(record, *rest)
        done["etag"] = b"new" if record["offset"] > 4 * PART else b"old"
        return done

    rig.store._carry_out = replaced  # type: ignore[method-assign, assignment]
    (done,) = run(rig.transfers, Op.READ, ["o"], object_nbytes=9 * PART)
    assert done["kind"] == Kind.OTHER
    assert "replaced" in rig.transfers.failures()[0].message


def test_cancel_aborts_what_was_begun(rig: Rig) -> None:
    rig.uploads.hold.clear()
    array, names = transfers_of(Op.WRITE, ["a", "b"], nbytes=9 * PART, memory=Memory.BUFFER)
    rig.transfers.submit(array, names, noise(9 * PART))
    rig.transfers.cancel()
    rig.uploads.hold.set()
    assert reap_all(rig.transfers)["kind"].tolist() == [Kind.CANCELLED] * 2
    assert sorted(rig.uploads.calls) == ["abort", "abort", "begin", "begin"]
    assert rig.store.uploads == {}


def test_cancel_leaves_what_has_not_begun_alone(rig: Rig) -> None:
    later = time.monotonic_ns() + 10**12
    array, names = transfers_of(Op.WRITE, ["a"], nbytes=9 * PART, memory=Memory.BUFFER, not_before_ns=later)
    rig.transfers.submit(array, names, noise(9 * PART))
    out: Any = np.zeros(1, COMPLETION_DTYPE)
    assert rig.transfers.reap(out, 1, 0.02) == 0
    rig.transfers.cancel()
    assert reap_all(rig.transfers)["kind"].tolist() == [Kind.CANCELLED]
    assert rig.uploads.calls == []


def test_an_upload_begins_at_its_intended_start(rig: Rig) -> None:
    start = time.monotonic_ns() + 50_000_000
    (done,) = run(rig.transfers, Op.WRITE, ["a"], noise(9 * PART), nbytes=9 * PART, not_before_ns=start)
    assert done["kind"] == Kind.OK
    assert done["start_ns"] >= start


def test_close_aborts_uploads_and_says_which_were_left() -> None:
    for refuse in (False, True):
        rig = Rig(window=1)
        array, names = transfers_of(Op.WRITE, ["o"], nbytes=9 * PART, memory=Memory.BUFFER)
        rig.transfers.submit(array, names, noise(9 * PART))
        out: Any = np.zeros(1, COMPLETION_DTYPE)
        while not rig.store.asked:
            rig.transfers.reap(out, 1, 0)
        if refuse:
            rig.uploads.refuse["abort"] = ConnectionRefusedError(errno.ECONNREFUSED, "nobody there", "o")
            with pytest.raises(OSError, match=r"left behind: o \(nobody there\)"):
                rig.transfers.close()
        else:
            rig.transfers.close()
            assert rig.store.uploads == {}
        assert rig.store.closed
        rig.transfers.close()  # a second one does nothing


def test_reap_honours_its_timeout_and_least_count(rig: Rig) -> None:
    rig.uploads.hold.clear()
    array, names = transfers_of(Op.WRITE, ["a", "big"], nbytes=[5, 9 * PART], memory=Memory.BUFFER)
    rig.transfers.submit(array, names, noise(9 * PART))
    out: Any = np.zeros(4, COMPLETION_DTYPE)
    assert rig.transfers.reap(out, 2, 0.05) == 1
    assert rig.transfers.outstanding == 1
    assert rig.transfers.reap(out, 1, 0.02) == 0
    rig.uploads.hold.set()
    assert rig.transfers.reap(out, 4, 10) == 1
    assert rig.transfers.reap(out, 1, 10) == 0
    assert rig.transfers.outstanding == 0


def test_reap_of_at_least_none_takes_what_there_is(rig: Rig) -> None:
    array, names = transfers_of(Op.WRITE, ["big"], nbytes=9 * PART, memory=Memory.BUFFER)
    rig.transfers.submit(array, names, noise(9 * PART))
    out: Any = np.zeros(4, COMPLETION_DTYPE)
    until = time.monotonic() + 60
    while not (count := rig.transfers.reap(out, 0)) and time.monotonic() < until:
        time.sleep(0.001)
    assert (count, out["kind"][0], rig.transfers.outstanding) == (1, Kind.OK, 0)


def test_a_failure_that_is_told_before_its_part_comes_back_is_kept(rig: Rig) -> None:
    rig.store.objects["o"] = noise(9 * PART)
    array, names = transfers_of(Op.READ, ["o"], object_nbytes=9 * PART)
    rig.transfers.submit(array, names)
    tag = next(iter(rig.transfers._parts))
    rig.store._failures.append(Failure(tag, Kind.HTTP, 500, "o", "told early"))
    assert rig.transfers.failures() == []
    rig.store.spoil = lambda record, key, query: Kind.HTTP
    rig.store._failed = lambda done, kind, key: _of_kind(done, kind)  # type: ignore[method-assign]
    (done,) = reap_all(rig.transfers)
    assert done["kind"] == Kind.HTTP
    assert [(failure.tag, failure.message) for failure in rig.transfers.failures()] == [(0, "told early")]


def _of_kind(done: Any, kind: Kind) -> Any:
    done["kind"], done["result"], done["status"] = kind, -errno.EIO, 500
    return done


def test_close_aborts_an_upload_whose_parts_were_lost_to_ctrl_c() -> None:
    rig = Rig(window=1)
    array, names = transfers_of(Op.WRITE, ["o"], nbytes=9 * PART, memory=Memory.BUFFER)
    rig.transfers.submit(array, names, noise(9 * PART))
    out: Any = np.zeros(1, COMPLETION_DTYPE)
    while not rig.store.asked:
        rig.transfers.reap(out, 1, 0)
    reap = rig.store.reap

    def torn(*arguments: Any) -> int:
        reap(*arguments)
        raise KeyboardInterrupt

    rig.store.reap = torn  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        rig.transfers.reap(out, 1)
    rig.store.reap = reap  # type: ignore[method-assign]
    begun = time.monotonic()
    rig.transfers.close()
    assert time.monotonic() - begun < 30
    assert rig.uploads.calls == ["begin", "abort"]
    assert rig.store.uploads == {}


def test_bad_arrays_are_refused_whole(rig: Rig) -> None:
    content = noise(9 * PART)
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({"tag": PART_TAG}, content, "tag"),
        ({"key_start": 100}, content, "outside `names`"),
        ({"place": 1}, content, "outside the buffer"),
        ({}, None, "none was given"),
        ({"memory": Memory.PATTERN}, None, "none was given"),
        ({"flags": IN_PARTS, "room": 0}, content, "multiple of 4096"),
        ({"flags": IN_PARTS, "room": 5000}, content, "multiple of 4096"),
    ]
    for fields, buffer, text in cases:
        fields = {"nbytes": 9 * PART, "memory": Memory.BUFFER, **fields}
        array, names = transfers_of(Op.WRITE, ["o"], **fields)
        with pytest.raises(ValueError, match=text):
            rig.transfers.submit(array, names, buffer)
    array, names = transfers_of(Op.READ, ["o"], object_nbytes=9 * PART, room=9 * PART, memory=Memory.BUFFER)
    with pytest.raises(ValueError, match="read-only"):
        rig.transfers.submit(array, names, content)
    assert rig.transfers.outstanding == 0
    assert rig.transfers.submit(b"", b"") == 0


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_crc32c_combines_as_if_the_bytes_had_been_summed_in_one(first: bytes, second: bytes) -> None:
    combined = crc32c.combine(google_crc32c.value(first), google_crc32c.value(second), len(second))
    assert combined == google_crc32c.value(first + second)


def test_crc32c_of_more_than_4_gib_combines() -> None:
    zeros = 5 << 30
    # x^(8n) is multiplicative: in two steps or one, the same
    once = crc32c.combine(0x12345678, 0, zeros)
    assert crc32c.combine(crc32c.combine(0x12345678, 0, zeros - 77), 0, 77) == once
    assert crc32c.to_base64(0x12345678) == "EjRWeA=="
