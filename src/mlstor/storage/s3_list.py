"""A listing by several requests at once: a bucket is divided by its common prefixes, as long as hands are free."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator

from mlstor.storage.s3_xml import Listing

#: More prefixes than this are not listed one by one: a flat listing gives 1000 objects a request, and a prefix costs
#: at least one.
MOST_PREFIXES = 256
#: Pages that wait for the caller at most; their threads then wait too.
_WAITING = 32

#: ``page(prefix, delimiter, token)``
PageFunction = Callable[[str, str, str], Listing]


def pages(page: PageFunction, prefix: str, threads: int = 8) -> Iterator[Listing]:
    """Pages of all objects below `prefix`, each object once, in no order.

    The first page is a flat one, which is all there is to most listings. If it was cut short, and a hand is free, the
    common prefixes are asked for and listed each for itself; if there are too many of them, or none, the listing goes
    on flat. Closing the iterator stops the threads.
    """
    first = page(prefix, "", "")
    if not first.token:
        if first.keys:
            yield first
        return
    walk = _Walk(page, threads)
    yield from walk.run(prefix, first)


class _Walk:
    def __init__(self, page: PageFunction, threads: int) -> None:
        self._page = page
        self._threads = threads
        self._tasks: deque[tuple[str, Listing | None]] = deque()
        self._changed = threading.Condition()
        self._busy = 0
        self._stop = False
        self._out: queue.Queue[Listing | BaseException | None] = queue.Queue(_WAITING)

    def run(self, prefix: str, first: Listing) -> Iterator[Listing]:
        self._tasks.append((prefix, first))
        workers = [threading.Thread(target=self._work, name="mlstor-list", daemon=True) for _ in range(self._threads)]
        for worker in workers:
            worker.start()
        ended = 0
        try:
            while ended < len(workers):
                got = self._out.get()
                if got is None:
                    ended += 1
                elif isinstance(got, BaseException):
                    raise got
                else:
                    yield got
        finally:
            self._stop_all()
            while ended < len(workers):  # threads may wait for room in the queue
                ended += self._out.get() is None

    def _stop_all(self) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while (task := self._next()) is not None:
                try:
                    self._list(*task)
                finally:
                    with self._changed:
                        self._busy -= 1
                        self._changed.notify_all()
        except BaseException as error:
            self._stop_all()
            self._out.put(error)
        finally:
            self._out.put(None)

    def _next(self) -> tuple[str, Listing | None] | None:
        with self._changed:
            while not self._stop and not self._tasks and self._busy:
                self._changed.wait()
            if self._stop or not self._tasks:
                return None
            self._busy += 1
            return self._tasks.popleft()

    def _list(self, prefix: str, first: Listing | None) -> None:
        listing = first or self._page(prefix, "", "")
        if listing.token and self._hands_are_free():
            parted = self._page(prefix, "/", "")
            below = parted.prefixes
            if not parted.token and 0 < len(below) <= MOST_PREFIXES and prefix not in below:
                with self._changed:
                    self._tasks.extend((each, None) for each in below)
                    self._changed.notify_all()
                listing = parted
        while not self._stop:
            if listing.keys:
                self._out.put(listing)
            if not listing.token:
                return
            listing = self._page(prefix, "", listing.token)

    def _hands_are_free(self) -> bool:
        with self._changed:
            return len(self._tasks) + self._busy < self._threads
