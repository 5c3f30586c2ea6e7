"""Phases of object streams: what each process reports (`StreamReport`) and what the record keeps (`StreamPhase`).

Integers only. Every histogram is sparse and adds up (`phase.Histogram`), so that a process folds its completions into
counts per bucket and hands over those. Times are as in `phase`.
"""

from __future__ import annotations

import errno
from typing import Annotated, Literal

import msgspec

from mlstor.results.phase import AnyPhase, Count, Histogram, ProcessReport, Reached

PhaseName = Literal["fill", "warm-up", "stream", "copy"]

OPS = (
    "get",
    "get-range",
    "get-parallel",
    "get-archived",
    "batch",
    "put",
    "put-parts",
    "put-shard",
    "head",
    "delete",
)  # fmt: skip
"""Names of operations, in the order in which they are shown: GET of a whole object, of a range, of a whole object in
parallel ranges, of a member of an archive (archpath); GetBatch; PUT in one request, in parts, of an archive; HEAD;
DELETE. A copy has ``get`` of the source and ``put`` of the destination; directories have the same names.
"""

MAX_EPOCHS = 128
"""Epochs with figures of their own; all further ones share the last entry (see `epoch_entry`)."""
MAX_TARGETS = 128
"""Targets with histograms of their own per operation; the rest of a larger cluster is merged as "others"."""
MAX_FAILURES = 64
"""Failed transfers described in a phase; further ones are counted in failures_dropped."""
MAX_TEXT = 300
"""Characters of a described failure's URL and message."""

SIZE_CLASSES_FROM = (0, *(4096 * 4**power for power in range(15)))
"""Smallest transfer of each size class in bytes: below 4 KiB, then powers of 4 from 4 KiB to 1 TiB; the last is
open-ended. ``numpy.searchsorted(SIZE_CLASSES_FROM, nbytes, side="right") - 1`` is the class.
"""

Temperature = Literal["cold", "warm", "unknown"]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]


class Slice(msgspec.Struct, kw_only=True):
    """Some of an operation's transfers that ended well: how many, their bytes and their total times."""

    count: Count = 0
    nbytes: Count = 0
    total: Histogram = msgspec.field(default_factory=Histogram)


class SizeClass(Slice, kw_only=True):
    """Transfers of from_bytes bytes or more, and less than the next class."""

    from_bytes: Count


class TargetSlice(Slice, kw_only=True):
    """Transfers that one target (of AIStore; else an endpoint) served; `failed` are not among `count`."""

    name: str
    failed: Count = 0


class OpFigures(msgspec.Struct, kw_only=True):
    """One kind of operation. `count` transfers with nbytes bytes ended well; `failed` did not, after all attempts, by
    `errors` (see `fault`); `cancelled` were called back at the end of the run, or in an open loop were meant to begin
    before it and found no room, and are in neither. `retries` are the further attempts of all of them; `retried_by`
    counts the transfers that needed any, also those that still waited for it at the end, by the fault of the first
    attempt. `connections` were made for them; of `compared` transfers the store's checksum was compared.

    Histograms of those that ended well: `total` from the beginning of the first attempt (payload ready) to the end,
    retries and pauses included; `retried` the same of those that needed a retry, which are in `total` too; `ttfb` from
    the beginning of the last attempt to the first byte of its answer, the way by a proxy included; `redirect` of
    the way by a proxy alone; `from_intended` from the intended start to the end (open loop only).

    `sizes` and `targets` each split `count`, and so do the transfers of cold and warm epochs, where it is known which
    they were.
    """

    count: Count = 0
    nbytes: Count = 0
    failed: Count = 0
    cancelled: Count = 0
    errors: dict[str, Count] = {}
    retries: Count = 0
    retried_by: dict[str, Count] = {}
    connections: Count = 0
    compared: Count = 0
    total: Histogram = msgspec.field(default_factory=Histogram)
    ttfb: Histogram = msgspec.field(default_factory=Histogram)
    redirect: Histogram = msgspec.field(default_factory=Histogram)
    from_intended: Histogram = msgspec.field(default_factory=Histogram)
    retried: Histogram = msgspec.field(default_factory=Histogram)
    cold: Slice = msgspec.field(default_factory=Slice)
    warm: Slice = msgspec.field(default_factory=Slice)
    sizes: list[SizeClass] = []
    targets: list[TargetSlice] = []


class Epoch(msgspec.Struct, kw_only=True):
    """One pass over the objects, all operations together: from its first transfer's start to its last one's end on any
    rank; epochs of different ranks may overlap. An entry stands for `epochs` epochs from `epoch` on, more than one only
    in the last entry of a long run.

    cold: the run had touched none of these objects before, and a client's cache can't answer for them. warm: it had
    read or written them. Whether the servers' caches hold them is another question: see `ServerCache`.
    """

    epoch: Count
    epochs: Count = 1
    temperature: Temperature = "unknown"
    start_ns: Count
    end_ns: Count
    count: Count = 0
    nbytes: Count = 0
    failed: Count = 0


class FailedTransfer(msgspec.Struct, kw_only=True):
    """A transfer that failed for good: on which rank, what (`op`, URL or path without credentials), by which `fault`,
    after how many attempts, and what the server or the transport said.
    """

    rank: Count
    op: str
    url: Text
    fault: str
    attempts: Count = 1
    message: Text = ""


class ServerCache(msgspec.Struct, kw_only=True):
    """Whether the servers' memory may have answered for their disks, by `rule`. working_set_bytes are of the distinct
    objects that the phase reads; server_memory_bytes of all servers together, null where nobody said.
    """

    verdict: Literal["exceeded", "possible", "unknown"]
    working_set_bytes: Count
    server_memory_bytes: Count | None = None
    memory_source: str = ""
    rule: str


class Network(msgspec.Struct, kw_only=True):
    """Whether a client's network was the limit, by `rule`; `reason` has the figures. Bytes of all hosts together,
    "unknown" where a host doesn't show them.
    """

    limited: Literal["yes", "no", "unknown"]
    reason: str
    rule: str
    received_bytes: Count | Literal["unknown"] = "unknown"
    sent_bytes: Count | Literal["unknown"] = "unknown"


class StreamPhase(AnyPhase, kw_only=True):
    """Transfers of objects on all ranks. A rank is a process here; the nfiles of `ranks` are objects, start_ns is the
    end of a warm-up that is not counted, and first_done_ns and end_ns are of transfers. nbytes are those of all
    operations that ended well; of a copy those that arrived.

    `skipped` objects were there already (a copy that is resumed). `opens` are files opened, 0 where the store has none.
    fetched_bytes are those that the kernel or the mount really moved for them, null where it doesn't tell.
    """

    name: PhaseName
    ops: dict[str, OpFigures]
    epochs: list[Epoch] = msgspec.field(default_factory=list)
    failures: list[FailedTransfer] = msgspec.field(default_factory=list)
    failures_dropped: Count = 0
    skipped_count: Count = 0
    skipped_nbytes: Count = 0
    opens: Count = 0
    fetched_bytes: Count | None = None
    server_cache: ServerCache | None = None
    network: Network


class StreamReport(ProcessReport, kw_only=True, tag="stream"):
    """One process's figures of one phase; gathered as MessagePack and merged by `stream_merge.merge_stream`.

    `ranks` has one element, of this process. All figures are of the time that counts, after a warm-up. The nic fields
    are the whole host's, given by one process of each host; nic_line_bits_per_s is the sum over its network devices in
    one direction, None where one doesn't tell. server_cache is given by process 0, or by all alike.
    """

    name: PhaseName
    ops: dict[str, OpFigures] = msgspec.field(default_factory=dict)
    epochs: list[Epoch] = msgspec.field(default_factory=list)
    failures: list[FailedTransfer] = msgspec.field(default_factory=list)
    failures_dropped: Count = 0
    skipped_count: Count = 0
    skipped_nbytes: Count = 0
    opens: Count = 0
    fetched_bytes: Count | None = None
    server_cache: ServerCache | None = None
    nic_received_bytes: Count | None = None
    nic_sent_bytes: Count | None = None
    nic_line_bits_per_s: Count | None = None

    @staticmethod
    def decode(data: bytes) -> StreamReport:
        """The report that `encode` made; msgspec.DecodeError or ValidationError if `data` is none."""
        return msgspec.msgpack.decode(data, type=StreamReport)


class StreamProgress(Reached, kw_only=True, tag="stream"):
    """How far one process has come with a phase of a stream."""

    name: PhaseName
    count: Count = 0


def size_class(nbytes: int) -> int:
    """Index into `SIZE_CLASSES_FROM` of a transfer of `nbytes` bytes (>= 0)."""
    if nbytes < SIZE_CLASSES_FROM[1]:
        return 0
    return min((nbytes.bit_length() - 1 - 12) // 2 + 1, len(SIZE_CLASSES_FROM) - 1)


def epoch_entry(epoch: int) -> int:
    """The entry of `StreamReport.epochs` that epoch number `epoch` (from 0) belongs to; the same on every rank."""
    return min(epoch, MAX_EPOCHS - 1)


def fault(kind: int, status: int = 0, result: int = 0) -> str:
    """The word by which a failed attempt is counted: "HTTP 503", "ENOSPC", "reset", "checksum", ...

    Parameters
    ----------
    kind
        A `storage.transfers.Kind`.
    status
        HTTP status of the answer, of an HTTP refusal.
    result
        -errno, of an error of the system; 0 where it is not known (of a first attempt).
    """
    from mlstor.storage.transfers import Kind

    if kind == Kind.HTTP:
        return f"HTTP {status}"
    if kind == Kind.SYSTEM and result < 0:
        return errno.errorcode.get(-result, f"errno {-result}")
    return Kind(kind).name.lower()


def failed_transfer(
    *, rank: int, op: str, url: str, fault: str, attempts: int = 1, message: str = ""
) -> FailedTransfer:
    """A `FailedTransfer` whose texts are cut to `MAX_TEXT` characters."""
    return FailedTransfer(
        rank=rank, op=op, url=_cut(url), fault=fault, attempts=attempts, message=_cut(" ".join(message.split()))
    )


def _cut(text: str) -> str:
    # names of files need not be UTF-8, a record has to be
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
