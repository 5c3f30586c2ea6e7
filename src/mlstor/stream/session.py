"""A stream before its first operation: which objects, whose they are, who does what. Every process makes one."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from mlstor.agreement import agreed, together
from mlstor.errors import UsageError
from mlstor.host import Host, describe
from mlstor.runlog import check_results_dir
from mlstor.settings import Settings
from mlstor.storage.transfers import Digest
from mlstor.stream import group as groups, listing, manifest as manifests, tokens
from mlstor.stream.manifest import Manifest
from mlstor.stream.profiles import under_way
from mlstor.stream.sizes import Sizes, SizeSpec, parse_sizes

if TYPE_CHECKING:
    from mlstor.storage.store import Store
    from mlstor.stream.catalog import Objects
    from mlstor.stream.options import Options
    from mlstor.world import World

T = TypeVar("T")
_DIGESTS = {"s3": Digest.CRC32C, "ais": Digest.XXH64, "file": Digest.NONE}
# Over HTTP, where the user says nothing: as many transfers hide the latency of a server, few cores can receive more.
_MOST_WORKERS, _IN_FLIGHT = 4, 8
_SOURCES = {"listed": "listing", "list file": "file", "catalog": "file"}


class Session:
    """What a stream is, as one of its processes sees it.

    Attributes
    ----------
    group : groups.Group
        Who shares the objects with this process.
    store : Store
    written : Manifest or None
        Of what this run writes.
    read_of : Manifest or None
        Of the run whose objects are read; of this one after a fill.
    objects : Objects or None
        What is read, asked for or deleted; None if there are only writes. Set by `begin`, and by a fill.
    source : str
        Where their names come from, in the record's words.
    server_memory : tuple
        Bytes of all servers, None if that is not known, and who said so.
    """

    def __init__(self, world: World, options: Options, command: list[str]) -> None:
        self.world, self.options, self.command = world, options, command
        self.settings = self.agreed(lambda: Settings.resolve(results_dir=options.results_dir))
        self.sizes: SizeSpec = self.agreed(lambda: parse_sizes(options.size, options.min_nbytes, options.max_nbytes))
        self.writes = options.put > 0 or options.fill is not None
        self.run_id = options.run_id or together(world, new_run_id)
        self.host: Host = describe()
        check_results_dir(world, self.settings.results_dir)
        self.group = groups.find(world, options, self.run_id, self.writes)
        self.store: Store = self.agreed(lambda: groups.open_it(self.group, options))
        self.workers, self.in_flight = self._under_way()
        #: operations per second of all ranks; None in a closed loop
        self.rate = self.agreed(lambda: tokens.rate_of_all(options, world.nhosts))
        self.server_memory = self._server_memory()
        self.limit_nbytes: int | None = self.agreed(self._limit_nbytes)
        self.results_id = together(world, self._free_results_id)
        self.written: Manifest | None = None
        self.read_of: Manifest | None = None
        self.objects: Objects | None = None
        self.source = "none"
        self.listing_s = 0.0
        self.claimed = False

    def agreed(self, step: Callable[[], T], took_part: bool = True) -> T:
        """The result of a step that every process takes, see `agreement.agreed`."""
        return agreed(self.world, step, took_part)

    def begin(self) -> None:
        """Find what is to be read, and claim a directory for what is to be written; from here on an interrupted run
        leaves something behind.
        """
        options = self.options
        if options.verify == "checksum" and self.agreed(lambda: self.digest) is Digest.NONE:
            raise UsageError(
                f"--verify checksum: {self.store.url} keeps no checksums to compare with; "
                "give --verify for what a run of mlstor wrote, or leave it out"
            )
        if options.objects_of is not None:
            self.read_of = self.agreed(self._written_before)
            self.objects, self.source = self.read_of.objects(self.read_of.whole), "synthetic"
            if options.delete:
                self.read_of.thinned = True
                self.agreed(self._save_thinned)
        elif options.fill is None and (options.get or options.head):
            self._list()
        if self.writes:
            self._claim()
        if options.fill is not None and self.written is not None:
            self.read_of, self.source = self.written, "synthetic"
            self.objects = self.written.objects(sum(self._of_group(options.fill)))

    def dealt(self, total: int) -> int:
        """This rank's part of a total of all ranks."""
        return total // self.world.size + (self.world.rank < total % self.world.size)

    def _of_group(self, total: int) -> list[int]:
        """The parts of all ranks of this group, in the group's order."""
        mine = json.dumps([self.group.url, self.world.host_index if self.group.per_node else 0, self.dealt(total)])
        said = [json.loads(text) for text in self.world.allgather(mine.encode())]
        own = json.loads(mine)[:2]
        return [count for *key, count in said if key == own]

    @property
    def digest(self) -> Digest:
        """The checksum that the store takes and gives."""
        of_store: Callable[[], Digest] | None = getattr(self.store, "digest", None)
        return of_store() if of_store is not None else _DIGESTS[self.group.scheme]

    # -- what is read --

    def _list(self) -> None:
        options, world = self.options, self.world
        store: Any = manifests.WithoutMarks(self.store)
        if self.group.alone or self.group.per_node:
            found = listing.shared(
                store, world, list_file=options.list_file, catalog=options.catalog, per_node=self.group.per_node
            )
            self.objects, self.source, self.listing_s = found.catalog, _SOURCES[found.source], found.seconds
            return

        def mine() -> Objects:
            if options.list_file is not None or options.catalog is not None:
                raise UsageError("--list-file and --catalog name the objects of one URL: give one")
            return listing.private(store)

        start_s = time.monotonic()
        self.objects, self.source = self.agreed(mine), "listing"
        self.listing_s = time.monotonic() - start_s

    def _written_before(self) -> Manifest:
        assert self.options.objects_of is not None
        found = manifests.wanted(self.store, self.options.objects_of)
        if not found.whole:
            raise UsageError(
                f"run {found.run_id} has not written its objects to an end: read what is there without --objects-of"
            )
        if found.thinned:
            url = self.store.url.rstrip("/")
            advice = (
                f"`mlstor stream --clean {found.run_id} {url}` removes the rest"
                if self.options.delete
                else f"read {url}/{found.run_id} without --objects-of, and without --verify pattern"
            )
            raise UsageError(
                f"objects of run {found.run_id} were deleted, and only a listing tells which are left: {advice}"
            )
        return found

    def _save_thinned(self) -> None:
        found = self.read_of
        if found is not None and self.group.leads:
            groups.mended_by_user(lambda: manifests.save_again(self.store, found), self.store.url)

    # -- what is written --

    def _claim(self) -> None:
        key = int(together(self.world, lambda: str(manifests.new_key())))
        claimed = Manifest(
            run_id=self.run_id,
            run_key=key,
            seed=self.options.seed,
            sizes=self.sizes,
            dirs=self.options.prefix_dirs,
            compressibility=self.options.compressibility,
            ended=False,
            thinned=self.options.delete > 0,
        )

        def claim() -> None:
            if not self.group.leads:
                return
            if manifests.load(self.store, self.run_id) is not None:
                raise UsageError(
                    f"run {self.run_id} has written to {self.store.url} before: choose another --run-id, or remove "
                    f"what it wrote with `mlstor stream --clean {self.run_id} {self.store.url}`"
                )
            latest = manifests.load(self.store, manifests.LAST)
            claimed.before = None if latest is None else latest.run_id
            groups.mended_by_user(lambda: manifests.save(self.store, claimed), self.store.url)

        self.claimed = True
        try:
            self.agreed(claim, self.group.leads)
        except UsageError:
            self.claimed = False
            raise
        self.written = claimed

    # -- how much --

    def _under_way(self) -> tuple[int, int]:
        """Worker threads, and transfers under way in each."""
        workers, in_flight = under_way(self.options, self.world.rank, self.world.size)
        world = self.world
        in_flight = in_flight or tokens.threads_of(self.options, world.local_rank, world.local_size) or 0
        if self.group.scheme == "file":
            from mlstor.storage import posix

            return workers or self.settings.worker_count(), in_flight or posix.IN_FLIGHT
        return workers or min(_MOST_WORKERS, len(os.sched_getaffinity(0))), in_flight or _IN_FLIGHT

    def _server_memory(self) -> tuple[int | None, str]:
        if self.options.server_memory_bytes is not None:
            return self.options.server_memory_bytes, "--server-memory"
        ask: Callable[[], int | None] | None = getattr(self.store, "memory_bytes", None)
        nbytes: int | None = None
        if ask is not None:

            def told() -> str:
                try:
                    return f"{ask() or 0} "
                except OSError as error:  # only administrators may ask, for example: then it isn't known
                    return f"0 the cluster does not say: {error.strerror or error}"

            text, _, refusal = together(self.world, told).partition(" ")
            nbytes = int(text) or None
            if nbytes is None:
                return None, refusal
        return nbytes, "" if nbytes is None else "the cluster's own sysinfo"

    def _limit_nbytes(self) -> int | None:
        times = self.options.server_memory_times
        if times is None:
            return self.options.limit_nbytes
        if self.server_memory[0] is None:
            raise UsageError(
                f"--bytes {times:g}x-server-memory: the servers don't say how much they have; give --server-memory SIZE"
            )
        return int(times * self.server_memory[0])

    def writes_for(self, nbytes: int) -> int:
        """Objects of all ranks that have `nbytes` bytes or more together."""
        return Sizes(self.sizes, self.options.seed).count_of(nbytes)

    def _free_results_id(self) -> str:
        """The run id, or with the time where a record or journal of it exists."""
        taken = os.path.join(self.settings.results_dir, self.run_id)
        return self.run_id if not os.path.exists(taken) else f"{self.run_id}-{new_run_id()}"


def new_run_id() -> str:
    """A name that no other run has."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
