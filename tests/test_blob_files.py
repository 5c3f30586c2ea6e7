"""Files as blobs: pieces of memory arrive as they were, and what goes wrong leaves the old file and nothing else."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blob_support import Case, Row, cases, check_round_trip, digest, noise_array, one_piece
from engine_support import finish, leftovers, python
from fuse_faults import Faulty, faulty
from hypothesis import given, settings, strategies as st
from test_engine_fork import in_child

from mlstor._io import Engine
from mlstor.blob.files import FileBlob
from mlstor.blob.target import open_blob, open_directory
from mlstor.blob.types import Blob, LatePiece, make_pieces
from mlstor.errors import UsageError

MIB = 1 << 20
OLD = b"what was there before"


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    return open_blob(tmp_path / "blob")


@settings(max_examples=60)
@given(case=cases(), dropped=st.frozensets(st.integers(0, 9), max_size=3))
def test_random_pieces_come_back_with_their_digests(blob: Blob, case: Case, dropped: frozenset[int]) -> None:
    check_round_trip(blob, case, dropped)


def test_either_backend_moves_them(engine: Engine, tmp_path: Path) -> None:
    rows = [Row(0, 1, 300_001, 0), Row(70_000, 0, 5000, 1), Row(64, 1, 1_200_001, 0), Row(1, 0, 100, -1)]
    check_round_trip(open_blob(tmp_path / "blob", engine=engine), Case(rows, [0, 1, 2, 3], 5000, 1, "crc32+crc32c"))


def test_thousands_of_small_pieces_come_by_few_reads(blob: Blob, tmp_path: Path) -> None:
    count, nbytes = 20_000, 2100  # more than one scratch buffer holds, and not a multiple of anything
    source, into = noise_array(count * nbytes), np.zeros((count, 2048), "u1")
    blob.publish(source.nbytes, one_piece(source, -1), keep=source)
    pieces = make_pieces(count)
    pieces["offset"] = np.arange(count) * nbytes + 52
    pieces["nbytes"], pieces["group"] = 2048, np.arange(count)
    pieces["address"] = into.ctypes.data + np.arange(count) * 2048
    with Engine(workers=2, depth=4, block_bytes=MIB) as engine:
        before = engine.counters()
        fetched = FileBlob(tmp_path / "blob", engine).fetch(pieces, keep=into)
        assert engine.counters().reads - before.reads < 100
    due = source.reshape(count, nbytes)[:, 52:]
    assert np.array_equal(into, due)
    assert fetched.digests == {i: digest("crc32", due[i].tobytes()) for i in range(count)}


def test_congruent_memory_is_not_copied(tmp_path: Path) -> None:
    memory = np.zeros(17 * MIB, "u1")
    address = memory.ctypes.data + -memory.ctypes.data % 4096 + 64  # where torch's allocator puts large tensors
    blob = open_blob(tmp_path / "blob")
    pieces = make_pieces([(4096 + 64, 8 * MIB, address, 0), (8 * MIB + 8192 + 64, 8 * MIB, address + 8 * MIB, 1)])
    late = [LatePiece(0, 64, lambda digests: bytes(64)), LatePiece(8 * MIB + 8192, 64, lambda digests: bytes(64))]
    published = blob.publish(17 * MIB, pieces, late, keep=memory)
    fetched = blob.fetch(pieces, keep=memory)
    if published.direct == "no":
        pytest.skip("no direct I/O here")
    for moved in (published, fetched):
        assert moved.zero_copy_bytes >= 0.99 * 16 * MIB
        assert moved.staged_bytes < 64 << 10


def test_a_limited_write_is_never_ahead_of_its_rate(tmp_path: Path) -> None:
    data, rate = noise_array(8 * MIB), 32 * MIB
    with Engine(workers=2, block_bytes=MIB) as engine:
        blob = open_blob(tmp_path / "blob", engine=engine)
        published = blob.publish(8 * MIB, one_piece(data), keep=data, max_bandwidth=rate)
        burst = 2 * MIB  # a block of each worker
        assert (published.end_ns - published.start_ns) / 1e9 >= (8 * MIB - burst) / rate
        assert blob.read(0, 8 * MIB) == data.tobytes()


def test_pieces_that_make_no_sense_are_refused(blob: Blob) -> None:
    data = noise_array(100)
    address = data.ctypes.data
    for rows, late in [
        ([(0, 50, address, -1), (49, 10, address + 50, -1)], []),  # overlap
        ([(0, 50, address, -1)], [LatePiece(20, 4, lambda digests: b"....")]),
        ([(60, 50, address, -1)], []),  # beyond the end
        ([(0, 50, 0, -1)], []),  # nowhere
    ]:
        with pytest.raises(ValueError, match=r"overlap|beyond|no address"):
            blob.publish(100, make_pieces(rows), late)
    with pytest.raises(ValueError, match=r"was given 5"):
        blob.publish(4, make_pieces(0), [LatePiece(0, 4, lambda digests: b"five.")])
    with pytest.raises(FileNotFoundError):
        blob.stat()


def test_a_blob_that_is_short_missing_or_another_is_an_error(blob: Blob) -> None:
    data = noise_array(MIB)
    with pytest.raises(FileNotFoundError, match="blob"):
        blob.fetch(one_piece(data), keep=data)
    first = blob.publish(1000, one_piece(data[:1000]), keep=data)
    with pytest.raises(OSError) as caught:
        blob.fetch(one_piece(data[:1001]), keep=data)
    assert caught.value.errno == errno.ENODATA
    second = blob.publish(1000, one_piece(data[:1000]), keep=data)
    assert first.etag != second.etag
    with pytest.raises(OSError, match="changed") as caught:
        blob.fetch(one_piece(data[:1000]), keep=data, etag=first.etag)
    assert caught.value.errno == errno.ESTALE
    blob.delete()
    blob.delete()
    with pytest.raises(FileNotFoundError):
        blob.stat()


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise_array(1000)
    blob.publish(1000, one_piece(data), keep=data)
    stat, looks = blob.stat, []

    def replaced_after_the_first_look() -> Any:
        found = stat()
        looks.append(found)
        if len(looks) == 1:
            open_blob(blob.name).publish(1000, one_piece(data), keep=data)
        return found

    monkeypatch.setattr(blob, "stat", replaced_after_the_first_look)
    with pytest.raises(OSError, match="changed") as caught:
        blob.fetch(one_piece(data), keep=data)
    assert caught.value.errno == errno.ESTALE


def test_cancelled_or_interrupted_it_leaves_the_old_file(blob: Blob, tmp_path: Path) -> None:
    Path(blob.name).write_bytes(OLD)
    data, cancel = noise_array(MIB), threading.Event()
    cancel.set()
    with pytest.raises(OSError) as caught:
        blob.publish(MIB, one_piece(data), keep=data, cancel=cancel)
    assert caught.value.errno == errno.ECANCELED

    def interrupt(digests: Any) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.5)  # in a worker; meanwhile the main thread hears of it
        return b"late"

    with pytest.raises(KeyboardInterrupt):
        blob.publish(MIB + 4, one_piece(data), [LatePiece(MIB, 4, interrupt)], keep=data)
    from mlstor import default_engine

    assert default_engine().drain(30)
    assert Path(blob.name).read_bytes() == OLD
    assert os.listdir(tmp_path) == ["blob"]


def test_it_pickles_and_works_in_a_fork(tmp_path: Path) -> None:
    directory = pickle.loads(pickle.dumps(open_directory(tmp_path / "a" / "b")))
    directory.make()
    directory.make()
    assert directory.names() == []
    blob = pickle.loads(pickle.dumps(directory.blob("x")))
    data = noise_array(MIB)
    blob.publish(MIB, one_piece(data), keep=data)

    def work() -> None:
        into = np.zeros(MIB, "u1")
        assert blob.fetch(one_piece(into), keep=into).digests == {0: digest("crc32", data.tobytes())}
        into = into[::-1].copy()
        blob.publish(MIB, one_piece(into), keep=into)

    in_child(work)
    assert blob.read(0, MIB) == data[::-1].tobytes()
    assert directory.names() == ["x"]
    directory.remove(["x", "never there"])
    assert directory.names() == open_directory(tmp_path / "missing").names() == []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        open_directory(tmp_path / "file" / "below").make()


def test_an_engine_that_was_given_is_its_own_process_s_only(tmp_path: Path) -> None:
    data = noise_array(MIB)
    with Engine(workers=1, block_bytes=MIB) as engine:
        directory = open_directory(tmp_path, engine=engine)
        blob = directory.blob("x")
        blob.publish(MIB, one_piece(data), keep=data)

        def work() -> None:
            for again in (blob, directory.blob("x")):
                assert again.read(0, MIB) == data.tobytes()
            directory.blob("y").publish(MIB, one_piece(data), keep=data)

        before = engine.counters().reads
        in_child(work)
        assert blob.read(0, MIB) == directory.blob("y").read(0, MIB) == data.tobytes()
        assert engine.counters().reads > before


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    data = noise_array(1000)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_bytes(OLD)
    for name, target in (("blob", "there/old"), ("dangling", "there/new")):
        (tmp_path / name).symlink_to(target)
        open_blob(tmp_path / name).publish(1000, one_piece(data), keep=data)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target).read_bytes() == data.tobytes()
    assert sorted(os.listdir(tmp_path / "there")) == ["new", "old"]


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    data = noise_array(1000)
    os.mkfifo(tmp_path / "blob")
    with pytest.raises(OSError, match="device, pipe or socket: name a file") as caught:
        open_blob(tmp_path / "blob").publish(1000, one_piece(data), keep=data)
    assert (caught.value.errno, caught.value.filename) == (errno.ENXIO, str(tmp_path / "blob"))
    assert (tmp_path / "blob").is_fifo()
    assert os.listdir(tmp_path) == ["blob"]


def test_names_of_blobs() -> None:
    assert open_blob("file:///some/where").name == "/some/where"
    assert open_directory("file:///some/where").blob("x").name == "/some/where/x"
    for url, words in [
        ("ftp://x/y", "unknown"),
        ("file://other/x", "three slashes"),
        ("s3://bucket", "name an object"),
    ]:
        with pytest.raises(UsageError, match=words):
            open_blob(url)
    with pytest.raises(UsageError, match="leave out endpoint"):
        open_blob("/some/where", endpoint="http://x")


# ---- storage that fails ----


def check_untouched(directory: Path, attempt: Callable[[], object], code: int) -> None:
    """It fails with that errno and the file's name; the old file is there, and nothing else."""
    with pytest.raises(OSError) as caught:
        attempt()
    assert caught.value.errno == code
    assert "blob" in str(caught.value)
    assert (directory / "blob").read_bytes() == OLD
    assert os.listdir(directory) == ["blob"]


def test_a_full_disk_leaves_the_old_file(tmpfs_mount: Callable[[int], Path]) -> None:
    directory = tmpfs_mount(4 * MIB)
    (directory / "blob").write_bytes(OLD)
    data = noise_array(8 * MIB)
    blob = open_blob(directory / "blob")
    check_untouched(directory, lambda: blob.publish(8 * MIB, one_piece(data), keep=data), errno.ENOSPC)


def test_who_may_not_write_is_told_so(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("to become another user needs root")
    (tmp_path / "blob").write_bytes(OLD)
    tmp_path.chmod(0o755)
    code = """
        import ctypes, os, sys
        import numpy
        from mlstor.blob.target import open_blob
        from mlstor.blob.types import make_pieces
        os.chdir(sys.argv[1])
        data = bytearray(5000)
        pieces = make_pieces(1)
        pieces["nbytes"], pieces["address"] = 5000, ctypes.addressof(ctypes.c_char.from_buffer(data))
        # What is imported at the first use may lie where only root may read.
        open_blob("first").publish(5000, pieces, keep=data)
        os.remove("first")
        os.setuid(65534)
        try:
            open_blob("blob").publish(5000, pieces, keep=data)
        except PermissionError as error:
            print(error)
    """
    assert "permissions" in finish(python(code, tmp_path))
    assert (tmp_path / "blob").read_bytes() == OLD
    assert os.listdir(tmp_path) == ["blob"]


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    with faulty(tmp_path_factory.mktemp("fuse")) as made:
        yield made


@pytest.fixture
def place(failing: Faulty) -> Iterator[Path]:
    """A directory on it that holds the old blob."""
    failing.heal()
    directory = failing.root / "directory"
    directory.mkdir(exist_ok=True)
    (directory / "blob").write_bytes(OLD)
    yield directory
    failing.heal()


@pytest.mark.parametrize(
    ("op", "nth", "code"),
    [
        ("create", 1, errno.EROFS),
        ("write", 1, errno.EIO),
        ("write", 4, errno.ENOSPC),
        ("fsync", 1, errno.EIO),
        ("rename", 1, errno.EIO),
    ],
)
def test_a_device_that_fails_leaves_the_old_file(failing: Faulty, place: Path, op: str, nth: int, code: int) -> None:
    data = noise_array(4 * MIB)
    late = [LatePiece(4 * MIB, 8, lambda digests: b"the last")]
    with Engine(workers=2, depth=2, block_bytes=256 << 10) as engine:
        blob = FileBlob(place / "blob", engine)
        failing.fail(op, code, nth)
        check_untouched(place, lambda: blob.publish(4 * MIB + 8, one_piece(data), late, keep=data), code)
        failing.heal()
        blob.publish(4 * MIB + 8, one_piece(data), late, keep=data)
        assert blob.read(4 * MIB - 1, 9) == data[-1:].tobytes() + b"the last"


def test_a_directory_that_does_not_sync_is_an_error_and_the_file_whole(failing: Faulty, place: Path) -> None:
    data = noise_array(MIB)
    blob = open_blob(place / "blob")
    failing.fail("fsyncdir", errno.EIO)
    with pytest.raises(OSError, match="directory") as caught:
        blob.publish(MIB, one_piece(data), keep=data)
    assert caught.value.errno == errno.EIO
    assert (place / "blob").read_bytes() == data.tobytes()
    assert leftovers(place) == []


def test_a_range_that_can_not_be_read_is_named(failing: Faulty, place: Path) -> None:
    data, into = noise_array(4 * MIB), np.zeros(4 * MIB, "u1")
    blob = open_blob(place / "blob")
    blob.publish(4 * MIB, one_piece(data), keep=data)
    failing.fail("read", errno.EIO, first=3 * MIB, last=3 * MIB + 10)
    small = make_pieces([(3 * MIB, 10, into.ctypes.data, 0), (0, MIB, into.ctypes.data + MIB, 1)])
    for pieces in (one_piece(into), small):
        with pytest.raises(OSError, match="blob") as caught:
            blob.fetch(pieces, keep=into)
        assert caught.value.errno == errno.EIO
        assert "offset" in str(caught.value)
    assert blob.read(0, 100) == data[:100].tobytes()


def test_two_processes_on_one_path_leave_one_or_the_other(tmp_path: Path) -> None:
    code = """
        import sys
        import numpy
        from mlstor.blob.target import open_blob
        from mlstor.blob.types import make_pieces
        data = numpy.full(300_001, int(sys.argv[2]), "u1")
        pieces = make_pieces([(0, data.nbytes, data.ctypes.data, 0)])
        for _ in range(50):
            open_blob(sys.argv[1]).publish(data.nbytes, pieces, keep=data)
    """
    path = tmp_path / "blob"
    writers = [python(code, path, value) for value in (1, 2)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            continue
        assert len(found) == 300_001
        assert len(set(found)) == 1, "a mixture"
        seen.add(found[0])
    for writer in writers:
        finish(writer)
    assert seen <= {1, 2}
    assert len(set(path.read_bytes())) == 1
    assert os.listdir(tmp_path) == ["blob"]
