"""What the C core asks of kernel and file system, on real file systems and with calls refused by seccomp."""

from __future__ import annotations

import ctypes as ct
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from leaf_library import Alignment, compile_library, load

DIRECT_NO, DIRECT_YES, DIRECT_UNKNOWN = range(3)


@pytest.fixture(scope="module")
def leaf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("leaf"), isal=False)


@pytest.fixture(scope="module")
def leaf(leaf_path: Path) -> ct.CDLL:
    return load(leaf_path)


def probe(leaf: ct.CDLL, path: Path) -> Alignment:
    alignment = Alignment()
    fd = os.open(path, os.O_RDONLY)
    try:
        assert leaf.mls_probe_alignment(fd, ct.byref(alignment)) == 0
    finally:
        os.close(fd)
    return alignment


@pytest.fixture
def xfs_file(shared_fs: Callable[[str], Path]) -> Path:
    """A file of 1 MiB on XFS."""
    path = shared_fs("xfs") / "file"
    path.write_bytes(os.urandom(1 << 20))
    return path


@contextmanager
def held_in_cache(fd: int, offset: int, nbytes: int) -> Iterator[None]:
    """Keep these pages, and no others, mapped: what drops caches elsewhere on the machine passes them by."""
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
        memory.madvise(mmap.MADV_RANDOM)  # no read-ahead
        for at in range(offset, offset + nbytes, mmap.PAGESIZE):
            memory[at]
        yield


def write_and_read_direct(path: Path, alignment: Alignment) -> None:
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 1 << 20) as memory:  # page-aligned
            written = memoryview(memory)[alignment.mem_align :][: alignment.offset_align]
            assert os.pwritev(fd, [written], 3 * alignment.offset_align) == alignment.offset_align
            read = memoryview(memory)[alignment.mem_align :][: alignment.read_offset_align]
            assert os.preadv(fd, [read], alignment.read_offset_align) == alignment.read_offset_align
            written.release()
            read.release()
    finally:
        os.close(fd)


def test_xfs_alignment_is_accepted_by_direct_io(leaf: ct.CDLL, xfs_file: Path) -> None:
    alignment = probe(leaf, xfs_file)
    assert alignment.fs_name == b"xfs"
    assert alignment.direct_supported == DIRECT_YES
    assert alignment.dev == xfs_file.stat().st_dev
    assert alignment.offset_align >= alignment.physical_block
    write_and_read_direct(xfs_file, alignment)


# Refuses one system call in a child, as an old kernel or a sandbox does, then probes the file named.
REFUSING_CHILD = """
import ctypes as ct, struct, sys
sys.path.insert(0, sys.argv[5])
import leaf_library as t
library = t.load(sys.argv[1])
number, refusal = int(sys.argv[3]), int(sys.argv[4])
program = struct.pack("HBBI" * 4,
    0x20, 0, 0, 0,               # load the call's number
    0x15, 0, 1, number,          # the one to refuse?
    0x06, 0, 0, 0x00050000 | refusal,
    0x06, 0, 0, 0x7FFF0000)      # allow the others
code = ct.create_string_buffer(program, len(program))
filter_program = ct.create_string_buffer(struct.pack("HxxxxxxP", 4, ct.addressof(code)))
libc = ct.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, filter_program, 0, 0) == 0, ct.get_errno()
with open(sys.argv[2], "rb") as f:
    resident = ct.c_uint64()
    assert library.mls_resident(f.fileno(), 5000, 100_000, ct.byref(resident)) == 0
    a = t.Alignment()
    assert library.mls_probe_alignment(f.fileno(), ct.byref(a)) == 0
    print(resident.value, a.source.decode(), a.direct_supported, a.mem_align, a.offset_align, a.mnt_id)
"""


def probe_refused(leaf_path: Path, path: Path, number: int, refusal: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", REFUSING_CHILD, str(leaf_path), str(path), str(number), str(refusal),
         str(Path(__file__).parent)],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


STATX_NUMBER = {"x86_64": 332, "aarch64": 291}.get(platform.machine(), 0)
CACHESTAT_NUMBER = 451
ENOSYS, EPERM = 38, 1


@pytest.mark.skipif(STATX_NUMBER == 0, reason="system call numbers of this machine are not in the table")
def test_without_statx_xfs_itself_is_asked(leaf: ct.CDLL, leaf_path: Path, xfs_file: Path) -> None:
    usual = probe(leaf, xfs_file)
    found = probe_refused(leaf_path, xfs_file, STATX_NUMBER, ENOSYS)
    _, source, direct, mem_align, offset_align, mnt_id = found
    assert (source, int(direct), int(mnt_id)) == ("xfs", DIRECT_YES, 0)
    assert (int(mem_align), int(offset_align)) == (usual.mem_align, usual.offset_align)


@pytest.mark.skipif(STATX_NUMBER == 0, reason="system call numbers of this machine are not in the table")
def test_without_statx_support_is_unknown_and_alignment_safe(leaf_path: Path, shared_fs: Callable[[str], Path]) -> None:
    path = shared_fs("ext4") / "file"
    path.write_bytes(bytes(1 << 20))
    _, source, direct, mem_align, offset_align, mnt_id = probe_refused(leaf_path, path, STATX_NUMBER, EPERM)
    assert (source, int(direct), int(mnt_id)) == ("sysfs", DIRECT_UNKNOWN, 0)
    assert int(offset_align) >= mmap.PAGESIZE
    assert int(mem_align) >= 512


@pytest.mark.parametrize("refusal", [ENOSYS, EPERM])
def test_mincore_stands_in_for_cachestat(leaf: ct.CDLL, leaf_path: Path, xfs_file: Path, refusal: int) -> None:
    # the child asks for 100,000 bytes from 5000 on
    with xfs_file.open("rb") as file:
        with held_in_cache(file.fileno(), 0, 1 << 20):
            assert probe_refused(leaf_path, xfs_file, CACHESTAT_NUMBER, refusal)[0] == "100000"
        assert leaf.mls_evict(file.fileno()) == 0
        page_end = (5000 // mmap.PAGESIZE + 1) * mmap.PAGESIZE
        with held_in_cache(file.fileno(), 5000, 1):
            found = probe_refused(leaf_path, xfs_file, CACHESTAT_NUMBER, refusal)[0]
        assert found == str(page_end - 5000)


@pytest.mark.parametrize(
    ("kind", "direct"),
    [("ext4", {DIRECT_YES}), ("xfs", {DIRECT_YES}), ("btrfs", {DIRECT_YES, DIRECT_UNKNOWN}),
     ("tmpfs", {DIRECT_NO}), ("overlay", set(range(3))), ("fuse", {DIRECT_UNKNOWN})],
)  # fmt: skip
def test_file_systems_are_named_and_judged(
    leaf: ct.CDLL, shared_fs: Callable[[str], Path], kind: str, direct: set[int]
) -> None:
    path = shared_fs(kind) / "file"
    path.write_bytes(b"x")
    alignment = probe(leaf, path)
    assert alignment.fs_name.decode() == kind
    assert alignment.direct_supported in direct
    assert alignment.dev == path.stat().st_dev


def test_eviction_empties_the_page_cache_and_a_read_fills_it_again(leaf: ct.CDLL, xfs_file: Path) -> None:
    resident = ct.c_uint64()

    def resident_bytes(offset: int, nbytes: int) -> int:
        assert leaf.mls_resident(fd, offset, nbytes, ct.byref(resident)) == 0
        return resident.value

    fd = os.open(xfs_file, os.O_RDONLY)
    try:
        with held_in_cache(fd, 0, 1 << 20):
            assert resident_bytes(0, 0) == 1 << 20
        assert leaf.mls_evict(fd) == 0
        assert resident_bytes(0, 0) == 0
        with held_in_cache(fd, 8 * mmap.PAGESIZE, 1):
            assert resident_bytes(8 * mmap.PAGESIZE, 100) == 100
            assert resident_bytes(0, 8 * mmap.PAGESIZE) == 0
    finally:
        os.close(fd)


def test_the_page_cache_of_another_users_file_is_refused(leaf_path: Path, tmp_path: Path) -> None:
    """The kernel hides it, and mincore would call every page resident."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDONLY)
    library, resident = load(leaf_path), ct.c_uint64()
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        os._exit(-library.mls_resident(fd, 0, 0, ct.byref(resident)))
    os.close(fd)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        pytest.skip("this kernel does not hide the page cache")
    assert code == EPERM
