"""Directories of blobs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mlstor.blob.files import FileBlob, sync_directory

if TYPE_CHECKING:
    from mlstor._io import Engine


class FileDirectory:
    """See `types.BlobDirectory`."""

    def __init__(self, path: str | os.PathLike[str], engine: Engine | None = None) -> None:
        self.name = os.fsdecode(path)
        self._engine = engine
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<FileDirectory {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return FileDirectory, (self.name,)

    def blob(self, relative: str) -> FileBlob:
        engine = self._engine if self._pid == os.getpid() else None  # a child can't use its parent's
        return FileBlob(os.path.join(self.name, relative), engine)

    def names(self) -> list[str]:
        try:
            with os.scandir(self.name) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        except FileNotFoundError:
            return []

    def remove(self, names: Iterable[str]) -> None:
        removed = False
        for name in names:
            try:
                os.unlink(os.path.join(self.name, name))
            except FileNotFoundError:
                continue
            removed = True
        if removed:
            sync_directory(self.name)

    def make(self) -> None:
        missing = []
        path = os.path.abspath(self.name)
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            with contextlib.suppress(
                FileExistsError
            ):  # made by another meanwhile; if it is a file, the next step says so
                os.mkdir(path)
            sync_directory(os.path.dirname(path))
