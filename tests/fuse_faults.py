"""A FUSE file system that fails on demand: a directory shown at another place, in which one call goes wrong.

As a program: ``fuse_faults.py BACKING MOUNTPOINT CONTROL``. CONTROL is a JSON file; ``{"op": "write", "nth": 3,
"errno": 5}`` lets the third write since the file was written, and all after it, end with EIO; ``first`` and ``last``
limit that to transfers which touch these bytes. No file: nothing fails. Calls: create, write, read, fsync, fsyncdir,
rename, truncate, unlink.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STARTS_S = 20.0
_NO_DATA = os.O_DIRECT | os.O_APPEND  # what is opened behind takes any buffer


class Faulty:
    """Use `faulty` to make one. `root` is where it is mounted, `backing` what lies behind it."""

    def __init__(self, root: Path, backing: Path, control: Path) -> None:
        self.root, self.backing, self._control = root, backing, control

    def fail(self, op: str, code: int, nth: int = 1, **where: int) -> None:
        """From now on the `nth` call of `op` and those after it end with that errno."""
        self._rule({"op": op, "nth": nth, "errno": code, **where})

    def slow(self, op: str, delay_s: float, nth: int = 1) -> None:
        """From now on the `nth` call of `op` and those after it take that much longer."""
        self._rule({"op": op, "nth": nth, "delay_s": delay_s})

    def _rule(self, rule: dict[str, Any]) -> None:
        partial = self._control.with_suffix(".new")
        partial.write_text(json.dumps(rule))
        partial.rename(self._control)

    def heal(self) -> None:
        """From now on nothing fails, and all is as fast as it can be."""
        self._control.unlink(missing_ok=True)


@contextmanager
def faulty(directory: Path) -> Iterator[Faulty]:
    """A new one below `directory`. Skips the test where there is no FUSE."""
    import pytest

    if not os.path.exists("/dev/fuse") or os.geteuid() != 0:
        pytest.skip("a FUSE file system needs /dev/fuse and root")
    if importlib.util.find_spec("fuse") is None:
        pytest.skip("fusepy is not installed: `pip install fusepy`")
    root, backing, control = directory / "shown", directory / "behind", directory / "control.json"
    root.mkdir()
    backing.mkdir()
    with open(directory / "output", "wb") as output:
        child = subprocess.Popen(
            [sys.executable, __file__, backing, root, control], stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
    try:
        deadline = time.monotonic() + _STARTS_S
        while not os.path.ismount(root):
            if child.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"no FUSE here: {(directory / 'output').read_text()[-500:]}")
            time.sleep(0.02)
        yield Faulty(root, backing, control)
    finally:
        for _ in range(100):  # what the kernel still holds of a file is let go a little later
            if subprocess.run(["umount", root], check=False, capture_output=True).returncode == 0:
                break
            time.sleep(0.05)
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def serve(backing: str, mountpoint: str, control: str) -> None:
    """Until it is unmounted."""
    import fuse  # type: ignore[import-untyped]

    class Passing(fuse.Operations):  # type: ignore[misc]  # fusepy has no types
        use_ns = True

        def __init__(self) -> None:
            self.asked: tuple[int, int] = (0, 0)
            self.rule: dict[str, Any] = {}
            self.count = 0

        def trip(self, op: str, offset: int = 0, nbytes: int = 0) -> None:
            """Fail, or wait, if this call is to."""
            try:
                found = os.stat(control)
            except FileNotFoundError:
                self.rule = {}
                return
            if (found.st_ino, found.st_mtime_ns) != self.asked:
                self.asked, self.count = (found.st_ino, found.st_mtime_ns), 0
                self.rule = json.loads(Path(control).read_text())
            rule = self.rule
            if rule["op"] != op:
                return
            if "first" in rule and not (offset <= rule["last"] and rule["first"] < offset + nbytes):
                return
            self.count += 1
            if self.count < rule["nth"]:
                return
            if "delay_s" in rule:
                time.sleep(rule["delay_s"])
            else:
                raise fuse.FuseOSError(rule["errno"])

        def real(self, path: str) -> str:
            return backing + path

        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            found = os.lstat(self.real(path))
            names = ("mode", "ino", "nlink", "uid", "gid", "size", "blocks", "blksize")
            times = {f"st_{name}": getattr(found, f"st_{name}_ns") for name in ("atime", "mtime", "ctime")}
            return {f"st_{name}": getattr(found, f"st_{name}") for name in names} | times

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *os.listdir(self.real(path))]

        def mkdir(self, path: str, mode: int) -> None:
            os.mkdir(self.real(path), mode)

        def rmdir(self, path: str) -> None:
            os.rmdir(self.real(path))

        def unlink(self, path: str) -> None:
            self.trip("unlink")
            os.unlink(self.real(path))

        def rename(self, old: str, new: str) -> None:
            self.trip("rename")
            os.rename(self.real(old), self.real(new))

        def chmod(self, path: str, mode: int) -> None:
            os.chmod(self.real(path), mode)

        def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
            os.utime(self.real(path), None) if times is None else os.utime(self.real(path), ns=times)

        def statfs(self, path: str) -> dict[str, int]:
            found = os.statvfs(self.real(path))
            names = ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax")
            return {f"f_{name}": getattr(found, f"f_{name}") for name in names}

        def open(self, path: str, flags: int) -> int:
            return os.open(self.real(path), flags & ~_NO_DATA)

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            self.trip("create")
            return os.open(self.real(path), os.O_RDWR | os.O_CREAT, mode)

        def read(self, path: str, nbytes: int, offset: int, fh: int) -> bytes:
            self.trip("read", offset, nbytes)
            return os.pread(fh, nbytes, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            self.trip("write", offset, len(data))
            return os.pwrite(fh, data, offset)

        def truncate(self, path: str, length: int, fh: int | None = None) -> None:
            self.trip("truncate")
            os.truncate(self.real(path) if fh is None else fh, length)

        def fsync(self, path: str, datasync: int, fh: int) -> None:
            self.trip("fsync")
            os.fsync(fh)

        def fsyncdir(self, path: str, datasync: int, fh: int) -> None:
            self.trip("fsyncdir")

        def release(self, path: str, fh: int) -> None:
            os.close(fh)

    try:
        fuse.FUSE(Passing(), mountpoint, foreground=True, nothreads=True, hard_remove=True)
    except RuntimeError as error:
        raise SystemExit(errno.EIO) from error


if __name__ == "__main__":
    serve(*sys.argv[1:4])
