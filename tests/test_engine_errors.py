"""Bad input and storage that fails, for real: the error names the file and says what to try, nothing stays behind."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_support import BACKENDS, BLOCK, DIRECTS, finish, leftovers, noise, python, small_engine

from mlstor._io import Engine, Pattern
from mlstor.operations import DURABLE, Extent, Late, ReadFile, Step, WriteFile

MIB = 1 << 20


def assert_error(error: OSError, code: int, path: Path, *words: str) -> None:
    assert error.errno == code
    assert error.filename == str(path)
    for word in words:
        assert word in str(error)


# ---- arguments ----


@pytest.mark.parametrize(
    ("extents", "error", "text"),
    [
        ([Extent(0, 10, bytes(10)), Extent(9, 1, b"x")], ValueError, "overlap"),
        ([Extent(5, 10, bytes(10)), Extent(0, 6, bytes(6))], ValueError, "overlap"),
        ([Extent(0, 10, bytes(9))], ValueError, "extent of 10 bytes was given a buffer of 9"),
        ([Extent(-1, 10, bytes(10))], ValueError, "not negative"),
        ([Extent(0, -10, b"")], ValueError, "not negative"),
        ([Extent(2**64, 1, b"x")], ValueError, "greatest file offset"),
        ([Extent(2**63 - 1, 1, b"x")], ValueError, "greatest file offset"),
        ([Extent(0, 1, b"x", "md5")], ValueError, r"crc32, crc32c, crc32\+crc32c or xxh64"),
        ([Extent(0, 1, b"x", "crc32", 3), Extent(1, 1, b"x", "crc32c", 3)], ValueError, "one kind of digest"),
        ([Extent(5, 1, b"x", "xxh64"), Extent(0, 1, b"x", "xxh64")], ValueError, "order that xxh64 needs"),
        ([Extent(0, 1, Late(lambda _: b"x"), "crc32")], ValueError, "no digest of their own"),
        ([Extent(0, 1, Late(lambda _: b"x")), Extent(1, 1, b"x", "xxh64")], ValueError, "late extents come last"),
        ([Extent(0, 1, "text")], TypeError, "bytes-like"),
        ([Extent(0, 1, None)], TypeError, "bytes-like"),
        ([Extent(0, 1, 7)], TypeError, "bytes-like"),
        ([Extent(0.5, 1, b"x")], TypeError, ""),  # type: ignore[arg-type]
        ([(0, 1, b"x")], TypeError, "sequence of Extent"),
    ],
)
def test_extents_are_checked(
    engine: Engine, tmp_path: Path, extents: list[Extent], error: type[Exception], text: str
) -> None:
    good = WriteFile(tmp_path / "good", [Extent(0, 1, b"x")])
    with pytest.raises(error, match=text or None):
        engine.submit([good, WriteFile(tmp_path / "bad", extents)])
    assert engine.drain(0)
    assert os.listdir(tmp_path) == []  # nothing of the batch was submitted


def test_operations_are_checked(engine: Engine, tmp_path: Path) -> None:
    extents = [Extent(0, 8, bytes(8))]
    cases: list[tuple[object, type[Exception], str]] = [
        ("a path", TypeError, "WriteFile or a ReadFile, not str"),
        (WriteFile(tmp_path / "x", extents, nbytes=7), ValueError, "nbytes=7 is below the end"),
        (WriteFile(tmp_path / "x", extents, nbytes=2**63), ValueError, "greatest file offset"),
        (WriteFile(tmp_path / "x", extents, block_bytes=2 * BLOCK), ValueError, "exceeds the engine's"),
        (WriteFile(tmp_path / "x", extents, block_bytes=-1), OverflowError, ""),
        (WriteFile(tmp_path / "x", extents, direct="perhaps"), ValueError, "auto, require or off"),
        (WriteFile(5, extents), TypeError, ""),  # type: ignore[arg-type]
        (WriteFile("nul\0byte", extents), ValueError, "null"),
        (ReadFile(tmp_path / "x", [Extent(0, 8, bytes(8))]), BufferError, ""),
        (ReadFile(tmp_path / "x", [Extent(0, 8, Late(lambda _: b""))]), TypeError, "bytes-like"),
    ]
    for operation, error, text in cases:
        with pytest.raises(error, match=text or None):
            engine.submit([operation])  # type: ignore[list-item]
    assert os.listdir(tmp_path) == []
    assert engine.submit([]) == []
    assert engine.reap(5, timeout_s=0) == []


# ---- the file system says no ----


@pytest.mark.parametrize("direct", DIRECTS)
def test_a_file_shorter_than_it_should_be(engine: Engine, tmp_path: Path, direct: str) -> None:
    path = tmp_path / "file"
    for nbytes in (0, 1, 4096, 2 * BLOCK, 2 * BLOCK + 100):
        path.write_bytes(noise(nbytes))
        for target in (bytearray(5 * BLOCK), Pattern(1)):
            with pytest.raises(OSError, match=f"bytes from {nbytes} on are missing") as caught:
                engine.read_file(path, target, nbytes=5 * BLOCK, direct=direct)
            assert_error(caught.value, errno.ENODATA, path, "shorter than it should be")


def test_absent_files_directories_and_a_directory_as_file(engine: Engine, tmp_path: Path) -> None:
    absent = tmp_path / "absent" / "file"
    for act in (lambda: engine.read_file(absent, bytearray(1)), lambda: engine.write_file(absent, b"x")):
        with pytest.raises(FileNotFoundError) as caught:
            act()
        assert_error(caught.value, errno.ENOENT, absent, "check that the directory still exists")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        engine.write_file(tmp_path / "file" / "below", b"x")
    for steps in (DURABLE, Step(0)):
        with pytest.raises(IsADirectoryError) as caught2:
            engine.write_file(tmp_path, b"x", steps)
        assert_error(caught2.value, errno.EISDIR, tmp_path, "name a file")
    with pytest.raises(IsADirectoryError):
        engine.read_file(tmp_path, bytearray(1))
    assert not leftovers(tmp_path.parent)


def test_what_is_no_file_is_not_replaced_by_one(engine: Engine, tmp_path: Path) -> None:
    # As root a rename over a device such as /dev/null would go well.
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a device, pipe or socket") as caught:
        engine.write_file(tmp_path / "pipe", b"x", DURABLE)
    assert_error(caught.value, errno.ENXIO, tmp_path / "pipe", "name a file")
    assert (tmp_path / "pipe").is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_directory_that_vanishes_meanwhile(engine: Engine, tmp_path: Path) -> None:
    """The late callback removes the directory between the writes and the rename."""
    directory = tmp_path / "directory"
    directory.mkdir()

    def vanish(digests: object) -> bytes:
        for name in os.listdir(directory):
            os.unlink(directory / name)
        directory.rmdir()
        return b"late"

    with pytest.raises(FileNotFoundError) as caught:
        engine.write_file(directory / "file", [Extent(0, 4, Late(vanish)), Extent(4, BLOCK, bytes(BLOCK))])
    assert_error(caught.value, errno.ENOENT, directory / "file", "(rename)", "directory still exists")


def test_a_full_tmpfs(engine: Engine, tmpfs_mount: Callable[[int], Path]) -> None:
    mount = tmpfs_mount(MIB)
    (mount / "former").write_bytes(b"former")
    for steps in (DURABLE, DURABLE & ~Step.PREALLOCATE):  # found at the allocation, and in the middle
        with pytest.raises(OSError) as caught:
            engine.write_file(mount / "former", noise(3 * MIB), steps)
        assert_error(caught.value, errno.ENOSPC, mount / "former", "free some room")
    assert os.listdir(mount) == ["former"]
    assert (mount / "former").read_bytes() == b"former"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direct", DIRECTS)
def test_a_full_ext4(loop_fs: Callable[..., Path], backend: str, direct: str) -> None:
    mount = loop_fs("ext4", 8 * MIB)
    with small_engine(backend) as engine:
        for steps in (DURABLE, DURABLE & ~Step.PREALLOCATE):
            with pytest.raises(OSError) as caught:
                engine.write_file(mount / "file", noise(16 * MIB), steps, direct=direct)
            assert_error(caught.value, errno.ENOSPC, mount / "file", "free some room")
        assert os.listdir(mount) == ["lost+found"]
        for attempt in range(100):  # there is room again, once the kernel's own worker has let go of the file
            try:
                engine.write_file(mount / "file", noise(MIB))
                break
            except OSError:
                if attempt == 99:
                    raise
                os.sync()  # ext4 gives blocks back when its journal commits
                time.sleep(0.05)


def test_a_read_only_file_system(engine: Engine, loop_fs: Callable[..., Path]) -> None:
    mount = loop_fs("ext4")
    (mount / "file").write_bytes(b"content")
    os.sync()
    assert os.system(f"mount -o remount,ro {mount}") == 0
    with pytest.raises(OSError) as caught:
        engine.write_file(mount / "file", b"other")
    assert_error(caught.value, errno.EROFS, mount / "file", "mounted read-only")
    into = bytearray(7)
    engine.read_file(mount / "file", into)
    assert into == b"content"


def test_direct_that_is_required_and_not_to_be_had(engine: Engine, tmpfs_mount: Callable[[int], Path]) -> None:
    mount = tmpfs_mount(4 * MIB)
    path = mount / "file"
    path.write_bytes(b"former")
    for steps in (DURABLE, Step(0)):
        with pytest.raises(OSError, match="tmpfs is memory") as caught:
            engine.write_file(path, b"new", steps, direct="require")
        assert_error(caught.value, errno.EOPNOTSUPP, path, "direct='auto' or 'off'")
        assert path.read_bytes() == b"former"  # not even emptied
    with pytest.raises(OSError, match="tmpfs is memory"):
        engine.read_file(path, bytearray(6), direct="require")
    assert os.listdir(mount) == ["file"]


def test_the_limit_of_file_sizes(tmp_path: Path) -> None:
    for backend in BACKENDS:
        code = """
            import resource, sys
            from mlstor._io import Engine
            from mlstor.operations import DURABLE, Step
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            engine = Engine(backend="auto" if sys.argv[2] == "io_uring" else "threads", workers=1, block_bytes=1 << 16)
            for steps in (DURABLE, DURABLE & ~Step.PREALLOCATE):
                for direct in ("auto", "off"):
                    try:
                        engine.write_file(sys.argv[1], bytes(2 << 20), steps, direct=direct)
                    except OSError as error:
                        print(error.errno, error.filename == sys.argv[1], "ulimit -f" in str(error))
        """
        out = finish(python(code, tmp_path / "file", backend))
        assert out.splitlines() == [f"{errno.EFBIG} True True"] * 4
        assert os.listdir(tmp_path) == []


def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    tmp_path.chmod(0o755)
    code = """
        import os, sys
        from mlstor._io import Engine
        os.setgid(65534), os.setuid(65534)
        try:
            Engine(workers=1, block_bytes=1 << 16).write_file(sys.argv[1], b"x")
        except PermissionError as error:
            print(error)
    """
    out = finish(python(code, tmp_path / "file", env={"XDG_CONFIG_HOME": "/nonexistent"}))
    assert "check the permissions" in out
    assert str(tmp_path / "file") in out
