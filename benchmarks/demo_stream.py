"""``make demo-stream``: objects written, and read twice in random order, by two MPI processes.

On a directory, on a real S3 server (SeaweedFS) and, where Go is, on a real AIStore, both on loopback and stopped
afterwards.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

BUCKET = "demo"
# 400 objects of 256 KiB to 1 MiB: about a quarter of a GB on each of the three.
STREAM = ("--fill", "400", "--min-size", "256KiB", "--max-size", "1MiB", "--epochs", "2", "--verify", "--cleanup")


def main() -> int:
    """Run the three streams below the directory that is named, or here."""
    where = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    with tempfile.TemporaryDirectory(prefix="mlstor-demo.", dir=where) as name:
        directory = Path(name)
        (directory / "objects").mkdir()
        for title, server in (("a directory", plain), ("S3 (SeaweedFS)", s3), ("AIStore", ais)):
            print(f"\n=== {title}\n", flush=True)
            with server(directory) as words:
                if not words:
                    continue
                code = stream(directory, words)
                if code:
                    return code
    return 0


def stream(directory: Path, words: list[str]) -> int:
    """One run under mpirun; its exit code."""
    # Two processes on a laptop: more of them than cores must not be refused, and none is bound to one core.
    launch = ["mpirun", "-n", "2", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    if os.geteuid() == 0:
        launch.append("--allow-run-as-root")
    command = [*launch, sys.executable, "-m", "mlstor.stream", *words, *STREAM, "--results", str(directory / "results")]
    return subprocess.run(command, check=False).returncode


@contextlib.contextmanager
def plain(directory: Path) -> Iterator[list[str]]:
    """A directory of the disk."""
    yield [str(directory / "objects")]


@contextlib.contextmanager
def s3(directory: Path) -> Iterator[list[str]]:
    """SeaweedFS, without identities."""
    import urllib.request

    from tests.servers import weed

    with weed.running(directory / "weed") as up:
        request = urllib.request.Request(f"{up.endpoint}/{BUCKET}", method="PUT")
        with urllib.request.urlopen(request, timeout=30):
            pass
        yield [f"s3://{BUCKET}/objects", "--endpoint", up.endpoint, "-o", "anonymous=yes"]


@contextlib.contextmanager
def ais(directory: Path) -> Iterator[list[str]]:
    """AIStore of one proxy and two targets, built once; left out where Go is not there to build it."""
    from tests.servers import aistore

    if aistore.PREBUILT is None and shutil.which("go") is None:
        print("left out: AIStore is built with Go, which is not installed")
        yield []
        return
    print("building AIStore, if that was not done before (two minutes), and starting it (20 s)", flush=True)
    (directory / "ais").mkdir()
    with aistore.running(directory / "ais") as cluster:
        cluster.call("POST", f"/v1/buckets/{BUCKET}", {"action": "create-bck"})
        yield [f"ais://{BUCKET}/objects", "--endpoint", cluster.endpoint]


if __name__ == "__main__":
    sys.exit(main())
