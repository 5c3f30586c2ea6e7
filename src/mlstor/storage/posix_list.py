"""What files lie below a directory: many directories at once, in bounded memory."""

from __future__ import annotations

import os
import queue
import stat
import threading
from collections.abc import Iterator

from mlstor.operations import is_leftover
from mlstor.storage.store import Page

#: Directories are read, and files looked at, by so many threads: on a network file system each call is a round trip.
THREADS = 8
_PAGE = 1000
#: Pages that wait for the caller, and lists of names that wait for a thread.
_MOST_WAITING = 64


def walk(root: str, prefix: str = "") -> Iterator[Page]:
    """Pages of the files below `root` whose key begins with `prefix`; see `PosixStore.list`.

    Raises
    ------
    OSError
        If a directory can't be read; ENOENT if `root` does not exist.
    ValueError
        If `prefix` leaves `root`.
    """
    if prefix.startswith("/") or ".." in prefix.split("/"):
        raise ValueError(f"{prefix!r} is no prefix: keys are relative to {root} and do not leave it")
    os.stat(root)
    above, _, _ = prefix.rpartition("/")
    return _pages(_Walk(root, prefix, above))


def _pages(walk: _Walk) -> Iterator[Page]:
    threads = [threading.Thread(target=walk.work, name="mlstor-list", daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        while (page := walk.pages.get()) is not None:
            if isinstance(page, BaseException):
                raise page
            yield page
    finally:
        walk.stop()
        for thread in threads:
            thread.join()


class _Walk:
    """A listing under way: directories to read, lists of entries to look at, pages that are ready."""

    def __init__(self, root: str, prefix: str, above: str) -> None:
        self.root = root
        self.prefix = prefix
        self.pages: queue.Queue[Page | BaseException | None] = queue.Queue(_MOST_WAITING)
        self._directories = [above]
        self._lists: list[list[tuple[str, os.DirEntry[str]]]] = []
        self._busy = 0
        self._stopped = False
        self._changed = threading.Condition()

    def work(self) -> None:
        """One thread's part, to the end of the walk."""
        while True:
            with self._changed:
                while not (self._directories or self._lists or self._stopped) and self._busy:
                    self._changed.wait()
                if self._stopped or not (self._directories or self._lists):
                    break
                entries = self._lists.pop() if self._lists else None
                directory = "" if entries is not None else self._directories.pop()
                self._busy += 1
            error: BaseException | None = None
            try:
                if entries is not None:
                    self._look(entries)
                else:
                    self._scan(directory)
            except BaseException as found:  # it is raised where the pages are taken
                error = found
            if error is not None:
                self._put(error)
            with self._changed:
                self._busy -= 1
                last = not (self._busy or self._directories or self._lists)
                self._changed.notify_all()
            if last:
                self._put(None)

    def stop(self) -> None:
        """Ends the threads: nobody takes pages any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _put(self, page: Page | BaseException | None) -> None:
        while not self._stopped:
            try:
                self.pages.put(page, timeout=0.1)
                return
            except queue.Full:
                continue

    def _scan(self, directory: str) -> None:
        entries: list[tuple[str, os.DirEntry[str]]] = []
        try:
            found = os.scandir(os.path.join(self.root, directory))
        except (FileNotFoundError, NotADirectoryError):
            return  # it went meanwhile, or the prefix names none: nothing begins with it
        with found:
            for entry in found:
                key = f"{directory}/{entry.name}" if directory else entry.name
                if entry.name.startswith(".mlstor-") or is_leftover(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if f"{key}/".startswith(self.prefix) or self.prefix.startswith(f"{key}/"):
                        with self._changed:
                            self._directories.append(key)
                            self._changed.notify()
                elif key.startswith(self.prefix):
                    entries.append((key, entry))
                if len(entries) == _PAGE:
                    self._share(entries)
                    entries = []
                if self._stopped:
                    return
        self._look(entries)

    def _share(self, entries: list[tuple[str, os.DirEntry[str]]]) -> None:
        """Leaves a list of a large directory to another thread, unless enough of them wait."""
        with self._changed:
            if len(self._lists) < _MOST_WAITING:
                self._lists.append(entries)
                self._changed.notify()
                return
        self._look(entries)

    def _look(self, entries: list[tuple[str, os.DirEntry[str]]]) -> None:
        page = Page([], [])
        for key, entry in entries:
            try:
                found = entry.stat()
            except FileNotFoundError:  # it went meanwhile, or is a link to nothing
                continue
            if stat.S_ISREG(found.st_mode):
                page.keys.append(key)
                page.sizes.append(found.st_size)
        if page.keys:
            self._put(page)
