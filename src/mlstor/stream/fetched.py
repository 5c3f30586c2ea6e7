"""Bytes that were really moved for what a process read: small reads may fetch more than they ask for, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlstor.mounts import mount_of

if TYPE_CHECKING:
    from mlstor.mounts import Mount

# Their reads go through the block layer, which accounts them to the process (Documentation/filesystems/proc.rst,
# read_bytes of /proc/PID/io).
_ON_BLOCK_DEVICES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs"})
_ON_NFS = frozenset({"nfs", "nfs4"})
_SERVER_READ = 4  # column of mountstats' "bytes:" (nfs-utils' mountstats: serverreadbytes)


class Fetched:
    """A counter of fetched bytes, where the kernel or the mount has one.

    Parameters
    ----------
    path : str
        Of the data.
    of_host : bool
        Whether this process tells what is counted for its whole host; the others of the host then tell 0.
    root : str
        Holds ``proc`` (for tests).

    Attributes
    ----------
    source : str
        What is read; empty where nothing tells.
    """

    def __init__(self, path: str, of_host: bool, root: str = "/") -> None:
        mount = mount_of(path)
        kind = mount.fs_type if mount is not None else ""
        self._mount: Mount | None = mount
        self._of_host = of_host
        self._proc = Path(root) / "proc/self"
        self.source = ""
        if kind in _ON_BLOCK_DEVICES:
            self.source = "read_bytes of /proc/self/io"
        elif kind in _ON_NFS:
            self.source = "server read bytes of /proc/self/mountstats"
        self._first = self._now()

    def nbytes(self) -> int | None:
        """Since this was made; None where nothing tells (FUSE, overlay, memory, other networks)."""
        now = self._now()
        return None if now is None or self._first is None or now < self._first else now - self._first

    def _now(self) -> int | None:
        if not self.source:
            return None
        try:
            if self._mount is not None and self._mount.fs_type in _ON_NFS:
                return self._of_mount((self._proc / "mountstats").read_text(), self._mount.mount_point)
            return _of_process((self._proc / "io").read_text())
        except OSError:  # hidden from this process: then it isn't known
            return None

    def _of_mount(self, text: str, mount_point: str) -> int | None:
        if not self._of_host:
            return 0
        inside = False
        for line in text.splitlines():
            words = line.split()
            if words[:1] == ["device"]:
                inside = words[3:5] == ["on", mount_point] or words[2:5] == ["mounted", "on", mount_point]
            elif inside and words[:1] == ["bytes:"]:
                return int(words[1 + _SERVER_READ])
        return None


def _of_process(text: str) -> int | None:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "read_bytes":
            return int(value)
    return None
