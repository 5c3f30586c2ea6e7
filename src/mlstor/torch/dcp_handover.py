"""Ranks on one host hand bytes over: a file in shared memory per giver, filled and emptied in rounds.

Whether a round is filled or emptied is said by files of no bytes, made and removed: system calls, so that what was
written before is seen after, on every processor.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from mlstor.torch.dcp_share import SEGMENT_BYTES, SHM, Share, Slot

#: Between two looks.
_LOOK_S = 0.001
#: Between two looks whether the others are alive.
_ALIVE_S = 0.25
#: A rank that has not begun to read after so long failed before: torch tells the others only once all are done.
_BEGIN_S = 60.0
#: Of the directories in shared memory.
_PREFIX = "mlstor-"


class _Part(NamedTuple):
    """A stretch of a slot that one round holds."""

    slot: int
    #: where in the slot
    start: int
    nbytes: int
    #: where in the segment
    place: int


class _Stream:
    """What one giver hands over, as a rank sees it: it is the giver, or one of the takers."""

    def __init__(self, giver: int, slots: list[Slot], indices: dict[int, int], path: str) -> None:
        self.giver = giver
        self.slots = slots
        #: index in this rank's plan of each slot that it gives or takes
        self.indices = indices
        self.rounds = list(_rounds(slots))
        self.takers = sorted({taker for slot in slots for taker in slot.takers})
        #: the round that is next to be filled (by the giver) or emptied (by a taker)
        self.round = 0
        #: of this rank, for slots: their bytes
        self.memory: dict[int, torch.Tensor] = {}
        self.path = path
        self.map: mmap.mmap | None = None
        #: the giver gives no more, or gave this rank up
        self.lost = False

    def over(self) -> bool:
        return self.round == len(self.rounds)


class Handover:
    """One rank's part in handing over. Use it in a ``with``: on the way out the others learn that it has ended.

    Parameters
    ----------
    share
    places
        By giver, the index in this rank's plan of each slot that it gives or takes.
    tensors
        By that index.
    """

    def __init__(self, share: Share, places: Mapping[int, dict[int, int]], tensors: Mapping[int, torch.Tensor]) -> None:
        self._share = share
        self._directory = os.path.join(SHM, _PREFIX + share.token)
        self._dead: set[int] = set()
        self._looked_s = self._began_s = 0.0
        self._streams = {
            giver: _Stream(giver, slots, places[giver], os.path.join(self._directory, f"{giver}.bytes"))
            for giver, slots in share.slots.items()
            if giver in places
        }
        self._tensors = tensors

    def __enter__(self) -> Handover:
        _sweep()
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        self._mark(f"{self._share.rank}.here", _process().encode())
        self._began_s = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.leave("over" if kind is None else "failed")

    def leave(self, how: str) -> None:
        """Tell the others that this rank has ended: ``over`` or ``failed``."""
        self._mark(f"{self._share.rank}.{how}")  # first: whatever fails here, nobody must wait for this rank
        self._streams.clear()
        self._look()
        if all(self._ended(rank) for rank in self._share.pids):
            shutil.rmtree(self._directory, ignore_errors=True)  # another rank may be at it

    def run(self) -> list[int]:
        """Give and take; returns the items (indices in the plan) that no giver handed over."""
        with torch.no_grad():
            return self._run()

    def _run(self) -> list[int]:
        missed: list[int] = []
        for giver, stream in list(self._streams.items()):
            if giver == self._share.rank and not self._open_giver(stream):
                self._mark(f"{giver}.gives-nothing")
                del self._streams[giver]
        while self._streams:
            moved = False
            for giver, stream in list(self._streams.items()):
                own = giver == self._share.rank
                while self._give(stream) if own else self._take(stream):
                    moved = True
                if stream.over() and (not own or self._emptied(stream, stream.round - 1)):
                    del self._streams[giver]
                    self._close(stream, own)
                    continue
                if not own and (self._ended(giver) or self._marked(f"{giver}.gives-nothing")):
                    stream.lost = True  # a giver does not end before all whom it waits for have everything
                if stream.lost:
                    missed += stream.indices.values()
                    del self._streams[giver]
                    self._close(stream, own)
            if not moved:
                time.sleep(_LOOK_S)
                self._look()
        return missed

    def _open_giver(self, stream: _Stream) -> bool:
        """Makes the segment; False if this rank can't hand over."""
        if len(stream.indices) < len(stream.slots):  # a planner has dropped items after the plan was made
            return False
        for slot, index in stream.indices.items():
            tensor = self._tensors[index]
            if tensor.dtype != stream.slots[slot].dtype or not _has_elements_alone(tensor):
                return False  # it was converted: the stored bytes are gone
        try:
            fd = os.open(stream.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # all others have ended without this rank, and removed the directory
            return False
        try:
            nbytes = max(sum(part.nbytes for part in parts) for parts in stream.rounds)
            try:
                os.posix_fallocate(fd, 0, nbytes)  # now, and not with SIGBUS later
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
                    raise
                os.unlink(stream.path)
                return False
            stream.map = mmap.mmap(fd, nbytes)
        finally:
            os.close(fd)
        return True

    def _source(self, stream: _Stream, slot: int) -> torch.Tensor:
        """The bytes of what this rank gives, on its device; slots come one after the other."""
        if slot not in stream.memory:
            stream.memory.clear()
            tensor = self._tensors[stream.indices[slot]].detach()
            if not _is_straight(tensor):
                tensor = tensor.resolve_conj().resolve_neg().contiguous()
            stream.memory[slot] = _bytes_of(tensor)
        return stream.memory[slot]

    def _put(self, stream: _Stream, part: _Part, content: torch.Tensor) -> None:
        """Puts a part of what this rank takes into its tensor."""
        slot = stream.slots[part.slot]
        tensor = self._tensors[stream.indices[part.slot]].detach()
        straight = tensor.dtype == slot.dtype and _is_straight(tensor)
        if part.slot not in stream.memory:
            stream.memory[part.slot] = (
                _bytes_of(tensor) if straight else torch.empty(slot.nbytes, dtype=torch.uint8, device="cpu")
            )
        with torch.inference_mode():  # these are bytes, whatever mode the tensor was made in
            stream.memory[part.slot][part.start : part.start + part.nbytes].copy_(content)
        if part.start + part.nbytes == slot.nbytes:
            whole = stream.memory.pop(part.slot)
            if not straight:
                tensor.copy_(whole.view(slot.dtype).view(tensor.shape))

    def _give(self, stream: _Stream) -> bool:
        """Fills the next round, if the one before is emptied."""
        number = stream.round
        if stream.over() or (number and not self._emptied(stream, number - 1)):
            return False
        assert stream.map is not None
        for slot, start, nbytes, place in stream.rounds[number]:
            content = torch.frombuffer(stream.map, dtype=torch.uint8, count=nbytes, offset=place)
            content.copy_(self._source(stream, slot)[start : start + nbytes])
        stream.round += 1
        self._mark(f"{stream.giver}.filled-{number}")
        return True

    def _take(self, stream: _Stream) -> bool:
        """Empties the next round, if it is filled."""
        number = stream.round
        if stream.lost or stream.over() or not self._marked(f"{stream.giver}.filled-{number}"):
            return False
        if stream.map is None:
            try:
                fd = os.open(stream.path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:  # the giver has ended without this rank
                stream.lost = True
                return False
            try:
                stream.map = mmap.mmap(fd, 0)  # torch warns of memory that it may not write to
            finally:
                os.close(fd)
        for part in stream.rounds[number]:
            if part.slot in stream.indices:
                content = torch.frombuffer(stream.map, dtype=torch.uint8, count=part.nbytes, offset=part.place)
                self._put(stream, part, content)
        if self._marked(f"{stream.giver}.without-{self._share.rank}"):  # what was copied may be of a later round
            stream.lost = True
            return False
        stream.round += 1
        self._mark(f"{stream.giver}.emptied-{number}-{self._share.rank}")
        return True

    def _emptied(self, stream: _Stream, number: int) -> bool:
        """Whether all takers have a round; one that is gone is given up first, and reads this should it come back."""
        for taker in stream.takers:
            if self._marked(f"{stream.giver}.emptied-{number}-{taker}"):
                continue
            if not self._ended(taker):
                return False
            self._mark(f"{stream.giver}.without-{taker}")
        return True

    def _close(self, stream: _Stream, own: bool) -> None:
        stream.memory.clear()
        stream.map = None  # not closed: a tensor on it may be in an error's traceback
        if own:
            with contextlib.suppress(FileNotFoundError):  # as in `_mark`
                os.unlink(stream.path)

    def _mark(self, name: str, content: bytes = b"") -> None:
        path = os.path.join(self._directory, name)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # all others have ended without this rank, and removed the directory
            return
        try:
            os.write(fd, content)
        finally:
            os.close(fd)

    def _marked(self, name: str) -> bool:
        return os.path.exists(os.path.join(self._directory, name))

    def _ended(self, rank: int) -> bool:
        """Whether nothing more comes of a rank."""
        return rank in self._dead or self._marked(f"{rank}.over") or self._marked(f"{rank}.failed")

    def _look(self) -> None:
        """Now and then: which ranks died, or never began?"""
        now = time.monotonic()
        if now - self._looked_s < _ALIVE_S:
            return
        self._looked_s = now
        for rank, pid in self._share.pids.items():
            late = now - self._began_s > _BEGIN_S and not self._marked(f"{rank}.here")
            if late or not _is_alive(pid):
                self._dead.add(rank)


def _has_elements_alone(tensor: torch.Tensor) -> bool:
    """Whether it is, on any device, its elements and strides and nothing else."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_nested)
    )


def _is_straight(tensor: torch.Tensor) -> bool:
    """Whether its memory is its elements in row-major order."""
    alone = _has_elements_alone(tensor)
    return alone and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _rounds(slots: list[Slot]) -> Iterator[list[_Part]]:
    """What each round holds."""
    parts: list[_Part] = []
    room = SEGMENT_BYTES
    for number, slot in enumerate(slots):
        start = 0
        while start < slot.nbytes:
            nbytes = min(room, slot.nbytes - start)
            parts.append(_Part(number, start, nbytes, SEGMENT_BYTES - room))
            start += nbytes
            room -= nbytes
            if not room:
                yield parts
                parts, room = [], SEGMENT_BYTES
    if parts:
        yield parts


def _process() -> str:
    """This process, as others that see the same shared memory may know it."""
    return f"{os.stat('/proc/self/ns/pid').st_ino} {os.getpid()}"


def _sweep() -> None:
    """Removes what loads left whose processes were all killed."""
    for entry in os.scandir(SHM):
        if not entry.name.startswith(_PREFIX):
            continue
        try:
            if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            here = [mark.path for mark in os.scandir(entry.path) if mark.name.endswith(".here")]
            said = [Path(path).read_text().split() for path in here]
        except OSError:  # its own ranks remove it
            continue
        own = _process().split()[0]
        if said and all(len(words) == 2 and words[0] == own and not _is_alive(int(words[1])) for words in said):
            shutil.rmtree(entry.path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state = file.read().rpartition(b")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in (b"Z", b"X")
