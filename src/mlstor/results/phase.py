"""One phase of a run: what each process reports of it and what the record keeps. Object streams' own parts are in
`stream`. Integers only. Times ending in ``_ns`` are relative to the moment the process left the phase's barrier, on
its monotonic clock; those ending in ``_unix_ns`` are wall clock.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]

SCHEME: Literal["log-linear-64x29"] = "log-linear-64x29"
MAX_DAMAGE = 64
"""Damaged places described in a phase; further ones are counted in `Verification.damage_dropped`."""

Op = Literal["write", "read"]
CachedWord = Literal["no", "yes", "unknown"]


class Histogram(msgspec.Struct, kw_only=True):
    """Durations of one kind of operation. `buckets` holds [bucket, count] pairs in ascending order, without
    empty ones; `scheme` names the buckets, and histograms of one scheme are added bucket by bucket. min_ns
    and max_ns are exact and 0 when count is 0. A bucket b below 128 is the duration b ns; else s = b // 64 -
    1 and its durations begin at (b - 64 s) * 2^s ns; the last of the 1856 is open-ended.
    """

    scheme: Literal["log-linear-64x29"] = SCHEME
    count: Count = 0
    sum_ns: Count = 0
    min_ns: Count = 0
    max_ns: Count = 0
    buckets: list[tuple[Count, Count]] = []


class PathTaken(msgspec.Struct, kw_only=True):
    """How `nfiles` files with `nbytes` bytes were reached: by which backend, and whether direct I/O was
    confirmed (yes), not used (no) or used without proof (unverified); `reason` says why it was not the first
    choice, empty if it was.
    """

    backend: str
    direct: Literal["yes", "no", "unverified"]
    reason: str = ""
    fs_type: str = ""
    nfiles: Count = 0
    nbytes: Count = 0


class Cached(msgspec.Struct, kw_only=True):
    """Whether the client's page cache may have answered for the storage, how that is known, and how many of
    the looked_at_bytes were found in the page cache.
    """

    verdict: CachedWord = "unknown"
    how: str = ""
    resident_bytes: Count = 0
    looked_at_bytes: Count = 0


class Damage(msgspec.Struct, kw_only=True):
    """`nbytes` wrong bytes at `offset` of `file`, as rank `rank` read them, and what lies there instead
    (null: not known).
    """

    rank: Count
    file: str
    offset: Count
    nbytes: Count
    kind: Literal["zeroed", "other-run", "other-checkpoint", "other-file", "other-offset", "corrupt", "no-stamp"]
    found_run: str | None = None
    found_checkpoint: Count | None = None
    found_file: str | None = None
    found_offset: Count | None = None


class Verification(msgspec.Struct, kw_only=True):
    """Bytes compared with what had been written, damaged 4 KiB blocks among them, and the first 64 damaged
    places; 0 verified bytes mean that nothing was compared.
    """

    verified_nbytes: Count = 0
    damaged_blocks: Count = 0
    damage: list[Damage] = []
    damage_dropped: Count = 0


class RankFigures(msgspec.Struct, array_like=True):
    """What one logical rank did in a phase: when it started, when its first file was durable (or read), when
    all was; a rank without files has start_ns three times.
    """

    rank: Count
    start_ns: Count
    first_done_ns: Count
    end_ns: Count
    nbytes: Count
    nfiles: Count


class RankColumns(msgspec.Struct, kw_only=True):
    """Columns of equal length in the order of `rank`: which process on which host (index into `hosts`) did
    the rank's work, start, first file durable (or read), last file durable (or read), bytes and files.
    """

    rank: list[Count] = []
    process: list[Count] = []
    host: list[Count] = []
    start_ns: list[Count] = []
    first_done_ns: list[Count] = []
    end_ns: list[Count] = []
    nbytes: list[Count] = []
    nfiles: list[Count] = []


class ProcessColumns(msgspec.Struct, kw_only=True):
    """Columns of equal length in the order of `process`: CPU time of the phase, peak resident memory of the
    process so far, time its workers were busy or waited for the storage (summed over workers), workers, cores
    it may run on, and barrier_skew_ns: its wall clock at the barrier less the phase's barrier_unix_ns (may be
    negative; holds the hosts' clock differences too).
    """

    process: list[Count] = []
    cpu_user_ns: list[Count] = []
    cpu_system_ns: list[Count] = []
    peak_rss_bytes: list[Count] = []
    worker_busy_ns: list[Count] = []
    worker_wait_ns: list[Count] = []
    workers: list[Count] = []
    cores_allowed: list[Count] = []
    barrier_skew_ns: list[int] = []


class Unfinished(msgspec.Struct, kw_only=True):
    """Columns of the processes that had not finished the phase when the run ended: how far each had come."""

    process: list[Count] = []
    host: list[Count] = []
    elapsed_ns: list[Count] = []
    nbytes: list[Count] = []


class Series(msgspec.Struct, kw_only=True):
    """Bytes done per interval: nbytes[i][j] in interval j (from j * interval_ns) on host host[i]; rows have
    one length.
    """

    interval_ns: Count = 0
    host: list[Count] = []
    nbytes: list[list[Count]] = []


class Client(msgspec.Struct, kw_only=True):
    """Whether the client and not the storage was the limit, by `rule`; `reason` has the figures.
    memory_traffic_bytes and nic_bytes (all hosts together) are "unknown" where the machine doesn't show them,
    and then no part of the verdict.
    """

    limited: Literal["yes", "no", "unknown"]
    reason: str
    rule: str
    memory_traffic_bytes: Count | Literal["unknown"] = "unknown"
    nic_bytes: Count | Literal["unknown"] = "unknown"


class Requests(msgspec.Struct, kw_only=True):
    """What object stores were asked in a phase: requests, how many of these were sent again (`retries`), connections
    that were made, and by what went wrong first the objects of which something was sent again (`retried_by`).
    """

    sent: Count = 0
    retries: Count = 0
    retried_by: dict[str, Count] = {}
    connections: Count = 0


class AnyPhase(msgspec.Struct, kw_only=True):
    """What every phase of a record has, from a barrier to the slowest rank's end (the largest end_ns). Phases are
    numbered from 0 in the order in which they ran. barrier_unix_ns is the wall clock of the lowest process. `complete`
    is false when a process is in `unfinished` or missing, or did not come to the phase's end.
    """

    number: Count
    complete: bool = True
    barrier_unix_ns: Count
    nbytes: Count
    ranks: RankColumns
    processes: ProcessColumns
    unfinished: Unfinished
    series: Series
    paths: list[PathTaken]
    cached: Cached
    verification: Verification
    client: Client


class Phase(AnyPhase, kw_only=True):
    """All ranks' work on one checkpoint; its end is durable, and a checkpoint may be read several times. Histograms are
    by operation name. `requests` is null where the files are not in an object store.
    """

    op: Op
    checkpoint: Count
    histograms: dict[str, Histogram]
    requests: Requests | None = None


class ProcessReport(msgspec.Struct, kw_only=True, tag_field="kind"):
    """What one process reports of any phase. `host` is its index into the record's hosts; memory_traffic_bytes and
    nic_bytes are the whole host's during the phase, given by one process of each host and None in the others and where
    unknown. `complete` is false where the phase was ended early, or is still under way.
    """

    number: Count
    process: Count
    host: Count
    complete: bool = True
    barrier_unix_ns: Count
    ranks: list[RankFigures]
    cpu_user_ns: Count = 0
    cpu_system_ns: Count = 0
    peak_rss_bytes: Count = 0
    worker_busy_ns: Count = 0
    worker_wait_ns: Count = 0
    workers: Count = 0
    cores_allowed: Count = 0
    interval_ns: Count = 0
    series: list[Count] = []
    paths: list[PathTaken] = []
    cached: Cached = msgspec.field(default_factory=Cached)
    verification: Verification = msgspec.field(default_factory=Verification)
    memory_traffic_bytes: Count | None = None
    nic_bytes: Count | None = None

    def encode(self) -> bytes:
        """As MessagePack, to be gathered over the ranks."""
        return msgspec.msgpack.encode(self)


class PhaseReport(ProcessReport, kw_only=True, tag="checkpoint"):
    """One process's figures of one phase of a checkpoint run; gathered as MessagePack and merged by
    `merge.merge_phase`.
    """

    op: Op
    checkpoint: Count
    histograms: dict[str, Histogram] = {}
    requests: Requests | None = None

    @staticmethod
    def decode(data: bytes) -> PhaseReport:
        """The report that `encode` made; msgspec.DecodeError or ValidationError if `data` is none."""
        return msgspec.msgpack.decode(data, type=PhaseReport)


class Reached(msgspec.Struct, kw_only=True, tag_field="kind"):
    """How far one process has come in the phase under way: bytes done in elapsed_ns since its barrier."""

    number: Count
    process: Count
    host: Count
    barrier_unix_ns: Count
    elapsed_ns: Count
    nbytes: Count


class Progress(Reached, kw_only=True, tag="checkpoint"):
    """How far one process has come with a checkpoint."""

    op: Op
    checkpoint: Count
