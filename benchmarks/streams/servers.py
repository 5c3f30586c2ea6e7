"""The servers of the benchmark: real ones on loopback, and a directory."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.streams import aisloader

READ, WRITTEN = "bench", "puts"  # buckets


@dataclass(frozen=True)
class Server:
    """A server that is up.

    Attributes
    ----------
    url : str
        Of the objects that are read.
    endpoint : str
        Empty for a directory.
    put_url : str
        Of the objects that are written.
    empty : callable
        Forget all that was written, where the server would keep what was written over.
    """

    url: str
    endpoint: str = ""
    put_url: str = ""
    empty: Callable[[], None] = lambda: None


@contextlib.contextmanager
def serving(kind: str, directory: Path) -> Iterator[Server]:
    """``"s3"`` is SeaweedFS, ``"ais"`` AIStore, ``"files"`` a directory; stopped and removed at the end."""
    if kind == "files":
        (directory / "files").mkdir()
        yield Server(str(directory / "files"))
    elif kind == "s3":
        from tests.servers import weed

        with weed.running(directory) as up:
            for bucket in (READ, WRITTEN):
                _call("PUT", f"{up.endpoint}/{bucket}")

            def empty() -> None:
                # SeaweedFS keeps what was written over until it is compacted; a bucket goes with all its volumes.
                _call("DELETE", f"{up.endpoint}/{WRITTEN}")
                _call("PUT", f"{up.endpoint}/{WRITTEN}")

            yield Server(f"s3://{READ}", up.endpoint, f"s3://{WRITTEN}", empty)
    else:
        from tests.servers import aistore

        find_aisloader(directory)
        with aistore.running(directory) as cluster:
            for bucket in (READ, WRITTEN):
                cluster.call("POST", f"/v1/buckets/{bucket}", {"action": "create-bck"})
            yield Server(f"ais://{READ}", cluster.endpoint, f"ais://{WRITTEN}")


def _call(method: str, url: str) -> None:
    import urllib.request

    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=60):
        pass


def find_aisloader(directory: Path) -> None:
    """aisloader: where it was built before, or built now from the same module as the server."""
    from tests.servers import aistore

    program = aistore.program("aisloader")
    os.environ[aisloader.PROGRAM] = str(program)
    subprocess.run([str(program), "-version"], check=True, capture_output=True, cwd=directory)
