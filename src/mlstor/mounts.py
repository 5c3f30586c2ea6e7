"""Where a path lies: its mount, and the block device under it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """A line of /proc/self/mountinfo (proc_pid_mountinfo(5)).

    Attributes
    ----------
    device : str
        ``"major:minor"``; an anonymous ``"0:n"`` for btrfs, overlay and network file systems.
    root : str
        The directory of the file system that is mounted here; not ``"/"`` for bind mounts and subvolumes.
    source : str
        What was mounted: a device, ``"server:/export"``, ...
    options, super_options : str
        Options of the mount and of the file system.
    """

    mount_id: int
    device: str
    root: str
    mount_point: str
    options: str
    fs_type: str
    source: str
    super_options: str

    @property
    def read_only(self) -> bool:
        """Whether the mount or its file system refuses writes."""
        return "ro" in self.options.split(",") or "ro" in self.super_options.split(",")

    def option(self, name: str) -> str | None:
        """The value of a file system option such as ``upperdir``, or None."""
        for item in self.super_options.split(","):
            key, separator, value = item.partition("=")
            if separator and key == name:
                return value
        return None


@dataclass(frozen=True)
class Device:
    """A block device as /sys shows it; what it doesn't show is None.

    Attributes
    ----------
    number : str
        ``"major:minor"`` of the device or partition.
    name : str
        The kernel's name of the whole disk, as ``"nvme0n1"``.
    level : str or None
        RAID level of an md device, as ``"raid0"``.
    backing_file : str or None
        The file under a loop device.
    io_poll : bool or None
        Whether polled completions are available.
    members : tuple of Device
        The devices under md and device-mapper.
    """

    number: str
    name: str
    model: str | None
    rotational: bool | None
    logical_block_bytes: int | None
    physical_block_bytes: int | None
    write_cache: str | None
    io_poll: bool | None
    level: str | None
    backing_file: str | None
    members: tuple[Device, ...]


def parse_mountinfo(text: str) -> tuple[Mount, ...]:
    """The mounts in `text`, in its order; blanks and backslashes in names are unescaped."""
    mounts = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")  # a varying number of optional fields ends with the dash
        fields, tail = left.split(" "), right.split(" ")
        if len(fields) < 6 or len(tail) < 3:
            continue  # not a mount
        mounts.append(
            Mount(
                mount_id=int(fields[0]),
                device=fields[2],
                root=_unescape(fields[3]),
                mount_point=_unescape(fields[4]),
                options=fields[5],
                fs_type=tail[0],
                source=_unescape(tail[1]),
                super_options=_unescape(" ".join(tail[2:])),
            )
        )
    return tuple(mounts)


def mount_of(path: str | os.PathLike[str], root: str = "/") -> Mount | None:
    """The mount on which `path` lies, or None where mountinfo can't be read.

    By mount id, which is right for mounts on top of one another too; for another `root` (tests), and for a
    path that doesn't exist, the longest mount point above the path.
    """
    try:
        mounts = parse_mountinfo(Path(root, "proc/self/mountinfo").read_text())
    except OSError:
        return None
    mount_id = _mount_id(path) if root == "/" else None
    for mount in mounts:
        if mount.mount_id == mount_id:
            return mount
    real = os.path.realpath(path) if root == "/" else os.fspath(path)
    best: Mount | None = None
    for mount in mounts:
        above = mount.mount_point.rstrip("/") + "/"
        # Of two mounts on one directory the later one is seen.
        if (real + "/").startswith(above) and (best is None or len(mount.mount_point) >= len(best.mount_point)):
            best = mount
    return best


def device_of(mount: Mount, root: str = "/") -> Device | None:
    """The block device under `mount`, or None if there is none or /sys doesn't show it."""
    link = Path(root, "sys/dev/block", mount.device)
    if not link.exists() and mount.source.startswith("/dev/"):
        # btrfs has an anonymous number; its source is one of its devices.
        name = os.path.realpath(mount.source) if root == "/" else mount.source
        link = Path(root, "sys/class/block", os.path.basename(name))
    return _device(link) if link.exists() else None


def _device(link: Path) -> Device:
    directory = Path(os.path.realpath(link))
    disk = directory.parent if (directory / "partition").exists() else directory
    queue = disk / "queue"
    model = _line(disk / "device/model")
    members = sorted((directory / "slaves").iterdir()) if (directory / "slaves").is_dir() else []
    return Device(
        number=_line(directory / "dev") or "",
        name=disk.name,
        model=model,
        rotational=_flag(queue / "rotational"),
        logical_block_bytes=_number(queue / "logical_block_size"),
        physical_block_bytes=_number(queue / "physical_block_size"),
        write_cache=_line(queue / "write_cache"),
        io_poll=_flag(queue / "io_poll"),
        level=_line(disk / "md/level"),
        backing_file=_line(disk / "loop/backing_file"),
        members=tuple(_device(member) for member in members),
    )


def _mount_id(path: str | os.PathLike[str]) -> int | None:
    try:
        fd = os.open(path, os.O_PATH)
    except OSError:  # no such path (yet)
        return None
    try:
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    except OSError:  # no /proc
        return None
    finally:
        os.close(fd)
    match = re.search(r"^mnt_id:\s*(\d+)$", info, re.MULTILINE)
    return int(match[1]) if match else None


def _unescape(text: str) -> str:
    # Octal escapes stand for bytes, of which several may make a character.
    if "\\" not in text:
        return text
    raw = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text.encode().decode("latin-1"))
    return raw.encode("latin-1").decode("utf-8", "surrogateescape")


def _line(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:  # this device has no such attribute
        return None


def _number(path: Path) -> int | None:
    text = _line(path)
    return int(text) if text is not None and text.isdigit() else None


def _flag(path: Path) -> bool | None:
    number = _number(path)
    return None if number is None else number != 0
