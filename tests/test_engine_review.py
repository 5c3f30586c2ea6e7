"""What the engine owes its caller at the edges: refused calls, order, memory, damage, and what it says of "direct"."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_support import BACKENDS, BLOCK, finish, memory, noise, python, small_engine

from mlstor._io import Pattern, build_info, evict, resident
from mlstor.operations import Extent, ReadFile, Step, WriteFile, is_leftover
from mlstor.settings import Settings

MIB = 1 << 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_operations_whose_iterator_closes_the_engine_are_refused(tmp_path: Path, backend: str) -> None:
    engine = small_engine(backend)

    def operations() -> Iterator[WriteFile]:
        yield WriteFile(tmp_path / "file", [Extent(0, 1, b"x")], Step(0))
        engine.close()

    with pytest.raises(ValueError, match="the engine is closed"):
        engine.submit(operations())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direct", ["auto", "off"])
def test_one_worker_ends_operations_in_the_order_of_submission(tmp_path: Path, backend: str, direct: str) -> None:
    paths = [tmp_path / str(i) for i in range(8)]
    for i, path in enumerate(paths):
        path.write_bytes(noise((i % 3 + 1) * BLOCK, i))
    with small_engine(backend, workers=1, depth=1) as engine:
        operations: list[WriteFile | ReadFile] = []
        for i, path in enumerate(paths):
            extents = [Extent(0, (i % 3 + 1) * BLOCK, memory((i % 3 + 1) * BLOCK))]
            if i % 2:
                operations.append(WriteFile(tmp_path / f"new-{i}", extents, Step(0), direct=direct))
            else:
                operations.append(ReadFile(path, extents, direct=direct))
        requests = engine.submit(operations)
        assert engine.drain(30)
        ends = [request.result().end_ns for request in requests]
        assert ends == sorted(ends)
        assert engine.reap(8) == requests


DEEP = """
    import sys
    from pathlib import Path
    import mlstor._io
    from mlstor._io import Engine, Pattern
    from mlstor.operations import Extent

    def rss_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = rss_bytes()
    engine = Engine(backend=sys.argv[2], workers=2, depth=64, block_bytes=4096)
    engine.write_file(sys.argv[1], [Extent(0, 4 << 20, Pattern(1))])
    assert engine.read_file(sys.argv[1], Pattern(1)).damaged_blocks == 0
    print(rss_bytes() - before)
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_blocks_take_little_memory_at_any_depth(tmp_path: Path, backend: str) -> None:
    small_engine(backend).close()  # skips where there is none
    assert int(finish(python(DEEP, tmp_path / "file", backend))) < 16 * MIB


@pytest.mark.parametrize("backend", BACKENDS)
def test_damage_is_told_by_offset(tmp_path: Path, backend: str) -> None:
    path, pattern = tmp_path / "file", Pattern(run_id=3)
    damaged = [4096 * block for block in (200, 3, 77, 150, 18, 19, 64, 255, 0, 128)]
    with small_engine(backend) as engine:
        engine.write_file(path, [Extent(0, MIB, pattern)])
        with path.open("r+b") as file:
            for offset in damaged:
                file.seek(offset)
                file.write(bytes(4096))
        for _ in range(5):  # the workers find it in another order each time
            result = engine.read_file(path, pattern)
            assert [damage.offset for damage in result.damage] == sorted(damaged)
            assert result.damaged_blocks == len(damaged)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        (".file.0123abcd.mlstor-tmp", True),
        (".a.b.c.ffffffff.mlstor-tmp", True),
        (".new\nline.00000000.mlstor-tmp", True),
        (".file.0123ABCD.mlstor-tmp", False),
        (".file.0123abc.mlstor-tmp", False),
        (".file.0123abcde.mlstor-tmp", False),
        (".file.mlstor-tmp", False),
        (".mlstor-tmp", False),
        ("file.0123abcd.mlstor-tmp", False),
        (".file.0123abcd.mlstor-tmp2", False),
    ],
)
def test_a_leftover_is_known_by_its_eight_hex_digits(name: str, is_one: bool) -> None:
    assert is_leftover(name) is is_one


def test_settings_of_a_target_are_found_by_a_path_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(f"targets:\n  {tmp_path}/slow:\n    direct: 'off'\n")
    monkeypatch.setenv("MLSTOR_PROFILE", str(profile))
    settings = Settings.resolve()
    assert settings.for_target(os.fsencode(tmp_path / "slow" / "file")).direct == "off"
    assert settings.for_target(os.fsencode(tmp_path / "fast")).direct == settings.direct == "auto"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direct", ["auto", "off"])
def test_a_file_that_is_too_short_is_said_to_lack_bytes_from_its_end_on(
    tmp_path: Path, backend: str, direct: str
) -> None:
    path, nbytes = tmp_path / "file", 5 * BLOCK + 1234
    path.write_bytes(noise(nbytes))
    with small_engine(backend) as engine:
        for _ in range(5):
            with pytest.raises(OSError, match=f"bytes from {nbytes} on are missing") as caught:
                engine.read_file(path, memory(20 * BLOCK), direct=direct)
            assert caught.value.errno == errno.ENODATA
            assert caught.value.filename == str(path)


RING_WITHOUT_OPERATIONS = """
    import errno, sys
    sys.path.insert(0, sys.argv[2])
    import seccomp
    seccomp.refuse_io_uring(errno.EPERM, first=seccomp.IO_URING_REGISTER)
    from mlstor._io import Engine, Pattern, probe
    from mlstor.operations import Extent
    engine = Engine(workers=1, depth=2)
    engine.write_file(sys.argv[1], [Extent(0, 1 << 20, Pattern(1))])
    assert engine.read_file(sys.argv[1], Pattern(1)).damaged_blocks == 0
    print(engine.backend, probe()["io_uring"], sep="|")
    print(engine.granted)
"""


def test_a_ring_whose_operations_are_not_granted_is_no_ring(tmp_path: Path) -> None:
    """A sandbox may let a ring be made and refuse to say what it can do: nothing is submitted to that one."""
    if build_info()["liburing"] is None:
        pytest.skip("built without io_uring")
    small_engine("io_uring").close()
    out = finish(python(RING_WITHOUT_OPERATIONS, tmp_path / "file", Path(__file__).parent)).splitlines()
    assert out[0] == "threads|False"
    assert out[1].startswith("io_uring refused: ")


# ---- what is called direct ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("touched_nbytes", [0, BLOCK, 8 * BLOCK])
@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_what_went_through_the_cache_is_not_called_direct(
    shared_fs: Callable[[str], Path], kind: str, backend: str, touched_nbytes: int
) -> None:
    """A file system may read through the cache what it would have to fault in: memory that nobody has touched yet."""
    path, nbytes = shared_fs(kind) / "file", 8 * BLOCK
    with small_engine(backend, workers=1) as engine, mmap.mmap(-1, nbytes) as destination:
        engine.write_file(path, noise(nbytes))
        evict(path)
        assert resident(path) == (0, nbytes)
        destination[:touched_nbytes] = bytes(touched_nbytes)
        result = engine.read_file(path, destination)
        cached_nbytes, _ = resident(path)
        assert destination[:] == noise(nbytes)
    assert not (result.direct == "yes" and cached_nbytes), f"{cached_nbytes} bytes went through the cache"


@pytest.mark.parametrize("backend", BACKENDS)
def test_compressed_extents_come_through_the_cache_and_are_not_called_direct(
    loop_fs: Callable[..., Path], backend: str
) -> None:
    """btrfs accepts O_DIRECT for them, and reads them as if it had not been given."""
    path, content = loop_fs("btrfs", options="compress-force") / "file", b"compress" * (8 * BLOCK // 8)
    with small_engine(backend) as engine:
        path.write_bytes(content)
        evict(path)
        destination = memory(len(content))
        result = engine.read_file(path, destination)
        assert destination == content
        if not resident(path)[0]:
            pytest.skip("this kernel's btrfs reads compressed extents without its cache")
        assert result.direct == "unverified"
        assert "were in the page cache afterwards" in result.reason
