"""What a run's record says of its surroundings: hosts, targets, verdicts before the first byte, every parameter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from mlstor import __version__
from mlstor.checkpoint.preflight import CacheRule, Preflight
from mlstor.checkpoint.profiles import step_names
from mlstor.host import Host
from mlstor.mounts import Device, device_of, mount_of
from mlstor.results import record

if TYPE_CHECKING:
    from mlstor.checkpoint.session import Session


class HostReport(msgspec.Struct, kw_only=True):
    """What the first process of a host tells of it."""

    host: record.Host
    targets: list[record.Target]
    checks: list[record.Check]
    cores: int
    client_memory_bytes: int | None


class ProcessReport(msgspec.Struct, kw_only=True):
    """What each process tells: on which CPUs it may run, the warning if these are few, and the first of a host
    what it has found of that.
    """

    affinity: str
    warning: str | None
    host: HostReport | None


def host_report(session: Session) -> HostReport | None:
    """What this process tells of its host, if it is the first there."""
    if session.preflight is None:
        return None
    rooms = {path: room for room in session.preflight.rooms for path in room.paths}
    index = session.world.host_index
    return HostReport(
        host=host_record(session.host),
        targets=[target_record(path, index, session, rooms[path].is_memory) for path in rooms],
        checks=checks(session.preflight, index),
        cores=usable_cores(session.host),
        client_memory_bytes=session.host.client_memory_bytes,
    )


def host_reports(processes: Sequence[ProcessReport], host_of_process: Sequence[int]) -> list[HostReport]:
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


def target_record(path: str, host_index: int, session: Session, is_memory: bool) -> record.Target:
    """A target directory as the record keeps it."""
    from mlstor import _io

    mount = mount_of(path)
    device = device_of(mount) if mount else None
    found = _io.alignment(path)
    return record.Target(
        path=path,
        resolved_path=os.path.realpath(path),
        host=host_index,
        sharing=session.options.sharing or session.sharing.kind,
        sharing_how="asserted" if session.sharing.asserted else "found",
        fs_type=mount.fs_type if mount else found["fs_type"],
        mount_options=f"{mount.options},{mount.super_options}" if mount else "",
        device=_device_text(mount.source if mount else "", device),
        memory_align_bytes=found["mem_align"],
        offset_align_bytes=found["offset_align"],
        is_memory=is_memory,
        block_bytes=session.block_nbytes(path, found["st_blksize"]),
        direct=session.how_of(path).direct,  # type: ignore[arg-type]  # the settings' words are the record's
    )


def _device_text(source: str, device: Device | None) -> str:
    if device is None:
        return source
    facts = [device.name, device.model, device.level, device.backing_file and f"on {device.backing_file}"]
    return f"{source} ({', '.join(fact for fact in facts if fact)})"


def checks(found: Preflight, host_index: int) -> list[record.Check]:
    """The verdicts of one host's pre-flight; a refusal has ended the run before."""
    made = []
    for room in found.rooms:
        where = ", ".join(room.paths)
        made.append(
            record.Check(
                name="room",
                verdict="ok",
                unit="bytes",
                needed=room.need_bytes,
                available=room.room_bytes,
                limited_by=room.bound,
                target=where,
                host=host_index,
            )
        )
        made.append(
            record.Check(
                name="inodes",
                verdict="ok" if room.free_inodes is not None else "unknown",
                unit="inodes",
                needed=room.need_inodes,
                available=room.free_inodes,
                target=where,
                host=host_index,
            )
        )
    left = found.memory_left_bytes
    made.append(
        record.Check(
            name="memory",
            verdict="ok" if left is not None else "unknown",
            unit="bytes",
            needed=found.memory_need_bytes,
            available=left,
            host=host_index,
        )
    )
    return made


def memory_rule(session: Session, reports: list[HostReport]) -> tuple[record.MemoryRule, str]:
    """MLPerf's rule on client memory for this run, and its sentence."""
    given = session.options.client_memory_bytes
    memories = [report.client_memory_bytes for report in reports if report.client_memory_bytes is not None]
    memory = given if given is not None else max(memories, default=None)
    least = min(session.nbytes_of_host(host) for host in range(session.world.nhosts))
    source = "--client-memory" if given is not None else "host memory and memory cgroup"
    if memory is None:
        rule = record.MemoryRule(
            verdict="unknown", nbytes_per_client=least, client_memory_bytes=None, memory_source="not shown"
        )
        return rule, "MLPerf's bound of 3 x client memory: unknown, give --client-memory"
    cache = CacheRule(memory, least, max(1, session.options.writes or 0))
    rule = record.MemoryRule(
        verdict="met" if cache.run_exceeds else "not met",
        nbytes_per_client=least * cache.checkpoints,
        client_memory_bytes=memory,
        memory_source=source,
    )
    return rule, cache.sentence


def workload(session: Session, targets: Sequence[record.Target]) -> record.Workload:
    """Every parameter of the run."""
    options, profile, layout = session.options, session.profile, session.layout
    engine = profile.engine_settings(session.settings, "write", len(session.my_ranks), session.largest_nbytes)
    return record.Workload(
        model=layout.shape.name,
        workload_file=options.workload,
        scale_numerator=layout.scale.numerator,
        scale_denominator=layout.scale.denominator,
        subset=options.subset,
        ranks=layout.nranks,
        ranks_meaning=session.meaning,
        only_ranks=session.only,
        deal="blocks" if options.deal == "block" else "round-robin",
        profile=options.profile,
        writes=options.writes or 0,
        reads=options.reads or 0,
        read_run=None if options.writes else session.run_id,
        rank_shift=options.rank_shift,
        verify=session.verify,
        keep=options.keep_count,
        steps=step_names(profile.steps),
        direct=targets[0].direct,
        backend=engine.backend,  # type: ignore[arg-type]
        block_bytes=max(target.block_bytes or 0 for target in targets),
        depth=engine.depth_count(),
        workers=engine.worker_count(),
        pause_ns=int(session.pause_s * 1e9),
        compressibility_percent=session.manifest.compressibility,
        nbytes=sum(layout.rank_nbytes(rank) for rank in session.ranks),
        nfiles=sum(layout.rank_nfiles(rank) for rank in session.ranks),
    )


def settings_of(session: Session, targets: Sequence[record.Target]) -> dict[str, record.Setting]:
    """The settings of the run, without those that its profile fixes; one target's values are the run's."""
    found = {session.settings.for_target(target.path) for target in targets}
    settings = found.pop() if len(found) == 1 else session.settings
    fixed = session.profile.fixed
    if session.profile.direct is not None and session.options.direct is None:
        fixed |= {"direct"}
    return {
        name: record.setting(entry["value"], entry["source"].split()[0])
        for name, entry in settings.describe().items()
        if name not in fixed
    }


def header(session: Session, reports: list[HostReport], start_unix_ns: int) -> record.Record:
    """The record before its first phase."""
    rule, _ = memory_rule(session, reports)
    world = session.world
    targets = [target for report in reports for target in report.targets]
    return record.Record(
        run_id=session.results_id,
        status="partial",
        start_unix_ns=start_unix_ns,
        command=session.command,
        version=__version__,
        settings=settings_of(session, targets),
        workload=workload(session, targets),
        world=record.World(
            ranks=session.layout.nranks,
            processes=world.size,
            hosts=world.nhosts,
            launcher=world.launcher or "none",
            mpi_library=world.mpi_library,
            process_host=list(world.host_of_rank),
        ),
        hosts=[report.host for report in reports],
        targets=targets,
        preflight=record.Preflight(
            checks=[check for report in reports for check in report.checks], mlperf_memory_rule=rule
        ),
        phases=[],
    )
