"""The loop: hand over transfers before the core runs out of them, reap them by the batch, count."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mlstor.meter import INTERVAL_NS
from mlstor.signals import held
from mlstor.storage.transfers import COMPLETION_DTYPE, Kind

if TYPE_CHECKING:
    from mlstor.storage.transfers import Transfers
    from mlstor.stream.compose import Composer
    from mlstor.stream.tally import Tally

#: So many failures one after the other, and nothing that ended well: the storage is gone, and a fast refusal would be
#: asked for again without end.
MOST_FAILURES = 1000
#: How long what was called back may take to come back when a run is interrupted: mpirun kills 0.5 s after SIGTERM.
_STOP_S = 0.2


class Load:
    """Runs a composer's transfers to their end.

    Parameters
    ----------
    ends_ns
        When no more are begun, CLOCK_MONOTONIC; None: when the composer has finished.
    tick
        Called every quarter of a second or more often.
    """

    def __init__(
        self,
        transfers: Transfers,
        composer: Composer,
        tally: Tally,
        *,
        ends_ns: int | None,
        tick: Callable[[], None],
    ) -> None:
        self._transfers, self._composer, self._tally = transfers, composer, tally
        self._ends_ns, self._tick = ends_ns, tick
        self._failed = 0
        self._out: Any = np.zeros(composer.capacity, COMPLETION_DTYPE)

    def run(self) -> None:
        """From the first transfer to the last.

        Raises
        ------
        KeyboardInterrupt
            When interrupted; what was done until then is counted, what was under way may be lost.
        OSError
            If nothing ends well any more.
        """
        with held() as check:
            try:
                self._loop(check)
            except (KeyboardInterrupt, OSError):
                self._composer.stop()
                self._transfers.cancel()
                self._rest(time.monotonic() + _STOP_S)
                raise
        self._tally.fold()

    def _loop(self, check: Callable[[], None]) -> None:
        composer, transfers = self._composer, self._transfers
        stopped = False
        ticked_ns = time.monotonic_ns()
        while True:
            check()
            now_ns = time.monotonic_ns()
            if not stopped and self._ends_ns is not None and now_ns >= self._ends_ns:
                stopped = True
                for kind, count in composer.not_begun().items():
                    self._tally.not_begun(kind, count)
                composer.stop()
                transfers.cancel()
            if not composer.finished:
                composer.fill()
            if not transfers.outstanding and composer.finished:
                return
            timeout_ns = INTERVAL_NS - (now_ns - ticked_ns)
            if not stopped and self._ends_ns is not None:
                timeout_ns = min(timeout_ns, self._ends_ns - now_ns)
            # While there is more to come, half of what is queued ahead may run out; not what is under way.
            ahead = (transfers.outstanding - composer.in_flight) // 2
            self._reap(transfers.outstanding if composer.finished else ahead, max(timeout_ns, 0) / 1e9)
            if self._failed >= MOST_FAILURES and not stopped:
                last = self._tally.failures[-1]
                raise OSError(
                    errno.EIO,
                    f"{self._failed} transfers failed one after the other, the first ones with {last.fault}"
                    + (f" ({last.message})" if last.message else ""),
                    last.url or None,
                )
            if time.monotonic_ns() - ticked_ns >= INTERVAL_NS:
                ticked_ns = time.monotonic_ns()
                self._tally.fold()
                self._tick()

    def _reap(self, min_done: int, timeout_s: float) -> int:
        count = self._transfers.reap(self._out, max(1, min_done), timeout_s)
        if count:
            rows = self._out[:count]
            self._tally.add(rows, self._transfers.failures)
            well = rows["kind"] == Kind.OK
            self._composer.done(rows["tag"].astype(np.int64), well)
            self._failed = 0 if well.any() else self._failed + int((rows["kind"] != Kind.CANCELLED).sum())
        return count

    def _rest(self, until_s: float) -> None:
        while self._transfers.outstanding and time.monotonic() < until_s:
            self._reap(self._transfers.outstanding, 0.05)
        self._tally.fold()
