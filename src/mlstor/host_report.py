"""What the processes of a run tell of their hosts, for its record."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mlstor.host import Host, binding_warning
from mlstor.launch import detect
from mlstor.results import record
from mlstor.world import World


class HostReport(msgspec.Struct, kw_only=True):
    """What the first process of a host tells of it. `cores`: those that all its processes may use together."""

    host: record.Host
    targets: list[record.Target] = []
    checks: list[record.Check] = []
    cores: int
    client_memory_bytes: int | None


class ProcessReport(msgspec.Struct, kw_only=True):
    """What each process tells: on which CPUs it may run, the warning if these are few, and the first of a host
    what it has found of that.
    """

    affinity: str
    warning: str | None
    host: HostReport | None


def gather(world: World, host: Host, report: HostReport | None) -> tuple[list[HostReport], list[str]] | None:
    """At process 0 one report per host, and the sentence to say if processes are bound to few cores; every process
    calls this.

    Parameters
    ----------
    report
        Of the first process of each host.
    """
    mine = ProcessReport(affinity=host.affinity, warning=binding_warning(host, detect()), host=report)
    gathered = world.gather(msgspec.msgpack.encode(mine))
    if gathered is None:
        return None
    processes = [msgspec.msgpack.decode(text, type=ProcessReport) for text in gathered]
    warnings = [one.warning for one in processes if one.warning is not None]
    said = []
    if warnings:
        of = f" ({len(warnings)} of {world.size} processes are bound)" if world.size > 1 else ""
        said = [f"warning: {warnings[0]}{of}"]
    return merged(processes, world.host_of_rank), said


def merged(processes: Sequence[ProcessReport], host_of_process: Sequence[int]) -> list[HostReport]:
    """The hosts' reports in order of their index, each with the affinity of all its processes."""
    reports = [one.host for one in processes if one.host is not None]
    for process, host in zip(processes, host_of_process, strict=True):
        found = reports[host].host
        if process.affinity not in found.affinities:
            found.affinities.append(process.affinity)
        found.affinity_narrow |= process.warning is not None
    return reports


def host_record(found: Host) -> record.Host:
    """A host as the record keeps it; what the machine does not show is empty."""
    from mlstor import _io
    from mlstor.results.journal import boot_id

    return record.Host(
        hostname=found.hostname,
        kernel=found.kernel,
        cpu_model=found.cpu_model or "",
        cores_online=found.cores_online or 0,
        affinity=found.affinity,
        affinity_narrow=found.narrow,
        memory_bytes=found.memory_total_bytes or 0,
        cgroup=record.Cgroup(
            version=found.cgroup.memory_version or 0,
            memory_limit_bytes=found.cgroup.memory_limit_bytes,
            memory_used_bytes=found.cgroup.memory_used_bytes,
            cpu_limit_millicores=found.cgroup.cpu_quota_milli,
        ),
        versions=found.versions,
        build=dict(_io.build_info()),
        boot_id=boot_id(),
    )


def usable_cores(found: Host) -> int:
    """Cores that all processes of this host may use together: the least of online, cpuset and quota."""
    quota = found.cgroup.cpu_quota_milli
    known = [count for count in (found.cores_online, found.cores_allowed) if count]
    if quota:
        known.append(max(1, quota // 1000))
    return min(known, default=0)


def world_record(world: World, ranks: int) -> record.World:
    """Who runs, for a record; `ranks` are the logical ones."""
    return record.World(
        ranks=ranks,
        processes=world.size,
        hosts=world.nhosts,
        launcher=world.launcher or "none",
        mpi_library=world.mpi_library,
        process_host=list(world.host_of_rank),
    )
