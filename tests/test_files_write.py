"""Arrays of files: written whole, looked at, removed; at their time; cancelled, forked, closed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_support import BACKENDS, DIRECTS, finish, leftovers, noise, python, small_engine
from files_support import SIZES, asking, make, placed, reaped, run

from mlstor._io import Engine, ObjectFiles, Pattern
from mlstor.operations import Step
from mlstor.storage.transfers import COMPLETION_DTYPE, Digest, Kind, Memory, Op


@pytest.fixture(params=BACKENDS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with small_engine(request.param) as engine:
        yield engine


@pytest.mark.parametrize("direct", DIRECTS)
def test_files_are_written_whole_with_the_directories_that_they_need(
    engine: Engine, each_fs: Path, direct: str
) -> None:
    contents = [noise(size, seed=i) for i, size in enumerate(SIZES)]
    keys = [f"deep/{'/'.join('ab'[: i % 3])}/{size}" for i, size in enumerate(SIZES)]
    place, _, nbytes = placed(SIZES)
    buffer = bytearray(nbytes)
    for at, content in zip(place, contents, strict=True):
        buffer[int(at) : int(at) + len(content)] = content
    files = ObjectFiles(engine, each_fs, direct=direct)
    for _ in range(2):  # made, then replaced
        done = run(files, keys, Op.WRITE, bytes(buffer), memory=Memory.BUFFER, place=place, nbytes=SIZES)
        assert (done["kind"] == Kind.OK).all(), files.failures()
        assert done["result"].tolist() == list(SIZES)
        assert done["object_nbytes"].tolist() == list(SIZES)
        assert [(each_fs / key).read_bytes() for key in keys] == contents
    for directory, _, _ in os.walk(each_fs):
        assert leftovers(directory) == []


@pytest.mark.parametrize(
    ("digest", "value"), [(Digest.CRC32C, 0), (Digest.CRC32, 0), (Digest.XXH64, 0xEF46DB3751D8E999)]
)
def test_an_empty_file_has_the_digest_of_no_bytes(engine: Engine, tmp_path: Path, digest: Digest, value: int) -> None:
    files = ObjectFiles(engine, tmp_path)
    written = run(files, ["empty"], Op.WRITE, pattern=Pattern(1), memory=Memory.PATTERN, nbytes=0, digest=digest)
    assert (written["kind"].tolist(), written["digest_value"].tolist()) == ([Kind.OK], [value])
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_pattern_is_written_and_found_again(engine: Engine, tmp_path: Path) -> None:
    pattern = Pattern(run_id=3, checkpoint=2, compressibility=30)
    files = ObjectFiles(engine, tmp_path)
    keys = [str(i) for i in range(20)]
    sizes = [i * 10_007 for i in range(20)]
    fields = {"memory": Memory.PATTERN, "place": np.arange(20) + 50}
    written = run(files, keys, Op.WRITE, pattern=pattern, nbytes=sizes, digest=Digest.CRC32C, **fields)
    assert (written["kind"] == Kind.OK).all(), files.failures()
    read = run(files, keys, pattern=pattern, digest=Digest.CRC32C, object_nbytes=sizes, **fields)
    assert (read["damaged_blocks"] == 0).all()
    assert read["result"].tolist() == sizes
    assert read["digest_value"].tolist() == written["digest_value"].tolist()
    expected = bytearray(sizes[7])
    Pattern(run_id=3, checkpoint=2, file_id=57, compressibility=30).fill(expected)
    assert (tmp_path / "7").read_bytes() == expected


def test_a_full_disk_is_reported_per_file_and_leaves_nothing_half_written(
    engine: Engine, tmpfs_mount: Callable[[int], Path]
) -> None:
    directory = tmpfs_mount(1 << 20)
    files = ObjectFiles(engine, directory)
    keys = [str(i) for i in range(8)]
    done = run(files, keys, Op.WRITE, pattern=Pattern(1), memory=Memory.PATTERN, nbytes=300_000)
    assert set(done["result"].tolist()) == {300_000, -errno.ENOSPC}
    written = {keys[int(one["tag"])] for one in done if one["kind"] == Kind.OK}
    assert set(os.listdir(directory)) == written
    assert {failure.message.split("(")[0] for failure in files.failures()} == {"No space left on device "}


def test_steps_of_a_write_are_those_that_were_asked_for(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"former")
    number = (tmp_path / "a").stat().st_ino
    fields = {"memory": Memory.BUFFER, "nbytes": 3}
    run(ObjectFiles(engine, tmp_path, steps=Step(0)), ["a"], Op.WRITE, b"new", **fields)
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "a").stat().st_ino) == (b"new", number)
    run(ObjectFiles(engine, tmp_path), ["a"], Op.WRITE, b"two", **fields)
    assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "a").stat().st_ino != number


def test_a_write_begins_at_0_and_has_a_source(engine: Engine, tmp_path: Path) -> None:
    files = ObjectFiles(engine, tmp_path)
    with pytest.raises(ValueError, match="offset 0"):
        files.submit(*asking(["a"], Op.WRITE, memory=Memory.BUFFER, offset=1, nbytes=1), b"xyz")
    with pytest.raises(ValueError, match="buffer or a pattern"):
        files.submit(*asking(["a"], Op.WRITE, nbytes=1))


def test_files_are_looked_at_and_removed(engine: Engine, tmp_path: Path) -> None:
    keys, _ = make(tmp_path)
    (tmp_path / "directory").mkdir()
    files = ObjectFiles(engine, tmp_path)
    found = run(files, [*keys, "missing", "directory"], Op.STAT)
    assert found["result"].tolist() == [0] * len(keys) + [-errno.ENOENT, -errno.EISDIR]
    assert found["object_nbytes"][: len(keys)].tolist() == list(SIZES)
    gone = run(files, [*keys, "missing", "directory"], Op.DELETE)
    assert gone["result"].tolist() == [0] * len(keys) + [-errno.ENOENT, -errno.EISDIR]
    assert os.listdir(tmp_path) == ["directory"]


def test_transfers_begin_when_they_are_to(engine: Engine, tmp_path: Path) -> None:
    keys, _ = make(tmp_path, [100, 300_000] * 5)
    files = ObjectFiles(engine, tmp_path)
    due = time.monotonic_ns() + (1 + np.arange(10)[::-1]) * 20_000_000  # the last is to begin first
    done = run(files, keys, not_before_ns=due)
    assert (done["kind"] == Kind.OK).all(), files.failures()
    assert (done["start_ns"] >= due).all()
    assert np.argsort(done["start_ns"]).tolist() == list(range(10))[::-1]


def test_what_has_not_begun_is_cancelled(engine: Engine, tmp_path: Path) -> None:
    keys, _ = make(tmp_path, [100])
    files = ObjectFiles(engine, tmp_path)
    hour_ns = 3_600_000_000_000
    asked, names = asking(keys * 50, not_before_ns=time.monotonic_ns() + hour_ns)
    asked["not_before_ns"][::2] = 0
    files.submit(asked, names)
    done = np.zeros(50, COMPLETION_DTYPE)
    assert files.reap(done, min_done=25, timeout_s=60) == 25
    assert files.reap(done, min_done=1, timeout_s=0.05) == 0
    files.cancel()
    rest = reaped(files)
    assert (rest["kind"] == Kind.CANCELLED).all()
    assert (rest["result"] == -errno.ECANCELED).all()
    assert (rest["tag"] % 2 == 1).all()
    assert files.failures() == []


def test_a_cancelled_batch_is_accounted_for_to_the_last(engine: Engine, tmp_path: Path) -> None:
    keys, _ = make(tmp_path, [5000, 200_000] * 20)
    files = ObjectFiles(engine, tmp_path)
    for _ in range(10):
        asked, names = asking(keys * 20)
        files.submit(asked, names)
        files.cancel()
        done = reaped(files)
        assert sorted(done["tag"].tolist()) == list(range(800))
        assert set(done["kind"].tolist()) <= {Kind.OK, Kind.CANCELLED}
        assert (done["result"][done["kind"] == Kind.OK] > 0).all()
    assert (run(files, keys)["kind"] == Kind.OK).all()


def test_closing_waits_for_what_is_under_way_and_takes_nothing_more(engine: Engine, tmp_path: Path) -> None:
    keys, _ = make(tmp_path, [5000] * 50)
    files = ObjectFiles(engine, tmp_path)
    asked, names = asking(keys)
    asked["not_before_ns"][1] = time.monotonic_ns() + 3_600_000_000_000
    files.submit(asked, names)
    files.close()
    files.close()
    assert files.outstanding == 0
    with pytest.raises(ValueError, match="closed"):
        files.submit(asked, names)
    assert (run(ObjectFiles(engine, tmp_path), keys)["kind"] == Kind.OK).all()


def test_an_engine_is_closed_under_its_files(tmp_path: Path) -> None:
    keys, _ = make(tmp_path, [5000] * 50)
    for backend in BACKENDS:
        engine = small_engine(backend)
        files = ObjectFiles(engine, tmp_path)
        asked, names = asking(keys * 20)
        asked["not_before_ns"][::7] = time.monotonic_ns() + 3_600_000_000_000
        files.submit(asked, names, bytearray(10))
        engine.close()
        with pytest.raises(ValueError, match="closed"):
            files.reap(np.zeros(1, COMPLETION_DTYPE))
        del files


def test_an_owned_engine_ends_with_its_files(tmp_path: Path) -> None:
    engine = small_engine("threads")
    ObjectFiles(engine, tmp_path, owns_engine=True).close()
    with pytest.raises(ValueError, match="closed"):
        engine.counters()


def test_counters_count(engine: Engine, tmp_path: Path) -> None:
    keys, _ = make(tmp_path, [5000] * 50)
    files = ObjectFiles(engine, tmp_path)
    run(files, keys)
    run(files, keys, Op.DELETE)
    counters = files.counters()
    assert counters.received_bytes == 250_000
    assert (counters.requests, counters.connections) == (100, 0)


@pytest.mark.parametrize("root", ["missing", "file"])
def test_a_root_that_is_no_directory_is_refused(engine: Engine, tmp_path: Path, root: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((FileNotFoundError, NotADirectoryError)) as caught:
        ObjectFiles(engine, tmp_path / root)
    assert caught.value.filename == str(tmp_path / root)
    with pytest.raises(ValueError, match="auto, require or off"):
        ObjectFiles(engine, tmp_path, direct="perhaps")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_child_of_a_fork_amidst_reads_has_none_of_them(backend: str, tmp_path: Path) -> None:
    make(tmp_path, [65_536] * 40)
    code = """
        import os, sys
        sys.path.insert(0, sys.argv[3])
        import numpy as np
        from engine_support import small_engine
        from files_support import asking, placed, reaped
        from mlstor._io import AlignedBuffer, ObjectFiles
        from mlstor.storage.transfers import Memory
        keys = sorted(os.listdir(sys.argv[1]))
        engine = small_engine(sys.argv[2])
        files = ObjectFiles(engine, sys.argv[1])
        sizes = [65536] * len(keys)
        place, room, nbytes = placed(sizes)
        buffer = AlignedBuffer(nbytes)
        for _ in range(20):
            files.submit(*asking(keys, memory=Memory.BUFFER, place=place, room=room), buffer)
            child = os.fork()
            if not child:
                try:
                    files.submit(*asking(keys))
                except RuntimeError:
                    del files
                    os._exit(0)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert (reaped(files)["result"] == 65536).all()
            for key, at in zip(keys, place):
                assert memoryview(buffer)[int(at):][:65536] == open(f"{sys.argv[1]}/{key}", "rb").read()
        print("done")
    """
    assert finish(python(code, tmp_path, backend, Path(__file__).parent), 60) == "done\n"


def test_ctrl_c_cancels_and_goes_on(tmp_path: Path) -> None:
    code = """
        import os, signal, sys, threading, time
        sys.path.insert(0, sys.argv[2])
        import numpy as np
        from engine_support import small_engine
        from files_support import asking, reaped
        from mlstor._io import ObjectFiles
        from mlstor.storage.transfers import COMPLETION_DTYPE, Kind
        files = ObjectFiles(small_engine("threads"), sys.argv[1])
        files.submit(*asking(["a"], not_before_ns=time.monotonic_ns() + 10**13))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            files.reap(np.zeros(1, COMPLETION_DTYPE))
        except KeyboardInterrupt:
            assert reaped(files)["kind"].tolist() == [Kind.CANCELLED]
            print("done")
    """
    assert finish(python(code, tmp_path, Path(__file__).parent)) == "done\n"
