"""What the tests of the engine share: small engines on both backends, file contents, subprocesses."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mlstor
from mlstor._io import AlignedBuffer, Engine, probe

SRC = Path(mlstor.__file__).parents[1]  # of the package that is being tested, installed or not
BLOCK = 64 << 10
BACKENDS = ("io_uring", "threads")
DIRECTS = ("auto", "off")


def small_engine(backend: str, **overrides: object) -> Engine:
    """An engine of few and small buffers, so that a test's file is many transfers of several workers."""
    if backend == "io_uring" and not probe()["io_uring"]:
        pytest.skip("io_uring is refused here")
    return Engine(**{"backend": backend, "workers": 2, "depth": 3, "block_bytes": BLOCK, **overrides})


@contextmanager
def engines() -> Iterator[dict[str, Engine]]:
    """One engine of each backend that this machine has, closed at the end."""
    made = {name: small_engine(name) for name in BACKENDS if name == "threads" or probe()["io_uring"]}
    try:
        yield made
    finally:
        for engine in made.values():
            engine.close()


def noise(nbytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def memory(nbytes: int, misaligned_by: int = 0) -> memoryview:
    """Writable memory of `nbytes` whose address is `misaligned_by` bytes past a multiple of 4096."""
    return memoryview(AlignedBuffer(nbytes + misaligned_by + 1))[misaligned_by : misaligned_by + nbytes]


def leftovers(directory: str | Path) -> list[str]:
    from mlstor.operations import is_leftover

    return [name for name in os.listdir(directory) if is_leftover(name)]


def python(code: str, *arguments: object, before: tuple[str, ...] = (), **keywords: object) -> subprocess.Popen[str]:
    """A Python process that runs `code` with mlstor importable; `before` is a command that runs it."""
    environment = {**os.environ, "PYTHONPATH": str(SRC), **keywords.pop("env", {})}  # type: ignore[dict-item]
    return subprocess.Popen(
        [*before, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **keywords,  # type: ignore[call-overload]
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 60) -> str:
    """Its output; fails unless it ends with 0 in time."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"not done after {timeout_s} s: {out}{err}")
    assert process.returncode == 0, f"exit {process.returncode}: {out}{err}"
    return out
