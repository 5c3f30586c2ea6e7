"""What a run's record says of its surroundings: hosts, targets, verdicts before the first byte, every parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from mlstor import __version__
from mlstor.checkpoint.preflight import CacheRule, Preflight
from mlstor.host_report import HostReport, host_record, usable_cores, world_record
from mlstor.results import record

if TYPE_CHECKING:
    from mlstor.checkpoint.session import Session


def host_report(session: Session) -> HostReport | None:
    """What this process tells of its host, if it is the first there."""
    if session.preflight is None:
        return None
    return HostReport(
        host=host_record(session.host),
        targets=session.site.target_records(session, session.preflight),
        checks=checks(session.preflight, session.world.host_index),
        cores=usable_cores(session.host),
        client_memory_bytes=session.host.client_memory_bytes,
    )


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
    for need in found.untold:
        check = record.Check(
            name="room",
            verdict="unknown",
            unit="bytes",
            needed=need.nbytes,
            limited_by="an object store does not tell",
            target=need.path,
            host=host_index,
        )
        made += [check, msgspec.structs.replace(check, name="inodes", unit="inodes", needed=need.files)]
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
    options, layout = session.options, session.layout
    how: dict[str, Any] = session.site.workload_facts(session, targets)
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
        pause_ns=int(session.pause_s * 1e9),
        compressibility_percent=session.manifest.compressibility,
        nbytes=sum(layout.rank_nbytes(rank) for rank in session.ranks),
        nfiles=sum(layout.rank_nfiles(rank) for rank in session.ranks),
        **how,
    )


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
        settings=session.site.settings_record(targets),
        workload=workload(session, targets),
        world=world_record(world, session.layout.nranks),
        hosts=[report.host for report in reports],
        targets=targets,
        stores=session.site.stores([target.path for target in targets]),
        preflight=record.Preflight(
            checks=[check for report in reports for check in report.checks], mlperf_memory_rule=rule
        ),
        phases=[],
    )
