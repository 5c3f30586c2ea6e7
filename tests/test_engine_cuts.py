"""How a file of several extents is cut: what can go as it lies does, late bytes delay no more than their own pages.

And the limit of bytes per second.
"""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import pytest
from engine_support import BLOCK, DIRECTS, leftovers, memory, noise, small_engine
from hypothesis import given, settings, strategies as st

from mlstor._io import Engine, Pattern
from mlstor.operations import Extent, Late, ReadFile, Step, WriteFile

QUICK = Step.RENAME
MIB = 1 << 20
PAGE = 4096
POOL = noise(4 * MIB, 9)  # what all contents are cut from


def filled(nbytes: int, residue: int, seed: int = 0) -> memoryview:
    view = memory(nbytes, residue)
    view[:] = (POOL * (nbytes // len(POOL) + 2))[seed % MIB :][:nbytes]
    return view


def records(count: int, nbytes: int, residue: int) -> tuple[list[Extent], int]:
    """In the manner of an archive: late headers of 64 bytes, then data at `residue` in its page, in memory as well."""
    extents, position = [], 0
    for i in range(count):
        begin = -(-(position + 64) // PAGE) * PAGE + residue
        extents.append(Extent(begin - 64, 64, Late(lambda digests, i=i: digests[i].to_bytes(4, "little") * 16)))
        extents.append(Extent(begin, nbytes, filled(nbytes, residue, i * 77), "crc32", i))
        position = begin + nbytes
    return extents, position


@pytest.mark.parametrize("direct", DIRECTS)
@pytest.mark.parametrize("with_late", [True, False])
def test_large_records_that_lie_right_are_not_copied(
    engine: Engine, tmp_path: Path, with_late: bool, direct: str
) -> None:
    extents, nbytes = records(6, 3 * MIB + 1000, 64)
    data = [extent for extent in extents if extent.digest]
    (request,) = engine.submit([WriteFile(tmp_path / "file", extents if with_late else data, QUICK, nbytes, 0, direct)])
    wrote = request.wait()
    assert wrote.zero_copy_bytes >= 0.99 * sum(extent.nbytes for extent in data)
    assert wrote.zero_copy_bytes + wrote.staged_bytes == wrote.nbytes
    assert wrote.digests == {i: zlib.crc32(extent.data) for i, extent in enumerate(data)}
    content = (tmp_path / "file").read_bytes()
    assert len(content) == nbytes
    for i, extent in enumerate(data):
        assert content[extent.offset : extent.offset + extent.nbytes] == bytes(extent.data)
        head = content[extent.offset - 64 : extent.offset]
        assert head == (wrote.digests[i].to_bytes(4, "little") * 16 if with_late else bytes(64))

    back = [extent._replace(data=memory(extent.nbytes, 64)) for extent in data]
    (request,) = engine.submit([ReadFile(tmp_path / "file", back, direct=direct)])
    read = request.wait()
    assert read.zero_copy_bytes >= 0.99 * sum(extent.nbytes for extent in data)
    assert read.digests == wrote.digests
    assert all(bytes(b.data) == bytes(e.data) for b, e in zip(back, data, strict=True))


def test_late_bytes_between_small_records_do_not_become_writes_of_their_own(engine: Engine, tmp_path: Path) -> None:
    extents, position = [], 0
    for i in range(2000):
        extents.append(Extent(position, 30, Late(lambda digests, i=i: digests[i].to_bytes(4, "little").ljust(30))))
        extents.append(Extent(position + 30, 800, POOL[i : i + 800], "crc32", i))
        position += 830
    before = engine.counters().writes
    engine.write_file(tmp_path / "file", extents, QUICK)
    assert engine.counters().writes - before <= position // BLOCK + 2
    content = (tmp_path / "file").read_bytes()
    for i in range(2000):
        at = 830 * i
        assert content[at : at + 4] == zlib.crc32(content[at + 30 : at + 830]).to_bytes(4, "little")


@settings(max_examples=40)
@given(data=st.data())
def test_whatever_meets_each_byte_is_written_once_and_read_back(
    by_backend: dict[str, Engine], tmp_path: Path, data: st.DataObject
) -> None:
    """Large and small, congruent or not, late, patterns, gaps, blocks of all sizes."""
    engine = by_backend[data.draw(st.sampled_from(sorted(by_backend)))]
    direct = data.draw(st.sampled_from(DIRECTS))
    block = data.draw(st.sampled_from([0, PAGE, 5 * PAGE, BLOCK]))
    pattern = Pattern(5, 1, 2)
    position, extents, expected, with_gaps = 0, [], bytearray(), False
    for i in range(data.draw(st.integers(2, 9))):
        gap = data.draw(st.sampled_from([0, 0, 0, 1, 60, 4000, 200_000]))
        with_gaps = with_gaps or gap > 0
        position += gap
        kind = data.draw(st.sampled_from(["large", "large", "askew", "small", "late", "late", "pattern"]))
        nbytes = data.draw(st.integers(256 << 10, 600_000) if kind in ("large", "askew") else st.integers(1, 9000))
        digest = data.draw(st.sampled_from(["crc32", "crc32c", "crc32+crc32c"]))
        if kind == "late":
            content = bytes([i + 1]) * nbytes
            extents.append(Extent(position, nbytes, Late(lambda digests, content=content: content)))
        elif kind == "pattern":
            stamped = bytearray(nbytes)
            pattern.fill(stamped, position)
            content = bytes(stamped)
            extents.append(Extent(position, nbytes, pattern, digest, i))
        else:
            view = filled(nbytes, (position + (kind == "askew")) % PAGE, 101 * i)
            content = bytes(view)
            extents.append(Extent(position, nbytes, view, digest, i))
        expected += bytes(position - len(expected)) + content
        position += nbytes
    tail = data.draw(st.sampled_from([0, 0, 1, 5000]))
    expected += bytes(tail)
    path = tmp_path / "file"
    (request,) = engine.submit([WriteFile(path, extents, QUICK, position + tail, block, direct)])
    result = request.wait()
    assert path.read_bytes() == expected
    if not with_gaps and not tail:
        assert result.nbytes == len(expected)
    want = {}
    for extent in extents:
        if extent.digest:
            content = expected[extent.offset : extent.offset + extent.nbytes]
            (alone,) = engine.submit([ReadFile(path, [extent._replace(data=None)], direct=direct)])
            want.update(alone.wait().digests)
            if extent.digest != "crc32c":
                assert want[extent.group] & 0xFFFFFFFF == zlib.crc32(content)
    assert result.digests == want
    back = [
        extent._replace(data=memory(extent.nbytes, data.draw(st.sampled_from([extent.offset % PAGE, 0, 1]))))
        for extent in extents
        if extent.digest
    ]
    if back:
        (request,) = engine.submit([ReadFile(path, back, Step(0), block, direct)])
        assert request.wait().digests == want
        for extent in back:
            assert extent.data == expected[extent.offset : extent.offset + extent.nbytes]


# ---- bytes per second ----


@pytest.mark.parametrize("backend", ["io_uring", "threads"])
def test_a_write_is_never_ahead_of_its_limit_by_more_than_its_blocks(backend: str, tmp_path: Path) -> None:
    nbytes, limit = 4 * MIB, 16_000_000
    with small_engine(backend) as engine:
        began = time.monotonic()
        operation = WriteFile(tmp_path / "file", [Extent(0, nbytes, POOL[:nbytes], "crc32")], QUICK, bytes_per_s=limit)
        (request,) = engine.submit([operation])
        result = request.wait()
        elapsed = time.monotonic() - began
        assert nbytes - 3 * BLOCK <= limit * elapsed  # two workers, and the block that is caught up with
        assert result.digests == {0: zlib.crc32(POOL[:nbytes])}
    assert (tmp_path / "file").read_bytes() == POOL[:nbytes]


def test_another_write_is_not_held_back_and_cancel_ends_the_wait(tmp_path: Path) -> None:
    with small_engine("threads", workers=1) as engine:
        slow = WriteFile(tmp_path / "slow", [Extent(0, MIB, POOL[:MIB])], bytes_per_s=1)
        (held,) = engine.submit([slow])
        engine.write_file(tmp_path / "quick", POOL)
        assert not held.done
        held.cancel()
        with pytest.raises(OSError, match="ancel"):
            held.wait(60)
    assert not leftovers(tmp_path)
    assert not (tmp_path / "slow").exists()


def test_an_engine_that_ends_does_not_wait_for_a_limit(tmp_path: Path) -> None:
    engine = small_engine("threads")
    (held,) = engine.submit([WriteFile(tmp_path / "slow", [Extent(0, MIB, POOL[:MIB])], bytes_per_s=1)])
    engine.close()
    assert held.done


def test_a_negative_limit_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not negative"):
        engine.write_file(tmp_path / "file", b"data", bytes_per_s=-1)
