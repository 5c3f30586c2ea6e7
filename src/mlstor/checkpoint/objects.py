"""Prefixes of object stores as the place of a run's files: durable by the store's answer, and no page cache between."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from mlstor.agreement import agreed
from mlstor.checkpoint import honesty, objectdir, preflight, targets
from mlstor.checkpoint.object_carrier import Moved, ObjectCarrier, ObjectJob
from mlstor.checkpoint.phase import Chain
from mlstor.checkpoint.site import Op, Placed, Site
from mlstor.errors import UsageError
from mlstor.results import record
from mlstor.results.notes import plural
from mlstor.results.phase import Cached
from mlstor.results.stream_workload import StoreUsed
from mlstor.storage.store import digest_of, scheme_of
from mlstor.stream.group import mended_by_user, open_url, said
from mlstor.units import format_gib

if TYPE_CHECKING:
    from mlstor._io import Pattern
    from mlstor.checkpoint.options import Options
    from mlstor.checkpoint.phase import Outcome
    from mlstor.checkpoint.preflight import Need, Preflight
    from mlstor.checkpoint.profiles import ObjectHow, Profile
    from mlstor.checkpoint.rundir import Manifest
    from mlstor.checkpoint.session import Session
    from mlstor.checkpoint.targets import Sharing
    from mlstor.host import Host
    from mlstor.operations import Damage
    from mlstor.results.phase import PhaseReport
    from mlstor.settings import Settings
    from mlstor.storage.store import Store
    from mlstor.world import World

#: Questions for an object's size at once.
_ASK_THREADS = 8
#: What is read again at once to find damaged places.
_AGAIN_NBYTES = 8 << 20
# What a transfer holds that is not made of a pattern: receive buffers of libcurl and of the socket.
_RECEIVED_NBYTES = 1 << 20
_PROCESS_NBYTES = 128 << 20
#: The largest part that a store makes of a pattern, where it is not S3, which says itself.
_MOST_AIS_PART_NBYTES = 64 << 20

_UNKNOWN = "its own caches are unknown"
_WRITTEN = Cached(verdict="no", how=f"ended by the object store's answer to the last request; {_UNKNOWN}")
_READ = Cached(verdict="no", how=f"read over the network from the object store; {_UNKNOWN}")


class Objects(Site):
    """See `site.Site`. Targets are URLs without a slash at their end."""

    def __init__(self, options: Options, settings: Settings, profile: Profile) -> None:
        super().__init__(options, settings, profile)
        self._stores: dict[str, Store] = {}
        self._carrier: ObjectCarrier | None = None
        self._refuse_what_is_of_files()
        self.store_options = self._store_options()

    def _refuse_what_is_of_files(self) -> None:
        options = self.options
        url = options.paths[0]
        if options.sharing is not None:
            raise UsageError(f"--{options.sharing} is about directories; all hosts see the objects of {url}")
        given = {"--direct": options.direct, "--backend": options.backend}
        named = [option for option, value in given.items() if value is not None]
        if named:
            raise UsageError(f"{' and '.join(named)} are about files; leave them out for {url}")
        client = options.store_options.get("client", "mlstor")
        if options.profile == "mlperf" and client != "mlstor":
            raise UsageError(
                f"--profile mlperf says itself how objects are cut; -o client={client} cuts its own: choose"
            )

    def _store_options(self) -> dict[str, Any]:
        """What the user said, and the parts that the settings ask for: those of a read are parallel ranges."""
        made = {"split_reads": True, **self.options.store_options}
        block, scheme = self.settings.block_bytes, scheme_of(self.options.paths[0])
        if not self._takes_block or not block or "part_bytes" in made:
            return made
        made["part_bytes"] = block
        if scheme == "ais" and block > _MOST_AIS_PART_NBYTES:
            most = format_gib(_MOST_AIS_PART_NBYTES)
            raise UsageError(f"--block {block}: a part of an object in AIStore is at most {most} here; give less")
        if scheme == "s3":
            from mlstor.storage.s3_options import PART_THRESHOLD_BYTES

            made.setdefault("part_threshold_bytes", max(block, PART_THRESHOLD_BYTES))
        return made

    @property
    def _takes_block(self) -> bool:
        """Whether the setting is of parts too: one that is stored was found for files."""
        return not self.profile.fixed and not self.settings.source("block_bytes").startswith("profile")

    def store(self, target: str) -> Store:
        """The store of a target, opened when it is first needed.

        Raises
        ------
        UsageError
            If an option is not known to that kind of store, or the store can't be reached as it was said.
        """
        if target not in self._stores:
            self._stores[target] = open_url(target, self.store_options)
        return self._stores[target]

    # -- before the first byte --

    def target(self, *, rank: int, local_rank: int, hostname: str) -> str:
        found = targets.chosen(self.options.paths, rank=rank, local_rank=local_rank, hostname=hostname)
        return found.rstrip("/")

    def path(self, target: str, name: str) -> str:
        return f"{target}/{name}"

    def sharing(self, world: World, targets_: Sequence[str], run_id: str) -> Sharing:
        agreed(world, lambda: [self.store(target) for target in targets_])
        return targets.Sharing("shared" if world.nhosts > 1 else "one-host", False, targets.by_host(world, targets_))

    def check(self, needs: Sequence[Need], host: Host, memory_need_bytes: int) -> Preflight:
        memory = preflight.check([], host, memory_need_bytes=memory_need_bytes)
        return preflight.Preflight((), memory.memory_need_bytes, memory.memory_left_bytes, tuple(needs))

    def process_nbytes(self, nranks: int, largest_nbytes: int, run_nranks: int, own_nbytes: int) -> int:
        write, read = (self.profile.objects(self.settings, op, nranks, run_nranks) for op in ("write", "read"))
        part = write.part_nbytes or max((self._body_nbytes(store) for store in self._stores.values()), default=0)
        sent = write.workers * write.in_flight * min(part, largest_nbytes)
        return _PROCESS_NBYTES + max(sent, read.workers * read.in_flight * _RECEIVED_NBYTES)

    def _body_nbytes(self, store: Store) -> int:
        """Of one request at most: what is not above the threshold goes whole."""
        facts = store.describe()
        return max(int(facts.get("part_threshold_bytes", 0)), int(facts["part_bytes"]))

    def load(self, target: str, run_id: str) -> Manifest | None:
        return objectdir.load(self.store(target), run_id)

    def claim(self, target: str, manifest: Manifest) -> Manifest:
        return objectdir.claim(self.store(target), manifest)

    def save(self, target: str, manifest: Manifest) -> None:
        objectdir.save(self.store(target), manifest)

    def sizes(self, files: Sequence[Placed]) -> list[int | None]:
        for placed in files:
            self.store(placed.target)

        def ask(placed: Placed) -> int | None:
            try:
                return self._stores[placed.target].stat(placed.name).nbytes
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(_ASK_THREADS, thread_name_prefix="mlstor-stat") as pool:
            return mended_by_user(lambda: list(pool.map(ask, files)), self.options.paths[0])

    # -- a phase --

    def _how(self, session: Session, op: Op) -> ObjectHow:
        return self.profile.objects(self.settings, op, len(session.my_ranks), len(session.ranks))

    def carrier(self, session: Session, op: Op, checkpoint: int) -> ObjectCarrier:
        """One for both kinds of phases where the profile has as much under way."""
        how = self._how(session, op)
        wanted = {session.target_of(rank if op == "write" else session.source_rank(rank)) for rank in session.my_ranks}
        carrier = self._carrier
        if carrier is None or carrier.how[:2] != how[:2] or set(carrier.transfers) != wanted:
            self.end_phases()
            carrier = self._carrier = self._made(how, sorted(wanted))
        pattern: Pattern | None = None
        if op == "write" or session.verify:
            pattern = honesty.pattern(session.manifest, checkpoint, 0)  # each transfer names its file
        carrier.prepare(how, op, pattern)
        return carrier

    def _made(self, how: ObjectHow, wanted: Sequence[str]) -> ObjectCarrier:
        each = max(1, how.workers // max(1, len(wanted)))
        digests = {target: digest_of(self.store(target)) for target in wanted}
        untold = (self.store(target).describe().get("unknown", ()) for target in wanted)
        carrier = ObjectCarrier(how, each * len(wanted), digests, not any("requests" in names for names in untold))
        try:
            for target in wanted:
                carrier.transfers[target] = self.store(target).transfers(workers=each, in_flight=how.in_flight)
        except BaseException:
            carrier.close()
            raise
        return carrier

    def chain(self, session: Session, op: Op, rank: int, checkpoint: int, files: Sequence[Placed]) -> Chain:
        jobs = [ObjectJob(one.target, one.name, one.path, one.file.nbytes, one.file.file_id) for one in files]
        return Chain(rank, len(files), [[job] for job in jobs] if self._how(session, op).serial else [jobs])

    def make_directories(self, session: Session, checkpoint: int) -> None:
        """There are none."""

    def before_read(self, session: Session, checkpoint: int) -> None:
        """No cache of this client holds objects."""

    def cached(self, session: Session, report: PhaseReport, first_read: bool) -> Cached:
        return _WRITTEN if report.op == "write" else _READ

    def damage(self, session: Session, checkpoint: int, outcome: Outcome, limit: int) -> list[Damage]:
        """Read again in ranges, until as many places are found as were counted."""
        assert isinstance(outcome, Moved)
        job = outcome.job
        pattern = honesty.pattern(session.manifest, checkpoint, job.file_id)
        wanted = min(limit, outcome.damaged_blocks)
        found: list[Damage] = []
        try:
            for offset in range(0, job.nbytes, _AGAIN_NBYTES):
                data = self.store(job.target).read(
                    job.key, offset=offset, nbytes=min(_AGAIN_NBYTES, job.nbytes - offset)
                )
                assert isinstance(data, bytes)
                found += pattern.check(data, offset, wanted - len(found))
                if len(found) >= wanted:
                    return found
        except OSError as error:
            why = f"it could not be read again: {said(error, job.path)}"
        else:
            why = "what was read again is whole there, so that it was damaged on its way"
        blocks = f"{plural(outcome.damaged_blocks, 'damaged block')} of 4 KiB, of which {len(found)} can be told"
        session.notes.append(f"{job.path}: {blocks}: {why}")
        return found

    # -- for the record --

    def target_records(self, session: Session, found: Preflight) -> list[record.Target]:
        made = []
        for need in found.untold:
            facts = self.store(need.path).describe()
            made.append(
                record.Target(
                    path=need.path,
                    resolved_path=need.path,
                    host=session.world.host_index,
                    sharing=session.sharing.kind,
                    sharing_how="found",
                    fs_type=str(facts["scheme"]),
                    device=str(facts["endpoint"]),
                    block_bytes=self._how(session, "write").part_nbytes or int(facts["part_bytes"]),
                    direct="off",
                )
            )
        return made

    def stores(self, targets: Sequence[str]) -> list[StoreUsed]:
        from mlstor.stream.describe import facts

        return [StoreUsed(url=target, facts=facts(self.store(target))) for target in sorted(set(targets))]

    def workload_facts(self, session: Session, targets: Sequence[record.Target]) -> dict[str, object]:
        how = self._how(session, "write")
        return {
            "steps": ["put", "complete"],
            "direct": "off",
            "backend": "auto",
            "block_bytes": max(target.block_bytes or 0 for target in targets),
            "depth": how.in_flight,
            "workers": how.workers,
        }

    def settings_record(self, targets: Sequence[record.Target]) -> dict[str, record.Setting]:
        """Without those of files."""
        fixed = self.profile.fixed | {"backend", "direct"}
        if not self._takes_block:
            fixed |= {"block_bytes"}
        return {
            name: record.setting(entry["value"], entry["source"].split()[0])
            for name, entry in self.settings.describe().items()
            if name not in fixed
        }

    # -- after --

    def remove_checkpoint(self, manifest: Manifest, target: str, checkpoint: int) -> tuple[int, list[str]]:
        return objectdir.remove_checkpoint(manifest, self.store(target), checkpoint)

    def remove(self, manifest: Manifest, target: str) -> tuple[int, list[str]]:
        return objectdir.remove(manifest, self.store(target))

    def end_phases(self) -> None:
        carrier, self._carrier = self._carrier, None
        if carrier is not None:
            carrier.close()

    def cancel(self) -> None:
        if self._carrier is not None:
            self._carrier.cancel()

    def close(self) -> None:
        try:
            self.end_phases()
        finally:
            while self._stores:
                self._stores.popitem()[1].close()
