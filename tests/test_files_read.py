"""Arrays of files: what is read is what was written, on each backend, direct or not, and what goes wrong is said."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_support import BACKENDS, DIRECTS, noise, small_engine
from files_support import SIZES, asking, make, placed, reaped, run

from mlstor._io import AlignedBuffer, Engine, ObjectFiles, Pattern, evict, resident
from mlstor.operations import Extent
from mlstor.storage.transfers import COMPLETION_DTYPE, WHOLE, Digest, Kind, Memory, Op


@pytest.fixture(params=BACKENDS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with small_engine(request.param) as engine:
        yield engine


@pytest.mark.parametrize("direct", DIRECTS)
@pytest.mark.parametrize("shift", [0, 1])
def test_files_of_all_sizes_arrive_whole_wherever_they_are_put(
    engine: Engine, each_fs: Path, direct: str, shift: int
) -> None:
    keys, contents = make(each_fs)
    files = ObjectFiles(engine, each_fs, direct=direct)
    for known in (False, True):  # with a catalog's sizes, and without
        place, room, nbytes = placed(SIZES, shift=shift)
        buffer = AlignedBuffer(nbytes)
        done = run(files, keys, buffer=buffer, memory=Memory.BUFFER, place=place, room=room,
                   object_nbytes=SIZES if known else WHOLE)  # fmt: skip
        assert (done["kind"] == Kind.OK).all(), files.failures()
        assert done["result"].tolist() == list(SIZES)
        assert done["object_nbytes"].tolist() == list(SIZES)
        for start, content in zip(place, contents, strict=True):
            assert bytes(memoryview(buffer)[int(start) :][: len(content)]) == content
    if direct == "off":
        assert files.direct == "no"


def test_nothing_beyond_the_room_is_touched(engine: Engine, tmp_path: Path) -> None:
    keys, contents = make(tmp_path, [5000, 4096, 100])
    sizes = [len(content) for content in contents]
    buffer = AlignedBuffer(1 << 20)
    view = np.frombuffer(buffer, np.uint8)
    files = ObjectFiles(engine, tmp_path)
    for _ in range(2):  # the second time the mount is known
        view[:] = 0xA5
        place = np.array([0, 8192, 65536], np.uint64)
        run(files, keys, buffer=buffer, memory=Memory.BUFFER, place=place, room=sizes)
        expected = np.full(1 << 20, 0xA5, np.uint8)
        for start, content in zip(place, contents, strict=True):
            expected[int(start) :][: len(content)] = np.frombuffer(content, np.uint8)
        assert (view == expected).all()


@pytest.mark.parametrize("direct", DIRECTS)
def test_many_more_files_than_are_in_flight(engine: Engine, tmp_path: Path, direct: str) -> None:
    keys, contents = make(tmp_path, [(i * 977) % 9000 for i in range(600)])
    sizes = [len(content) for content in contents]
    files = ObjectFiles(engine, tmp_path, direct=direct)
    place, room, nbytes = placed(sizes)
    for _ in range(3):  # the buffer is registered from the second time on
        buffer = AlignedBuffer(nbytes)
        for _ in range(2):
            done = run(files, keys, buffer=buffer, memory=Memory.BUFFER, place=place, room=room, object_nbytes=sizes)
            assert (done["kind"] == Kind.OK).all(), files.failures()
            view = memoryview(buffer)
            assert all(view[int(at) :][: len(content)] == content for at, content in zip(place, contents, strict=True))


def test_ranges_of_files(engine: Engine, tmp_path: Path) -> None:
    content = noise(200_000)
    (tmp_path / "a").write_bytes(content)
    files = ObjectFiles(engine, tmp_path)
    offsets = [0, 1, 4095, 4096, 65536, 199_999, 200_000, 3]
    nbytes = [10, 4096, 2, 8192, 65536, 1, 0, 199_990]
    place, _, total = placed(nbytes)
    for _ in range(2):
        buffer = bytearray(total)
        done = run(files, ["a"] * 8, buffer=buffer, memory=Memory.BUFFER, offset=offsets, nbytes=nbytes, place=place)
        assert done["result"].tolist() == nbytes, files.failures()
        for at, offset, count in zip(place, offsets, nbytes, strict=True):
            assert buffer[int(at) :][:count] == content[offset:][:count]


def test_a_range_to_the_end_begins_at_its_offset(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789" * 1000)
    files = ObjectFiles(engine, tmp_path)
    buffer = bytearray(8192)
    done = run(files, ["a"], buffer=buffer, memory=Memory.BUFFER, offset=9_990, room=8192)
    assert done["result"][0] == 10
    assert buffer[:10] == b"0123456789"


@pytest.mark.parametrize("known", [False, True])
def test_another_length_than_the_catalog_says_is_told(engine: Engine, tmp_path: Path, known: bool) -> None:
    sizes = [1000, 4096, 70_000, 200_000]
    keys, _ = make(tmp_path, sizes)
    files = ObjectFiles(engine, tmp_path)
    if known:
        run(files, keys)
    for wrong in (-1, 1):
        done = run(files, keys, object_nbytes=[size + wrong for size in sizes])
        assert (done["kind"] == Kind.LENGTH).all()
        assert (done["result"] == -errno.EIO).all()
        assert done["object_nbytes"].tolist() == sizes
        assert {failure.kind for failure in files.failures()} == {Kind.LENGTH}


def test_a_range_behind_the_end_is_short(engine: Engine, tmp_path: Path) -> None:
    keys, _ = make(tmp_path, [1000, 200_000])
    files = ObjectFiles(engine, tmp_path)
    for offset, nbytes in ((0, 200_001), (199_999, 2), (200_001, 1), (200_001, WHOLE)):
        done = run(files, keys, offset=offset, nbytes=nbytes)
        assert (done["kind"] == Kind.SHORT).all()
        assert (done["result"] == -errno.ENODATA).all()
    assert "ends before" in files.failures()[0].message


def test_an_object_without_room_is_of_the_wrong_length(engine: Engine, tmp_path: Path) -> None:
    make(tmp_path, [5000])
    files = ObjectFiles(engine, tmp_path)
    done = run(files, ["0-5000.bin"], buffer=bytearray(4999), memory=Memory.BUFFER, room=4999)
    assert done["kind"][0] == Kind.LENGTH


@pytest.mark.parametrize("direct", DIRECTS)
def test_a_fifo_is_refused_and_not_waited_for(engine: Engine, tmp_path: Path, direct: str) -> None:
    keys, _ = make(tmp_path, [5000] * 2)
    os.mkfifo(tmp_path / "fifo")
    files = ObjectFiles(engine, tmp_path, direct=direct)
    for size in (WHOLE, 0):
        done = run(files, ["fifo", *keys], object_nbytes=[size, 5000, 5000])
        assert done["result"].tolist() == [-errno.EINVAL, 5000, 5000]


def test_each_bad_file_is_reported_and_the_others_are_read(engine: Engine, tmp_path: Path) -> None:
    keys, _ = make(tmp_path, [5000] * 8)
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    files = ObjectFiles(engine, tmp_path)
    for _ in range(2):
        done = run(files, ["missing", *keys, "directory", "loop", "0-5000.bin/x", "n" * 300])
        codes = [-int(result) if result < 0 else 0 for result in done["result"]]
        assert codes == [errno.ENOENT, *[0] * 8, errno.EISDIR, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG]
        assert (done["kind"] == [Kind.SYSTEM if code else Kind.OK for code in codes]).all()
        assert (done["first_kind"] == done["kind"]).all()
        failures = {failure.tag: failure for failure in files.failures()}
        assert sorted(failures) == [0, 9, 10, 11, 12]
        assert failures[0].url == str(tmp_path / "missing")
        assert "No such file" in failures[0].message
    assert files.failures() == []


def test_more_failures_than_are_kept_are_counted_all_the_same(engine: Engine, tmp_path: Path) -> None:
    files = ObjectFiles(engine, tmp_path)
    done = run(files, [f"missing-{i}" for i in range(300)])
    assert (done["result"] == -errno.ENOENT).all()
    assert len(files.failures()) == 256


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("", "empty"),
        ("/etc/passwd", "slash"),
        ("../x", "leaves"),
        ("a/../../x", "leaves"),
        ("a/..", "leaves"),
        ("a/", "slash"),
        ("a\0b", "null"),
    ],
)
def test_keys_that_are_none_are_refused_and_nothing_is_submitted(
    engine: Engine, tmp_path: Path, key: str, said: str
) -> None:
    files = ObjectFiles(engine, tmp_path)
    for op in Op:
        asked, names = asking(["fine", key], op, memory=Memory.PATTERN)
        with pytest.raises(ValueError, match=f"transfer 1: .*{said}"):
            files.submit(asked, names, None, Pattern(1))
    assert files.outstanding == 0


@pytest.mark.parametrize("key", ["..x", "x..", "a b", "ä%20+", "a//b", "./c", "...", b"\xff\xfe"])
def test_odd_names_are_names(engine: Engine, tmp_path: Path, key: str | bytes) -> None:
    path = tmp_path / os.fsdecode(key)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"odd")
    assert run(ObjectFiles(engine, tmp_path), [key])["result"][0] == 3


def test_what_lies_outside_the_buffer_is_refused(engine: Engine, tmp_path: Path) -> None:
    files = ObjectFiles(engine, tmp_path)
    for fields, said in (
        ({"place": 90, "nbytes": 11}, "outside"),
        ({"place": 2**64 - 5, "nbytes": 10}, "outside"),
        ({"nbytes": 20, "room": 10}, "less room"),
        ({}, "says no room"),
        ({"nbytes": 2**63}, "greatest"),
        ({"memory": 7}, "none of"),
        ({"digest": 7}, "digest"),
        ({"key_start": 2**63}, "names"),
        ({"op": 9}, "none of"),
    ):
        asked, names = asking(["a"], **{"memory": Memory.BUFFER, **fields})
        with pytest.raises(ValueError, match=said):
            files.submit(asked, names, bytearray(100))
    asked, names = asking(["a"], memory=Memory.BUFFER, nbytes=10)
    with pytest.raises(ValueError, match="none was given"):
        files.submit(asked, names)
    with pytest.raises(ValueError, match="read-only"):
        files.submit(asked, names, bytes(100))
    with pytest.raises(ValueError, match="none was given"):
        files.submit(*asking(["a"], memory=Memory.PATTERN))
    with pytest.raises(ValueError, match="TRANSFER_DTYPE"):
        files.submit(bytes(95), b"")
    assert files.outstanding == 0


@pytest.mark.parametrize(
    ("digest", "name"), [(Digest.CRC32C, "crc32c"), (Digest.CRC32, "crc32"), (Digest.XXH64, "xxh64")]
)
def test_digests_of_what_was_read(engine: Engine, tmp_path: Path, digest: Digest, name: str) -> None:
    keys, contents = make(tmp_path)
    files = ObjectFiles(engine, tmp_path)
    expected = []
    for key, content in zip(keys, contents, strict=True):
        extent = Extent(0, len(content), bytearray(len(content)), name)
        empty = 0xEF46DB3751D8E999 if digest is Digest.XXH64 else 0  # of no bytes, by the algorithms' definition
        expected.append(engine.read_file(tmp_path / key, [extent]).digests[0] if content else empty)
    for _ in range(2):
        done = run(files, keys, digest=digest)
        assert done["digest_value"].tolist() == expected
    right = run(files, keys, digest=digest, flags=1, digest_value=expected)
    assert (right["kind"] == Kind.OK).all()
    wrong = run(files, keys, digest=digest, flags=1, digest_value=[value ^ 1 for value in expected])
    assert (wrong["kind"] == Kind.CHECKSUM).all()
    assert (wrong["result"] == -errno.EIO).all()
    assert "checksum" in files.failures()[0].message


def test_a_pattern_shows_damage(engine: Engine, tmp_path: Path) -> None:
    pattern = Pattern(run_id=7, checkpoint=1)
    sizes = [4096, 10_000, 65_536, 300_000]
    keys = [str(i) for i in range(4)]
    for i, size in enumerate(sizes):
        content = bytearray(size)
        Pattern(run_id=7, checkpoint=1, file_id=100 + i).fill(content)
        (tmp_path / str(i)).write_bytes(content)
    files = ObjectFiles(engine, tmp_path)
    fields = {"memory": Memory.PATTERN, "place": [100, 101, 102, 103]}
    for _ in range(2):
        assert run(files, keys, pattern=pattern, **fields)["damaged_blocks"].tolist() == [0, 0, 0, 0]
    with open(tmp_path / "2", "r+b") as file:
        file.seek(8192)
        file.write(bytes(5000))
    assert run(files, keys, pattern=pattern, **fields)["damaged_blocks"].tolist() == [0, 0, 2, 0]
    swapped = run(files, keys, pattern=pattern, memory=Memory.PATTERN, place=[101, 100, 102, 103])
    assert swapped["damaged_blocks"].tolist() == [1, 3, 2, 0]
    part = run(files, ["2"], pattern=pattern, memory=Memory.PATTERN, place=102, offset=4096, nbytes=4096)
    assert part["damaged_blocks"].tolist() == [0]


def test_times_are_in_order(engine: Engine, tmp_path: Path) -> None:
    keys, _ = make(tmp_path)
    files = ObjectFiles(engine, tmp_path)
    for _ in range(2):
        done = run(files, keys)
        for earlier, later in (
            ("submit_ns", "start_ns"),
            ("start_ns", "attempt_ns"),
            ("attempt_ns", "first_byte_ns"),
            ("first_byte_ns", "end_ns"),
        ):
            assert (done[earlier] <= done[later]).all(), (earlier, later)
        assert (done["attempts"] == 1).all()
        assert (done["endpoint"] == 0).all()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_direct_is_confirmed_once_per_mount_and_by_a_sample(
    engine: Engine, shared_fs: Callable[[str], Path], kind: str
) -> None:
    directory = shared_fs(kind)
    keys, _ = make(directory, [5000] * 40)
    for key in keys:
        evict(directory / key)
    files = ObjectFiles(engine, directory)
    assert (files.direct, files.reason) == ("unverified", "nothing was read")
    run(files, keys)
    assert files.direct == "yes"
    for _ in range(20):
        run(files, keys)
    assert files.direct == "yes"
    looked_at = int(files.reason.split()[2])
    assert 2 <= looked_at <= 20
    assert [resident(directory / key)[0] for key in keys] == [0] * 40


def test_memory_is_never_called_direct(engine: Engine, shared_fs: Callable[[str], Path]) -> None:
    directory = shared_fs("tmpfs")
    keys, _ = make(directory)
    files = ObjectFiles(engine, directory)
    assert (run(files, keys)["kind"] == Kind.OK).all()
    assert files.direct == "no"
    assert "memory" in files.reason
    required = ObjectFiles(engine, directory, direct="require")
    done = run(required, keys[1:])
    assert (done["result"] == -errno.EOPNOTSUPP).all()


def test_a_second_mount_below_the_first_is_known_by_itself(
    engine: Engine, tmp_path: Path, shared_fs: Callable[[str], Path]
) -> None:
    (tmp_path / "disk").symlink_to(shared_fs("ext4"))
    (tmp_path / "memory").symlink_to(shared_fs("tmpfs"))
    contents = {}
    for place in ("disk", "memory"):
        for i in range(20):
            contents[f"{place}/{i}"] = noise(5000, seed=i)
            (tmp_path / place / str(i)).write_bytes(contents[f"{place}/{i}"])
    os.sync()
    files = ObjectFiles(engine, tmp_path)
    room = np.full(40, 8192, np.uint64)
    place = np.arange(40, dtype=np.uint64) * 8192
    for _ in range(3):
        buffer = AlignedBuffer(40 * 8192)
        done = run(files, list(contents), buffer=buffer, memory=Memory.BUFFER, place=place, room=room)
        assert (done["kind"] == Kind.OK).all(), files.failures()
        for i, content in enumerate(contents.values()):
            assert memoryview(buffer)[i * 8192 :][:5000] == content
    assert files.direct == "no"


def test_buffered_reads_leave_nothing_in_the_page_cache_unless_they_are_to(
    engine: Engine, shared_fs: Callable[[str], Path]
) -> None:
    directory = shared_fs("ext4")
    keys, _ = make(directory, [65_536] * 4)
    for dropped in (True, False):
        files = ObjectFiles(engine, directory, direct="off", evict=dropped)
        for _ in range(2):
            run(files, keys)
        assert files.direct == "no"
        assert [resident(directory / key)[0] for key in keys] == [0 if dropped else 65_536] * 4


def test_an_answer_comes_to_who_waits_for_none(engine: Engine, tmp_path: Path) -> None:
    files = ObjectFiles(engine, tmp_path)
    done = np.zeros(4, COMPLETION_DTYPE)
    assert files.reap(done, min_done=3) == 0
    files.submit(*asking([]))
    assert files.outstanding == 0
    keys, _ = make(tmp_path, [10] * 10)
    files.submit(*asking(keys))
    taken = 0
    while files.outstanding:
        taken += files.reap(done, min_done=1, timeout_s=60)
    assert taken == 10
    assert reaped(files).size == 0
