"""What became of the transfers: arrays of completions, folded into the counts and histograms of the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlstor.results import stream
from mlstor.results.phase import MAX_DAMAGE
from mlstor.storage.transfers import COMPLETION_DTYPE, Failure, Kind as Ended
from mlstor.stream import buckets
from mlstor.stream.buckets import Durations
from mlstor.stream.draws import U64
from mlstor.stream.mix import LABELS, Kind
from mlstor.stream.slots import Slots

#: Completions that are folded at once: the cost of a fold is that of a few hundred of them.
FOLD = 4096
_CONNECTED, _COMPARED = 1, 2  # COMPLETION_DTYPE's flags
_CLASSES: U64 = np.array(stream.SIZE_CLASSES_FROM, np.uint64)

Temperature = Callable[[int], stream.Temperature]


class Part:
    """Some transfers of an operation that ended well."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.total = Durations()

    def add(self, rows: Any, total_ns: U64, found: buckets.Buckets) -> None:
        """Add completions, their durations and the buckets of these."""
        self.nbytes += int(rows["result"].sum())
        self.total.add(total_ns, found)

    @property
    def fields(self) -> dict[str, Any]:
        """Those of `stream.Slice`."""
        return {"count": self.total.count, "nbytes": self.nbytes, "total": self.total.histogram()}


class OpTally:
    """One kind of operation."""

    def __init__(self) -> None:
        self.failed = self.cancelled = self.waited = self.retries = self.connections = self.compared = 0
        self.errors: dict[str, int] = {}
        self.retried_by: dict[str, int] = {}
        self.all = Part()
        self.times = {name: Durations() for name in ("ttfb", "redirect", "from_intended", "retried")}
        self.by_temperature: dict[str, Part] = {}
        self.by_class: dict[int, Part] = {}
        self.by_target: dict[int, Part] = {}
        self.failed_at: dict[int, int] = {}

    def add(self, rows: Any, intended_ns: U64, temperatures: Iterable[tuple[str, npt.NDArray[np.bool_]]]) -> None:
        """Add completions of this kind.

        Parameters
        ----------
        intended_ns
            When each was meant to begin, 0 in a closed loop.
        temperatures
            "cold" and "warm" with a mask of the rows that are.
        """
        self.retries += int((np.maximum(rows["attempts"], 1).astype(np.int64) - 1).sum())
        self.connections += int((rows["flags"] & _CONNECTED).astype(bool).sum())
        # also what failed and was called back before it could be tried again
        waited = (rows["kind"] == Ended.CANCELLED) & ~np.isin(rows["first_kind"], (Ended.OK, Ended.CANCELLED))
        self.waited += int(waited.sum())
        again = rows[(rows["attempts"] > 1) | waited]
        count_faults(self.retried_by, again["first_kind"], again["first_status"])
        well = rows["kind"] == Ended.OK
        if not well.all():
            bad = rows[~well & (rows["kind"] != Ended.CANCELLED)]
            self.cancelled += int((rows["kind"] == Ended.CANCELLED).sum())
            self.failed += len(bad)
            count_faults(self.errors, bad["kind"], bad["status"], bad["result"])
            for target, count in _counted(bad["endpoint"]):
                self.failed_at[target] = self.failed_at.get(target, 0) + count
        self._well(rows[well], intended_ns[well], [(word, mask[well]) for word, mask in temperatures])

    def _well(self, rows: Any, intended_ns: U64, temperatures: list[tuple[str, npt.NDArray[np.bool_]]]) -> None:
        if not len(rows):
            return
        self.compared += int((rows["flags"] & _COMPARED).astype(bool).sum())
        total_ns = rows["end_ns"] - rows["start_ns"]
        found = buckets.of(total_ns)
        self.all.add(rows, total_ns, found)
        answered = rows[rows["first_byte_ns"] > 0]
        self._time("ttfb", answered["first_byte_ns"] - answered["attempt_ns"])
        self._time("redirect", rows["redirect_ns"][rows["redirect_ns"] > 0])
        paced = intended_ns > 0
        self._time("from_intended", rows["end_ns"][paced] - intended_ns[paced])
        retried = rows["attempts"] > 1
        self.times["retried"].add(total_ns[retried], found[retried])
        for word, mask in temperatures:
            if mask.any():
                self.by_temperature.setdefault(word, Part()).add(rows[mask], total_ns[mask], found[mask])
        for parts, keys in (
            (self.by_class, np.searchsorted(_CLASSES, rows["result"].astype(np.uint64), side="right") - 1),
            (self.by_target, rows["endpoint"]),
        ):
            for key, _ in _counted(keys):
                mask = keys == key
                parts.setdefault(key, Part()).add(rows[mask], total_ns[mask], found[mask])

    def _time(self, name: str, durations_ns: U64) -> None:
        self.times[name].add(durations_ns, buckets.of(durations_ns))

    def figures(self, targets: Sequence[str]) -> stream.OpFigures:
        """As the record keeps it; `targets` names the endpoints where they are told apart."""
        served = sorted(self.by_target.keys() | self.failed_at.keys()) if targets else []
        return stream.OpFigures(
            **self.all.fields,
            failed=self.failed,
            cancelled=self.cancelled,
            errors=self.errors,
            retries=self.retries,
            retried_by=self.retried_by,
            connections=self.connections,
            compared=self.compared,
            ttfb=self.times["ttfb"].histogram(),
            redirect=self.times["redirect"].histogram(),
            from_intended=self.times["from_intended"].histogram(),
            retried=self.times["retried"].histogram(),
            cold=stream.Slice(**self.by_temperature.get("cold", Part()).fields),
            warm=stream.Slice(**self.by_temperature.get("warm", Part()).fields),
            sizes=[
                stream.SizeClass(from_bytes=stream.SIZE_CLASSES_FROM[key], **part.fields)
                for key, part in sorted(self.by_class.items())
            ],
            targets=[
                stream.TargetSlice(
                    name=targets[key] if key < len(targets) else f"endpoint {key}",
                    failed=self.failed_at.get(key, 0),
                    **self.by_target.get(key, Part()).fields,
                )
                for key in served
            ],
        )


def count_faults(into: dict[str, int], kinds: Any, statuses: Any, results: Any = None) -> None:
    """Count transfers by the word for what went wrong."""
    if not len(kinds):
        return
    codes = np.zeros(len(kinds), np.int64) if results is None else np.where(kinds == Ended.SYSTEM, results, 0)
    columns = np.stack([kinds.astype(np.int64), statuses.astype(np.int64), codes], axis=1)
    for (kind, status, result), count in zip(*np.unique(columns, axis=0, return_counts=True), strict=True):
        word = stream.fault(int(kind), int(status), int(result))
        into[word] = into.get(word, 0) + int(count)


def _counted(keys: Any) -> list[tuple[int, int]]:
    if not len(keys):
        return []
    if (keys == keys[0]).all():
        return [(int(keys[0]), len(keys))]
    found, counts = np.unique(keys, return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))


class Tally:
    """Everything that a phase's completions say.

    Parameters
    ----------
    slots
        Of the composer, for what it knew.
    start_ns
        The barrier, CLOCK_MONOTONIC.
    rank
        Of this process.
    temperature
        Whether an epoch is cold or warm.
    verified
        Whether reads are compared with a pattern.
    """

    def __init__(self, slots: Slots, start_ns: int, rank: int, temperature: Temperature, verified: bool) -> None:
        self._slots, self._start_ns, self._rank = slots, start_ns, rank
        self._temperature, self._verified = temperature, verified
        self._rows: Any = np.zeros(2 * FOLD, COMPLETION_DTYPE)
        self._kind = np.zeros(2 * FOLD, np.uint8)
        self._epoch = np.zeros(2 * FOLD, np.uint32)
        self._intended_ns: U64 = np.zeros(2 * FOLD, np.uint64)
        self._filled = 0
        self.ops: dict[int, OpTally] = {}
        self.epochs: dict[int, stream.Epoch] = {}
        self.failures: list[stream.FailedTransfer] = []
        #: of reads with damage: the object's index, where the read began, damaged blocks
        self.damaged: list[tuple[int, int, int]] = []
        self.damaged_blocks = self.verified_nbytes = 0
        self.first_ns = self.first_done_ns = self.last_ns = 0
        self.count = self.nbytes = self.failed = 0

    def add(self, rows: Any, failures: Callable[[], Sequence[Failure]]) -> None:
        """Add completions whose slots are not yet given back; `failures` tells of those that failed."""
        slots = rows["tag"].astype(np.int64)
        bad = (rows["kind"] != Ended.OK) & (rows["kind"] != Ended.CANCELLED)
        if bad.any():
            self._describe(rows[bad], failures())
        damaged = rows["damaged_blocks"] > 0
        if damaged.any() and len(self.damaged) < MAX_DAMAGE:
            columns = self._slots.index[slots], self._slots.offset[slots], rows["damaged_blocks"]
            self.damaged += zip(*(column[damaged].tolist() for column in columns), strict=True)
        for first in range(0, len(rows), FOLD):  # as many as were under way may come at once
            self._note(rows[first : first + FOLD], slots[first : first + FOLD])

    def _note(self, rows: Any, slots: npt.NDArray[np.int64]) -> None:
        if self._filled + len(rows) > len(self._rows):
            self.fold()
        end = self._filled + len(rows)
        self._rows[self._filled : end] = rows
        self._kind[self._filled : end] = self._slots.kind[slots]
        self._epoch[self._filled : end] = self._slots.epoch[slots]
        self._intended_ns[self._filled : end] = self._slots.intended_ns[slots]
        self._filled = end
        if end >= FOLD:
            self.fold()

    def not_begun(self, kind: int, count: int) -> None:
        """Operations of an open loop that were meant to begin before its end, and were never handed over."""
        self.ops.setdefault(kind, OpTally()).cancelled += count

    def _describe(self, rows: Any, failures: Sequence[Failure]) -> None:
        said = {failure.tag: failure for failure in failures}
        for row in rows[: max(0, stream.MAX_FAILURES - len(self.failures))]:
            failure = said.get(int(row["tag"]))
            self.failures.append(
                stream.failed_transfer(
                    rank=self._rank,
                    op=LABELS[int(self._slots.kind[int(row["tag"])])],
                    url=failure.url if failure else "",
                    fault=stream.fault(int(row["kind"]), int(row["status"]), int(row["result"])),
                    attempts=max(1, int(row["attempts"])),
                    message=failure.message if failure else "",
                )
            )

    def fold(self) -> None:
        """Fold what was added since the last time into the figures."""
        count, self._filled = self._filled, 0
        if not count:
            return
        rows, kinds, epochs = self._rows[:count], self._kind[:count], self._epoch[:count]
        temperatures = [(word, np.isin(epochs, which)) for word, which in self._by_temperature(epochs)]
        for kind, _ in _counted(kinds):
            mask = kinds == kind
            self.ops.setdefault(kind, OpTally()).add(
                rows[mask], self._intended_ns[:count][mask], [(word, found[mask]) for word, found in temperatures]
            )
        ran = rows["kind"] != Ended.CANCELLED
        well = rows["kind"] == Ended.OK
        self._span(rows["start_ns"][ran], rows["end_ns"][ran])
        self.count += int(well.sum())
        self.nbytes += int(rows["result"][well].sum())
        self.failed += int((ran & ~well).sum())
        if self._verified:
            compared = rows[well & np.isin(kinds, (Kind.GET, Kind.GET_RANGE))]
            self.verified_nbytes += int(compared["result"].sum())
            self.damaged_blocks += int(compared["damaged_blocks"].sum())
        for epoch, _ in _counted(epochs[ran]):
            mask = ran & (epochs == epoch)
            entry = self._add_to_epoch(epoch, rows["start_ns"][mask], rows["end_ns"][mask], rows["result"][mask & well])
            entry.failed += int((mask & ~well).sum())

    def _by_temperature(self, epochs: npt.NDArray[np.uint32]) -> list[tuple[str, list[int]]]:
        found: dict[str, list[int]] = {}
        for epoch, _ in _counted(epochs):
            found.setdefault(self._temperature(epoch), []).append(epoch)
        return [(word, which) for word, which in found.items() if word != "unknown"]

    def _span(self, starts_ns: U64, ends_ns: U64) -> None:
        if not len(starts_ns):
            return
        first, done, last = (
            max(0, int(found) - self._start_ns) for found in (starts_ns.min(), ends_ns.min(), ends_ns.max())
        )
        if not self.last_ns:
            self.first_ns, self.first_done_ns = first, done
        self.first_ns, self.first_done_ns = min(self.first_ns, first), min(self.first_done_ns, done)
        self.last_ns = max(self.last_ns, last)

    def _add_to_epoch(self, epoch: int, starts_ns: U64, ends_ns: U64, results: Any) -> stream.Epoch:
        """Add operations of an epoch, with the `results` of those that ended well; the entry."""
        entry = stream.epoch_entry(epoch)
        start = max(0, int(starts_ns.min()) - self._start_ns)
        end = max(0, int(ends_ns.max()) - self._start_ns)
        found = self.epochs.get(entry)
        if found is None:
            found = self.epochs[entry] = stream.Epoch(
                epoch=entry, temperature=self._temperature(epoch), start_ns=start, end_ns=end
            )
        found.epochs = max(found.epochs, epoch - entry + 1)
        found.start_ns, found.end_ns = min(found.start_ns, start), max(found.end_ns, end)
        found.count += len(results)
        found.nbytes += int(results.sum())
        return found

    def figures(self, targets: Sequence[str]) -> dict[str, stream.OpFigures]:
        """Of all operations, by name; folds what is left."""
        self.fold()
        return {LABELS[kind]: one.figures(targets) for kind, one in sorted(self.ops.items())}

    @property
    def waited(self) -> int:
        """Transfers that had failed, and were called back while they waited to be tried again."""
        return sum(one.waited for one in self.ops.values())

    @property
    def checksum_failures(self) -> int:
        """Transfers whose bytes had not the checksum that the store has."""
        return sum(one.errors.get("checksum", 0) for one in self.ops.values())
