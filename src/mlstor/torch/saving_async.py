"""`async_save`: the state is copied, the call returns, and a thread writes the copy."""

from __future__ import annotations

import atexit
import errno
import os
import pickle
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from mlstor.blob.target import open_blob
from mlstor.blob.types import Published
from mlstor.errors import UsageError
from mlstor.torch.arena import BusyError, default_arena
from mlstor.torch.pickling import DEFAULT_PROTOCOL, describe
from mlstor.torch.saving import check_host, name_of, opening, parse_bandwidth, stem_of
from mlstor.torch.staging import stage

if TYPE_CHECKING:
    from mlstor._io import Engine
    from mlstor.blob.types import Blob
    from mlstor.storage.store import Store
    from mlstor.torch.arena import Arena
    from mlstor.torch.staging import Staged

WhenBusy = Literal["wait", "raise"]
AtExit = Literal["wait", "warn"]


class AsyncSave(Future[Published]):
    """A save under way. `result` waits until the state is durable under its name, or raises what went wrong.

    It belongs to the process that made it; a child made by a fork doesn't write.
    """

    def __init__(self, path: str, staged_bytes: int) -> None:
        super().__init__()
        #: path or URL
        self.path = path
        #: bytes of the copy, which are those of the file
        self.staged_bytes = staged_bytes
        #: for how long the caller was held up, s: until the state was copied, and before, if asked, until the save
        #: before it was done
        self.stall_s = 0.0

    def __repr__(self) -> str:
        return f"<AsyncSave {self.path} {self._state.lower()}>"

    def result(self, timeout: float | None = None) -> Published:
        """What was published.

        Parameters
        ----------
        timeout
            Seconds; default: as long as it takes.

        Raises
        ------
        OSError
            If the storage failed; what was there before under the name is still there.
        TimeoutError
            After `timeout`; the save goes on.
        """
        try:
            return super().result(timeout)
        finally:
            self._was_seen()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As `result`, but the error is returned; None if there was none."""
        try:
            return super().exception(timeout)
        finally:
            self._was_seen()

    def _was_seen(self) -> None:
        if self.done():
            _unseen.pop(self, None)


class _Job(NamedTuple):
    thread: threading.Thread
    stop: threading.Event


#: Saves that are being written, and the errors of those that failed and whom nobody asked.
_running: dict[AsyncSave, _Job] = {}
_unseen: dict[AsyncSave, BaseException] = {}


def async_save(
    obj: Any,
    f: str | os.PathLike[str],
    *,
    pickle_module: ModuleType = pickle,
    pickle_protocol: int = DEFAULT_PROTOCOL,
    when_busy: WhenBusy = "wait",
    max_bandwidth: str | int | None = None,
    arena: Arena | None = None,
    at_exit: AtExit = "wait",
    engine: Engine | None = None,
    store: Store | None = None,
    options: Mapping[str, Any] | None = None,
) -> AsyncSave:
    """Copy a state, return, and save the copy in the background as `save` does.

    The tensors may be changed as soon as this returns. A save that fails leaves what was there before, and its error is
    raised by `AsyncSave.result`; if nobody asks, the next `async_save`, or the process's end, warns of it.

    Parameters
    ----------
    obj, f, pickle_module, pickle_protocol, engine, store, options
        As `save`.
    when_busy
        While the arena holds a state that is still being written: wait until it is done (default), or raise.
    max_bandwidth
        Bytes per second at most (``"500MB/s"``), so that the training's own reads are not starved. Default: no limit.
    arena
        Where the state is copied to. Default: one for the process, as large as the largest state.
    at_exit
        What happens if the process ends before the state is written: it waits (default), or the save is given up, with
        a warning that names `f`.

    Returns
    -------
    AsyncSave
        A future; ``stall_s`` says how long this call took.

    Raises
    ------
    BusyError
        If ``when_busy="raise"`` and the save before is still being written.
    UsageError
        If `obj` or `f` can't be saved so, or the state is larger than the arena may become.
    """
    name = name_of(f)
    return begin(
        obj,
        open_blob(name, engine=engine, **opening(store, options)),
        stem_of(name),
        pickle_module=pickle_module,
        pickle_protocol=pickle_protocol,
        when_busy=when_busy,
        max_bandwidth=max_bandwidth,
        arena=arena,
        at_exit=at_exit,
    )


def begin(
    obj: Any,
    blob: Blob,
    stem: str,
    *,
    pickle_module: ModuleType = pickle,
    pickle_protocol: int = DEFAULT_PROTOCOL,
    when_busy: WhenBusy = "wait",
    max_bandwidth: str | int | None = None,
    arena: Arena | None = None,
    at_exit: AtExit = "wait",
    then: Callable[[], None] | None = None,
) -> AsyncSave:
    """`async_save` to a blob; `then` is called in the writing thread once it is published, and belongs to the save."""
    started = time.perf_counter()
    if when_busy not in get_args(WhenBusy):
        raise UsageError(f"when_busy is 'wait' or 'raise', not {when_busy!r}")
    if at_exit not in get_args(AtExit):
        raise UsageError(f"at_exit is 'wait' or 'warn', not {at_exit!r}")
    check_host()
    bytes_per_s = parse_bandwidth(max_bandwidth)
    _warn_of_unseen()
    described = describe(obj, pickle_module=pickle_module, pickle_protocol=pickle_protocol)
    try:
        staged = stage(described, stem, arena or default_arena(), wait=when_busy == "wait")
    except BusyError:
        raise BusyError(
            f"{_names(_running)} is still being written: wait for its result(), or give when_busy='wait'"
        ) from None
    save = AsyncSave(blob.name, staged.layout.nbytes)
    stop = threading.Event()
    # Python waits for threads that are no daemons before it ends, also in a child process of multiprocessing.
    thread = threading.Thread(
        target=_write,
        args=(save, staged, blob, bytes_per_s, stop, then),
        name="mlstor-save",
        daemon=at_exit == "warn",
    )
    save.set_running_or_notify_cancel()
    _running[save] = _Job(thread, stop)
    save.stall_s = time.perf_counter() - started
    try:
        thread.start()
    except BaseException:
        del _running[save]
        staged.lease.release()
        raise
    return save


def _write(
    save: AsyncSave,
    staged: Staged,
    blob: Blob,
    bytes_per_s: int,
    stop: threading.Event,
    then: Callable[[], None] | None,
) -> None:
    try:
        published = staged.publish(blob, max_bandwidth=bytes_per_s, cancel=stop)
        if then is not None:
            then()
    except BaseException as error:  # whoever asks for the result gets it
        traceback.clear_frames(error.__traceback__)  # they hold the arena's memory
        _unseen[save] = error
        _end(save, staged)
        save.set_exception(error)
    else:
        _end(save, staged)
        save.set_result(published)


def _end(save: AsyncSave, staged: Staged) -> None:
    """Before the result is there: who waits for it may stage the next state at once."""
    staged.lease.release()
    _running.pop(save, None)


def _names(saves: Mapping[AsyncSave, object]) -> str:
    return ", ".join(save.path for save in list(saves)) or "another state"


def _warn_of_unseen() -> None:
    while _unseen:
        save, error = _unseen.popitem()
        warnings.warn(f"the background save of {save.path} failed: {error}", RuntimeWarning, stacklevel=3)


def _at_exit() -> None:
    """Only saves with ``at_exit="warn"`` are still running now."""
    for save, job in list(_running.items()):
        job.stop.set()
        job.thread.join()
        error = _unseen.get(save)
        if isinstance(error, OSError) and error.errno == errno.ECANCELED:
            del _unseen[save]
            warnings.warn(
                f"the process ends before the background save of {save.path} is done: it is given up, and what was "
                "there before stays",
                RuntimeWarning,
                stacklevel=1,
            )
    _warn_of_unseen()


def _begin_child() -> None:
    """The threads, and what they write, are the parent's."""
    _running.clear()
    _unseen.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_begin_child)
