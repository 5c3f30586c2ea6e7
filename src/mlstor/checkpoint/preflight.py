"""What a run needs and whether it is there, looked at before the first byte: room, inodes, memory.

A pod that outgrows its ephemeral storage is evicted and one that outgrows its memory is killed; neither is
told ENOSPC. So the room of a target is the least of all bounds that show.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from mlstor.checkpoint.targets import check_directory
from mlstor.errors import UsageError
from mlstor.host import Host
from mlstor.mounts import Device, Mount, device_of, mount_of
from mlstor.units import format_both, format_gib

_MEMORY_FS_TYPES = frozenset({"tmpfs", "ramfs"})
# How the kubelet names the directories of emptyDir volumes, which count against a pod's ephemeral-storage
# limit.
_EMPTY_DIR = "kubernetes.io~empty-dir"
# MLPerf Storage 4.3.1: a client must write more than this many times its memory, or flush between the phases.
_MEMORY_FACTOR = 3

_SMALLER = "use --scale, fewer --writes or another PATH"


@dataclass(frozen=True)
class Need:
    """What this host, or on a shared target the whole run, puts into one directory at most at one time.

    Attributes
    ----------
    path : str
    nbytes : int
        Bytes of all files.
    files : int
        Files and directories.
    """

    path: str
    nbytes: int
    files: int


@dataclass(frozen=True)
class Room:
    """What a file system has for the targets that lie on it.

    Attributes
    ----------
    paths : tuple of str
        The targets on this file system.
    is_memory : bool
        It is a tmpfs, or lies on one (loop device, overlay): a result is of memory, not of storage.
    free_bytes, free_inodes : int or None
        As statvfs says, for an ordinary user; None where a file system doesn't count inodes.
    room_bytes : int
        The least of all bounds.
    bound : str
        Which one that is.
    need_bytes, need_inodes : int
        Summed over `paths`, each file rounded up to the file system's block.
    """

    paths: tuple[str, ...]
    mount: Mount | None
    device: Device | None
    is_memory: bool
    free_bytes: int
    free_inodes: int | None
    room_bytes: int
    bound: str
    need_bytes: int
    need_inodes: int


@dataclass(frozen=True)
class Preflight:
    """What was looked at before a run, for its record.

    Attributes
    ----------
    rooms : tuple of Room
        One per file system.
    memory_need_bytes : int
        What the processes of this host need for themselves.
    memory_left_bytes : int or None
        The least of what the memory cgroup and the host have left.
    untold : tuple of Need
        Targets that don't tell what they have room for: object stores.
    """

    rooms: tuple[Room, ...]
    memory_need_bytes: int
    memory_left_bytes: int | None
    untold: tuple[Need, ...] = ()


def check(
    needs: Sequence[Need],
    host: Host,
    *,
    memory_need_bytes: int = 0,
    ephemeral_limit_bytes: int | None = None,
    write: bool = True,
) -> Preflight:
    """Look at the targets of this host and refuse what they can't hold. One process per host calls this.

    Parameters
    ----------
    needs : sequence of Need
        One per directory; directories of one file system are added up.
    host : Host
        `mlstor.host.describe()` of this host.
    memory_need_bytes : int
        Memory that this host's processes will take: staging, buffers, the interpreters.
    ephemeral_limit_bytes : int, optional
        The pod's ephemeral-storage limit, from the downward API. It bounds the container's own layer
        (overlay) and emptyDir volumes, not volumes of their own.
    write : bool
        False for a read-only run: directories need only be readable, and need no room.

    Raises
    ------
    UsageError
        If a target can't be used, or something doesn't suffice: which bound, how much is needed, what to try.
    """
    for need in needs:
        check_directory(need.path, write=write)
    left = _memory_left(host)
    if left is not None and memory_need_bytes > left[0]:
        raise UsageError(
            f"{host.hostname} has {format_gib(left[0])} of memory left ({left[1]}), but its processes need "
            f"{format_gib(memory_need_bytes)}: use fewer processes per host, or a smaller --depth or --block"
        )
    by_device: dict[int, list[Need]] = {}
    for need in needs:
        by_device.setdefault(os.stat(need.path).st_dev, []).append(need)
    rooms = tuple(_room(group, left, memory_need_bytes, ephemeral_limit_bytes) for group in by_device.values())
    for room in rooms if write else ():
        _refuse_if_small(room, host.hostname)
    return Preflight(rooms, memory_need_bytes, None if left is None else left[0])


def _room(
    needs: list[Need], left: tuple[int, str] | None, memory_need_bytes: int, ephemeral_limit_bytes: int | None
) -> Room:
    path = needs[0].path
    mount = mount_of(path)
    device = device_of(mount) if mount else None
    shown = os.statvfs(path)
    free_bytes = shown.f_bavail * shown.f_frsize
    bounds = [(free_bytes, "free space of the file system")]
    if ephemeral_limit_bytes is not None and mount is not None and _is_ephemeral(mount):
        bounds.append((ephemeral_limit_bytes, "the pod's ephemeral-storage limit"))
    if left is not None and mount is not None and mount.fs_type in _MEMORY_FS_TYPES:
        # Its pages are the memory of this host and its cgroup, of which the processes need some themselves.
        bounds.append((max(0, left[0] - memory_need_bytes), left[1]))
    room_bytes, bound = min(bounds)
    return Room(
        paths=tuple(need.path for need in needs),
        mount=mount,
        device=device,
        is_memory=mount is not None and _is_memory(mount, device),
        free_bytes=free_bytes,
        free_inodes=shown.f_favail if shown.f_files else None,  # btrfs and some network file systems say 0 of 0
        room_bytes=room_bytes,
        bound=bound,
        need_bytes=sum(need.nbytes + need.files * shown.f_frsize for need in needs),
        need_inodes=sum(need.files for need in needs),
    )


def _refuse_if_small(room: Room, hostname: str) -> None:
    where = ", ".join(room.paths)
    if room.need_bytes > room.room_bytes:
        raise UsageError(
            f"{where} on {hostname} has room for {format_both(room.room_bytes)} ({room.bound}), but the run "
            f"needs "
            f"{format_both(room.need_bytes)}: {_SMALLER}"
        )
    if room.free_inodes is not None and room.need_inodes > room.free_inodes:
        raise UsageError(
            f"{where} on {hostname} has {room.free_inodes} free inodes, but the run needs "
            f"{room.need_inodes}: "
            "use fewer --writes, another PATH, or a file system made with more inodes"
        )


def _memory_left(host: Host) -> tuple[int, str] | None:
    bounds = []
    if host.cgroup.memory_left_bytes is not None:
        bounds.append((host.cgroup.memory_left_bytes, f"memory cgroup v{host.cgroup.memory_version}"))
    if host.memory_available_bytes is not None:
        bounds.append((host.memory_available_bytes, "available memory of the host"))
    return min(bounds, default=None)


def _is_ephemeral(mount: Mount) -> bool:
    return mount.fs_type == "overlay" or _EMPTY_DIR in mount.root


def is_memory(path: str) -> bool:
    """Whether files in a directory are in memory; see `Room.is_memory`."""
    mount = mount_of(path)
    return mount is not None and _is_memory(mount, device_of(mount))


def _is_memory(mount: Mount, device: Device | None) -> bool:
    if mount.fs_type in _MEMORY_FS_TYPES:
        return True
    below = device.backing_file if device is not None else mount.option("upperdir")
    under = mount_of(below) if below is not None and os.path.exists(below) else None  # may lie outside this container
    return under is not None and under.fs_type in _MEMORY_FS_TYPES


@dataclass(frozen=True)
class CacheRule:
    """MLPerf Storage's rule that a client's memory must not be able to hold what it has written (4.3.1).

    Attributes
    ----------
    client_memory_bytes : int
    bytes_per_client : int
        One checkpoint's bytes on the client that has the least.
    checkpoints : int
        How many a run writes.
    run_exceeds, checkpoint_exceeds : bool
        Whether more than 3 x memory is written by all checkpoints (the rules' prose) or by one (README and
        checker).
    """

    client_memory_bytes: int
    bytes_per_client: int
    checkpoints: int

    @property
    def run_exceeds(self) -> bool:
        return self.checkpoints * self.bytes_per_client > _MEMORY_FACTOR * self.client_memory_bytes

    @property
    def checkpoint_exceeds(self) -> bool:
        return self.bytes_per_client > _MEMORY_FACTOR * self.client_memory_bytes

    @property
    def sentence(self) -> str:
        """The verdict, by both readings."""
        verdict = {
            (True, True): "exceeded by each checkpoint: no flush is needed between writing and reading",
            (
                True,
                False,
            ): "exceeded by all checkpoints together but not by one: no flush is needed by the rules' text, "
            "one is by the checker",
            (
                False,
                False,
            ): "not exceeded: caches must be flushed between writing and reading, or shown to be bypassed",
        }[self.run_exceeds, self.checkpoint_exceeds]
        return (
            f"MLPerf's bound of {_MEMORY_FACTOR} x client memory "
            f"({format_gib(_MEMORY_FACTOR * self.client_memory_bytes)}; "
            f"a client writes {self.checkpoints} x {format_gib(self.bytes_per_client)}) is {verdict}"
        )
