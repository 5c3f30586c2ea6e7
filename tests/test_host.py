"""Facts of a host from recorded and real /proc and /sys: cgroups, mounts, devices, binding."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlstor import cgroup, host, mounts
from mlstor.launch import Launcher

GIB = 1 << 30
V1_UNLIMITED = "9223372036854771712\n"


def tree(root: Path, files: dict[str, str]) -> str:
    """A fake root with these files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


V2_MOUNT = "30 20 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


# --- cgroups


def test_v2_takes_the_least_limit_of_all_ancestors(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pods/one\n",
            "proc/self/mountinfo": V2_MOUNT,
            f"{top}/pods/memory.max": f"{4 * GIB}\n",
            f"{top}/pods/memory.current": f"{3 * GIB}\n",
            f"{top}/pods/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            f"{top}/pods/one/memory.max": "max\n",
            f"{top}/pods/one/memory.current": f"{GIB}\n",
            f"{top}/pods/one/cpu.max": "150000 100000\n",
            f"{top}/pods/cpu.max": "max 100000\n",
            f"{top}/pods/one/cpu.stat": "usage_usec 9\nnr_throttled 7\n",
            f"{top}/cpuset.cpus.effective": "0-7\n",
        },
    )
    assert cgroup.read(root) == cgroup.Cgroup(
        memory_version=2,
        memory_limit_bytes=4 * GIB,
        memory_used_bytes=GIB,
        memory_left_bytes=2 * GIB,  # the group's page cache gives way
        cpu_quota_milli=1500,
        cpu_throttled_count=7,
        cpus_allowed="0-7",
    )


def test_v1_inside_a_container_knows_the_limit_of_ancestors_it_does_not_see(tmp_path: Path) -> None:
    group = "/kubepods/pod7/abc"
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": f"4:memory:{group}\n0::/\n",
            "proc/self/mountinfo": V2_MOUNT.replace("cgroup rw", "cgroup/unified rw") + V1_MOUNT.format(root=group),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_UNLIMITED,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"hierarchical_memory_limit {2 * GIB}\ntotal_inactive_file 0\n",
        },
    )
    limits = cgroup.read(root)
    assert (limits.memory_version, limits.memory_limit_bytes, limits.memory_left_bytes) == (1, 2 * GIB, GIB)


def test_v1_without_a_limit_has_none(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/user\n3:cpu,cpuacct:/\n",
            "proc/self/mountinfo": V1_MOUNT.format(root="/")
            + "36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_UNLIMITED,
            "sys/fs/cgroup/memory/user/memory.limit_in_bytes": V1_UNLIMITED,
            "sys/fs/cgroup/memory/user/memory.usage_in_bytes": "4096\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    limits = cgroup.read(root)
    assert (limits.memory_version, limits.memory_limit_bytes, limits.memory_left_bytes) == (1, None, None)
    assert (limits.memory_used_bytes, limits.cpu_quota_milli) == (4096, None)


def test_a_machine_that_shows_nothing_is_unknown_not_guessed(tmp_path: Path) -> None:
    assert cgroup.read(str(tmp_path)) == cgroup.Cgroup()
    facts = host.describe(str(tmp_path))
    assert (facts.cpu_model, facts.cores_online, facts.memory_total_bytes, facts.numa_nodes) == (None,) * 4
    assert not facts.narrow
    assert facts.client_memory_bytes is None
    assert mounts.mount_of("/", str(tmp_path)) is None


def test_this_process_in_a_real_v1_group_with_a_limit(tmp_path: Path) -> None:
    top = Path("/sys/fs/cgroup/memory")
    if not (top / "cgroup.procs").exists() or not os.access(top, os.W_OK):
        pytest.skip("no writable v1 memory hierarchy here")
    own = next(
        line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line
    )
    group = top / own.lstrip("/") / f"mlstor-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(2 * GIB))
        code = (
            "import os, pathlib; from mlstor import cgroup; "
            f"pathlib.Path({str(group / 'cgroup.procs')!r}).write_text(str(os.getpid())); "
            "limits = cgroup.read(); print(limits.memory_limit_bytes, limits.memory_left_bytes)"
        )
        env = {**os.environ, "PYTHONPATH": str(Path(cgroup.__file__).parent.parent)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        limit, left = map(int, done.stdout.split())
        assert limit == 2 * GIB
        assert 0 < left <= 2 * GIB
    finally:
        group.rmdir()


# --- mounts


def test_mountinfo_names_are_unescaped_and_optional_fields_skipped() -> None:
    text = (
        "36 35 98:0 /mnt1 /mnt/my\\040disk rw,noatime master:1 propagate_from:2 - ext4 /dev/ro\\134ot "
        "rw,errors=continue\n"
        "37 35 0:44 / /caf\\303\\251 ro - nfs4 srv:/x rw,vers=4.2\n"
    )
    first, second = mounts.parse_mountinfo(text)
    assert (first.mount_point, first.source, first.root, first.device) == (
        "/mnt/my disk",
        "/dev/ro\\ot",
        "/mnt1",
        "98:0",
    )
    assert first.option("errors") == "continue"
    assert not first.read_only
    assert (second.mount_point, second.fs_type, second.read_only) == ("/café", "nfs4", True)


def test_the_longest_mount_point_wins_and_of_equals_the_last(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/mountinfo": "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
            "2 1 8:2 / /data rw - xfs /dev/sdb rw\n"
            "3 1 8:3 / /data rw - ext4 /dev/sdc rw\n"
            "4 1 8:4 / /database rw - btrfs /dev/sdd rw\n"
        },
    )
    found = {path: mounts.mount_of(path, root) for path in ("/data/x", "/database", "/dat", "/data")}
    assert {path: mount and mount.mount_id for path, mount in found.items()} == {
        "/data/x": 3, "/database": 4, "/dat": 1, "/data": 3,
    }  # fmt: skip


def test_a_real_loop_mount_shows_its_device_and_image(loop_fs: Callable[..., Path]) -> None:
    directory = loop_fs("ext4", options="noatime")
    mount = mounts.mount_of(directory)
    assert mount is not None
    assert (mount.fs_type, mount.mount_point) == ("ext4", str(directory))
    assert "noatime" in mount.options.split(",")
    device = mounts.device_of(mount)
    assert device is not None
    assert device.name.startswith("loop")
    assert device.backing_file == str(directory.parent / "image")
    assert device.logical_block_bytes == 512


def test_a_raid_of_drives_names_level_and_members(tmp_path: Path) -> None:
    nvme = "sys/devices/pci0/nvme/nvme0/nvme0n1"
    root = tree(
        tmp_path,
        {
            "sys/devices/virtual/block/md0/dev": "9:0\n",
            "sys/devices/virtual/block/md0/md/level": "raid0\n",
            "sys/devices/virtual/block/md0/queue/logical_block_size": "512\n",
            f"{nvme}/queue/rotational": "0\n",
            f"{nvme}/queue/physical_block_size": "4096\n",
            f"{nvme}/queue/io_poll": "1\n",
            f"{nvme}/device/model": "Microsoft NVMe Direct Disk v2  \n",
            f"{nvme}/nvme0n1p1/partition": "1\n",
            f"{nvme}/nvme0n1p1/dev": "259:1\n",
        },
    )
    (tmp_path / "sys/devices/virtual/block/md0/slaves").mkdir()
    (tmp_path / "sys/devices/virtual/block/md0/slaves/nvme0n1p1").symlink_to(tmp_path / nvme / "nvme0n1p1")
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/9:0").symlink_to("../../devices/virtual/block/md0")
    (mount,) = mounts.parse_mountinfo("5 1 9:0 / /scratch rw - ext4 /dev/md0 rw,nobarrier\n")
    device = mounts.device_of(mount, root)
    assert device is not None
    assert (device.name, device.level, device.rotational) == ("md0", "raid0", None)
    (member,) = device.members
    assert (member.number, member.name, member.model) == ("259:1", "nvme0n1", "Microsoft NVMe Direct Disk v2")
    assert (member.rotational, member.physical_block_bytes, member.io_poll) == (False, 4096, True)


def test_tmpfs_has_no_device(tmpfs_mount: Callable[[int], Path]) -> None:
    mount = mounts.mount_of(tmpfs_mount(1 << 20))
    assert mount is not None
    assert (mount.fs_type, mounts.device_of(mount)) == ("tmpfs", None)


# --- the host


def test_this_host_is_described() -> None:
    facts = host.describe()
    assert facts.kernel == os.uname().release
    assert facts.affinity_cores == len(os.sched_getaffinity(0))
    assert facts.memory_total_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < (facts.client_memory_bytes or 0) <= facts.memory_total_bytes
    assert {"python", "mlstor", "numpy"} <= set(facts.versions)


def test_a_rank_bound_to_one_core_is_warned_of_with_the_option_that_widens_it() -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one core can't be narrowed")
    only = min(before)
    os.sched_setaffinity(0, {only})
    try:
        facts = host.describe()
    finally:
        os.sched_setaffinity(0, before)
    assert facts.narrow
    assert facts.affinity == str(only)
    for launcher, remedy in (
        (Launcher("Open MPI mpirun", "open-mpi", 0, 2, "--bind-to none"), "start with --bind-to none"),
        (Launcher("Slurm srun", "slurm", 0, 2, "--cpu-bind=none"), "start with --cpu-bind=none"),
        (None, "without taskset"),
    ):
        assert remedy in (host.binding_warning(facts, launcher) or "")


def test_a_cpuset_that_leaves_fewer_cores_is_no_binding(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpuset.cpus.effective": ",".join(map(str, cpus)),
            "sys/devices/system/cpu/online": "0-1023\n",
        },
    )
    facts = host.describe(root)
    assert (facts.cores_online, facts.cores_allowed) == (1024, len(cpus))
    assert host.binding_warning(facts, None) is None


@pytest.mark.parametrize(("text", "count"), [("0-3,8", 5), ("7", 1), ("0-1,4-5,9\n", 5), ("\n", None), (None, None)])
def test_cpu_lists_are_counted(text: str | None, count: int | None) -> None:
    assert host.cpulist_count(text) == count


def test_client_memory_is_the_cgroups_where_that_is_less() -> None:
    facts = dataclasses.replace(host.describe(), memory_total_bytes=64 * GIB)
    limited = dataclasses.replace(facts, cgroup=cgroup.Cgroup(memory_version=2, memory_limit_bytes=8 * GIB))
    assert limited.client_memory_bytes == 8 * GIB
