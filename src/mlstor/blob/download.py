"""A blob from an object: ranges straight into the caller's memory, many at once; small pieces by few reads."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Any

from mlstor.blob.compose import split
from mlstor.blob.gather import STRAIGHT_BYTES, Batch, Small
from mlstor.blob.memory import Window
from mlstor.blob.pieces import by_group, checked, joined, sums
from mlstor.blob.types import DigestKind, Fetched
from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Digest, Kind, Memory, Op, zeros
from mlstor.stream.failures import failed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mlstor._io import AlignedBuffer
    from mlstor.blob.channel import Channel
    from mlstor.storage.transfers import Transfers

#: Of one range. As the stores' own: a request costs about 1 ms, and more of them run at once.
RANGE_BYTES = 8 << 20
#: Small pieces so close together come with one request.
_GAP_BYTES = 128 << 10
_SCRATCH_BYTES = 32 << 20
#: Tags from here on are of runs of small pieces.
_RUNS = 1 << 40
_DIGESTS = {"crc32": Digest.CRC32, "crc32c": Digest.CRC32C}


def download(
    channel: Channel, key: str, name: str, pieces: NDArray[Any], *, digest: DigestKind, keep: object, etag: str
) -> Fetched:
    """See `types.Blob.fetch`. Where answers have no ETag, as AIStore's, what is there afterwards is compared with
    `etag`; without one only digests show that the object was replaced between two ranges.
    """
    start_ns = time.monotonic_ns()
    pieces = checked(pieces, name)
    ranges = split(joined(pieces), RANGE_BYTES)
    with channel.lease() as transfers:
        reads = _Reads(transfers, key, name, ranges, digest, keep)
        reads.run()
    found = {tag.decode() for tag in reads.etags} - {""}
    if not found:  # nothing was read, or answers to ranges have none
        found = {channel.stat(key).etag}
    if len(found | {etag or min(found)}) > 1:
        raise OSError(errno.ESTALE, "the object changed while it was read: read it again", name)
    nbytes = int(pieces["nbytes"].sum())
    return Fetched(
        name,
        nbytes,
        by_group(ranges, reads.values, digest),
        found.pop(),
        start_ns,
        time.monotonic_ns(),
        nbytes - reads.copied_bytes,
        reads.copied_bytes,
        "no",
    )


class _Reads:
    """One fetch.

    Attributes
    ----------
    values : array of uint64
        The ranges' digests.
    etags : set of bytes
        What the answers named the object.
    """

    def __init__(
        self, transfers: Transfers, key: str, name: str, ranges: NDArray[Any], digest: DigestKind, keep: object
    ) -> None:
        import numpy as np

        self._transfers, self._key, self._name, self._kind = transfers, key.encode(), name, digest
        # Amazon's connector, which has no parts of ours, has no checksums either.
        by_workers = getattr(transfers, "uploads", None) is not None
        self._digest = _DIGESTS.get(digest, Digest.NONE) if by_workers else Digest.NONE
        self.values: NDArray[Any] = np.zeros(len(ranges), "<u8")
        self.etags: set[bytes] = set()
        # What is only to be summed, and not by the workers, is read into scratch memory like small pieces.
        unseen = (ranges["address"] == 0) & (ranges["group"] >= 0) & (self._digest is Digest.NONE)
        indirect = unseen | (ranges["nbytes"] < STRAIGHT_BYTES)
        self._small = Small(ranges, indirect)
        self.copied_bytes = int(ranges["nbytes"][indirect].sum())
        self._batches = self._small.batches(
            0, gap_bytes=_GAP_BYTES, run_bytes=RANGE_BYTES, batch_bytes=_SCRATCH_BYTES, align=False
        )
        self._ranges = ranges
        self._large = np.flatnonzero(~indirect)
        self._keep = keep
        self._flying: dict[int, tuple[Batch, AlignedBuffer]] = {}
        self._left: dict[int, int] = {}
        self._begun = 0

    def run(self) -> None:
        self._begin()
        self._begin()
        self._begin_large()
        done = zeros(64, COMPLETION_DTYPE)
        while self._transfers.outstanding:
            rows = done[: self._transfers.reap(done, 1)]
            bad = rows[rows["kind"] != Kind.OK]
            if len(bad):
                if bad["kind"][0] == Kind.LENGTH:
                    text = "the object ends before the bytes that were asked for: was it replaced by a shorter one?"
                    raise OSError(errno.ENODATA, text, self._name)
                raise failed(self._transfers, bad[0], self._name)
            self.etags.update(rows["etag"].tolist())
            self._came(rows[rows["tag"] < _RUNS])
            for tag in rows["tag"][rows["tag"] >= _RUNS].tolist():
                self._run_came((tag - _RUNS) >> 20)

    def _came(self, rows: NDArray[Any]) -> None:
        """Ranges have come to their places."""
        numbers = rows["tag"].astype("<i8")
        if self._digest is Digest.NONE:
            self.values[numbers] = sums(self._ranges[numbers], self._kind)
        else:
            self.values[numbers] = rows["digest_value"]

    def _run_came(self, number: int) -> None:
        self._left[number] -= 1
        if not self._left[number]:
            batch, scratch = self._flying.pop(number)
            batch.scatter(self._small, scratch, self._kind, self.values)
            self._begin()

    def _begin_large(self) -> None:
        ranges = self._ranges[self._large]
        if not len(ranges):
            return
        window = Window(ranges, self._keep)
        items = self._items(ranges["offset"], ranges["nbytes"])
        items["tag"] = self._large
        items["memory"] = [Memory.BUFFER if address else Memory.DROP for address in ranges["address"].tolist()]
        kept = ranges["address"] != 0
        items["place"][kept] = ranges["address"][kept] - window.address
        items["room"][kept] = ranges["nbytes"][kept]
        items["digest"][ranges["group"] >= 0] = self._digest
        self._transfers.submit(items, self._key, window.buffer)

    def _begin(self) -> None:
        """The next batch of small pieces."""
        batch = next(self._batches, None)
        if batch is None:
            return
        import numpy as np

        number, self._begun = self._begun, self._begun + 1
        scratch = batch.scratch()
        runs = np.array(batch.runs, "<u8")
        items = self._items(runs[:, 0], runs[:, 1])
        items["tag"] = _RUNS + (number << 20) + np.arange(len(runs))
        items["memory"], items["place"], items["room"] = Memory.BUFFER, runs[:, 2], runs[:, 1]
        self._flying[number] = batch, scratch
        self._left[number] = len(runs)
        self._transfers.submit(items, self._key, scratch)

    def _items(self, offsets: NDArray[Any], sizes: NDArray[Any]) -> Any:
        items = zeros(len(offsets), TRANSFER_DTYPE)
        items["op"], items["key_nbytes"], items["object_nbytes"] = Op.READ, len(self._key), WHOLE
        items["offset"], items["nbytes"] = offsets, sizes
        return items
