"""Blocking calls of the stores, made by a few threads, whose answers are taken in the loop's own thread."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Calls:
    """Calls under way.

    Attributes
    ----------
    running : int
        Those whose answer was not taken yet.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mlstor-copy")
        self._answers: queue.SimpleQueue[tuple[Callable[[Any], None], Any]] = queue.SimpleQueue()
        self.running = 0
        self._futures: set[Future[None]] = set()

    @property
    def idle(self) -> bool:
        """Whether no call is under way and no answer waits; unlike `running` also after an interrupt amidst `take`."""
        return not self._futures and self._answers.empty()

    def make(self, call: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Have a thread carry out `call`; `take` then gives what it returned, or its `OSError`, to `then`."""

        def run() -> None:
            answer: Any
            try:
                answer = call()
            except Exception as error:
                answer = error
            self._answers.put((then, answer))

        self.running += 1
        future = self._pool.submit(run)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)

    def take(self, timeout_s: float = 0.0) -> bool:
        """Take one answer; False if none came in time. An exception that is no `OSError` is raised."""
        try:
            then, answer = self._answers.get(timeout=timeout_s) if timeout_s > 0 else self._answers.get_nowait()
        except queue.Empty:
            return False
        self.running -= 1
        if isinstance(answer, Exception) and not isinstance(answer, OSError):
            raise answer
        then(answer)
        return True

    def close(self) -> None:
        """What has not begun is forgotten; what is under way is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
