"""What a copy's record says of its surroundings and of what it was asked to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mlstor import __version__
from mlstor.host_report import HostReport, host_record, usable_cores, world_record
from mlstor.results import record
from mlstor.results.stream_workload import CopyWorkload, StoreUsed
from mlstor.stream.describe import directory_record, facts
from mlstor.units import format_both

if TYPE_CHECKING:
    from mlstor.copy.session import CopySession, Side


def host_report(session: CopySession) -> HostReport | None:
    """What this process tells of its host, if it is the first there."""
    world = session.world
    if world.local_rank != 0:
        return None
    host = session.host
    found = []
    for side in (session.source, session.destination):
        if side.sharing is not None:
            found += [
                directory_record(path, world.host_index, side.sharing, None)
                for path in side.sharing.targets_by_host[world.host_index]
            ]
    return HostReport(
        host=host_record(host),
        targets=found,
        cores=usable_cores(host),
        client_memory_bytes=host.client_memory_bytes,
    )


def announcement(session: CopySession) -> str:
    """What the copy is about to do, in a sentence."""
    count, nbytes = len(session.objects), session.objects.total_bytes
    text = f"run {session.run_id}: {count:,} objects, {format_both(nbytes or 0)}, from {session.source.url}"
    text += f" to {session.destination.url}" + (", whole on each node" if session.options.per_node else "")
    text += f"; listed in {session.listing_s:.1f} s"
    there = int(session.there.sum())
    return text + (f"; {there:,} are there already" if there else "")


def workload_record(session: CopySession, workers: int) -> CopyWorkload:
    """Every parameter of the copy."""
    options = session.options
    verify: dict[str, Literal["no", "checksum", "bytes"]] = {"no": "no", "checksum": "checksum", "read": "bytes"}
    return CopyWorkload(
        source=session.source.url,
        destination=session.destination.url,
        ranks=session.world.size,
        count=len(session.objects),
        nbytes=session.objects.total_bytes or 0,
        per_node=options.per_node,
        resumed=bool(session.there.any()),
        verify=verify[options.verify],
        part_nbytes=session.part_bytes,
        workers=workers,
        in_flight=session.in_flight,
    )


def stores(session: CopySession) -> list[StoreUsed]:
    """Both sides, as they are now."""

    def used(side: Side, role: Literal["source", "destination"]) -> StoreUsed:
        return StoreUsed(url=side.url, role=role, facts=facts(side.store))

    return [used(session.source, "source"), used(session.destination, "destination")]


def header(session: CopySession, workers: int, reports: list[HostReport], start_unix_ns: int) -> record.StreamRecord:
    """The record before its phase."""
    world = session.world

    return record.StreamRecord(
        run_id=session.results_id,
        status="partial",
        start_unix_ns=start_unix_ns,
        command=session.command,
        version=__version__,
        settings={
            name: record.setting(entry["value"], entry["source"].split()[0])
            for name, entry in session.settings.describe().items()
            if name == "results_dir" or "file" in (session.source.scheme, session.destination.scheme)
        },
        workload=workload_record(session, workers),
        stores=stores(session),
        world=world_record(world, world.size),
        hosts=[report.host for report in reports],
        targets=[target for report in reports for target in report.targets],
        preflight=record.Preflight(),
        phases=[],
    )
