"""Who takes part, at which size, on which server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.child import run_child
from benchmarks.harness import Contender, Sample
from benchmarks.streams import catalogs, memory, small_files, tokens
from benchmarks.streams.job import StreamJob
from benchmarks.streams.parts import Part, Place, group_of, key_of, twin, wanted
from benchmarks.streams.servers import Server
from mlstor.errors import UsageError

KIB, MIB = 1 << 10, 1 << 20
SERVERS = ("s3", "ais", "files")
OPS = ("get", "put")


@dataclass(frozen=True)
class Size:
    """Objects of one size.

    Attributes
    ----------
    nbytes : int
        Of an object.
    nread, nwritten : int
        Objects to read, and names to write, over and over.
    in_flight : int
        Operations at a time.
    """

    nbytes: int
    nread: int
    nwritten: int
    in_flight: int = 8


SIZES = {
    "4KiB": Size(4 * KIB, 2000, 4000),
    "64KiB": Size(64 * KIB, 2000, 2000),
    "1MiB": Size(MIB, 256, 256),
    "8MiB": Size(8 * MIB, 48, 48),
    "256MiB": Size(256 * MIB, 3, 4, in_flight=2),
}
# Where goals are: the whole of --seconds, and the self-check's same client twice. Elsewhere a part of --seconds.
WITH_GOALS = ("s3 get 64KiB", "s3 get 8MiB", "s3 put 8MiB", "ais get 64KiB", "ais get 8MiB")
SHARE = 0.3
# Memory that is touched before a contender: four times what is in flight, within bounds.
LEAST_TOUCHED_BYTES = 64 * MIB
# What is written before the server is emptied is bounded: from this size on after each contender.
EMPTIED_BYTES = MIB


@dataclass(frozen=True)
class Entry:
    """A contender before it has a server.

    Attributes
    ----------
    client : str
        Its name in tables and keys.
    op : str
        ``"get"`` or ``"put"``.
    function : str
        ``module:function`` of the child.
    server : str
        Where it runs.
    via_proxy : bool
        Of AIStore.
    with_goals : bool
        Only where a goal compares with it: a second way to use a client.
    """

    client: str
    op: str
    function: str
    server: str
    via_proxy: bool = False
    with_goals: bool = False


ENTRIES = (
    Entry("mlstor", "get", "streams.ours:get", "s3"),
    Entry("s3torchconnector", "get", "streams.peers:s3torchconnector_get", "s3"),
    Entry("boto3", "get", "streams.peers:boto3_get", "s3"),
    Entry("obstore, threads", "get", "streams.peers:obstore_threads_get", "s3"),
    Entry("obstore, asyncio", "get", "streams.peers:obstore_asyncio_get", "s3", with_goals=True),
    Entry("mlstor", "put", "streams.ours:put", "s3"),
    Entry("s3torchconnector", "put", "streams.peers:s3torchconnector_put", "s3"),
    Entry("boto3", "put", "streams.peers:boto3_put", "s3"),
    Entry("obstore, threads", "put", "streams.peers:obstore_threads_put", "s3"),
    Entry("obstore, asyncio", "put", "streams.peers:obstore_asyncio_put", "s3", with_goals=True),
    Entry("mlstor, direct", "get", "streams.ours:get_dropped", "ais"),
    Entry("mlstor, by the proxy", "get", "streams.ours:get_dropped", "ais", via_proxy=True),
    Entry("aisloader", "get", "streams.aisloader:get", "ais"),
    Entry("mlstor, direct", "put", "streams.ours:put", "ais"),
    Entry("mlstor, by the proxy", "put", "streams.ours:put", "ais", via_proxy=True),
    Entry("aisloader", "put", "streams.aisloader:put", "ais"),
)
# Rows that are more than a client, an operation and a size.
PARTS: tuple[Part, ...] = (
    memory.PART,
    small_files.PART,
    catalogs.PART,
    tokens.PART,
)


@dataclass(frozen=True)
class Choice:
    """What of all contenders is wanted: shell patterns of keys, sizes and operations."""

    only: str = ""
    sizes: tuple[str, ...] = tuple(SIZES)
    ops: tuple[str, ...] = OPS

    def takes(self, key: str) -> bool:
        """Whether a contender that is no client of a server is wanted."""
        return wanted(key, self.only)


def chosen(server: str, choice: Choice) -> tuple[list[tuple[Entry, str]], list[Part]]:
    """Clients with the label of a size, and parts.

    Raises
    ------
    UsageError
        If a size is not known, or nothing is left.
    """
    unknown = [size for size in choice.sizes if size not in SIZES]
    if unknown:
        raise UsageError(f"--sizes {','.join(unknown)}: there are {', '.join(SIZES)}")
    clients = [
        (entry, size)
        for size in choice.sizes
        for entry in ENTRIES
        if entry.server == server and entry.op in choice.ops
        if not entry.with_goals or group_of(server, entry.op, size) in WITH_GOALS
        if choice.takes(key_of(server, entry.op, size, entry.client))
    ]
    clients.sort(key=lambda pair: OPS.index(pair[0].op))
    parts = [part for part in PARTS if any(map(choice.takes, part.keys(server)))]
    if not clients and not parts:
        raise UsageError(f"--only {choice.only!r} matches no contender of --server {server}")
    return clients, parts


def keys(server: str, clients: Sequence[tuple[Entry, str]], parts: Sequence[Part], choice: Choice) -> list[str]:
    """The keys of what was chosen, for ``--list``; twins are not among them."""
    found = [key_of(server, entry.op, size, entry.client) for entry, size in clients]
    return found + [key for part in parts for key in part.keys(server) if choice.takes(key)]


def to_fill(clients: Sequence[tuple[Entry, str]], parts: Sequence[Part]) -> list[str]:
    """Sizes of which objects are read."""
    read = {size for entry, size in clients if entry.op == "get"} | {size for part in parts for size in part.sizes}
    return [size for size in SIZES if size in read]


def bind(clients: Sequence[tuple[Entry, str]], server: Server, place: Place) -> list[Contender]:
    """The contenders that are clients, each group with one twice where a goal is a rate."""
    bound: list[Contender] = []
    for entry, size in clients:
        job = job_of(place, entry.op, size)
        job = replace(job, via_proxy=entry.via_proxy)
        if entry.op == "put":
            job = replace(job, path=server.put_url, prefix=f"put-{size}-{entry.client.split(',')[0]}")

        def run(
            function: str = entry.function, job: StreamJob = job, writes_much: bool = is_emptied(entry.op, size)
        ) -> Sample:
            sample = run_child(function, job)
            if writes_much:
                server.empty()
            return sample

        group = group_of(place.server, entry.op, size)
        bound.append(Contender(key_of(place.server, entry.op, size, entry.client), group, entry.client, run))
    firsts = {one.group: one for one in reversed(bound) if one.label.startswith("mlstor")}
    return bound + [twin(one) for group, one in reversed(firsts.items()) if group in WITH_GOALS]


def is_emptied(op: str, size: str) -> bool:
    """Whether the server is emptied after a contender."""
    return op == "put" and SIZES[size].nbytes >= EMPTIED_BYTES


def job_of(place: Place, op: str, size: str) -> StreamJob:
    """What is done with objects of one size."""
    about = SIZES[size]
    return StreamJob(
        place.url,
        about.nbytes,
        min(place.touch_bytes, max(LEAST_TOUCHED_BYTES, 4 * about.in_flight * about.nbytes)),
        seconds=place.seconds * (1 if group_of(place.server, op, size) in WITH_GOALS else SHARE),
        seed=place.seed,
        endpoint=place.endpoint,
        prefix=f"get-{size}",
        nobjects=about.nread if op == "get" else about.nwritten,
        in_flight=about.in_flight,
    )


def fill(place: Place, sizes: Sequence[str]) -> None:
    """Write the objects that are read."""
    for size in sizes:
        job = small_files.job_of(place) if place.server == "files" else job_of(place, "get", size)
        run_child("streams.ours:fill", replace(job, in_flight=min(job.in_flight, 8), touch_bytes=0, seconds=0.0))
