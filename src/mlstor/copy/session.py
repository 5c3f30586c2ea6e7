"""A copy before its first transfer: both sides, the objects, and whose they are. Every process makes one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from mlstor.agreement import agreed, together
from mlstor.checkpoint import targets
from mlstor.copy.options import LEAST_PART_BYTES
from mlstor.copy.resume import Proven, already_there, forget
from mlstor.errors import UsageError
from mlstor.host import Host, describe
from mlstor.runlog import check_results_dir
from mlstor.settings import Settings
from mlstor.storage.store import open_store, scheme_of
from mlstor.storage.transfers import WHOLE, Digest
from mlstor.stream import listing
from mlstor.stream.group import said
from mlstor.stream.session import new_run_id
from mlstor.units import format_both

if TYPE_CHECKING:
    from mlstor.copy.options import Options
    from mlstor.storage.store import Store
    from mlstor.stream.catalog import Objects
    from mlstor.stream.draws import U64
    from mlstor.world import World

T = TypeVar("T")
_DIGESTS = {"s3": Digest.CRC32C, "ais": Digest.XXH64, "file": Digest.NONE}
#: Parts of an upload at most, of S3 (10,000) and AIStore (9,999); part sizes are multiples of a MiB from there on.
_MOST_PARTS = 9_999
_MIB = 1 << 20


class Side(NamedTuple):
    """One end of the copy.

    Attributes
    ----------
    url : str
        A directory's is its absolute path.
    scheme : str
    store : Store
    digest : Digest
        The checksum that the store has of whole objects; NONE if it has none.
    sharing : targets.Sharing or None
        Of a directory.
    """

    url: str
    scheme: str
    store: Store
    digest: Digest
    sharing: targets.Sharing | None


class CopySession:
    """What a copy is, as one of its processes sees it.

    Attributes
    ----------
    source, destination : Side
    objects : Objects
        All of the source.
    there : array of bool
        Of each object whether the destination has one of its name and size.
    part_bytes : int
        Larger objects are copied in parts of it.
    share : tuple of int
        This process's number among those that share the objects, and how many these are.
    """

    def __init__(self, world: World, options: Options, command: list[str]) -> None:
        self.world, self.options, self.command = world, options, command
        self.settings = self.agreed(lambda: Settings.resolve(results_dir=options.results_dir))
        self.host: Host = describe()
        self.run_id = together(world, new_run_id)
        check_results_dir(world, self.settings.results_dir)
        self.results_id = together(world, self._free_results_id)
        self.share = (world.local_rank, world.local_size) if options.per_node else (world.rank, world.size)
        self.workers, self.in_flight = options.workers or 0, options.in_flight or 8
        self._check_urls()
        self.source = self._side(options.source, options.source_options, writes=False)
        self.destination = self._side(options.destination, options.destination_options, writes=True)
        start_s = time.monotonic()
        self.objects: Objects = listing.shared(self.source.store, world, prefix=options.prefix).catalog
        self.listing_s = time.monotonic() - start_s
        self.part_bytes = self.agreed(self._part_bytes)
        if options.overwrite:
            if world.local_rank == 0:
                forget(self.settings.results_dir, self._key())
            world.barrier("journal")
        self.proven = Proven(self.settings.results_dir, self._key(), world.rank)
        self.there = self._already_there()

    def agreed(self, step: Callable[[], T], took_part: bool = True) -> T:
        """The result of a step that every process takes, see `agreement.agreed`."""
        return agreed(self.world, step, took_part)

    @property
    def leads(self) -> bool:
        """Whether this process is the first of those that share the objects."""
        return self.share[0] == 0

    def mine(self, chosen: Any) -> U64:
        """This process's share of the objects of which `chosen` is true."""
        number, count = self.share
        dealt: U64 = np.flatnonzero(chosen)[number::count].astype(np.uint64)
        return dealt

    # -- the sides --

    def _check_urls(self) -> None:
        def check() -> None:
            source, destination = _place(self.options.source), _place(self.options.destination)
            one, other = source.rstrip("/") + "/", destination.rstrip("/") + "/"
            if one.startswith(other) or other.startswith(one):
                same = self.options.source_options == self.options.destination_options
                if scheme_of(source) == "file" or same:
                    raise UsageError(f"{destination} and {source} lie within one another: copy to another place")

        self.agreed(check)

    def _side(self, url: str, store_options: dict[str, Any], writes: bool) -> Side:
        scheme = scheme_of(url)
        sharing = None
        if scheme == "file":
            url = _place(url)
            self.agreed(lambda: self._check_directory(url, writes))
            sharing = targets.discover(
                self.world,
                [url],
                self.run_id,
                asserted="per-node" if writes and self.options.per_node and self.world.nhosts > 1 else None,
                read_only=not writes,
            )
            self.agreed(lambda: self._check_sharing(url, sharing, writes))

        def opened() -> Side:
            try:
                store = open_store(url, **store_options)
            except OSError as error:
                raise UsageError(said(error, url)) from None
            of_store: Callable[[], Digest] | None = getattr(store, "digest", None)
            try:
                digest = of_store() if of_store is not None else _DIGESTS[scheme]
            except OSError as error:
                raise UsageError(said(error, url)) from None
            return Side(url, scheme, store, digest, sharing)

        return self.agreed(opened)

    def _check_directory(self, path: str, writes: bool) -> None:
        if writes and self.world.local_rank == 0:
            try:
                os.makedirs(path, exist_ok=True)
            except OSError as error:
                raise UsageError(f"the directory {path} can't be made: {error.strerror}") from None
        if not writes or self.world.local_rank == 0:
            targets.check_directory(path, write=writes)

    def _check_sharing(self, path: str, sharing: targets.Sharing, writes: bool) -> None:
        if sharing.kind != "per-node":
            return
        if not writes:
            raise UsageError(
                f"hosts don't see one another's files in {path}: start the ranks on the host that has them"
            )
        if not self.options.per_node:
            raise UsageError(
                f"hosts don't see one another's files in {path}: give --per-node for a copy on each of them"
            )

    def _part_bytes(self) -> int:
        """The part as asked for, larger where an object would have too many."""
        options = self.options
        sizes = getattr(self.objects, "sizes", None)
        largest = int(sizes.max()) if sizes is not None and len(sizes) else 0
        if largest == WHOLE:
            raise UsageError(f"{self.source.url} does not say how large its objects are")
        if self.destination.scheme == "file" or largest <= options.part_bytes * _MOST_PARTS:
            return options.part_bytes
        part_bytes = max(LEAST_PART_BYTES, -(-largest // (_MOST_PARTS * _MIB)) * _MIB)
        if options.memory_bytes < 2 * part_bytes:
            raise UsageError(
                f"an object of {format_both(largest)} needs parts of {format_both(part_bytes)}, and --memory has no "
                f"room for two: give --memory {-(-4 * part_bytes // _MIB)}MiB"
            )
        return part_bytes

    # -- what is there --

    def _key(self) -> str:
        """What a resumed copy has in common with the one that was interrupted."""
        host = self.world.hostname if self.options.per_node else ""
        facts = [[side.url, side.store.describe().get("endpoint")] for side in (self.source, self.destination)]
        return json.dumps([facts, host])

    def _already_there(self) -> Any:
        """Looked up by the first process of those that share the objects, for all of them."""
        count = len(self.objects)
        if self.options.overwrite:
            return np.zeros(count, bool)

        def look() -> bytes:
            if not self.leads:
                return b""
            try:
                found = already_there(self.objects, self.destination.store, self.options.prefix)
            except OSError as error:
                raise UsageError(said(error, self.destination.url)) from None
            return np.packbits(found).tobytes()

        told = self.world.allgather(self.agreed(look, self.leads))
        leader = self.world.host_of_rank.index(self.world.host_index) if self.options.per_node else 0
        return np.unpackbits(np.frombuffer(told[leader], np.uint8), count=count).astype(bool)

    def _free_results_id(self) -> str:
        taken = os.path.join(self.settings.results_dir, self.run_id)
        return self.run_id if not os.path.exists(taken) else new_run_id()


def _place(url: str) -> str:
    """A URL, or the absolute path of a directory, links resolved."""
    if scheme_of(url) != "file":
        return url
    from mlstor.storage.posix import path_of

    return os.path.realpath(path_of(url))
