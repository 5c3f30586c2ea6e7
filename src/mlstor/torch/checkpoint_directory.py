"""`CheckpointDirectory`: numbered checkpoints of which only whole ones are found again, and old ones removed.

A checkpoint is its data, ``step-00000123.pt``, and a marker, ``step-00000123.json``, which is published once the data
are durable. The marker says which file holds the data, its size, and the CRC-32 of the zip's directory, which holds the
CRC-32 of every record. What has no marker is not there.
"""

from __future__ import annotations

import errno
import json
import operator
import os
import re
import threading
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from mlstor.blob.target import open_directory
from mlstor.blob.types import make_pieces
from mlstor.errors import CorruptionError, UsageError
from mlstor.formats.scrub import scrub
from mlstor.formats.zip_directory import read_directory
from mlstor.operations import TEMPORARY_SUFFIX, is_leftover
from mlstor.torch.loading import load
from mlstor.torch.saving import name_of, opening, save_to
from mlstor.torch.saving_async import AsyncSave, begin

if TYPE_CHECKING:
    from mlstor._io import Engine
    from mlstor.blob.types import Blob
    from mlstor.storage.store import Store

#: Of the marker's JSON.
FORMAT = "mlstor-checkpoint-1"
#: A marker is far smaller; what is larger is none.
_MOST_MARKER_BYTES = 64 << 10


#: What this process is writing now: place and name of the data, and the step.
_busy: dict[tuple[str, str], int] = {}
_lock = threading.Lock()


class Marker(NamedTuple):
    """What the marker of a checkpoint says."""

    step: int
    #: name of the data, in the same directory
    data: str
    nbytes: int
    #: where the zip's directory starts, which reaches to the end, and its CRC-32
    directory_offset: int
    directory_crc32: int
    #: UTC, ISO 8601
    created: str


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint of a `CheckpointDirectory`."""

    step: int
    #: path or URL of the data, a file that `torch.load` reads
    path: str
    nbytes: int
    #: UTC, ISO 8601
    created: str
    _how: Mapping[str, Any] = field(repr=False, compare=False)

    def load(self, map_location: Any = None, **arguments: Any) -> Any:
        """The state, verified; arguments as those of `mlstor.torch.load`."""
        return load(self.path, map_location, **self._how, **arguments)


class CheckpointDirectory:
    """Numbered checkpoints in a directory, or under a prefix of an object store.

    One process saves into it under one `prefix`: it removes what others, now dead, left. Any number may read.

    Parameters
    ----------
    path_or_url
        Made when first saved to.
    keep
        How many of the newest checkpoints stay after a save. Default 3; 0: all.
    prefix
        Names start with it. Default ``step``. Ranks that save each a state of their own take one each.
    engine, store, options
        As `mlstor.torch.save`.

    Raises
    ------
    UsageError
        If an argument or the URL can't be.
    """

    def __init__(
        self,
        path_or_url: str | os.PathLike[str],
        keep: int = 3,
        *,
        prefix: str = "step",
        engine: Engine | None = None,
        store: Store | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(keep, int) or keep < 0:
            raise UsageError(f"keep={keep}: give how many checkpoints stay, or 0 for all")
        if not isinstance(prefix, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", prefix):
            raise UsageError(f"prefix={prefix!r}: use letters, digits, '_', '.' and '-'")
        self.keep = keep
        self.prefix = prefix
        self._how = {"engine": engine, "store": store, "options": options}
        self._directory = open_directory(name_of(path_or_url), engine=engine, **opening(store, options))
        place = self._directory.name
        self._place = place if "://" in place else os.path.abspath(place)
        self._name = re.compile(re.escape(prefix) + r"-([0-9]{8,})(?:\.[0-9]+)?\.pt")
        self._marker = re.compile(re.escape(prefix) + r"-([0-9]{8,})\.json")

    def __repr__(self) -> str:
        return f"<CheckpointDirectory {self._directory.name} keep={self.keep}>"

    def save(self, step: int, state: Any, **arguments: Any) -> str:
        """Save a state, durably; then remove what is beyond `keep`.

        Parameters
        ----------
        step
            0 or more. A checkpoint of this step that is there stays the valid one until the new one is durable.
        state
            Anything that `torch.save` takes.
        **arguments
            As those of `mlstor.torch.save`: `max_bandwidth`, `pickle_protocol`, ...

        Returns
        -------
        str
            Path or URL of the data.

        Raises
        ------
        UsageError
            For a step that can't be, or as `save`.
        OSError
            If the storage fails; the checkpoints that were there are still there.
        """
        step = _number(step)
        data = self._begin(step)
        try:
            blob = self._directory.blob(data)
            save_to(state, blob, data.removesuffix(".pt"), **arguments)
            self._commit(step, blob, data)
        finally:
            self._end(data)
        return blob.name

    def save_async(self, step: int, state: Any, **arguments: Any) -> AsyncSave:
        """As `save`, in the background; arguments as those of `mlstor.torch.async_save`.

        Returns
        -------
        AsyncSave
            Done when the checkpoint is committed, and what is beyond `keep` removed.
        """
        step = _number(step)
        data = self._begin(step)
        try:
            blob = self._directory.blob(data)
            future = begin(
                state,
                blob,
                data.removesuffix(".pt"),
                **arguments,
                then=lambda: self._commit(step, blob, data),
            )
        except BaseException:
            self._end(data)
            raise
        future.add_done_callback(lambda _: self._end(data))
        return future

    def steps(self) -> list[int]:
        """The committed steps, lowest first; of their data nothing is read."""
        return sorted(self._markers(self._directory.names()))

    def latest(self, *, verify: bool = False) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None if there is none.

        Its size and the directory at its end are compared with what the marker says: one short read, whatever its size.
        One that is damaged or lacks its data is passed over, with a warning that says why.

        Parameters
        ----------
        verify
            Also read all of it and compare every CRC-32. `Checkpoint.load` does that anyway.

        Raises
        ------
        OSError
            If the storage fails: an older checkpoint is no answer to that.
        """
        steps = self.steps()
        while steps:
            step = steps.pop()
            try:
                return self._checked(step, verify)
            except CorruptionError as error:
                why = str(error)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODATA):
                    raise
                why = f"{error.filename}: {error.strerror}"
                now = self.steps()
                if step not in now:  # pruned meanwhile by its writer, which has newer ones
                    steps = now
                    continue
            warnings.warn(f"checkpoint {step} is passed over: {why}", RuntimeWarning, stacklevel=2)
        return None

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of one step, checked as `latest` does.

        Raises
        ------
        OSError
            ENOENT if it isn't there.
        CorruptionError
            If it is not what was saved.
        """
        return self._checked(step, False)

    def remove(self, step: int) -> None:
        """Remove one checkpoint; one that isn't there is no error."""
        names = self._directory.names()
        self._clean(names, [name for name, found in self._marked(names) if found == step])

    # Names.

    def _marked(self, names: Iterable[str]) -> Iterator[tuple[str, int]]:
        for name in names:
            if match := self._marker.fullmatch(name):
                yield name, int(match[1])

    def _markers(self, names: Iterable[str]) -> dict[int, str]:
        return {step: name for name, step in self._marked(names)}

    def _marker_name(self, step: int) -> str:
        return f"{self.prefix}-{step:08d}.json"

    def _clean(self, names: list[str], markers: list[str]) -> list[str]:
        """Remove these markers, then what no marker names: data, and what killed writers left. Gives what stays.

        Data without a marker don't count, a marker without data would have to be passed over: so markers go first.
        """
        self._directory.remove(markers)
        names = [name for name in names if name not in markers]
        marked = self._markers(names)
        with _lock:
            busy = {data: step for (place, data), step in _busy.items() if place == self._place}
        dead, data_of = [], defaultdict(list)
        for name in names:
            inner = name[1 : -len(TEMPORARY_SUFFIX) - 9] if is_leftover(name) else name
            if match := self._name.fullmatch(inner):
                if inner == name and int(match[1]) in marked:
                    data_of[int(match[1])].append(name)
                elif inner not in busy:
                    dead.append(name)
            elif inner != name and (match := self._marker.fullmatch(inner)) and int(match[1]) not in busy.values():
                dead.append(name)
        if any(not is_leftover(name) for name in dead):
            # What another thread has committed, and is done with, since the names were listed.
            committed = self._markers(self._directory.names())
            dead = [n for n in dead if not ((match := self._name.fullmatch(n)) and int(match[1]) in committed)]
        for step, found in data_of.items():
            if len(found) > 1:
                dead += set(self._superseded(step, found)) - busy.keys()
        self._directory.remove(dead)
        return [name for name in names if name not in dead]

    def _superseded(self, step: int, data: list[str]) -> list[str]:
        """Which of several data of one step its marker does not name; none if the marker is damaged."""
        try:
            named = self._read_marker(step).data
        except CorruptionError:
            return []
        return [name for name in data if name != named]

    def _begin(self, step: int) -> str:
        """A name for the data that nothing has: a valid checkpoint is never written over. `_end` frees it."""
        self._directory.make()
        names = self._clean(self._directory.names(), [])
        newest = max(self._markers(names), default=-1)
        if step < newest:
            warnings.warn(
                f"checkpoint {step} is saved while {newest} is in {self._directory.name}, which stays the latest: "
                f"remove({newest}) if the training went back",
                RuntimeWarning,
                stacklevel=3,
            )
        stem = f"{self.prefix}-{step:08d}"
        data, attempt = f"{stem}.pt", 0
        with _lock:
            while data in names or (self._place, data) in _busy:
                attempt += 1
                data = f"{stem}.{attempt}.pt"
            _busy[self._place, data] = step
        return data

    def _end(self, data: str) -> None:
        with _lock:
            _busy.pop((self._place, data), None)

    # Commit and check.

    def _commit(self, step: int, blob: Blob, data: str) -> None:
        """The marker, made of what can be read back; then what the new checkpoint makes superfluous goes."""
        info = blob.stat()
        archive = read_directory(blob.read, info.nbytes, blob.name)
        tail = blob.read(archive.directory_offset, info.nbytes - archive.directory_offset)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        marker = Marker(step, data, info.nbytes, archive.directory_offset, zlib.crc32(tail), created)
        text = json.dumps({"format": FORMAT, **marker._asdict()}, indent=1).encode()
        _publish_bytes(self._directory.blob(self._marker_name(step)), text)
        try:
            self._prune(step)
        except OSError as error:
            warnings.warn(
                f"checkpoint {step} is saved, but older ones could not be removed: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _prune(self, step: int) -> None:
        names = self._directory.names()
        markers = {**self._markers(names), step: self._marker_name(step)}
        kept = {*sorted(markers)[-self.keep :], step}  # [-0:] is all
        self._clean(names, [markers[old] for old in sorted(markers.keys() - kept)])

    def _checked(self, step: int, verify: bool) -> Checkpoint:
        marker = self._read_marker(step)
        blob = self._directory.blob(marker.data)
        try:
            nbytes = blob.stat().nbytes
        except FileNotFoundError:
            if self._read_marker(step) == marker:
                raise
            return self._checked(step, verify)  # the step was saved again meanwhile
        if nbytes != marker.nbytes:
            raise CorruptionError(f"{blob.name}: it has {nbytes} bytes, and was saved with {marker.nbytes}")
        tail = blob.read(marker.directory_offset, nbytes - marker.directory_offset)
        if zlib.crc32(tail) != marker.directory_crc32:
            raise CorruptionError(f"{blob.name}: the directory at its end is not what was written")
        if verify:
            _read_through(blob)
        return Checkpoint(step, blob.name, nbytes, marker.created, self._how)

    def _read_marker(self, step: int) -> Marker:
        blob = self._directory.blob(self._marker_name(step))
        nbytes = blob.stat().nbytes
        if not 0 < nbytes <= _MOST_MARKER_BYTES:
            raise CorruptionError(f"{blob.name}: a marker of {nbytes} bytes is none")
        try:
            found = json.loads(blob.read(0, nbytes))
            if found.pop("format") != FORMAT:
                raise ValueError("another format")
            marker = Marker(**found)
            numbers = (marker.step, marker.nbytes, marker.directory_offset, marker.directory_crc32)
            if not all(type(number) is int for number in numbers) or not 0 <= marker.directory_offset < marker.nbytes:
                raise ValueError("numbers that can't be")
            if marker.step != step or not self._name.fullmatch(marker.data):
                raise ValueError("another checkpoint's")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptionError(f"{blob.name}: the marker is damaged ({error})") from None
        return marker


def _number(step: int) -> int:
    """A step that JSON takes: NumPy's and torch's integers are none."""
    if not hasattr(step, "__index__") or operator.index(step) < 0:
        raise UsageError(f"step={step!r}: give a whole number from 0 on")
    return operator.index(step)


def _publish_bytes(blob: Blob, data: bytes) -> None:
    import numpy as np

    memory = np.frombuffer(data, np.uint8)
    blob.publish(len(data), make_pieces([(0, len(data), memory.ctypes.data, -1)]), keep=memory)


def _read_through(blob: Blob) -> None:
    """Compare every CRC-32; what is damaged, or could not be read, is raised."""
    for found in scrub(blob):
        if found.status == "error":
            raise OSError(errno.EIO, found.why, blob.name)
        if found.status != "ok":
            raise CorruptionError(f"{blob.name}: {found.record or 'the file'} at offset {found.offset}: {found.why}")


def _begin_child() -> None:
    """What the parent is writing stays busy here too; who held the lock is not here."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_begin_child)
