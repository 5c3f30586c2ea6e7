"""What is written comes back byte for byte: every size, address, backend, direct or not, on every file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from engine_support import BACKENDS, BLOCK, DIRECTS, leftovers, memory, noise, small_engine
from hypothesis import given, settings, strategies as st

from mlstor._io import AlignedBuffer, Engine, Pattern, alignment
from mlstor.operations import DURABLE, Extent, ReadFile, Step, WriteFile

ALIGNS = (512, 4096, BLOCK)
SIZES = sorted({0, 1, 511} | {k * a + d for a in ALIGNS for k in (1, 2, 3) for d in (-1, 0, 1, 511)})


@pytest.mark.parametrize("direct", DIRECTS)
def test_every_size_at_aligned_and_misaligned_addresses(engine: Engine, tmp_path: Path, direct: str) -> None:
    sources = {}
    for nbytes in SIZES:
        for shift in (0, 1, 512):
            source = memory(nbytes, shift)
            source[:] = noise(nbytes, nbytes)
            sources[tmp_path / f"{nbytes}-{shift}"] = source
    steps = Step.PREALLOCATE | Step.RENAME  # syncs are for other tests: these are hundreds of files
    requests = engine.submit(
        [WriteFile(path, [Extent(0, len(s), s)], steps, direct=direct) for path, s in sources.items()]
    )
    for request, (path, source) in zip(requests, sources.items(), strict=True):
        result = request.wait()
        assert result.nbytes == len(source) == result.zero_copy_bytes + result.staged_bytes
        assert path.read_bytes() == source
        for shift in (0, 3):
            target = memory(len(source), shift)
            engine.read_file(path, target, direct=direct)
            assert target == source
    assert not leftovers(tmp_path)


@settings(max_examples=40)
@given(data=st.data())
def test_random_extents_come_back(by_backend: dict[str, Engine], tmp_path: Path, data: st.DataObject) -> None:
    engine = by_backend[data.draw(st.sampled_from(sorted(by_backend)), label="backend")]
    direct = data.draw(st.sampled_from(DIRECTS), label="direct")
    block = data.draw(st.sampled_from([0, 4096, 16384]), label="block_bytes")
    lengths = st.one_of(st.integers(1, 40), st.integers(1, 9000), st.sampled_from([4096, 8192, 65536, 70000]))
    layout = data.draw(st.lists(st.tuples(st.one_of(st.just(0), st.integers(0, 5000)), lengths), max_size=25))
    want, extents = bytearray(), []
    for i, (gap, nbytes) in enumerate(layout):
        want += bytes(gap)
        source = memory(nbytes, data.draw(st.sampled_from([0, len(want) % 4096, 7])))
        source[:] = noise(nbytes, i)
        extents.append(Extent(len(want), nbytes, source))
        want += source
    tail = data.draw(st.integers(0, 6000), label="zeros at the end")
    want += bytes(tail)
    shuffled = data.draw(st.permutations(extents))
    path = tmp_path / "file"
    serial = data.draw(st.booleans(), label="serial")
    (request,) = engine.submit([WriteFile(path, shuffled, Step.RENAME, len(want), block, direct, serial)])
    request.wait()
    assert path.read_bytes() == want
    back = [Extent(e.offset, e.nbytes, memory(e.nbytes, 5)) for e in shuffled]
    engine.submit([ReadFile(path, back, Step(0), block, direct, serial)])[0].wait()
    assert all(e.data == want[e.offset : e.offset + e.nbytes] for e in back)


def test_aligned_memory_is_not_copied(engine: Engine, tmp_path: Path) -> None:
    source = memory(4 * BLOCK)
    source[:] = noise(len(source))
    wrote = engine.write_file(tmp_path / "file", source)
    read = engine.read_file(tmp_path / "file", memory(4 * BLOCK))
    assert wrote.zero_copy_bytes == read.zero_copy_bytes == 4 * BLOCK
    if wrote.direct == "yes":  # else nothing asks for alignment
        shifted = memory(4 * BLOCK, 1)
        assert engine.write_file(tmp_path / "other", shifted).staged_bytes == 4 * BLOCK


def test_buffers_are_laid_end_to_end(engine: Engine, tmp_path: Path) -> None:
    parts = [noise(10), b"", noise(70001), noise(1)]
    engine.write_file(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    into = [bytearray(10), bytearray(70001)]
    engine.read_file(tmp_path / "file", into)
    assert into == [parts[0], parts[2]]


def test_a_part_is_read_from_an_offset(engine: Engine, tmp_path: Path) -> None:
    content = noise(200_000)
    (tmp_path / "file").write_bytes(content)
    into = bytearray(5000)
    assert engine.read_file(tmp_path / "file", into, offset=60_001).nbytes == 5000
    assert into == content[60_001:65_001]
    assert engine.read_file(tmp_path / "file", offset=100).nbytes == len(content) - 100


def test_thousands_of_tiny_files_in_one_submit(engine: Engine, tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(3000)]
    for direct in DIRECTS:
        contents = [Extent(0, 4, str(i).zfill(4).encode()) for i in range(len(paths))]
        written = engine.submit(
            [WriteFile(p, [e], Step.RENAME, direct=direct) for p, e in zip(paths, contents, strict=True)]
        )
        done = engine.reap(len(written), timeout_s=60)
        assert set(done) == set(written)
        assert [r.result().nbytes for r in done] == [4] * len(paths)
        assert all(p.read_bytes() == str(i).zfill(4).encode() for i, p in enumerate(paths))


def test_a_file_is_overwritten_whole(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for steps in (DURABLE, Step.FSYNC, Step(0)):
        path.write_bytes(noise(300_000))
        engine.write_file(path, b"short", steps)
        assert path.read_bytes() == b"short"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


#: what each file system may answer to "was it direct?"
DIRECT_WORDS = {
    "ext4": {"yes"},
    "xfs": {"yes"},
    "btrfs": {"yes", "unverified"},
    "tmpfs": {"no"},
    "overlay": {"no", "yes", "unverified"},
    "fuse": {"no", "unverified"},
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_file_system(each_fs: Path, backend: str, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["each_fs"]
    with small_engine(backend) as engine:
        for nbytes in (0, 1, 4095, 3 * BLOCK, 3 * BLOCK + 511):
            content = noise(nbytes, nbytes)
            wrote = engine.write_file(each_fs / "file", content)
            assert (each_fs / "file").read_bytes() == content
            into = memory(nbytes)
            read = engine.read_file(each_fs / "file", into)
            assert into == content
            assert wrote.fs_type == read.fs_type == alignment(each_fs)["fs_type"]
            if nbytes >= BLOCK:  # else there may be no aligned block
                assert {wrote.direct, read.direct} <= DIRECT_WORDS[kind], (wrote.reason, read.reason)
                assert all(result.reason for result in (wrote, read))
            buffered = engine.read_file(each_fs / "file", direct="off")
            assert (buffered.direct, buffered.backend) == ("no", "threads") or not nbytes
        pattern = Pattern(9, file_id=3)
        engine.write_file(each_fs / "pattern", [Extent(0, 5 * BLOCK + 77, pattern)])
        assert engine.read_file(each_fs / "pattern", pattern).damaged_blocks == 0
        assert not leftovers(each_fs)


def test_an_aligned_buffer_is_memory() -> None:
    buffer = AlignedBuffer(1000, 65536)
    assert (len(buffer), buffer.nbytes, buffer.address % 65536) == (1000, 1000, 0)
    assert bytes(buffer) == bytes(1000)
    memoryview(buffer)[:3] = b"abc"
    assert bytes(memoryview(buffer)[:4]) == b"abc\0"
    for nbytes, align in ((0, 4096), (-1, 4096), (1, 0), (1, 3)):
        with pytest.raises(ValueError):
            AlignedBuffer(nbytes, align)
    with pytest.raises(MemoryError):
        AlignedBuffer(1 << 60)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_takes_a_files_place_keeps_its_mode_and_owner(
    by_backend: dict[str, Engine], tmp_path: Path, backend: str
) -> None:
    path, data = tmp_path / "private", b"x" * 10_000
    by_backend[backend].write_file(path, data)
    ordinary = path.stat().st_mode
    path.chmod(0o600)
    owner = (1234, 1235) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(path, *owner)
    inode = path.stat().st_ino
    by_backend[backend].write_file(path, data)
    found = path.stat()
    assert found.st_ino != inode
    assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o600, *owner)
    by_backend[backend].write_file(tmp_path / "new", data)
    assert (tmp_path / "new").stat().st_mode == ordinary
