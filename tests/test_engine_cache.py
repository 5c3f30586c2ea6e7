"""The page cache: evicted and looked at page by page, and what the engine says of "direct"."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_support import BACKENDS, BLOCK, memory, noise, small_engine

from mlstor._io import evict, probe_path, resident
from mlstor.operations import Step

PAGE = os.sysconf("SC_PAGESIZE")


@pytest.fixture
def disk(shared_fs: Callable[[str], Path]) -> Path:
    return shared_fs("ext4")


def test_eviction_is_seen_page_by_page(disk: Path) -> None:
    path = disk / "file"
    nbytes = 10 * PAGE + 100
    path.write_bytes(bytes(nbytes))
    assert resident(path) == (nbytes, nbytes)
    evict(path)
    assert resident(path) == (0, nbytes)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(4 * PAGE)
        file.read(1)
    assert resident(path) == (PAGE, nbytes)
    assert resident(path, 4 * PAGE, PAGE) == (PAGE, PAGE)
    assert resident(path, 5 * PAGE) == (0, 5 * PAGE + 100)
    assert resident(path, nbytes + 5, 10) == (0, 0)
    assert resident(path, 0, 0) == (0, 0)


def test_a_file_that_is_absent(tmp_path: Path) -> None:
    for act in (evict, resident):
        with pytest.raises(FileNotFoundError):
            act(tmp_path / "absent")


@pytest.mark.parametrize("backend", BACKENDS)
def test_direct_io_leaves_nothing_in_the_cache_and_says_so(disk: Path, backend: str) -> None:
    path, nbytes = disk / "file", 8 * BLOCK
    with small_engine(backend) as engine:
        wrote = engine.write_file(path, noise(nbytes))
        assert (wrote.direct, wrote.backend) == ("yes", backend)
        assert "nothing of the first block" in wrote.reason
        assert resident(path) == (0, nbytes)
        assert engine.read_file(path, memory(nbytes)).direct == "yes"
        assert resident(path) == (0, nbytes)
        buffered = engine.read_file(path, direct="off")
        assert (buffered.direct, buffered.reason) == ("no", "direct I/O was switched off")
        assert resident(path)[0] == nbytes


def test_a_mapped_file_is_not_called_direct(disk: Path) -> None:
    """Pages that another process maps can't be dropped before the read: the cache may have answered."""
    import mmap

    path, nbytes = disk / "file", 4 * BLOCK
    path.write_bytes(noise(nbytes))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[::PAGE]) >= 0  # touched
        with small_engine("threads") as engine:
            result = engine.read_file(path, memory(nbytes))
        assert result.direct == "unverified"
        assert "were in the page cache" in result.reason


@pytest.mark.parametrize("direct", ["off"])
def test_dontneed_drops_what_was_read(disk: Path, direct: str) -> None:
    path, nbytes = disk / "file", 8 * BLOCK
    with small_engine("threads") as engine:
        engine.write_file(path, noise(nbytes), Step.FDATASYNC, direct=direct)
        evict(path)
        engine.read_file(path, steps=Step.DONTNEED | Step.RANDOM, direct=direct)
        assert resident(path)[0] == 0
        engine.read_file(path, direct=direct)
        assert resident(path)[0] == nbytes


def test_a_directory_is_probed_with_real_io(each_fs: Path, request: pytest.FixtureRequest) -> None:
    facts = probe_path(each_fs)
    kind = request.node.callspec.params["each_fs"]
    assert os.listdir(each_fs) == []
    if kind in ("ext4", "xfs"):
        assert facts["direct_write"] == facts["direct_read"] == "yes"
    elif kind == "tmpfs":
        assert facts["direct_write"].startswith("no: tmpfs is memory")
    elif kind == "fuse":
        assert facts["direct_write"].split(":")[0] in ("no", "unverified")
