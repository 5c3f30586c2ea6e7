"""Memory that states are copied to before they are written: aligned, reused, one state at a time."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from ctypes import memmove
from types import TracebackType

import torch

from mlstor._io import AlignedBuffer
from mlstor.errors import MlstorError, UsageError
from mlstor.units import format_both, parse_size

_HUGE_BYTES = 2 << 20
#: What one thread copies at a time, and from where on several do: starting one costs as much as copying 1 MiB.
_CHUNK_BYTES = 16 << 20
_ALONE_BELOW_BYTES = 64 << 20
#: More threads than this don't copy faster: the memory is the limit.
_MOST_THREADS = 4
_PORTABLE = 1  # cudaHostRegisterPortable


class BusyError(MlstorError):
    """The arena is in use: the state that was staged before is still being written."""


class Lease:
    """The arena, as long as one state lies in it. A context manager; `release` gives the arena back.

    Made by `Arena.lease`.
    """

    def __init__(self, arena: Arena, memory: AlignedBuffer, nbytes: int) -> None:
        self._arena = arena
        #: hold it as long as the bytes are read
        self.memory = memory
        self.nbytes = nbytes
        #: of the first byte, a multiple of 4096
        self.address = memory.address
        #: the bytes, writable
        self.view = memoryview(memory)[:nbytes]

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def stage(self, storages: Sequence[tuple[int, torch.UntypedStorage]]) -> None:
        """Copy storages of any device to their places.

        Parameters
        ----------
        storages
            (position in the arena, storage). The copies are complete when this returns.
        """
        host, other = [], []
        for position, storage in storages:
            nbytes = storage.nbytes()
            if position < 0 or position + nbytes > self.nbytes:
                raise ValueError(f"{nbytes} bytes at {position} don't fit into a lease of {self.nbytes}")
            if not nbytes:
                continue
            if is_host(storage):
                host.append((self.address + position, storage.data_ptr(), nbytes))
            else:
                other.append((position, storage))
        self._start_device_copies(other)
        copy_memory(host)
        for device in {storage.device for _, storage in other if storage.device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()

    def _start_device_copies(self, storages: Sequence[tuple[int, torch.UntypedStorage]]) -> None:
        if any(storage.device.type == "cuda" for _, storage in storages):
            self._arena.pin()
        for position, storage in storages:
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            place = torch.frombuffer(self.memory, dtype=torch.uint8, offset=position, count=storage.nbytes())
            place.copy_(source, non_blocking=storage.device.type == "cuda")

    def release(self) -> None:
        """Give the arena back: nobody reads these bytes any more. A second call does nothing."""
        self._arena._take_back(self)


class Arena:
    """One piece of aligned memory that states are staged into, one after another.

    It grows when a larger state comes, and is never written to while it is leased.

    Parameters
    ----------
    most_bytes
        Bound on its size (``"16GiB"``). Default 0: as large as the largest state.

    Notes
    -----
    After a fork the child's arena is empty and free: the parent's bytes are not the child's.
    """

    def __init__(self, most_bytes: str | int = 0) -> None:
        self._most_bytes = parse_size(most_bytes)
        self._begin()
        _arenas.add(self)

    def _begin(self) -> None:
        self._free = threading.Condition()
        self._memory: AlignedBuffer | None = None
        self._holder: Lease | None = None
        self._pinned = False

    def __repr__(self) -> str:
        return f"<Arena of {self.nbytes} bytes>"

    @property
    def nbytes(self) -> int:
        """Size of the memory that it holds now."""
        return self._memory.nbytes if self._memory else 0

    @property
    def leased(self) -> bool:
        """Whether a state lies in it that is still needed."""
        return self._holder is not None

    def lease(self, nbytes: int, *, wait: bool = True) -> Lease:
        """The arena for one state; what it held before is gone.

        Parameters
        ----------
        nbytes
        wait
            Until it is given back, or raise at once.

        Raises
        ------
        BusyError
            If it is leased, and `wait` is false.
        UsageError
            If `nbytes` is beyond the arena's bound.
        MemoryError
        """
        if self._most_bytes and nbytes > self._most_bytes:
            raise UsageError(
                f"the state needs {format_both(nbytes)} and the arena holds at most {format_both(self._most_bytes)}: "
                "give a larger most_bytes, or save without staging"
            )
        with self._free:
            if self._holder is not None and not wait:
                raise BusyError("the arena is in use: the state that was staged before is still being written")
            while self._holder is not None:
                self._free.wait()
            self._holder = Lease(self, self._sized(nbytes), nbytes)
            return self._holder

    def _sized(self, nbytes: int) -> AlignedBuffer:
        """The memory, replaced if it is too small: what was there is freed first."""
        if self._memory is None or self._memory.nbytes < nbytes:
            self._drop()
            # Some room above, for a pickle that grows by a few bytes; untouched, it is free.
            size = -(-(nbytes + nbytes // 16) // _HUGE_BYTES) * _HUGE_BYTES
            if self._most_bytes:
                size = max(min(size, self._most_bytes), nbytes)
            self._memory = AlignedBuffer(max(size, 1))
        return self._memory

    def pin(self) -> None:
        """Page-lock the memory, so that a CUDA device copies to it at full speed, without a wait for each storage."""
        if self._pinned or self._memory is None:
            return
        # Any: torch.cuda.cudart() is a module of C functions without types
        code = int(torch.cuda.cudart().cudaHostRegister(self._memory.address, self._memory.nbytes, _PORTABLE))  # type: ignore[no-untyped-call]
        if code:
            warnings.warn(
                f"CUDA could not pin the staging memory (error {code}): copies from the device are slower",
                RuntimeWarning,
                stacklevel=2,
            )
        self._pinned = code == 0

    def _drop(self) -> None:
        if self._pinned and self._memory is not None:
            torch.cuda.cudart().cudaHostUnregister(self._memory.address)  # type: ignore[no-untyped-call]
        self._memory, self._pinned = None, False

    def clear(self) -> None:
        """Free the memory; the next lease gets new.

        Raises
        ------
        BusyError
            If it is leased.
        """
        with self._free:
            if self._holder is not None:
                raise BusyError("the arena is in use: wait for the save")
            self._drop()

    def _take_back(self, lease: Lease) -> None:
        with self._free:
            if self._holder is lease:
                self._holder = None
                self._free.notify()


def is_host(storage: torch.UntypedStorage) -> bool:
    """Whether the processor can copy a storage's bytes itself."""
    return storage.device.type == "cpu"


def copy_memory(moves: Sequence[tuple[int, int, int]]) -> None:
    """Copy (to, from, bytes) between addresses, without the GIL and with several threads if it is much."""
    total = sum(nbytes for _, _, nbytes in moves)
    if total < _ALONE_BELOW_BYTES:
        for move in moves:
            memmove(*move)
        return
    left: deque[tuple[int, int, int]] = deque()
    for to, source, nbytes in moves:
        for start in range(0, nbytes, _CHUNK_BYTES):
            left.append((to + start, source + start, min(_CHUNK_BYTES, nbytes - start)))

    def work() -> None:
        while True:
            try:
                move = left.popleft()
            except IndexError:
                return
            memmove(*move)

    helpers = [
        threading.Thread(target=work, name="mlstor-stage", daemon=True)
        for _ in range(min(_MOST_THREADS, len(os.sched_getaffinity(0))) - 1)
    ]
    started = []
    try:
        for helper in helpers:
            helper.start()
            started.append(helper)
        work()
    finally:  # after Ctrl-C too nobody may go on writing: the memory is about to be given back
        left.clear()
        for helper in started:
            helper.join()


_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()
_default: Arena | None = None
_lock = threading.Lock()


def default_arena() -> Arena:
    """This process's arena, made when first needed."""
    global _default
    with _lock:
        if _default is None:
            _default = Arena()
        return _default


def _begin_child() -> None:
    global _default, _lock
    _lock = threading.Lock()
    _default = None
    for arena in list(_arenas):
        arena._begin()


os.register_at_fork(after_in_child=_begin_child)
