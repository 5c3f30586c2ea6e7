"""What is refused before the first byte, on real small file systems and with fake cgroup limits."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mlstor import host as hosts
from mlstor.cgroup import Cgroup
from mlstor.checkpoint import preflight
from mlstor.checkpoint.preflight import CacheRule, Need, check
from mlstor.errors import UsageError
from mlstor.mounts import Mount

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def host() -> hosts.Host:
    """This host without the limits of the group that the tests happen to run in."""
    return dataclasses.replace(hosts.describe(), cgroup=Cgroup(), memory_available_bytes=64 * GIB)


def test_what_fits_is_recorded(tmp_path: Path, host: hosts.Host) -> None:
    done = check([Need(str(tmp_path), MIB, 3)], host, memory_need_bytes=MIB)
    (room,) = done.rooms
    assert room.paths == (str(tmp_path),)
    assert room.need_inodes == 3
    assert MIB < room.need_bytes <= room.room_bytes == room.free_bytes
    assert room.bound == "free space of the file system"
    assert (done.memory_need_bytes, done.memory_left_bytes) == (MIB, 64 * GIB)
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_system_is_refused_with_both_figures(tmpfs_mount: Callable[[int], Path], host: hosts.Host) -> None:
    small = str(tmpfs_mount(MIB))
    with pytest.raises(UsageError, match=r"1\.05 MB \(1\.00 MiB\) \(free space.*needs 2\.1.*--scale"):
        check([Need(small, 2 * MIB, 1)], host)


def test_directories_of_one_file_system_are_added_up(tmpfs_mount: Callable[[int], Path], host: hosts.Host) -> None:
    top = tmpfs_mount(4 * MIB)
    needs = []
    for name in ("a", "b"):
        (top / name).mkdir()
        needs.append(Need(str(top / name), 3 * MIB, 1))
    assert check(needs[:1], host).rooms[0].is_memory
    with pytest.raises(UsageError, match="room for"):
        check(needs, host)


def test_too_few_inodes_are_refused(loop_fs: Callable[..., Path], host: hosts.Host) -> None:
    directory = loop_fs("ext4")
    free = os.statvfs(directory).f_favail
    (room,) = check([Need(str(directory), 0, 1)], host).rooms
    assert (room.free_inodes, room.is_memory, room.device is not None) == (free, False, True)
    with pytest.raises(UsageError, match=f"{free} free inodes, but the run needs {free + 1}"):
        check([Need(str(directory), 0, free + 1)], dataclasses.replace(host), ephemeral_limit_bytes=None)


def test_few_inodes_of_a_tmpfs_are_seen(tmp_path: Path, host: hosts.Host) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    target = tmp_path / "few"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=8", "tmpfs", target], check=True)
    try:
        with pytest.raises(UsageError, match="free inodes, but the run needs 100"):
            check([Need(str(target), 4096, 100)], host)
    finally:
        subprocess.run(["umount", target], check=True)


@pytest.mark.parametrize("version", [1, 2])
def test_a_tmpfs_has_only_what_the_memory_cgroup_has_left(
    tmpfs_mount: Callable[[int], Path], host: hosts.Host, version: int
) -> None:
    target = str(tmpfs_mount(64 * MIB))
    limited = dataclasses.replace(host, cgroup=Cgroup(memory_version=version, memory_left_bytes=8 * MIB))
    (room,) = check([Need(target, 4 * MIB, 1)], limited, memory_need_bytes=2 * MIB).rooms
    assert (room.room_bytes, room.bound, room.is_memory) == (6 * MIB, f"memory cgroup v{version}", True)
    with pytest.raises(UsageError, match=f"memory cgroup v{version}"):
        check([Need(target, 7 * MIB, 1)], limited, memory_need_bytes=2 * MIB)


def test_a_disk_is_not_bound_by_the_memory_cgroup(loop_fs: Callable[..., Path], host: hosts.Host) -> None:
    limited = dataclasses.replace(host, cgroup=Cgroup(memory_version=2, memory_left_bytes=MIB))
    (room,) = check([Need(str(loop_fs("ext4")), 8 * MIB, 1)], limited).rooms
    assert room.bound == "free space of the file system"


def test_processes_that_need_more_memory_than_is_left_are_refused(tmp_path: Path, host: hosts.Host) -> None:
    limited = dataclasses.replace(host, cgroup=Cgroup(memory_version=2, memory_left_bytes=256 * MIB))
    with pytest.raises(UsageError, match=r"256\.00 MiB of memory left \(memory cgroup v2\).*need 1\.00 GiB"):
        check([Need(str(tmp_path), 0, 0)], limited, memory_need_bytes=GIB)


def test_an_overlay_is_bound_by_the_pods_ephemeral_storage(tmp_path: Path, host: hosts.Host) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    lower, upper, work, target = (tmp_path / name for name in ("lower", "upper", "work", "target"))
    for directory in (lower, upper, work, target):
        directory.mkdir()
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mounted = subprocess.run(
        ["mount", "-t", "overlay", "-o", options, "overlay", target], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no overlay here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(UsageError, match="the pod's ephemeral-storage limit"):
            check([Need(str(target), 2 * MIB, 1)], host, ephemeral_limit_bytes=MIB)
        (room,) = check([Need(str(target), MIB // 2, 1)], host, ephemeral_limit_bytes=MIB).rooms
        assert (room.room_bytes, room.is_memory) == (MIB, False)
    finally:
        subprocess.run(["umount", target], check=True)


def test_a_volume_of_its_own_is_not_ephemeral(loop_fs: Callable[..., Path], host: hosts.Host) -> None:
    check([Need(str(loop_fs("ext4")), 2 * MIB, 1)], host, ephemeral_limit_bytes=MIB)


def test_an_empty_dir_volume_is_known_by_where_the_kubelet_keeps_it(
    tmp_path: Path, host: hosts.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = "/var/lib/kubelet/pods/1f2e/volumes/kubernetes.io~empty-dir/scratch"
    mount = Mount(9, "8:1", root, str(tmp_path), "rw", "ext4", "/dev/sda1", "rw")
    monkeypatch.setattr(preflight, "mount_of", lambda path: mount)
    with pytest.raises(UsageError, match="ephemeral-storage"):
        check([Need(str(tmp_path), 2 * MIB, 1)], host, ephemeral_limit_bytes=MIB)


def test_a_file_system_in_an_image_on_tmpfs_is_memory_too(
    tmpfs_mount: Callable[[int], Path], tmp_path: Path, host: hosts.Host
) -> None:
    image = tmpfs_mount(64 * MIB) / "image"
    target = tmp_path / "target"
    target.mkdir()
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, target], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no loop device here: {mounted.stderr.decode().strip()}")
    try:
        assert check([Need(str(target), 4096, 1)], host).rooms[0].is_memory
    finally:
        subprocess.run(["umount", target], check=True)


def test_a_read_only_mount_is_refused_for_writing_and_taken_for_reading(
    loop_fs: Callable[..., Path], host: hosts.Host
) -> None:
    target = str(loop_fs("ext4", options="ro"))
    with pytest.raises(UsageError, match="read-only file system"):
        check([Need(target, 4096, 1)], host)
    (room,) = check([Need(target, GIB, 1)], host, write=False).rooms
    assert room.mount is not None
    assert room.mount.read_only


def test_an_ordinary_user_is_told_that_a_directory_is_not_writable(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    locked = Path(tempfile.mkdtemp())  # pytest's own directories are closed to others further up
    locked.chmod(0o755)
    try:
        code = (
            "import os; from mlstor.checkpoint.targets import check_directory; "
            f"os.setuid(65534); check_directory({str(locked)!r})"
        )
        import mlstor

        source = str(Path(mlstor.__file__).parent.parent)
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=False,
            text=True,
            env={**os.environ, "PYTHONPATH": source},
        )
        assert "UsageError: " in done.stderr
        assert "is not writable for this user (uid 65534)" in done.stderr
    finally:
        locked.rmdir()


@pytest.mark.parametrize(
    ("per_client", "memory", "run", "one", "words"),
    [
        (4000, 1000, True, True, "exceeded by each checkpoint: no flush"),
        (3000, 1000, True, False, "not by one"),
        (301, 1000, True, False, "not by one"),
        (300, 1000, False, False, "not exceeded: caches must be flushed"),
    ],
)
def test_mlperfs_rule_is_read_both_ways(per_client: int, memory: int, run: bool, one: bool, words: str) -> None:
    rule = CacheRule(client_memory_bytes=memory * GIB, bytes_per_client=per_client * GIB, checkpoints=10)
    assert (rule.run_exceeds, rule.checkpoint_exceeds) == (run, one)
    assert words in rule.sentence
    assert "10 x " in rule.sentence
