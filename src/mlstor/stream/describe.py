"""What a stream's record says of its surroundings: hosts, stores, every parameter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from mlstor import __version__
from mlstor.host_report import HostReport, host_record, usable_cores, world_record
from mlstor.mounts import device_of, mount_of
from mlstor.results import record
from mlstor.results.phase import PathTaken
from mlstor.results.stream_workload import StoreUsed, StreamWorkload
from mlstor.storage import posix
from mlstor.stream import token_run
from mlstor.stream.mix import LABELS, Kind
from mlstor.stream.sizes import Sizes
from mlstor.units import format_both

if TYPE_CHECKING:
    from mlstor.checkpoint.targets import Sharing
    from mlstor.storage.store import Store
    from mlstor.storage.transfers import Transfers
    from mlstor.stream.session import Session
    from mlstor.stream.workload import Workload

Said = Literal["shared", "per-node"]
_MEMORY_FS_TYPES = ("tmpfs", "ramfs")


def host_report(session: Session) -> HostReport | None:
    """What this process tells of its host, if it is the first there."""
    if session.world.local_rank != 0:
        return None
    host = session.host
    targets = []
    if session.group.sharing is not None:
        index = session.world.host_index
        targets = [target_record(path, index, session) for path in session.group.sharing.targets_by_host[index]]
    return HostReport(
        host=host_record(host),
        targets=targets,
        cores=usable_cores(host),
        client_memory_bytes=host.client_memory_bytes,
    )


def target_record(path: str, host_index: int, session: Session) -> record.Target:
    """A directory as the record keeps it."""
    assert session.group.sharing is not None
    return directory_record(path, host_index, session.group.sharing, session.options.sharing)


def directory_record(path: str, host_index: int, sharing: Sharing, said: Said | None) -> record.Target:
    """The same, with what was found of its sharing, and what the user has said of it."""
    from mlstor import _io

    mount = mount_of(path)
    device = device_of(mount) if mount else None
    found = _io.alignment(path)
    return record.Target(
        path=path,
        resolved_path=os.path.realpath(path),
        host=host_index,
        sharing=said or sharing.kind,
        sharing_how="asserted" if sharing.asserted else "found",
        fs_type=mount.fs_type if mount else found["fs_type"],
        mount_options=f"{mount.options},{mount.super_options}" if mount else "",
        device=" ".join(fact for fact in (mount.source if mount else "", device and device.model) if fact),
        memory_align_bytes=found["mem_align"],
        offset_align_bytes=found["offset_align"],
        is_memory=(mount.fs_type if mount else found["fs_type"]) in _MEMORY_FS_TYPES,
    )


def facts(store: Store) -> dict[str, int | bool | str | None]:
    """What a store says of itself, as plain values."""
    return {name: _plain(value) for name, value in store.describe().items()}


def _plain(value: Any) -> int | bool | str | None:
    if value is None or isinstance(value, int | bool | str):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | set) else str(value)


def target_names(store: Store) -> Sequence[str]:
    """Who may answer, by the `endpoint` of a completion; empty where there is but one."""
    access: Any = getattr(store, "access", None)
    servers: Sequence[str] = getattr(access, "servers", ())
    return servers


def no_cache_answers(session: Session) -> bool:
    """Whether no cache of this client can answer for what the run has not yet touched.

    Over HTTP there is none. The page cache of a directory's files may hold them from before, unless they are read
    directly, which shows with the first of them.
    """
    if session.options.epoch_scope == "client" and session.world.size > 1:
        return False  # another client may have read it just before
    return session.group.scheme != "file" or session.store.describe()["direct"] == "yes"


def paths_taken(session: Session, transfers: Transfers, count: int, nbytes: int) -> list[PathTaken]:
    """How the files of a directory were reached; nothing over HTTP."""
    if session.group.scheme != "file" or not count:
        return []
    engine: Any = getattr(transfers, "engine", None)
    found = session.store.describe()
    direct = found["direct"]
    return [
        PathTaken(
            backend=engine.backend if engine is not None else "",
            direct=direct,
            reason="" if direct == "yes" else found["reason"],
            fs_type=found["fs_type"],
            nfiles=count,
            nbytes=nbytes,
        )
    ]


def announcement(session: Session, workload: Workload) -> str:
    """What the run is about to do, in a sentence."""
    mix = ", ".join(f"{share:g} % {name}" for name, share in _mix(session).items() if share)
    text = f"run {session.run_id}: {mix} on {session.store.url}"
    objects = session.objects
    if objects is not None:
        total = objects.total_bytes
        size = "" if total is None else f", {format_both(total)}"
        text += f"; {len(objects):,} objects{size}"
        if session.source == "listing":
            text += f", listed in {session.listing_s:.1f} s"
    if workload.ranges is not None and workload.ranges.words is not None:
        text += f"; reads of {workload.ranges.words}"
    return text


def _mix(session: Session) -> dict[str, float]:
    options = session.options
    shares = {Kind.GET: options.get, Kind.PUT: options.put, Kind.HEAD: options.head, Kind.DELETE: options.delete}
    return {LABELS[kind]: share for kind, share in shares.items()}


def workload_record(session: Session, workload: Workload, stores: Sequence[StoreUsed]) -> StreamWorkload:
    """Every parameter of the run."""
    options, objects = session.options, session.objects
    sizes = session.sizes if session.writes else None
    ranges = workload.ranges
    parts = [store.facts.get("part_bytes") for store in stores]
    return StreamWorkload(
        urls=[store.url for store in stores],
        profile=options.profile,
        pattern=options.pattern,
        keep_handles=options.tokens is None or options.tokens.handles == "kept",
        p99_goal_ns=token_run.p99_goal_ns(session),
        client=str(stores[0].facts.get("client") or "mlstor"),
        ranks=session.world.size,
        seed=options.seed,
        order=options.order,
        epoch_scope=options.epoch_scope,
        uneven=options.uneven,
        catalog_count=0 if objects is None else len(objects),
        catalog_nbytes=None if objects is None else objects.total_bytes,
        catalog_source=session.source,  # type: ignore[arg-type]  # one of its words
        catalog_digest="" if objects is None else objects.digest,
        epochs=options.epochs,
        duration_ns=None if options.duration_s is None else int(options.duration_s * 1e9),
        limit_nbytes=session.limit_nbytes,
        limit_ops=options.ops,
        warmup_ns=int(options.warmup_s * 1e9),
        mix_ppm={name: round(share * 10_000) for name, share in _mix(session).items() if share},
        sizes=None if sizes is None else str(Sizes(sizes, options.seed)),
        min_nbytes=None if sizes is None else sizes.least_nbytes,
        max_nbytes=None if sizes is None else sizes.most_nbytes,
        compressibility_percent=session.written.compressibility if session.written is not None else 0,
        part_nbytes=next((part for part in parts if isinstance(part, int)), None),
        ranges=None if ranges is None else ranges.words,
        range_nbytes=None if ranges is None else ranges.nbytes,
        workers=session.workers,
        in_flight=session.in_flight,
        rate_milliops_per_s=None if session.rate is None else round(session.rate * 1000),
        verify=options.verify or "no",
        subdirectories=options.prefix_dirs,
        cleanup=options.cleanup,
        server_memory_bytes=session.server_memory[0],
        server_memory_source=session.server_memory[1],
    )


def stores(session: Session) -> list[StoreUsed]:
    """The store of this process, and how it was reached and read until now. Of a directory that was not read by its
    own transfers (token reads go by handles) the record's targets tell.
    """
    found = facts(session.store)
    if found.get("reason") == posix.NOTHING_READ:
        del found["direct"], found["reason"]
    return [StoreUsed(url=session.store.url, facts=found)]


def header(session: Session, workload: Workload, reports: list[HostReport], start_unix_ns: int) -> record.StreamRecord:
    """The record before its first phase."""
    world = session.world
    used = stores(session)
    return record.StreamRecord(
        run_id=session.results_id,
        status="partial",
        start_unix_ns=start_unix_ns,
        command=session.command,
        version=__version__,
        settings={
            name: record.setting(entry["value"], entry["source"].split()[0])
            for name, entry in session.settings.describe().items()
            if name == "results_dir" or session.group.scheme == "file"
        },
        workload=workload_record(session, workload, used),
        stores=used,
        world=world_record(world, world.size),
        hosts=[report.host for report in reports],
        targets=[target for report in reports for target in report.targets],
        preflight=record.Preflight(),
        phases=[],
    )
