"""Who takes part, at which size, on which server."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.child import run_child
from benchmarks.harness import Contender
from benchmarks.streams.job import StreamJob
from mlstor.errors import UsageError

KIB, MIB = 1 << 10, 1 << 20
SERVERS = ("s3", "ais", "files")
# Label: bytes of an object, objects to read, objects to write, operations at a time. What is written is written over
# again, but SeaweedFS keeps what was there until it is compacted: hence few of the large ones.
SIZES = {
    "4KiB": (4 * KIB, 2000, 1000, 8),
    "64KiB": (64 * KIB, 2000, 1000, 8),
    "1MiB": (MIB, 256, 200, 8),
    "8MiB": (8 * MIB, 48, 24, 8),
    "256MiB": (256 * MIB, 3, 2, 2),
}
NFILES, FILE_BYTES = 20_000, 64 * KIB
LOADER_WORKERS = (0, 1, 2, 4)


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
    servers : tuple of str
        Where it runs.
    via_proxy : bool
        Of AIStore.
    workers : int
        Of a DataLoader.
    """

    client: str
    op: str
    function: str
    servers: tuple[str, ...]
    via_proxy: bool = False
    workers: int = 0


ENTRIES = (
    Entry("mlstor", "get", "streams.ours:get", ("s3",)),
    Entry("s3torchconnector", "get", "streams.peers:s3torchconnector_get", ("s3",)),
    Entry("boto3", "get", "streams.peers:boto3_get", ("s3",)),
    Entry("obstore, threads", "get", "streams.peers:obstore_threads_get", ("s3",)),
    Entry("obstore, asyncio", "get", "streams.peers:obstore_asyncio_get", ("s3",)),
    Entry("mlstor", "put", "streams.ours:put", ("s3",)),
    Entry("s3torchconnector", "put", "streams.peers:s3torchconnector_put", ("s3",)),
    Entry("boto3", "put", "streams.peers:boto3_put", ("s3",)),
    Entry("obstore, threads", "put", "streams.peers:obstore_threads_put", ("s3",)),
    Entry("mlstor, direct", "get", "streams.ours:get_dropped", ("ais",)),
    Entry("mlstor, by the proxy", "get", "streams.ours:get_dropped", ("ais",), via_proxy=True),
    Entry("aisloader", "get", "streams.aisloader:get", ("ais",)),
    Entry("mlstor", "get", "streams.ours:get", ("files",)),
    Entry("fio", "get", "streams.files:fio", ("files",)),
    *(
        Entry(f"DataLoader, {workers} workers", "get", "streams.files:dataloader", ("files",), workers=workers)
        for workers in LOADER_WORKERS
    ),
)
# The self-check: the same client twice.
TWIN = " (again)"


def group_of(server: str, op: str, size: str) -> str:
    """The table that a contender stands in."""
    return f"{server} {op} {size}"


def key_of(server: str, op: str, size: str, client: str) -> str:
    """A contender's name in ``--only`` and in the JSON."""
    return f"{group_of(server, op, size)} {client}".replace(",", "").replace(" ", "-")


def sizes_of(server: str) -> list[str]:
    """The sizes that are measured on `server`."""
    return ["64KiB"] if server == "files" else list(SIZES)


def bind(
    server: str, url: str, endpoint: str, seconds: float, touch_bytes: int, seed: int, only: str
) -> list[Contender]:
    """The contenders of one server whose keys match `only`, comma-separated shell patterns.

    Raises
    ------
    UsageError
        If nothing matches.
    """
    patterns = [pattern.strip() for pattern in only.split(",")] if only else ["*"]
    bound = []
    for entry in ENTRIES:
        for size in sizes_of(server) if server in entry.servers else ():
            key = key_of(server, entry.op, size, entry.client)
            if not any(fnmatch.fnmatch(key, pattern) for pattern in patterns):
                continue
            job = job_of(server, entry.op, size, url, endpoint, seconds, touch_bytes, seed)
            job = replace(job, via_proxy=entry.via_proxy, threads=entry.workers)
            if entry.op == "put":
                job = replace(job, prefix=f"put-{size}-{entry.client.split(',')[0]}")
            run = partial(run_child, entry.function, job)
            bound.append(Contender(key, group_of(server, entry.op, size), entry.client, run))
    if not bound:
        raise UsageError(f"--only {only!r} matches no contender of --server {server}")
    return bound + twins(bound)


def twins(bound: Sequence[Contender]) -> list[Contender]:
    """One contender once more: the first of ours, whose ratio to itself shows how even the machine was."""
    first = next((one for one in bound if one.label.startswith("mlstor") and "64KiB" in one.group), bound[0])
    return [replace(first, key=first.key + "-again", label=first.label + TWIN, twin_of=first.key)]


def job_of(
    server: str, op: str, size: str, url: str, endpoint: str, seconds: float, touch_bytes: int, seed: int
) -> StreamJob:
    """What is done with objects of one size."""
    nbytes, nread, nwritten, in_flight = SIZES[size]
    if server == "files":
        # each file once, from an empty page cache
        return StreamJob(url, FILE_BYTES, touch_bytes, seed=seed, prefix=f"get-{size}", nobjects=NFILES, in_flight=64)
    return StreamJob(
        url,
        nbytes,
        touch_bytes,
        seconds=seconds if op == "get" else 0.0,
        seed=seed,
        endpoint=endpoint,
        prefix=f"get-{size}",
        nobjects=nread if op == "get" else nwritten,
        in_flight=in_flight,
    )


def fill(server: str, url: str, endpoint: str, sizes: Sequence[str], seed: int) -> None:
    """Write the objects that are read."""
    for size in sizes:
        job = job_of(server, "get", size, url, endpoint, 0.0, 0, seed)
        run_child("streams.ours:fill", replace(job, in_flight=min(job.in_flight, 8), seconds=0.0))
