"""Copies to, from and between real servers: SeaweedFS for S3, and AIStore."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ais_support
import launchers
import numpy as np
import pytest
import s3_support
from copy_support import MIB, NAMES, CopyBench, StreamRan, files, make, objects
from servers.aistore import Cluster, aistore  # noqa: F401 - a fixture
from servers.weed import Weed, weed  # noqa: F401 - a fixture

from mlstor.copy.names import refusal
from mlstor.storage.parts import PartedTransfers
from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, Op

SIZES = {name: 50 * at * at for at, name in enumerate(NAMES)} | {"empty": 0, "large": 20 * MIB + 7}
PARTS = ("--part", "5MiB", "--memory", "20MiB")


@pytest.fixture
def copy(tmp_path: Path) -> CopyBench:
    return CopyBench(tmp_path)


class Bucket:
    """A bucket of a server, as a side of a copy."""

    def __init__(self, store: Any, endpoint: str, *options: str) -> None:
        self.store = store
        self.url = store.url
        self.endpoint, self._options = endpoint, options

    def words(self, side: str) -> list[str]:
        named = [word for option in self._options for word in (f"--{side}-option", option)]
        return [f"--{side}-endpoint", self.endpoint, *named]

    def objects(self) -> dict[str, bytes]:
        return objects(self.store)


@pytest.fixture
def s3(weed: Weed) -> Iterator[Bucket]:  # noqa: F811
    with s3_support.bucket(weed, prefix="p q") as store:
        yield Bucket(store, weed.endpoint, "anonymous=yes")


@pytest.fixture
def other_s3(weed: Weed) -> Iterator[Bucket]:  # noqa: F811
    with s3_support.bucket(weed) as store:
        yield Bucket(store, weed.endpoint, "anonymous=yes")


@pytest.fixture
def ais(aistore: Cluster) -> Iterator[Bucket]:  # noqa: F811
    with ais_support.bucket(aistore, prefix="p") as store:
        yield Bucket(store, aistore.endpoint)


def there_and_back(copy: CopyBench, bucket: Bucket, verify: str) -> None:
    made = make(copy.source, SIZES)
    ran = copy.run(*PARTS, "--verify", verify, *bucket.words("destination"), copy.source, bucket.url)
    assert ran.code == 0, ran.err
    assert bucket.objects() == made
    put = ran.stream.phases[0].ops["put"]
    assert (put.count, put.nbytes, put.failed) == (len(made), sum(SIZES.values()), 0)
    if verify == "read":
        assert ran.stream.phases[0].verification.verified_nbytes == sum(SIZES.values())
    else:
        assert put.compared >= len(made) - 2  # AIStore keeps no checksum of an object of parts or of no bytes
    ran = copy.run(*PARTS, "--verify", verify, *bucket.words("source"), bucket.url, copy.destination)
    assert ran.code == 0, ran.err
    assert files(copy.destination) == made
    assert ran.stream.phases[0].ops["get"].compared >= (len(made) - 2 if verify != "no" else 0)


@pytest.mark.parametrize("verify", ["checksum", "read"])
def test_from_a_directory_to_s3_and_back(copy: CopyBench, s3: Bucket, verify: str) -> None:
    there_and_back(copy, s3, verify)
    assert list(s3.store.unfinished_uploads()) == []


@pytest.mark.parametrize("verify", ["checksum", "read"])
def test_from_a_directory_to_aistore_and_back(copy: CopyBench, ais: Bucket, verify: str) -> None:
    there_and_back(copy, ais, verify)


def test_from_s3_to_aistore_and_to_another_bucket(copy: CopyBench, s3: Bucket, ais: Bucket, other_s3: Bucket) -> None:
    made = make(copy.source, SIZES)
    for source, destination in (("", s3), (s3, ais), (ais, other_s3)):
        words = destination.words("destination") + (source.words("source") if isinstance(source, Bucket) else [])
        url = source.url if isinstance(source, Bucket) else copy.source
        ran = copy.run(*PARTS, *words, url, destination.url)
        assert ran.code == 0, ran.err
        assert destination.objects() == made


def between(s3: Bucket, other_s3: Bucket) -> list[str]:
    return [*PARTS, *s3.words("source"), *other_s3.words("destination"), s3.url, other_s3.url]


def test_checksums_tell_objects_of_one_size_apart(copy: CopyBench, s3: Bucket, other_s3: Bucket) -> None:
    for key, data in {"same": b"x" * 100, "differs": b"y" * 100}.items():
        s3.store.write(key, data)
        other_s3.store.write(key, b"x" * 100)
    ran = copy.run(*between(s3, other_s3))
    assert ran.code == 0, ran.err
    assert other_s3.objects() == {"same": b"x" * 100, "differs": b"y" * 100}
    assert (ran.stream.phases[0].skipped_count, ran.stream.phases[0].ops["put"].count) == (1, 1)


def test_aistores_checksums_tell_objects_of_one_size_apart(copy: CopyBench, ais: Bucket, aistore: Cluster) -> None:  # noqa: F811
    with ais_support.bucket(aistore) as other:
        for key, data in {"same": b"x" * 100, "differs": b"y" * 100}.items():
            ais.store.write(key, data)
            other.write(key, b"x" * 100)
        ran = copy.run("--endpoint", aistore.endpoint, ais.url, other.url)
        assert ran.code == 0, ran.err
        assert objects(other) == {"same": b"x" * 100, "differs": b"y" * 100}
        assert ran.stream.phases[0].skipped_count == 1


@pytest.mark.parametrize("verify", ["checksum", "read"])
@pytest.mark.parametrize("key", ["small", "large"])
def test_other_bytes_at_the_destination_are_found_and_removed(
    copy: CopyBench, s3: Bucket, monkeypatch: pytest.MonkeyPatch, verify: str, key: str
) -> None:
    """Somebody replaces the object right after it was written."""
    make(copy.source, {"small": 9000, "large": 6 * MIB, "good": 10})
    if key == "small":
        plain, replaced = PartedTransfers.reap, []

        def reap(self: PartedTransfers, out: Any, min_done: int = 1, timeout_s: float | None = None) -> int:
            count = plain(self, out, min_done, timeout_s)
            rows = np.frombuffer(out, COMPLETION_DTYPE)[:count]
            if not replaced and ((rows["op"] == Op.WRITE) & (rows["result"] == 9000)).any():
                replaced.append(key)
                s3.store.write(key, bytes(9000))
            return count

        monkeypatch.setattr(PartedTransfers, "reap", reap)
    else:
        from mlstor.copy.parts import ServerParts

        whole = ServerParts.complete

        def complete(self: ServerParts, key: str, upload_id: str, parts: Any) -> None:
            whole(self, key, upload_id, parts)
            s3.store.write(key, bytes(6 * MIB))

        monkeypatch.setattr(ServerParts, "complete", complete)
    ran = copy.run(*PARTS, "--verify", verify, *s3.words("destination"), copy.source, s3.url)
    assert ran.code == 3, ran.err + ran.out
    assert ran.stream.phases[0].ops["put"].errors == {"checksum": 1}
    assert sorted(s3.objects()) == sorted({"small", "large", "good"} - {key})
    if verify == "read":
        assert ran.stream.phases[0].verification.damaged_blocks == -(-(9000 if key == "small" else 6 * MIB) // 4096)


def test_a_write_that_is_refused_leaves_the_object_that_was_there(
    copy: CopyBench, s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that changes between read and write: the parts don't add up to what was read, and are not put together."""
    make(copy.source, {"object": 20 * MIB})
    s3.store.write("object", b"the former one")
    plain = PartedTransfers.submit

    def submit(self: PartedTransfers, transfers: Any, names: Any, buffer: Any = None, pattern: Any = None) -> int:
        first = np.frombuffer(transfers, TRANSFER_DTYPE)[0]
        if first["op"] == Op.WRITE and buffer is not None:
            memoryview(buffer)[int(first["place"])] ^= 1
        return plain(self, transfers, names, buffer, pattern)

    monkeypatch.setattr(PartedTransfers, "submit", submit)
    words = ["--part", "32MiB", *s3.words("destination"), copy.source, s3.url]
    ran = copy.run("--overwrite", *words)
    assert ran.code == 3, ran.err + ran.out
    assert ran.stream.phases[0].ops["put"].errors == {"checksum": 1}
    assert s3.objects() == {"object": b"the former one"}
    assert list(s3.store.unfinished_uploads()) == []


@pytest.mark.parametrize("kind", ["s3", "ais"])
def test_an_object_that_has_changed_since_it_was_proven_is_copied_again(
    copy: CopyBench, s3: Bucket, ais: Bucket, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = {"s3": s3, "ais": ais}[kind]
    for key in ("same", "changed", "gone"):
        source.store.write(key, os.urandom(9000))
    source.store.write("large", os.urandom(6 * MIB))
    import mlstor.copy.resume as resume

    with monkeypatch.context() as patch:  # as if it had been interrupted at its end
        patch.setattr(resume.Proven, "discard", lambda self: None)
        ran = copy.run(*PARTS, *source.words("source"), source.url, copy.destination)
        assert ran.code == 0, ran.err
    source.store.write("changed", os.urandom(9000))
    source.store.write("large", os.urandom(6 * MIB))
    (copy.destination / "gone").unlink()
    ran = copy.run(*PARTS, *source.words("source"), source.url, copy.destination)
    assert ran.code == 0, ran.err
    assert files(copy.destination) == source.objects()
    assert ran.stream.phases[0].ops["put"].count == 3


def test_an_object_that_is_gone_fails_alone(copy: CopyBench, s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlstor.copy.run as run

    for key, size in {"a": 10, "gone": 20, "gone too": 11 * MIB}.items():
        s3.store.write(key, os.urandom(size))
    plain = run.Runner._phase

    def late(self: run.Runner, *rest: Any) -> Any:
        s3.store.delete(["gone", "gone too"])
        return plain(self, *rest)

    monkeypatch.setattr(run.Runner, "_phase", late)
    ran = copy.run(*PARTS, *s3.words("source"), s3.url, copy.destination)
    assert ran.code == 1
    assert set(files(copy.destination)) == {"a"}
    phase = ran.stream.phases[0]
    assert sum(op.failed for op in phase.ops.values()) == 2
    assert {one.fault for one in phase.failures} == {"HTTP 404"}


def test_keys_that_can_be_no_files_fail_and_say_why(copy: CopyBench, s3: Bucket) -> None:
    for key in ("fine", "long" * 60):
        s3.store.write(key, b"x")
    ran = copy.run(*PARTS, *s3.words("source"), s3.url, copy.destination)
    assert ran.code == 1
    assert set(files(copy.destination)) == {"fine"}
    assert {one.url: one.fault for one in ran.stream.phases[0].failures} == {"long" * 60: "EINVAL"}
    assert "255 bytes" in ran.err


@pytest.mark.parametrize("key", ["two//slashes", "/first", "last/", "a/./b", "../up", "nul\0", "long" * 60])
def test_keys_that_are_no_paths_are_refused_by_a_directory(key: str) -> None:
    assert refusal(key, "file")
    assert not refusal(key, "s3")


def test_what_aistore_would_lose_and_what_is_not_utf8_is_refused() -> None:
    assert refusal("a//b", "ais")
    assert refusal("caf\udce9", "s3")
    assert not refusal("a/b.c", "file")


def under_way(copy: CopyBench, s3: Bucket, words: list[str]) -> launchers.Running:
    """A copy whose upload has begun."""
    running = launchers.Running(copy.words(*words), copy.directory)
    deadline = time.monotonic() + 60
    # that of an earlier run is gone before this one begins an upload
    while not (list(s3.store.unfinished_uploads()) and list(copy.results.glob(".copy-*/*.uploads"))):
        assert running.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return running


def test_a_stopped_copy_leaves_no_uploads(copy: CopyBench, s3: Bucket) -> None:
    import signal

    made = make(copy.source, {"large": 300 * MIB})
    words = [*PARTS, "--workers", "1", "--in-flight", "1", *s3.words("destination"), str(copy.source), s3.url]
    running = under_way(copy, s3, words)
    running.process.send_signal(signal.SIGINT)
    assert running.wait(60).returncode == 130
    assert list(s3.store.unfinished_uploads()) == []
    assert s3.objects() == {}
    assert StreamRan(0, "", "", copy.results).stream.status == "partial"
    running = under_way(copy, s3, words)
    running.process.kill()
    running.process.wait()
    assert list(s3.store.unfinished_uploads()) != []
    assert s3.objects() == {}
    ran = copy.run(*words)
    assert ran.code == 0, ran.err
    assert list(s3.store.unfinished_uploads()) == []
    assert s3.store.read("large") == made["large"]
