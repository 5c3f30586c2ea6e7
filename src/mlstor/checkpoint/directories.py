"""Directories as the place of a run's files: through the file engine, durable by fsync, honest by O_DIRECT."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mlstor import _io
from mlstor.checkpoint import honesty, preflight, rundir, targets
from mlstor.checkpoint.file_carrier import FileCarrier
from mlstor.checkpoint.phase import Chain
from mlstor.checkpoint.profiles import Job, step_names
from mlstor.checkpoint.site import Op, Placed, Site
from mlstor.errors import UsageError
from mlstor.mounts import Device, device_of, mount_of
from mlstor.operations import Step
from mlstor.results import record

if TYPE_CHECKING:
    from mlstor.checkpoint.options import Options
    from mlstor.checkpoint.phase import Outcome
    from mlstor.checkpoint.preflight import Need, Preflight
    from mlstor.checkpoint.profiles import Profile
    from mlstor.checkpoint.rundir import Manifest
    from mlstor.checkpoint.session import Session
    from mlstor.checkpoint.targets import Sharing
    from mlstor.host import Host
    from mlstor.operations import Damage
    from mlstor.results.phase import Cached, PhaseReport
    from mlstor.results.stream_workload import StoreUsed
    from mlstor.settings import Settings
    from mlstor.world import World


class Directories(Site):
    """See `site.Site`."""

    def __init__(self, options: Options, settings: Settings, profile: Profile) -> None:
        super().__init__(options, settings, profile)
        if options.store_options:
            raise UsageError("--endpoint and -o are for s3:// and ais://: leave them out for a directory")
        self._carriers: dict[Op, FileCarrier] = {}
        self._evicted: honesty.Evicted | None = None

    # -- before the first byte --

    def target(self, *, rank: int, local_rank: int, hostname: str) -> str:
        return targets.resolve(self.options.paths, rank=rank, local_rank=local_rank, hostname=hostname)

    def path(self, target: str, name: str) -> str:
        return os.path.join(target, name)

    def sharing(self, world: World, targets_: Sequence[str], run_id: str) -> Sharing:
        return targets.discover(
            world, targets_, run_id, asserted=self.options.sharing, read_only=not self.options.writes
        )

    def check(self, needs: Sequence[Need], host: Host, memory_need_bytes: int) -> Preflight:
        return preflight.check(
            needs,
            host,
            memory_need_bytes=memory_need_bytes,
            ephemeral_limit_bytes=self.settings.ephemeral_storage_limit_bytes,
            write=bool(self.options.writes),
        )

    def process_nbytes(self, nranks: int, largest_nbytes: int, run_nranks: int, own_nbytes: int) -> int:
        return self.profile.process_nbytes(self.settings, nranks, largest_nbytes)

    def load(self, target: str, run_id: str) -> Manifest | None:
        return rundir.load(target, run_id)

    def claim(self, target: str, manifest: Manifest) -> Manifest:
        return rundir.claim(target, manifest)

    def save(self, target: str, manifest: Manifest) -> None:
        rundir.save(target, manifest)

    def sizes(self, files: Sequence[Placed]) -> list[int | None]:
        return [_nbytes(placed.path) for placed in files]

    def how_of(self, target: str) -> Settings:
        """The settings that hold for the files of a target directory."""
        found = self.settings.for_target(target)
        return replace(found, direct=self.options.direct or self.profile.direct or found.direct)

    # -- a phase --

    def carrier(self, session: Session, op: Op, checkpoint: int) -> FileCarrier:
        """One engine for both kinds of phases where the profile wants the same."""
        wanted = self.profile.engine_settings(self.settings, op, len(session.my_ranks), session.largest_nbytes)
        for other, carrier in list(self._carriers.items()):
            if carrier.engine.settings == wanted:
                return carrier
            carrier.engine.close()
            del self._carriers[other]
        self._carriers[op] = FileCarrier(_io.Engine(wanted))
        return self._carriers[op]

    def chain(self, session: Session, op: Op, rank: int, checkpoint: int, files: Sequence[Placed]) -> Chain:
        jobs = []
        for placed in files:
            compared = op == "write" or session.verify
            pattern = honesty.pattern(session.manifest, checkpoint, placed.file.file_id) if compared else None
            jobs.append(Job(placed.path, placed.file.nbytes, pattern))
        make = self.profile.writes if op == "write" else self.profile.reads
        owner = rank if op == "write" else session.source_rank(rank)
        return Chain(rank, len(files), make(jobs, self.how_of(session.target_of(owner))))

    def make_directories(self, session: Session, checkpoint: int) -> None:
        durable = bool(self.profile.steps & Step.FSYNC_DIR)
        for target in sorted({session.target_of(rank) for rank in session.my_ranks}):
            rundir.make_checkpoint_dir(target, session.run_id, session.layout.shape.name, checkpoint, durable)

    def before_read(self, session: Session, checkpoint: int) -> None:
        self._evicted = honesty.evict(session, checkpoint) if self.options.evict else None

    def cached(self, session: Session, report: PhaseReport, first_read: bool) -> Cached:
        if report.op == "write":
            return honesty.WRITTEN
        read = {session.target_of(session.source_rank(rank)) for rank in session.my_ranks}
        in_memory = any(map(preflight.is_memory, read))
        return honesty.cached(session, report.paths, self._evicted, first_read, in_memory)

    def damage(self, session: Session, checkpoint: int, outcome: Outcome, limit: int) -> list[Damage]:
        found: list[Damage] = outcome.damage  # type: ignore[attr-defined]  # of the engine's results
        return found[:limit]

    # -- for the record --

    def target_records(self, session: Session, found: Preflight) -> list[record.Target]:
        return [self._target(path, session, room.is_memory) for room in found.rooms for path in room.paths]

    def _target(self, path: str, session: Session, is_memory: bool) -> record.Target:
        mount = mount_of(path)
        device = device_of(mount) if mount else None
        found = _io.alignment(path)
        how = self.how_of(path)
        return record.Target(
            path=path,
            resolved_path=os.path.realpath(path),
            host=session.world.host_index,
            sharing=session.options.sharing or session.sharing.kind,
            sharing_how="asserted" if session.sharing.asserted else "found",
            fs_type=mount.fs_type if mount else found["fs_type"],
            mount_options=f"{mount.options},{mount.super_options}" if mount else "",
            device=_device_text(mount.source if mount else "", device),
            memory_align_bytes=found["mem_align"],
            offset_align_bytes=found["offset_align"],
            is_memory=is_memory,
            block_bytes=self.profile.block_nbytes(how, found["st_blksize"]),
            direct=how.direct,  # type: ignore[arg-type]  # the settings' words are the record's
        )

    def stores(self, targets: Sequence[str]) -> list[StoreUsed]:
        return []

    def workload_facts(self, session: Session, targets: Sequence[record.Target]) -> dict[str, object]:
        engine = self.profile.engine_settings(self.settings, "write", len(session.my_ranks), session.largest_nbytes)
        return {
            "steps": step_names(self.profile.steps),
            "direct": targets[0].direct,
            "backend": engine.backend,
            "block_bytes": max(target.block_bytes or 0 for target in targets),
            "depth": engine.depth_count(),
            "workers": engine.worker_count(),
        }

    def settings_record(self, targets: Sequence[record.Target]) -> dict[str, record.Setting]:
        """One target's values are the run's."""
        found = {self.settings.for_target(target.path) for target in targets}
        fixed = self.profile.fixed
        if self.profile.direct is not None and self.options.direct is None:
            fixed |= {"direct"}
        return {
            name: record.setting(entry["value"], entry["source"].split()[0])
            for name, entry in (found.pop() if len(found) == 1 else self.settings).describe().items()
            if name not in fixed
        }

    # -- after --

    def remove_checkpoint(self, manifest: Manifest, target: str, checkpoint: int) -> tuple[int, list[str]]:
        return rundir.remove_checkpoint(manifest, target, checkpoint)

    def remove(self, manifest: Manifest, target: str) -> tuple[int, list[str]]:
        return rundir.remove(manifest, target)

    def end_phases(self) -> None:
        while self._carriers:
            self._carriers.popitem()[1].engine.close()

    def cancel(self) -> None:
        for carrier in self._carriers.values():
            carrier.engine.cancel()

    def close(self) -> None:
        """Nothing to undo: an engine ends with the last reference to it."""


def _nbytes(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def _device_text(source: str, device: Device | None) -> str:
    if device is None:
        return source
    facts = [device.name, device.model, device.level, device.backing_file and f"on {device.backing_file}"]
    return f"{source} ({', '.join(fact for fact in facts if fact)})"
