"""Many transfers at once to the nodes of an AIStore cluster, straight to the target that holds the object.

`AisTransfers` stands before an `HttpEngine`: it says which endpoint each transfer goes to, and hands what a target
refused or didn't answer to the proxy, which knows the cluster as it is now. The caller sees one completion, with the
attempts of both and the time from the first of them.
"""

from __future__ import annotations

import errno
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from mlstor._http import place
from mlstor.storage.ais_map import CHECKED_WRITE
from mlstor.storage.ais_slots import TRANSFER, WORDS, Batch, Slots
from mlstor.storage.transfers import COMPLETION_DTYPE, Digest, Failure, Kind, Op

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Buffer, Self

    from mlstor._http import HttpEngine
    from mlstor._io import Pattern
    from mlstor.storage.ais_map import ClusterMap, Routes
    from mlstor.storage.transfers import TransferCounters

_COMPLETION = numpy.dtype(COMPLETION_DTYPE)


def _offset(dtype: numpy.dtype[Any], field: str) -> int:
    assert dtype.fields
    return int(dtype.fields[field][1])


_OP, _DIGEST = _offset(TRANSFER, "op"), _offset(TRANSFER, "digest")
_KIND, _ENDPOINT = _offset(_COMPLETION, "kind"), _offset(_COMPLETION, "endpoint")

# As `Transfers.failures` promises.
_MOST_FAILURES = 256
#: A map that was fetched less than this ago is not fetched again.
_MAP_AGE_S = 1.0
# Pauses between attempts by the proxy while a target is away: from the first, doubling, up to the last.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.25, 2.0
_UNREACHED = (Kind.CONNECT, Kind.RESET, Kind.STALLED, Kind.SHORT)


@dataclass
class Access:
    """How a store's transfers reach its cluster, and what became of that; shared by all of them."""

    #: READ and STAT go straight to the target that holds the object; if not, `reason` says why
    direct: bool
    reason: str
    #: WRITE and DELETE do, too
    mutations: bool
    #: by the `endpoint` of a completion: "proxy", then ids of targets
    servers: list[str] = field(default_factory=lambda: ["proxy"])
    #: why direct access was given up in mid-run, "" if it wasn't
    lost: str = ""
    #: how often a transfer was handed to the proxy
    resent: int = 0
    #: of the attempts to fetch the map in mid-run that failed, the last 8
    map_errors: list[str] = field(default_factory=list)


class _Before(NamedTuple):
    """The attempts of a transfer that was sent again, summed up."""

    submit_ns: int
    start_ns: int
    attempts: int
    first_kind: int
    first_status: int
    resent: int
    patience_ns: int


class AisTransfers:
    """`Transfers` of one bucket. Made by `AisStore.transfers`.

    Parameters
    ----------
    engine
        Does the transfers; it is closed with this.
    routes
        Endpoints of `engine`.
    uname_prefix
        What rendezvous hashing puts before a key.
    get_map
        Fetches the cluster map; raises OSError if it can't.
    cluster
        The map that is known already.
    access
        How the cluster is reached; is told what changes.
    patience_s
        How long a transfer is sent again while its target, or the proxy, doesn't answer, from its first failure on.
        Within it a target may die and come back. Each of the attempts counts.

    Notes
    -----
    A 404 of a target means: ask the proxy. One that comes by the proxy is final, unless a target that there was when
    this was made is missing in the map: objects whose target has left look missing until it is back.
    """

    def __init__(
        self,
        engine: HttpEngine,
        routes: Routes,
        uname_prefix: bytes,
        get_map: Callable[[], ClusterMap],
        cluster: ClusterMap,
        access: Access,
        patience_s: float,
    ) -> None:
        self.outstanding = 0
        self._access = access
        self._resent = 0
        self._engine = engine
        self._routes = routes
        self._prefix = uname_prefix
        self._get_map = get_map
        self._expected = {target.id for target in cluster.targets}
        self._complete = True
        self._version = cluster.version
        self._patience_ns = int(patience_s * 1e9)
        mutations = access.direct and access.mutations
        self._straight: dict[int, bool] = dict.fromkeys((Op.WRITE, Op.DELETE, CHECKED_WRITE), mutations)
        self._straight.update({Op.READ: access.direct, Op.STAT: access.direct})
        self._next_map = time.monotonic() + _MAP_AGE_S
        self._stopped = False
        self._failures: list[Failure] = []
        self._kept: Any = None
        self._said: dict[int, Failure] = {}
        self._before: dict[int, _Before] = {}
        self._slots = Slots()
        self._turn = 0
        routes.update(cluster)

    # ---- in ----

    def submit(
        self, transfers: Buffer, names: Buffer, buffer: Buffer | None = None, pattern: Pattern | None = None
    ) -> int:
        """See `Transfers.submit`; `endpoint` is not looked at.

        Raises
        ------
        OSError
            EINVAL for a WRITE whose key begins with ``/`` or holds ``//``.
        """
        given = memoryview(transfers)
        if not given.nbytes:
            return 0
        words = numpy.frombuffer(given, numpy.uint64).reshape(-1, WORDS).copy()
        self._stopped = False
        requests = words.view(numpy.uint8)[:, [_OP, _DIGEST]]
        op, digest = requests[0].tolist()
        alike = not numpy.count_nonzero(requests != requests[0])
        mutates = not alike or op not in (Op.READ, Op.STAT)
        if mutates and self._straight[Op.WRITE] and time.monotonic() >= self._next_map:
            # A target takes a PUT for an object that isn't its own: with an old map it would be put where none looks.
            self._refresh()
        if alike:
            self._place(words, names, _request(op, digest))
        else:
            kinds = numpy.array([_request(op, digest) for op, digest in requests.tolist()])
            groups = [(words[kinds == kind], kind) for kind in numpy.unique(kinds).tolist()]
            for group, kind in groups:
                self._place(group, names, kind)
            words = numpy.concatenate([group for group, _ in groups])
        if mutates:
            _refuse_lost_names(words, memoryview(names))
        batch = Batch(names, buffer, pattern)
        self._slots.take(words, batch)
        try:
            self._engine.submit(words, *batch)
        except BaseException:
            self._slots.give_back(words[:, 0])
            raise
        self.outstanding += len(words)
        return len(words)

    def _place(self, words: Any, names: Buffer, request: int) -> None:
        """Say which endpoint transfers go to, which are requests of one kind."""
        routes = self._routes
        self._turn += 1
        if self._straight[request] and len(routes.digests):
            ways = routes.straight[request]
            place(words, names, self._prefix, routes.digests, ways[self._turn % len(ways)])
        else:
            words.view(TRANSFER)["endpoint"] = routes.proxy[request]

    # ---- out ----

    def reap(self, out: Buffer, min_done: int = 1, timeout_s: float | None = None) -> int:
        """See `Transfers.reap`."""
        room: Any = numpy.frombuffer(memoryview(out), numpy.uint64).reshape(-1, _COMPLETION.itemsize // 8)
        if not room.flags.writeable:
            raise BufferError("the array for completions must be writable")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        wanted = min(min_done, self.outstanding, len(room))
        filled = self._deliver(room)
        while filled < len(room):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                count = self._engine.reap(room[filled:], max(0, wanted - filled), left)
            except KeyboardInterrupt:
                self._stopped = True
                self._kept = room[:filled].copy() if filled else None
                self.outstanding += filled
                raise
            if count:
                filled += self._finished(room[filled : filled + count])
            # nothing came: it was the time, or the engine has no more
            if filled >= wanted or (left is not None and count == 0):
                break
        return filled

    def _deliver(self, room: Any) -> int:
        """What was done when Ctrl-C came in the middle of a `reap`."""
        if self._kept is None:
            return 0
        count = min(len(self._kept), len(room))
        room[:count] = self._kept[:count]
        self._kept = self._kept[count:] if count < len(self._kept) else None
        self.outstanding -= count
        return count

    def _finished(self, words: Any) -> int:
        """Give completions the caller's tags; those that are sent again are taken out. Returns how many are left."""
        if numpy.count_nonzero(words.view(numpy.uint8)[:, _KIND]):
            self._said.update((failure.tag, failure) for failure in self._engine.failures())
            done = words.view(_COMPLETION)[:, 0]
            keep = numpy.ones(len(done), bool)
            for index in numpy.flatnonzero(done["kind"]).tolist():
                keep[index] = not self._send_again(done[index])
            if not keep.all():
                kept = words[keep]
                words = words[: len(kept)]
                words[:] = kept
        if self._before or self._said:
            self._complete_story(words.view(_COMPLETION)[:, 0])
        endpoints = words.view(numpy.uint32)[:, _ENDPOINT // 4]
        endpoints[:] = self._routes.server[endpoints]
        words[:, 0] = self._slots.give_back(words[:, 0])
        self.outstanding -= len(words)
        return len(words)

    def _complete_story(self, done: Any) -> None:
        """Tell of the attempts before the last sending, and note failures under the caller's tags."""
        for index, slot in enumerate(done["tag"].tolist()):
            before = self._before.pop(slot, None)
            if before:
                one = done[index]
                one["submit_ns"], one["start_ns"] = before.submit_ns, before.start_ns
                one["attempts"] = min(before.attempts + int(one["attempts"]), 0xFFFF)
                one["first_kind"], one["first_status"] = before.first_kind, before.first_status
            said = self._said.pop(slot, None)
            if said and len(self._failures) < _MOST_FAILURES:
                self._failures.append(said._replace(tag=self._slots.tag(slot)))

    # ---- once more ----

    def _send_again(self, one: Any) -> bool:
        """Hand a transfer that failed to the proxy, if that may help; says whether it did."""
        slot = int(one["tag"])
        pause_s = self._pause(slot, one)
        if pause_s is None:
            return False
        now_ns = time.monotonic_ns()
        before = self._before.get(slot)
        if before is None:
            # one attempt may have failed and the next have been refused: the first is what counts
            kind, status = int(one["first_kind"]), int(one["first_status"])
            if kind == Kind.OK:
                kind, status = int(one["kind"]), int(one["status"])
            before = _Before(
                int(one["submit_ns"]), int(one["start_ns"]), 0, kind, status, 0, now_ns + self._patience_ns
            )
        attempts = before.attempts + int(one["attempts"])
        self._before[slot] = before._replace(attempts=attempts, resent=before.resent + bool(pause_s))
        self._said.pop(slot, None)
        record, batch = self._slots.record(slot)
        request = _request(int(record["op"][0]), int(record["digest"][0]))
        record["endpoint"] = self._routes.proxy[request]
        record["not_before_ns"] = now_ns + int(pause_s * 1e9) if pause_s else 0
        self._slots.keep(slot, record)
        self._engine.submit(record, *batch)
        self._resent += 1
        self._access.resent += 1
        return True

    def _pause(self, slot: int, one: Any) -> float | None:
        """Seconds until a transfer that failed is sent again, 0 if at once; None if its failure is final."""
        kind, status = int(one["kind"]), int(one["status"])
        if self._stopped:
            return None
        # where it was sent to; after a redirect the completion has another
        direct = self._routes.is_straight[int(self._slots.record(slot)[0]["endpoint"][0])]
        if kind == Kind.HTTP and direct and status in (401, 403):
            self._straight = dict.fromkeys(self._straight, False)
            self._access.lost = f"a target answered {status} in mid-run"
            return 0.0
        if kind == Kind.HTTP and direct and status in (400, 404, 409, 502, 503, 504):
            self._refresh()
            return 0.0
        if kind in _UNREACHED:
            self._refresh()
            if direct:
                return 0.0
        elif kind == Kind.HTTP and status == 404:
            self._refresh()
            if self._complete:
                return None
        elif kind != Kind.HTTP or status not in (502, 503, 504):
            return None
        before = self._before.get(slot)
        if before and time.monotonic_ns() >= before.patience_ns:
            return None
        pause: float = min(_FIRST_PAUSE_S * 2 ** min(before.resent if before else 0, 8), _LAST_PAUSE_S)
        return pause * (0.5 + random.random() / 2)

    def _refresh(self) -> None:
        """Fetch the cluster map, unless that was done just now; without an answer the old one stays."""
        now = time.monotonic()
        if now < self._next_map:
            return
        try:
            cluster = self._get_map()
        except OSError as error:
            self._access.map_errors = [*self._access.map_errors[-7:], str(error)]
        else:
            self._complete = self._expected <= {target.id for target in cluster.targets}
            if cluster.version != self._version:
                self._version = cluster.version
                self._routes.update(cluster)
        self._next_map = time.monotonic() + _MAP_AGE_S

    # ---- the rest ----

    def failures(self) -> list[Failure]:
        """See `Transfers.failures`."""
        said, self._failures = self._failures, []
        return said

    def cancel(self) -> None:
        """See `Transfers.cancel`; nothing is sent again until the next `submit`."""
        self._stopped = True
        self._engine.cancel()

    def counters(self) -> TransferCounters:
        """Those of the engine; what was handed to the proxy is among the retries."""
        counters = self._engine.counters()
        return counters._replace(retries=counters.retries + self._resent)

    def close(self) -> None:
        self._stopped = True
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _refuse_lost_names(words: Any, names: memoryview) -> None:
    """AIStore takes ``a//b``, places it by that name, stores it as the file ``a/b``, and so lists neither."""
    transfers = words.view(TRANSFER)[:, 0]
    starts, sizes = transfers["key_start"].tolist(), transfers["key_nbytes"].tolist()
    for op, start, nbytes in zip(transfers["op"].tolist(), starts, sizes, strict=True):
        key = bytes(names[start : start + nbytes])
        if op == Op.WRITE and (b"//" in key or key.startswith(b"/")):
            text = "AIStore would not find it again: give it a name without // and without / at its beginning"
            raise OSError(errno.EINVAL, text, key.decode("utf-8", "replace"))


def _request(op: int, digest: int) -> int:
    """The column of `Routes`."""
    return CHECKED_WRITE if op == Op.WRITE and digest in (Digest.CRC32C, Digest.XXH64) else op
