"""Fixtures shared by the tests: real file systems, mounted for a test and taken down after it."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from checkpoint_support import Bench

    from mlstor import Engine

MIB = 1 << 20
# Least image that each mkfs accepts, with room for a test's files.
LEAST_BYTES = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 256 * MIB}
MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
FILE_SYSTEMS = ("ext4", "xfs", "btrfs", "tmpfs", "overlay", "fuse")


# What fails on one run fails on the next; `--hypothesis-profile=explore` tries other examples each time.
settings.register_profile("explore", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.register_profile("suite", settings.get_profile("explore"), derandomize=True, database=None)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """A shell starts what it runs in the background deaf to SIGINT, and whatever that starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_stored_profile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests see neither the developer's MLSTOR_* nor their profile."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MLSTOR_")]:
            patch.delenv(name)
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "no-config"))
        yield


# mkfs lives where an ordinary PATH does not look.
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": SEARCH},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} gave {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


def _need(*programs: str) -> None:
    """Skip unless we are root and have `programs`."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    for program in programs:
        if shutil.which(program, path=SEARCH) is None:
            pytest.skip(f"{program} is not installed")


@contextmanager
def _mounted(mountpoint: Path, *mount: str | Path) -> Iterator[Path]:
    mountpoint.mkdir(parents=True, exist_ok=True)
    try:
        _run("mount", *mount, mountpoint)
    except RuntimeError as error:
        if "permission denied" in str(error).lower() or "unknown filesystem" in str(error):
            pytest.skip(f"this machine does not allow the mount: {error}")
        raise
    try:
        yield mountpoint
    finally:
        _unmount(mountpoint)


def _unmount(mountpoint: Path) -> None:
    """An io_uring worker of the kernel drops its reference to a file some time after its last completion was seen."""
    for _ in range(100):
        try:
            _run("umount", mountpoint)
            return
        except RuntimeError as error:
            if "busy" not in str(error):
                raise
            time.sleep(0.05)
    _run("umount", mountpoint)


@contextmanager
def _loop(kind: str, directory: Path, nbytes: int | None, options: str, direct: bool) -> Iterator[Path]:
    """A new `kind` of file system of `nbytes` on a loop device."""
    _need(MKFS[kind][0], "losetup")
    directory.mkdir(parents=True, exist_ok=True)
    image = directory / "image"
    with image.open("wb") as file:
        file.truncate(nbytes or LEAST_BYTES[kind])
    _run(*MKFS[kind], image)
    try:
        device = _run("losetup", "--find", "--show", *(["--direct-io=on"] if direct else []), image)
    except RuntimeError as error:
        pytest.skip(f"this machine gives no loop device: {error}")
    try:
        with _mounted(directory / "mnt", *(["-o", options] if options else []), device) as mountpoint:
            yield mountpoint
    finally:
        _run("losetup", "-d", device)
        image.unlink()


@contextmanager
def _tmpfs(directory: Path, nbytes: int) -> Iterator[Path]:
    _need()
    with _mounted(directory, "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs") as mountpoint:
        yield mountpoint


@contextmanager
def _overlay(directory: Path) -> Iterator[Path]:
    """An overlay whose layers lie on a tmpfs: on an overlay (a container's root) it would be refused."""
    with _tmpfs(directory / "layers", 256 * MIB) as layers:
        for name in ("lower", "upper", "work"):
            (layers / name).mkdir()
        options = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
        with _mounted(directory / "mnt", "-t", "overlay", "-o", options, "overlay") as mountpoint:
            yield mountpoint


@contextmanager
def _fuse(directory: Path) -> Iterator[Path]:
    """An ext4 image served by fuse2fs, a FUSE file system that Debian packages."""
    _need("mkfs.ext4", "fuse2fs", "fusermount3")
    if not os.path.exists("/dev/fuse"):
        pytest.skip("this machine has no /dev/fuse")
    mountpoint = directory / "mnt"
    mountpoint.mkdir(parents=True)
    image = directory / "image"
    with image.open("wb") as file:
        file.truncate(LEAST_BYTES["ext4"])
    _run(*MKFS["ext4"], image)
    _run("fuse2fs", "-o", "rw,fakeroot", image, mountpoint)
    try:
        yield mountpoint
    finally:
        _run("umount", mountpoint)


LoopFactory = Callable[..., Path]


@pytest.fixture
def loop_fs(tmp_path: Path) -> Iterator[LoopFactory]:
    """``loop_fs(kind, nbytes=None, options="", direct=False)``: a new ext4, xfs or btrfs for this test alone.

    With `direct` the loop device itself uses O_DIRECT on its image.
    """
    serial = itertools.count()
    with ExitStack() as stack:

        def make(kind: str, nbytes: int | None = None, options: str = "", direct: bool = False) -> Path:
            directory = tmp_path / f"loop-{kind}-{next(serial)}"
            return stack.enter_context(_loop(kind, directory, nbytes, options, direct))

        yield make


@pytest.fixture
def tmpfs_mount(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``tmpfs_mount(nbytes)``: mount a new tmpfs of that size for this test alone."""
    serial = itertools.count()
    with ExitStack() as stack:
        yield lambda nbytes: stack.enter_context(_tmpfs(tmp_path / f"tmpfs-{next(serial)}", nbytes))


@pytest.fixture
def overlay_mount(tmp_path: Path) -> Iterator[Path]:
    """An overlay mounted for this test alone."""
    with _overlay(tmp_path / "overlay") as mountpoint:
        yield mountpoint


@pytest.fixture(scope="session")
def shared_fs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """``shared_fs(kind)``: a fresh directory on the file system of that kind which the session shares.

    For tests that leave the mount as it was; `kind` is one of ext4, xfs, btrfs, tmpfs, overlay, fuse. Nothing
    is removed before the session's end: write little, or use `each_fs`.
    """
    mounts: dict[str, Path] = {}
    serial = itertools.count()
    with ExitStack() as stack:

        def give(kind: str) -> Path:
            if kind not in mounts:
                root = tmp_path_factory.mktemp(f"shared-{kind}")
                if kind == "tmpfs":
                    made = _tmpfs(root, 256 * MIB)
                elif kind == "overlay":
                    made = _overlay(root)
                elif kind == "fuse":
                    made = _fuse(root)
                else:
                    made = _loop(kind, root, None, "", False)
                mounts[kind] = stack.enter_context(made)
            directory = mounts[kind] / f"test-{next(serial)}"
            directory.mkdir()
            return directory

        yield give


@pytest.fixture(params=FILE_SYSTEMS)
def each_fs(request: pytest.FixtureRequest, shared_fs: Callable[[str], Path]) -> Iterator[Path]:
    """A fresh directory on each kind of file system in turn (the test's id names it), removed afterwards."""
    directory = shared_fs(request.param)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def by_backend() -> Iterator[dict[str, Engine]]:
    """A small engine of each backend that this machine has, by name."""
    from engine_support import engines

    with engines() as made:
        yield made


@pytest.fixture(params=("io_uring", "threads"))
def engine(request: pytest.FixtureRequest, by_backend: dict[str, Engine]) -> Engine:
    """A small engine on each backend in turn."""
    if request.param not in by_backend:
        pytest.skip("io_uring is refused here")
    return by_backend[request.param]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A directory to measure, one for results, and ways to run ``mlstor checkpoint`` on them."""
    from checkpoint_support import Bench

    return Bench(tmp_path)
