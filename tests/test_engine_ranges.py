"""Arrays of ranges of an open file."""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_support import BACKENDS, BLOCK, DIRECTS, finish, memory, noise, python, small_engine

from mlstor._io import AlignedBuffer, Engine, RangeFile, open_ranges
from mlstor.operations import DONE_DTYPE, RANGE_DTYPE, Extent, Late, Step, WriteFile

NBYTES = 40 * BLOCK + 100


@pytest.fixture(scope="module")
def content() -> bytes:
    return noise(NBYTES)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "file").write_bytes(content)
    return tmp_path / "file"


def ranges(*rows: tuple[int, int, int, int]) -> np.ndarray:
    return np.array(list(rows), dtype=RANGE_DTYPE)


def reap_all(file: RangeFile) -> np.ndarray:
    done = np.zeros(file.outstanding, dtype=DONE_DTYPE)
    reaped = 0
    while reaped < len(done):
        reaped += file.reap(done[reaped:], min_done=1, timeout_s=30)
    return done


@pytest.mark.parametrize("direct", DIRECTS)
@pytest.mark.parametrize("longest", [4096, BLOCK])
def test_random_ranges(engine: Engine, path: Path, content: bytes, direct: str, longest: int) -> None:
    random = np.random.default_rng(7)
    count = 1500
    asked = np.zeros(count, dtype=RANGE_DTYPE)
    asked["tag"] = random.permutation(count)
    asked["nbytes"] = random.integers(1, longest + 1, count)
    asked["offset"] = random.integers(0, NBYTES - longest, count)
    asked["offset"][::3] &= ~np.uint64(4095)
    asked["nbytes"][::3] = 4096
    stride = (longest + 8191) // 4096 * 4096
    asked["dest"] = np.arange(count) * stride
    asked["dest"][1::2] += 13  # not aligned: through the staging pool
    buffer = memory(count * stride)
    file = open_ranges(engine, path, direct)
    assert file.nbytes == NBYTES
    for first in range(0, count, 400):
        assert file.submit(asked[first : first + 400], buffer) == len(asked[first : first + 400])
    done = reap_all(file)
    assert file.outstanding == 0
    by_tag = {int(row["tag"]): row for row in done}
    assert len(by_tag) == count
    for tag, offset, nbytes, dest in asked.tolist():
        assert by_tag[tag]["result"] == nbytes
        assert by_tag[tag]["latency_ns"] > 0
        assert buffer[dest : dest + nbytes] == content[offset : offset + nbytes]


def test_ranges_without_a_buffer_are_read_and_dropped(engine: Engine, path: Path) -> None:
    before = engine.counters().read_bytes
    file = open_ranges(engine, path)
    file.submit(ranges((1, 0, 4096, 0), (2, 8192, 4096, 0)))
    assert sorted(reap_all(file)["tag"].tolist()) == [1, 2]
    assert engine.counters().read_bytes >= before + 8192


@pytest.mark.parametrize("direct", DIRECTS)
def test_ranges_past_the_end_say_so(engine: Engine, path: Path, direct: str) -> None:
    file = open_ranges(engine, path, direct)
    rows = (1, NBYTES - 10, 10, 0), (2, NBYTES - 10, 11, 100), (3, NBYTES + 10_000, 1, 200)
    file.submit(ranges(*rows), bytearray(300))
    results = {int(row["tag"]): int(row["result"]) for row in reap_all(file)}
    assert results == {1: 10, 2: -10001, 3: -10001}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ((0, 0, 0, 0), "range 0 has 0 bytes"),
        ((0, 0, BLOCK + 1, 0), f"range 0 has {BLOCK + 1} bytes"),
        ((0, 0, 100, 1), "outside the buffer"),
        ((0, 0, 100, 2**64 - 50), "outside the buffer"),
        ((0, 2**64 - 4096, 100, 0), "greatest file offset"),
    ],
)
def test_ranges_are_checked(engine: Engine, path: Path, row: tuple[int, int, int, int], text: str) -> None:
    file = open_ranges(engine, path)
    with pytest.raises(ValueError, match=text):
        file.submit(ranges(row), bytearray(100))
    assert file.outstanding == 0
    with pytest.raises(ValueError, match="RANGE_DTYPE"):
        file.submit(np.zeros(3, dtype="u1"))
    with pytest.raises(BufferError):
        file.submit(ranges((0, 0, 5, 0)), b"12345")
    assert file.submit(ranges(), bytearray(1)) == 0
    assert file.reap(np.zeros(4, dtype=DONE_DTYPE)) == 0


def test_a_missing_file_and_an_unknown_word(engine: Engine, path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_ranges(engine, path.with_name("absent"))
    with pytest.raises(ValueError, match="auto, require or off"):
        open_ranges(engine, path, "maybe")


def test_an_empty_file_has_no_ranges(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    file = open_ranges(engine, tmp_path / "empty")
    assert file.nbytes == 0
    file.submit(ranges((5, 0, 1, 0)))
    assert reap_all(file)["result"].tolist() == [-10001]


def test_reap_returns_at_its_timeout_and_never_more_than_fits(engine: Engine, path: Path) -> None:
    file = open_ranges(engine, path)
    out = np.zeros(2, dtype=DONE_DTYPE)
    assert file.reap(out, min_done=2, timeout_s=0) == 0
    file.submit(ranges(*((i, 0, 100, 0) for i in range(5))))
    assert [file.reap(out, min_done=2), file.reap(out, min_done=2), file.reap(out, min_done=2)] == [2, 2, 1]


def test_buffer_and_file_live_as_long_as_ranges_are_under_way(engine: Engine, path: Path, content: bytes) -> None:
    buffer = bytearray(BLOCK)
    file = open_ranges(engine, path)
    for _ in range(20):
        file.submit(ranges((0, 0, BLOCK, 0)), buffer)
    with pytest.raises(BufferError):
        buffer.append(0)
    del file  # its ranges go on
    gc.collect()
    assert engine.drain(30)
    assert buffer == content[:BLOCK]


def test_the_buffer_is_released_when_all_are_reaped(engine: Engine, path: Path) -> None:
    buffer = bytearray(BLOCK)
    file = open_ranges(engine, path)
    file.submit(ranges((0, 0, BLOCK, 0), (1, 0, 10, 0)), buffer)
    reap_all(file)
    buffer.append(0)


def test_a_closed_engine_ends_its_range_files(path: Path) -> None:
    engine = small_engine("threads")
    file = open_ranges(engine, path)
    file.submit(ranges(*((i, 0, 100, 0) for i in range(500))))
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        file.submit(ranges((0, 0, 1, 0)))
    with pytest.raises(ValueError, match="closed"):
        file.reap(np.zeros(1, dtype=DONE_DTYPE))


def many(count: int, nbytes: int = 4096) -> np.ndarray:
    """`count` ranges of `nbytes`, tagged from 0 on, all over the file."""
    asked = np.zeros(count, dtype=RANGE_DTYPE)
    asked["tag"] = np.arange(count)
    asked["offset"] = np.arange(count) % (NBYTES // nbytes) * nbytes
    asked["nbytes"] = nbytes
    return asked


@pytest.mark.parametrize("direct", DIRECTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranges_that_were_cancelled_are_all_reported(path: Path, backend: str, direct: str) -> None:
    batches, each = 4, 50_000
    with small_engine(backend, workers=1, depth=2, block_bytes=4096) as engine:
        file = open_ranges(engine, path, direct)
        for _ in range(batches):
            file.submit(many(each))
        engine.cancel()
        assert engine.drain(30)
        assert file.outstanding == batches * each
        done = reap_all(file)
        assert file.outstanding == 0
    tags, counts = np.unique(done["tag"], return_counts=True)
    assert len(tags) == each
    assert set(counts) == {batches}
    assert set(done["result"].tolist()) <= {4096, -errno.ECANCELED}
    assert (done["result"] == -errno.ECANCELED).any()


INTERRUPTED = """
    import errno, sys
    import numpy as np
    from mlstor._io import Engine, open_ranges
    from mlstor.operations import DONE_DTYPE, RANGE_DTYPE
    path, backend = sys.argv[1:]
    engine = Engine(backend="auto" if backend == "io_uring" else backend, workers=1, depth=2, block_bytes=1 << 20)
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    file = open_ranges(engine, path)
    ranges = np.zeros(1 << 20, RANGE_DTYPE)
    ranges["nbytes"] = 1 << 20
    file.submit(ranges)
    done = np.zeros(len(ranges), DONE_DTYPE)
    print("begin", flush=True)
    try:
        file.reap(done, min_done=len(done))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(engine.drain(20))
    rest = np.zeros(file.outstanding, DONE_DTYPE)
    print(file.reap(rest, min_done=len(rest)) == len(rest) > 0, bool((rest["result"] == -errno.ECANCELED).any()))
    engine.close()
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_in_reap_cancels_the_ranges_that_have_not_begun(tmp_path: Path, backend: str) -> None:
    process = python(INTERRUPTED, tmp_path / "file", backend)
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    rest = process.stdout.read()
    finish(process)
    assert rest.splitlines() == ["True", "True True"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_buffer_of_a_finished_batch_is_freed_while_another_is_outstanding(
    path: Path, content: bytes, backend: str
) -> None:
    import threading

    reached, opened = threading.Event(), threading.Event()

    def late(digests: object) -> bytes:
        reached.set()
        assert opened.wait(60)
        return b"late"

    with small_engine(backend, workers=1, depth=1) as engine:
        file = open_ranges(engine, path)
        first, second = np.zeros(BLOCK, np.uint8), np.zeros(BLOCK, np.uint8)
        references = weakref.ref(first), weakref.ref(second)
        file.submit(ranges((1, 0, BLOCK, 0)), first)
        # The only worker waits in it, after the first batch and before the second.
        gate = WriteFile(path.with_name("gate"), [Extent(0, 4, Late(late)), Extent(4, BLOCK, bytes(BLOCK))], Step(0))
        engine.submit([gate])
        file.submit(ranges((2, BLOCK, BLOCK, 0)), second)
        assert reached.wait(60)
        assert file.reap(np.zeros(2, dtype=DONE_DTYPE), min_done=1, timeout_s=30) == 1
        assert bytes(first) == content[:BLOCK]
        del first, second
        gc.collect()
        try:
            assert file.outstanding == 1
            assert [reference() is None for reference in references] == [True, False]
        finally:
            opened.set()
        reap_all(file)
        gc.collect()
        assert references[1]() is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "expected"), [("ext4", "yes"), ("tmpfs", "no")])
def test_a_file_says_how_its_ranges_are_read(
    shared_fs: Callable[[str], Path], content: bytes, backend: str, kind: str, expected: str
) -> None:
    path = shared_fs(kind) / "file"
    with small_engine(backend) as engine:
        engine.write_file(path, content)
        file = open_ranges(engine, path)
        file.submit(many(20))
        assert (reap_all(file)["result"] == 4096).all()
        assert file.direct == expected
        buffered = open_ranges(engine, path, "off")
        buffered.submit(many(20))
        reap_all(buffered)
        assert buffered.direct == "no"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direct", DIRECTS)
def test_arrays_are_served_in_the_order_of_submission(path: Path, backend: str, direct: str) -> None:
    with small_engine(backend, workers=1, depth=1) as engine:
        file = open_ranges(engine, path, direct)
        for array in range(8):
            asked = many(50)
            asked["tag"] += 50 * array
            file.submit(asked)
        assert reap_all(file)["tag"].tolist() == list(range(400))


def registered_bytes() -> int:
    """Memory that is registered with the rings which this process has open.

    VmPin of /proc/self/status counts those of closed rings too, until the kernel has taken them down, tens of
    milliseconds later: of engines of earlier tests, and of what an engine tries when it begins.
    """
    total = 0
    for ring in Path("/proc/self/fd").iterdir():
        if os.path.lexists(ring) and os.readlink(ring) == "anon_inode:[io_uring]":
            while "UserBufs:" not in (text := (Path("/proc/self/fdinfo") / ring.name).read_text()):
                time.sleep(0.001)  # while a call changes something of the ring, nothing of it is shown
            total += sum(map(int, re.findall(r"^ *\d+: 0x[0-9a-f]+/(\d+)$", text, re.MULTILINE)))
    return total


def region_engine() -> Engine:
    """One worker with a registered pool, on direct files; skips where this machine does not grant that."""
    engine = small_engine("io_uring", workers=1, depth=8)
    if "buffers registered" not in engine.granted:
        engine.close()
        pytest.skip(f"no registered buffers here: {engine.granted}")
    return engine


def read_blocks(file: RangeFile, blocks: list[int], buffer: AlignedBuffer) -> None:
    asked = np.zeros(len(blocks), RANGE_DTYPE)
    asked["offset"] = np.array(blocks) * 4096
    asked["nbytes"] = 4096
    asked["dest"] = np.arange(len(blocks)) * 4096
    file.submit(asked, buffer)
    assert (reap_all(file)["result"] == 4096).all()


def test_a_buffer_that_comes_again_is_registered_and_read_into_in_place(path: Path, content: bytes) -> None:
    with region_engine() as engine:
        file = open_ranges(engine, path, "require")
        buffer = AlignedBuffer(16 * 4096)
        read_blocks(file, list(range(16)), buffer)
        before = engine.counters().zero_copy_bytes, registered_bytes()
        for blocks in ([*range(16, 32)], [*range(100, 84, -1)]):
            read_blocks(file, blocks, buffer)
            for slot, block in enumerate(blocks):
                assert memoryview(buffer)[slot * 4096 : (slot + 1) * 4096] == content[block * 4096 : (block + 1) * 4096]
        assert engine.counters().zero_copy_bytes - before[0] == 2 * 16 * 4096
        assert registered_bytes() - before[1] >= 16 * 4096


def test_a_registered_buffer_is_let_go_when_the_engine_has_nothing_to_do(path: Path) -> None:
    with region_engine() as engine:
        file = open_ranges(engine, path, "require")
        before = registered_bytes()
        buffer = AlignedBuffer(64 * 4096)
        for _ in range(3):
            read_blocks(file, [*range(64)], buffer)
        assert registered_bytes() > before
        deadline = time.monotonic() + 60
        while registered_bytes() > before:
            assert time.monotonic() < deadline, "still pinned"
            time.sleep(0.1)


def test_buffers_in_turn_at_one_address_are_told_apart(path: Path, content: bytes) -> None:
    """A freed buffer's address is used again at once, by other pages than those that are registered."""
    with region_engine() as engine:
        file = open_ranges(engine, path, "require")
        for turn in range(6):
            buffer = AlignedBuffer(32 * 4096)
            for again in range(3):
                first = (turn * 3 + again) * 32
                read_blocks(file, [*range(first, first + 32)], buffer)
                assert memoryview(buffer) == content[first * 4096 : (first + 32) * 4096]
            del buffer
