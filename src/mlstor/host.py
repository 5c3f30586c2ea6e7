"""This host: kernel, processors, memory, limits, versions. What the machine doesn't show is None."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import dataclass
from pathlib import Path

from mlstor import __version__, cgroup
from mlstor.launch import Launcher

_PACKAGES = ("numpy", "mpi4py", "msgspec", "torch")


@dataclass(frozen=True)
class Host:
    """Facts of this host and of this process's share of it.

    Attributes
    ----------
    cores_online : int or None
        Logical processors that are online.
    cores_allowed : int or None
        Those that the cpuset leaves to this container or job step; `cores_online` where no cpuset shows.
    affinity : str
        Processors on which this process may run, as ``"0-3,8"``.
    affinity_cores : int
        How many these are.
    memory_total_bytes, memory_available_bytes : int or None
        MemTotal and MemAvailable.
    numa_nodes : int or None
    versions : dict
        Python, the C library, and installed packages that matter here.
    """

    hostname: str
    kernel: str
    machine: str
    cpu_model: str | None
    cores_online: int | None
    cores_allowed: int | None
    affinity: str
    affinity_cores: int
    memory_total_bytes: int | None
    memory_available_bytes: int | None
    numa_nodes: int | None
    cgroup: cgroup.Cgroup
    versions: dict[str, str]

    @property
    def narrow(self) -> bool:
        """Whether this process is bound to fewer cores than the host allows it."""
        return self.cores_allowed is not None and self.affinity_cores < self.cores_allowed

    @property
    def client_memory_bytes(self) -> int | None:
        """Memory that could cache data here: the host's, or the cgroup's limit where that is less."""
        known = [size for size in (self.memory_total_bytes, self.cgroup.memory_limit_bytes) if size is not None]
        return min(known, default=None)


def describe(root: str = "/") -> Host:
    """Facts of this host; `root` holds ``proc`` and ``sys`` (for tests).

    Affinity, host name and versions are those of the calling process whatever `root` is.
    """
    base = Path(root)
    limits = cgroup.read(root)
    memory = _meminfo(base / "proc/meminfo")
    online = cpulist_count(_text(base / "sys/devices/system/cpu/online"))
    mask = os.sched_getaffinity(0)
    allowed = cpulist_count(limits.cpus_allowed)
    return Host(
        hostname=socket.gethostname(),
        kernel=(_text(base / "proc/sys/kernel/osrelease") or platform.release()).strip(),
        machine=platform.machine(),
        cpu_model=_cpu_model(base / "proc/cpuinfo"),
        cores_online=online,
        cores_allowed=online if allowed is None else allowed,
        affinity=_cpulist(mask),
        affinity_cores=len(mask),
        memory_total_bytes=memory.get("MemTotal"),
        memory_available_bytes=memory.get("MemAvailable"),
        numa_nodes=len(list((base / "sys/devices/system/node").glob("node[0-9]*"))) or None,
        cgroup=limits,
        versions=_versions(),
    )


def binding_warning(host: Host, launcher: Launcher | None) -> str | None:
    """What to say of a narrow affinity mask, with the option that widens it; None if it is wide."""
    if not host.narrow:
        return None
    if launcher is None:
        remedy = "start it without taskset or numactl"
    elif launcher.widen is None:
        remedy = "switch off the launcher's binding"
    else:
        remedy = f"start with {launcher.widen}"
    cores = "core" if host.affinity_cores == 1 else "cores"
    return (
        f"bound to {host.affinity_cores} {cores} ({host.affinity}) of the {host.cores_allowed} that "
        f"{host.hostname} "
        f"allows, and the engine's threads with it: the client may be the limit; {remedy} to use all"
    )


def cpulist_count(text: str | None) -> int | None:
    """How many processors a list such as ``"0-3,8"`` names; None for None or an empty list."""
    if text is None or not text.strip():
        return None
    count = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count


def _cpulist(cpus: set[int]) -> str:
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _cpu_model(path: Path) -> str | None:
    # x86 says "model name"; arm64 names no model here.
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return None


def _meminfo(path: Path) -> dict[str, int]:
    sizes = {}
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":  # KiB, in spite of its name
            sizes[key] = int(words[0]) * 1024
    return sizes


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {
        "mlstor": __version__,
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()).strip(),
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # not installed: the record leaves it out
    return found


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:  # absent, or hidden from this process: then it isn't known
        return None
