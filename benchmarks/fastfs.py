"""XFS on a loop device over a tmpfs file: so fast that software is the limit, as on a node with eight drives.

The tmpfs file is written in full first, so that no write allocates memory, and mkfs may not discard it again.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mlstor.errors import UsageError
from mlstor.units import format_gib

MIB = 1 << 20
MIN_BYTES = 320 * MIB  # mkfs.xfs refuses less than 300 MiB


@contextlib.contextmanager
def ram_backed_xfs(nbytes: int, spare_bytes: int) -> Iterator[Path]:
    """Mount a fresh XFS of `nbytes` and yield its directory; what it made goes again, whatever happens.

    Parameters
    ----------
    nbytes : int
        Size of the device in bytes; at least 320 MiB.
    spare_bytes : int
        Memory that must stay available beside it for the contenders, in bytes.

    Raises
    ------
    UsageError
        If the caller is not root, or memory does not suffice.
    """
    if os.geteuid() != 0:
        raise UsageError("the RAM-backed file system needs mounts and a loop device; run with --fast as root")
    nbytes = -(-max(nbytes, MIN_BYTES) // MIB) * MIB
    available = available_bytes(Path("/proc/meminfo").read_text())
    if available < nbytes + spare_bytes:
        raise UsageError(
            f"the RAM-backed file system takes {format_gib(nbytes)}, the rest {format_gib(spare_bytes)}, "
            f"and {format_gib(available)} of memory are available; "
            "give a smaller --size or fewer contenders with --only"
        )
    with contextlib.ExitStack() as cleanup:
        base = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mlstor-bench-fast-")))
        memory, mount = base / "memory", base / "xfs"
        memory.mkdir()
        mount.mkdir()
        tool("mount", "-t", "tmpfs", "-o", f"size={nbytes + 16 * MIB},mode=0700", "mlstor-bench", str(memory))
        cleanup.callback(unmount, memory)
        image = memory / "image"
        write_fully(image, nbytes)
        device = tool("losetup", "--find", "--show", "--direct-io=on", str(image)).strip()
        cleanup.callback(undo("losetup", "--detach", device))
        tool("mkfs.xfs", "-q", "-K", device)  # -K: a discard would give the memory back
        tool("mount", "-o", "noatime,nodiscard", device, str(mount))
        cleanup.callback(unmount, mount)
        yield mount


def available_bytes(meminfo: str) -> int:
    """MemAvailable of the text of /proc/meminfo, in bytes."""
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no MemAvailable in /proc/meminfo")


def write_fully(path: Path, nbytes: int) -> None:
    """Write every byte of `path`, so that all its memory is there."""
    block = random.randbytes(MIB)
    with path.open("wb", buffering=0) as file:
        for _ in range(nbytes // MIB):
            if file.write(block) != MIB:
                raise OSError(f"short write to {path}")


def unmount(path: Path) -> None:
    """Unmount; what the kernel still holds of a contender's files it lets go a little later."""
    for _ in range(100):
        try:
            tool("umount", str(path))
            return
        except UsageError as error:
            if "busy" not in str(error):
                raise
            time.sleep(0.1)
    tool("umount", str(path))


def undo(*words: str) -> Callable[[], None]:
    """A callback for an ExitStack that runs a tool; its failure is an error like any other."""

    def run() -> None:
        tool(*words)

    return run


def tool(*words: str) -> str:
    """Run a tool of the system; its standard output.

    Raises
    ------
    UsageError
        If it is missing or fails, with what it said.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError(f"there is no {words[0]}; install mount, util-linux and xfsprogs") from None
    if done.returncode != 0:
        raise UsageError(f"{' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout
