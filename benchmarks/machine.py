"""What a benchmark says of the machine, and what it asks of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from benchmarks.fastfs import available_bytes
from mlstor.errors import UsageError
from mlstor.units import format_gib


def describe(directory: Path) -> dict[str, str]:
    """Kernel, processor, file system and Python; no name of the machine or of directories, as this is published."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return {
        "kernel": platform.release().split("-")[0],
        "CPU": f"{len(os.sched_getaffinity(0))} x {models[0] if models else platform.machine()}",
        "file system": file_system(directory, Path("/proc/self/mountinfo").read_text()),
        "Python": platform.python_version(),
    }


def huge_pages(setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> str:
    """To what memory the kernel gives huge pages: ``always``, ``madvise`` (where a program asks) or ``never``."""
    if not setting.exists():  # a kernel without them
        return "never"
    return setting.read_text().partition("[")[2].partition("]")[0]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def file_system(directory: Path, mountinfo: str) -> str:
    """Type of the file system of `directory`, by the longest mount point in `mountinfo` that holds it."""
    best, kind = "", "unknown"
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].replace("\\040", " ")
        if directory.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, rest.split()[0]
    return kind


def require_room(directory: Path, room_bytes: int, memory_bytes: int) -> Path:
    """`directory`, if it exists and has the room and the machine the memory.

    Raises
    ------
    UsageError
        Otherwise.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory; name one on the file system to measure with --dir")
    status = os.statvfs(directory)
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes < room_bytes:
        raise UsageError(f"{directory} has {format_gib(free_bytes)} free; this run needs {format_gib(room_bytes)}")
    available = available_bytes(Path("/proc/meminfo").read_text())
    if available < memory_bytes:
        raise UsageError(
            f"{format_gib(available)} of memory are available and this run needs {format_gib(memory_bytes)}; "
            "give a smaller --size"
        )
    return directory
