"""What this process's control groups allow of memory and CPU, v1 and v2: the least of all levels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlstor.mounts import parse_mountinfo

# v1 says "no limit" with the largest page count the kernel can hold, a little under 2^63 bytes.
_V1_UNLIMITED_BYTES = 1 << 62


@dataclass(frozen=True)
class Cgroup:
    """Limits of this process, each None where there is none or where the machine doesn't show it.

    Attributes
    ----------
    memory_version : int or None
        1 or 2: which hierarchy limits memory; None if neither is visible.
    memory_limit_bytes : int or None
        Least limit of the group and its visible ancestors.
    memory_used_bytes : int or None
        What the group uses, page cache included.
    memory_left_bytes : int or None
        Least of limit - (usage - inactive page cache) over the levels: what may still be taken before
        something is killed. That is the working set by which Kubernetes evicts too.
    cpu_quota_milli : int or None
        CPU time per time, in thousandths of a core.
    cpu_throttled_count : int or None
        Periods in which the quota ran out, since the group was made.
    cpus_allowed : str or None
        The cpuset, as a list such as ``"0-3,8"``.
    """

    memory_version: int | None = None
    memory_limit_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_left_bytes: int | None = None
    cpu_quota_milli: int | None = None
    cpu_throttled_count: int | None = None
    cpus_allowed: str | None = None


def read(root: str = "/") -> Cgroup:
    """The limits of the calling process; `root` holds ``proc`` and ``sys`` (for tests)."""
    levels = _Levels(Path(root))
    version, memory = levels.of("memory", "memory.limit_in_bytes", "memory.current")
    cpu_version, cpu = levels.of("cpu", "cpu.cfs_quota_us", "cpu.max")
    set_version, cpuset = levels.of("cpuset", "cpuset.cpus", "cpuset.cpus.effective")
    limits, left, used = _memory(version, memory)
    quotas = [quota for level in cpu if (quota := _quota_milli(cpu_version, level)) is not None]
    return Cgroup(
        memory_version=version,
        memory_limit_bytes=min(limits, default=None),
        memory_used_bytes=used,
        memory_left_bytes=max(0, min(left)) if left else None,
        cpu_quota_milli=min(quotas, default=None),
        cpu_throttled_count=_keyed(cpu[0] / "cpu.stat").get("nr_throttled") if cpu else None,
        cpus_allowed=_cpus(set_version, cpuset),
    )


class _Levels:
    """Directories of this process's groups, innermost first, as far as the mounts show them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._mounts = parse_mountinfo(_text(root / "proc/self/mountinfo") or "")
        self._v2: str | None = None
        self._v1: dict[str, str] = {}
        for line in (_text(root / "proc/self/cgroup") or "").splitlines():
            hierarchy, controllers, path = line.split(":", 2)
            if hierarchy == "0":
                self._v2 = path
            for controller in filter(None, controllers.split(",")):
                self._v1[controller] = path

    def of(self, controller: str, v1_file: str, v2_file: str) -> tuple[int | None, list[Path]]:
        """(version, directories) of the hierarchy in which `controller` really works here."""
        # On a hybrid system the v2 tree is mounted too, but the controller's files are in the v1 tree.
        for version, path, file in ((1, self._v1.get(controller), v1_file), (2, self._v2, v2_file)):
            if path is not None:
                found = [level for level in self._walk(version, controller, path) if (level / file).exists()]
                if found:
                    return version, found
        return None, []

    def _walk(self, version: int, controller: str, path: str) -> list[Path]:
        for mount in self._mounts:
            if version == 1:
                matches = mount.fs_type == "cgroup" and controller in mount.super_options.split(",")
            else:
                matches = mount.fs_type == "cgroup2"
            if not matches:
                continue
            top = self._root / mount.mount_point.lstrip("/")
            # A container sees its own group as the mount's root, with the host's path before it or, in a
            # cgroup namespace, without.
            inside = path[len(mount.root.rstrip("/")) :] if _below(path, mount.root) else ""
            level = top / inside.lstrip("/")
            levels = [level]
            while level != top and top in level.parents:
                level = level.parent
                levels.append(level)
            return levels
        return []


def _below(path: str, root: str) -> bool:
    return root == "/" or path == root or path.startswith(root.rstrip("/") + "/")


def _memory(version: int | None, levels: list[Path]) -> tuple[list[int], list[int], int | None]:
    limits: list[int] = []
    left: list[int] = []
    used: int | None = None
    limit_file, usage_file, cache_key = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    for level in levels:
        limit = _number(level / limit_file)  # v2 says "max", which is no number
        usage = _number(level / usage_file)
        stat = _keyed(level / "memory.stat")
        used = usage if used is None else used
        if version == 1:
            # In a container the ancestors aren't mounted; v1 tells the least of their limits all the same.
            shown = [value for value in (limit, stat.get("hierarchical_memory_limit")) if value is not None]
            limit = min(shown, default=None)
            limit = None if limit is None or limit >= _V1_UNLIMITED_BYTES else limit
        if limit is None:
            continue
        limits.append(limit)
        if usage is not None:
            left.append(limit - max(0, usage - stat.get(cache_key, 0)))
    return limits, left, used


def _quota_milli(version: int | None, level: Path) -> int | None:
    if version == 1:
        quota, period = _number(level / "cpu.cfs_quota_us"), _number(level / "cpu.cfs_period_us")
    else:
        words = (_text(level / "cpu.max") or "").split()
        quota, period = (int(word) if word.isdigit() else None for word in (words if len(words) == 2 else ("", "")))
    if quota is None or not period or quota < 0:  # v1 says -1 for none
        return None
    return quota * 1000 // period


def _cpus(version: int | None, levels: list[Path]) -> str | None:
    names = ("cpuset.effective_cpus", "cpuset.cpus") if version == 1 else ("cpuset.cpus.effective",)
    for level in levels:
        for name in names:
            text = _text(level / name)
            if text and text.strip():
                return text.strip()
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:  # absent, or hidden from this process: then it isn't known
        return None


def _number(path: Path) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _keyed(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in (_text(path) or "").splitlines())
    return {words[0]: int(words[1]) for words in pairs if len(words) == 2 and words[1].isdigit()}
