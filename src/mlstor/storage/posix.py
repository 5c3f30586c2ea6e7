"""Directories as stores: objects are files, keys their paths below the directory, with ``/`` between names."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from mlstor.errors import UsageError
from mlstor.operations import DURABLE, Extent, ReadFile, Step, is_leftover
from mlstor.storage.posix_list import walk
from mlstor.storage.store import ObjectInfo, Page

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from mlstor._io import Engine, ObjectFiles
    from mlstor.settings import Settings

#: Files in flight per worker by default: each open of a file whose inode is not in memory waits for the disk.
IN_FLIGHT = 32
#: Staging per file in flight, where the setting is automatic: 64 MiB for two workers with 32 each.
SLOT_BYTES = 1 << 20
#: What `describe` gives as reason before anything was read.
NOTHING_READ = "nothing was read"
_DELETE_BATCH = 4096


def open(url: str, *, durable: bool = True, create: bool = False, settings: Settings | None = None) -> PosixStore:
    """The store of a directory.

    Parameters
    ----------
    url
        A path, or ``file:///path`` with %-escapes.
    durable
        A written object is synced, and so is its name, before it counts as written; True by default. Either way it
        shows only when it is complete.
    create
        Make the directory if it does not exist; False by default.
    settings
        Of the engines; by default what `Settings.resolve` finds.

    Raises
    ------
    UsageError
        If the URL is no local path, or the directory does not exist.
    OSError
        If the directory can't be made or looked at.
    """
    path = path_of(url)
    if create:
        os.makedirs(path, exist_ok=True)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UsageError(f"the directory {path} does not exist; make it, or check the path") from None
    if not stat.S_ISDIR(mode):
        raise UsageError(f"{path} is not a directory; give the directory that holds the files")
    return PosixStore(url, path, durable, settings)


def path_of(url: str) -> str:
    """The absolute path that a path or a file:// URL names.

    Raises
    ------
    UsageError
        If the URL names another host, or is empty.
    """
    path = url
    if url.startswith("file://"):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise UsageError(f"{url!r} names the host {parts.netloc!r}; a local path has three slashes: file:///path")
        path = unquote(url[len("file://") + len(parts.netloc) :])
    if not path or "\0" in path:
        raise UsageError(f"{url!r} names no directory")
    return os.path.abspath(path)


class PosixStore:
    """Files under a directory. Made by `open`; see `mlstor.storage.store.Store`.

    Pickles to its URL, options and settings. Subdirectories are made when a key needs them, and those that `delete`
    leaves empty are removed.
    """

    def __init__(self, url: str, path: str, durable: bool, settings: Settings | None) -> None:
        self.url = url
        self.path = path
        self.durable = durable
        self._settings = settings
        self._engine: Engine | None = None
        self._made: list[ObjectFiles] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.url, self.durable, self._settings)

    @property
    def steps(self) -> Step:
        """The steps of a write."""
        return DURABLE if self.durable else Step.PREALLOCATE | Step.RENAME

    def list(self, prefix: str = "") -> Iterator[Page]:
        """Pages of up to 1000 files whose key begins with `prefix`, in no order; directories are read in parallel.

        Links to files are followed, links to directories are not. What a killed write left (``.NAME.HEX.mlstor-tmp``)
        and names that begin with ``.mlstor-`` are left out, and so is what is no regular file.

        Raises
        ------
        OSError
            If a directory can't be read; ENOENT if the store's own does not exist.
        """
        return walk(self.path, prefix)

    def stat(self, key: str) -> ObjectInfo:
        """Size of a file, bytes.

        Raises
        ------
        OSError
            ENOENT if there is none, EISDIR for a directory, EINVAL for what is neither that nor a file.
        """
        path = self._path(key)
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", path)
        return ObjectInfo(found.st_size)

    def read(self, key: str, into: Buffer | None = None, offset: int = 0, nbytes: int | None = None) -> bytes | int:
        """A whole file or a range of it: its bytes, or how many of them were put `into` a writable buffer.

        Raises
        ------
        OSError
            ENODATA if the file ends before the range does.
        ValueError
            If the buffer is smaller than what is to be read.
        """
        path = self._path(key)
        if nbytes is None:
            nbytes = max(0, self.stat(key).nbytes - offset)
        target = memoryview(bytearray(nbytes) if into is None else into).cast("B")
        if target.nbytes < nbytes:
            raise ValueError(f"{path}: {nbytes} bytes do not fit into a buffer of {target.nbytes}")
        extent = Extent(offset, nbytes, target[:nbytes])
        self._own_engine().submit([ReadFile(path, [extent])])[0].wait()
        return target.tobytes() if into is None else nbytes

    def write(self, key: str, source: Buffer) -> None:
        """Make or replace a file; it shows only when it is complete, and durable if the store is."""
        path = self._path(key)
        engine = self._own_engine()
        try:
            engine.write_file(path, source, steps=self.steps)
        except FileNotFoundError:
            self._make_parents(key)
            engine.write_file(path, source, steps=self.steps)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files, and the directories that this leaves empty; one that isn't there is no error.

        Raises
        ------
        OSError
            The first that the storage gave; the others were tried all the same.
        """
        from mlstor._io import ObjectFiles

        files = ObjectFiles(self._own_engine(), self.path)
        waiting = iter(keys)
        parents: set[str] = set()
        refused: OSError | None = None
        while batch := list(islice(waiting, _DELETE_BATCH)):
            refused = self._delete_batch(files, batch) or refused
            parents.update(os.path.dirname(key) for key in batch)
        files.close()
        self._remove_empty(parents)
        if refused:
            raise refused

    def remove_leftovers(self, directory: str) -> int:
        """Remove what killed writes left below a directory, and the directories that this empties; how many files.

        Raises
        ------
        OSError
            If one can't be removed.
        """
        count, parents = 0, set()
        for above, _, names in os.walk(self._path(directory)):
            for name in filter(is_leftover, names):
                os.unlink(os.path.join(above, name))
                parents.add(os.path.relpath(above, self.path))
                count += 1
        self._remove_empty(parents)
        return count

    def transfers(self, *, workers: int = 0, in_flight: int = IN_FLIGHT) -> ObjectFiles:
        """Many files at once, `in_flight` per worker, on an engine of its own; 0 workers is the setting.

        Staging memory is workers x in_flight x the block (1 MiB where the setting is automatic).
        """
        from dataclasses import replace

        from mlstor._io import Engine, ObjectFiles
        from mlstor.settings import Settings

        settings = self._settings or Settings.resolve()
        chosen: dict[str, Any] = {
            "depth": in_flight,
            "block_bytes": settings.for_target(self.path).block_bytes or SLOT_BYTES,
        }
        if workers:
            chosen["workers"] = workers
        settings = replace(self._settings, **chosen) if self._settings else Settings.resolve(**chosen)
        files = ObjectFiles(Engine(settings), self.path, steps=self.steps, owns_engine=True)
        self._made.append(files)
        return files

    def describe(self) -> dict[str, Any]:
        """For the record: where, how it was read (direct: yes, no or unverified, and why), options."""
        from mlstor._io import alignment

        paths = sorted({(files.direct, files.reason) for files in self._made if files.reason != NOTHING_READ})
        return {
            "scheme": "file",
            "path": self.path,
            "fs_type": alignment(self.path)["fs_type"],
            "durable": self.durable,
            "direct": paths[0][0] if paths else "unverified",
            "reason": "; ".join(reason for _, reason in paths) or NOTHING_READ,
        }

    def close(self) -> None:
        """End the engines that were made; again: does nothing."""
        for files in self._made:
            files.close()
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _own_engine(self) -> Engine:
        """For single files: the process's, unless the store has settings of its own."""
        from mlstor._io import Engine, default_engine

        if self._settings is None:
            return default_engine()
        if self._engine is None:
            self._engine = Engine(self._settings)
        return self._engine

    def _path(self, key: str) -> str:
        names = key.split("/")
        if not key or key.startswith("/") or key.endswith("/") or ".." in names or "\0" in key:
            raise ValueError(f"{key!r} is no key: keys are relative to {self.path} and do not leave it")
        return os.path.join(self.path, key)

    def _make_parents(self, key: str) -> None:
        above = self.path
        for name in key.split("/")[:-1]:
            inner = os.path.join(above, name)
            try:
                os.mkdir(inner)
            except FileExistsError:
                pass
            else:
                if self.durable:  # the name lies in the directory above
                    directory = os.open(above, os.O_RDONLY | os.O_DIRECTORY)
                    try:
                        os.fsync(directory)
                    finally:
                        os.close(directory)
            above = inner

    def _delete_batch(self, files: ObjectFiles, keys: Sequence[str]) -> OSError | None:
        """Removes them; the first error, but for those that say that there is no such file."""
        from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, Op, zeros

        names = [os.fsencode(key) for key in keys]
        asked, done = zeros(len(keys), TRANSFER_DTYPE), zeros(len(keys), COMPLETION_DTYPE)
        at = 0
        for i, name in enumerate(names):
            asked[i]["tag"], asked[i]["op"] = i, Op.DELETE
            asked[i]["key_start"], asked[i]["key_nbytes"] = at, len(name)
            at += len(name)
        files.submit(asked, b"".join(names))
        files.reap(done, min_done=len(keys))
        for completion in done[done["result"] < 0]:
            code = -int(completion["result"])
            if code not in (errno.ENOENT, errno.ENOTDIR):
                return OSError(code, os.strerror(code), self._path(keys[int(completion["tag"])]))
        return None

    def _remove_empty(self, directories: set[str]) -> None:
        """The deepest first, and those above them that this empties; never the store's own."""
        for directory in sorted(directories, key=lambda name: name.count("/"), reverse=True):
            while directory:
                try:
                    os.rmdir(os.path.join(self.path, directory))
                except FileNotFoundError:
                    pass
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    break
                directory = os.path.dirname(directory)


def _reopen(url: str, durable: bool, settings: Settings | None) -> PosixStore:
    return open(url, durable=durable, settings=settings)
