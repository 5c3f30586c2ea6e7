"""SIGINT and SIGTERM as one thing: terminals send the one, mpirun and Kubernetes the other."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A `KeyboardInterrupt` that knows its signal.

    Attributes
    ----------
    signum : int
        The signal that came.
    exit_code : int
        128 + `signum`, as shells report it: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.exit_code = 128 + signum


def end_silently() -> None:
    """From here on SIGINT and SIGTERM end this process without a word.

    For a rank whose error rank 0 tells: a launcher sends SIGTERM to the others as soon as rank 0 has exited.
    """
    for signum in _STOPPING:
        signal.signal(signum, signal.SIG_DFL)


_active: list[Interrupts] = []


@contextmanager
def held() -> Iterator[Callable[[], None]]:
    """Within this context a first signal raises only where the function is called that `with` gives.

    For loops that call into what a half-done step would break, such as the locks of a thread pool; they call it several
    times a second. Without `Interrupts` around it nothing is held: signals raise as they do.

        with held() as check:
            while more:
                check()
                step()
    """
    interrupts = _active[-1] if _active else None
    if interrupts is None:
        yield lambda: None
        return
    interrupts.hold += 1
    try:
        yield interrupts.check
    finally:
        interrupts.hold -= 1
    interrupts.check()


def raise_lost() -> None:
    """Raise for a first signal whose exception was dropped on its way, in a loop that it should have ended.

    numpy drops whatever is raised while it looks for attributes of an operand's type, and those of an enumeration are
    looked for in Python before 3.12 (``EnumType.__getattr__``), where handlers of signals run.
    """
    interrupts = _active[-1] if _active else None
    if interrupts is not None and interrupts.received is not None and not interrupts.hold:
        raise Interrupted(interrupts.received)


class Interrupts:
    """Within this context SIGINT and SIGTERM raise `Interrupted` in the main thread.

    The first SIGTERM raises; later ones do nothing, since mpirun repeats it while a rank is already saving
    what it has (SIGKILL follows about 0.5 s after the first). Every SIGINT raises: a user who insists is
    obeyed.

    Raises
    ------
    ValueError
        On entering, outside of the main thread: Python delivers signals nowhere else.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        #: how many `held` there are around what runs now
        self.hold = 0
        self._waiting = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for signum in _STOPPING:
            self._former[signum] = signal.signal(signum, self._handle)
        _active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.remove(self)
        for signum, former in self._former.items():
            # None stands for a handler that was not installed from Python and can't be put back from here
            signal.signal(signum, signal.SIG_DFL if former is None else former)
        self._former.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        repeated = self.received is not None
        if not repeated:
            self.received = signum
        if self.hold and not repeated:
            self._waiting = True
        elif signum == signal.SIGINT or not repeated:
            raise Interrupted(signum)

    def check(self) -> None:
        """Raise for the signal that came while it was held."""
        if self._waiting and self.received is not None:
            self._waiting = False
            raise Interrupted(self.received)
