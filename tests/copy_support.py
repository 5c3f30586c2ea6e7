"""Runs of ``mlstor copy`` for the tests: in this process, as a program, or as ranks of a real mpirun."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import launchers
import numpy as np
from stream_support import StreamRan

from mlstor import cli
from mlstor.storage.posix import PosixStore
from mlstor.storage.transfers import COMPLETION_DTYPE

MODULE = ["-m", "mlstor.copy"]
MIB = 1 << 20
PART = 64 << 10
#: Parts of 64 KiB: objects of a few hundred KiB are large.
SMALL_PARTS = ("--part", "64KiB", "--memory", "512KiB")

#: Names that go wrong where one side escapes otherwise than the other, and that a file can have.
NAMES = ["plain", "with space", "a+b", "100%", "%2F", "q?x=1&y=2", "hash#tag", "ümläut", "日本語/ファイル",
         "dir/sub/leaf", "quote'\"", "trailing "]  # fmt: skip


class CopyBench:
    """Directories to copy between, and ways to do it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source, self.destination = directory / "source", directory / "destination"
        self.results = directory / "results"
        self.source.mkdir()

    def arguments(self, *options: object) -> list[str]:
        return [*map(str, options), "--no-live", "--results", str(self.results)]

    def run(self, *options: object) -> StreamRan:
        """A copy in this process, of what the options end with."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.main(["copy", *self.arguments(*options)])
        return StreamRan(code, out.getvalue(), err.getvalue(), self.results)

    def __call__(self, *options: object) -> StreamRan:
        """A copy between the two directories, which must succeed."""
        ran = self.run(*options, self.source, self.destination)
        assert ran.code == 0, ran.err + ran.out
        return ran

    def words(self, *options: object, nranks: int = 0) -> list[str]:
        import sys

        if not nranks:
            return [sys.executable, *MODULE, *self.arguments(*options)]
        mpi = launchers.find("openmpi")
        return [*mpi.mpirun, *mpi.unbound, "-n", str(nranks), mpi.python, *MODULE, *self.arguments(*options)]

    def mpi(self, nranks: int, *options: object) -> StreamRan:
        done = launchers.run(self.words(*options, nranks=nranks), self.directory)
        return StreamRan(done.returncode, done.stdout, done.stderr, self.results)


def make(root: Path, sizes: dict[str, int]) -> dict[str, bytes]:
    """Files of random bytes."""
    made = {}
    for name, size in sizes.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made[name] = os.urandom(size)
        path.write_bytes(made[name])
    return made


def files(root: Path) -> dict[str, bytes]:
    """All files below a directory, temporary ones too."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def objects(store: Any) -> dict[str, bytes]:
    """All objects of a store."""
    return {key: store.read(key) for page in store.list() for key in page.keys}


class Spoiling:
    """Transfers that flip a byte of each file they have written, if its name is among these."""

    def __init__(self, inner: Any, root: str, names: Iterable[str]) -> None:
        self._inner, self._root, self._names = inner, root, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def reap(self, out: Any, min_done: int = 1, timeout_s: float | None = None) -> int:
        count: int = self._inner.reap(out, min_done, timeout_s)
        if (np.frombuffer(out, COMPLETION_DTYPE)[:count]["op"] == 1).any():
            for name in self._names:
                flip(Path(self._root, name), 5000)
        return count


def flip(path: Path, at: int) -> None:
    """Change one byte, if it is as it was; once."""
    mark = path.with_name(f".mlstor-flipped-{path.name}")
    if path.exists() and not mark.exists():
        mark.touch()
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))


@contextmanager
def spoiling(monkeypatch: Any, root: Path, names: Iterable[str]) -> Iterator[None]:
    """Within this, what is written below `root` under these names is damaged as soon as it is there."""
    plain = PosixStore.transfers

    def transfers(self: PosixStore, **options: Any) -> Any:
        made = plain(self, **options)
        return Spoiling(made, self.path, names) if self.path == str(root) else made

    with monkeypatch.context() as patch:
        patch.setattr(PosixStore, "transfers", transfers)
        yield
