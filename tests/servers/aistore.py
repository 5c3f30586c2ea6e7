"""A real AIStore on loopback for tests: one proxy and two targets, built once from the released Go module.

`MLSTOR_TEST_AIS` names a directory with an `aisnode` that was built before; without it the module is built into the
user's cache, which takes two minutes once and needs Go 1.26.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from . import free_ports

VERSION = "v1.5.0"
MODULE = "github.com/NVIDIA/aistore"
# Looked at now: the tests themselves see no MLSTOR_* variable.
PREBUILT = os.environ.get("MLSTOR_TEST_AIS")

STARTS_S = 120.0
BUILDS_S = 1200.0

_TIMEOUTS = {
    "cplane_operation": "2s",
    "max_keepalive": "5s",
    "cold_get_conflict": "5s",
    "max_host_busy": "20s",
    "startup_time": "1m",
    "join_startup_time": "3m",
    "send_file_time": "5m",
    "ec_streams_time": "10m",
    "object_md": "2h",
}


def program(name: str = "aisnode") -> Path:
    """``aisnode`` or ``aisloader``; built if it isn't there. Skips the test where there is neither it nor Go."""
    if PREBUILT:
        prebuilt = Path(PREBUILT) / name
        if not prebuilt.is_file():
            raise FileNotFoundError(f"MLSTOR_TEST_AIS is {PREBUILT}, which has no {name}")
        return prebuilt
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlstor-tests" / f"aistore-{VERSION}"
    built = cache / name
    if not built.is_file():
        go = shutil.which("go")
        if go is None:
            pytest.skip("AIStore is built with Go, which is not installed")
        _build(go, cache, name)
    return built


def _build(go: str, cache: Path, name: str) -> None:
    # `go install MODULE@VERSION` would ask for a list of versions; a module file of our own says which
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "go.mod").write_text(f"module tools\n\ngo 1.26\n\nrequire {MODULE} {VERSION}\n")
        environment = {**os.environ, "CGO_ENABLED": "0", "GOBIN": directory}
        command = [go, "install", "-mod=mod", "-tags=mono", f"{MODULE}/cmd/{name}"]
        done = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, timeout=BUILDS_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{name} was not built: {done.stderr[-2000:]}")
        cache.mkdir(parents=True, exist_ok=True)
        # another process may be doing the same
        partial = cache / f"{name}.{os.getpid()}"
        shutil.move(Path(directory, name), partial)
        partial.replace(cache / name)


class Node:
    """One aisnode process, its directory and its three ports."""

    def __init__(self, cluster: Cluster, name: str, ports: list[int]) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{ports[0]}"
        self._cluster = cluster
        self._directory = cluster.directory / name
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        for part in ("conf", "log", "data"):
            (self._directory / part).mkdir(parents=True)
        networks = ("", "_intra_control", "_intra_data")
        self._local = {
            "confdir": str(self._directory / "conf"),
            "log_dir": str(self._directory / "log"),
            "host_net": {
                **{f"hostname{network}": "127.0.0.1" for network in networks},
                **{f"port{network}": str(port) for network, port in zip(networks, ports, strict=True)},
            },
            "fspaths": {},
            "test_fspaths": {
                "root": str(self._directory / "data"),
                "count": 0 if name == "proxy" else 1,
                "instance": 0,
            },
        }

    def start(self) -> None:
        local = self._directory / "node.json"
        local.write_text(json.dumps(self._local))
        command = [
            str(self._cluster.program),
            f"-config={self._cluster.config}",
            f"-local_config={local}",
            f"-role={'proxy' if self.name == 'proxy' else 'target'}",
        ]
        if self.name == "proxy":
            command.append(f"-ntargets={self._cluster.ntargets}")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AIS_")}
        environment["AIS_PRIMARY_EP"] = self._cluster.endpoint
        self._log = open(self._directory / "output", "ab")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, env=environment
        )

    def kill(self) -> None:
        """As a crash does: without a word to the others."""
        self._end(lambda process: process.kill())

    def stop(self) -> None:
        def ask(process: subprocess.Popen[bytes]) -> None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

        self._end(ask)

    def _end(self, how: Any) -> None:
        if self._process:
            how(self._process)
            self._process.wait()
            self._process = None
        if self._log:
            self._log.close()
            self._log = None

    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def said(self) -> str:
        """The end of what it wrote, for a test's message."""
        return (self._directory / "output").read_bytes()[-1500:].decode(errors="replace")


class Cluster:
    """A proxy and targets. `endpoint` is the proxy's URL."""

    def __init__(self, directory: Path, ntargets: int = 2, **sections: Any) -> None:
        self.program = program()
        self.directory = directory
        self.ntargets = ntargets
        ports = free_ports(3 * (ntargets + 1))
        self.endpoint = f"http://127.0.0.1:{ports[0]}"
        self.config = directory / "cluster.json"
        self.config.write_text(
            json.dumps(
                {
                    "backend": {},
                    "proxy": {"primary_url": self.endpoint, "original_url": self.endpoint, "discovery_url": ""},
                    "timeout": _TIMEOUTS,
                    "net": {
                        "l4": {"proto": "tcp"},
                        "http": {"idle_conn_time": "6s", "idle_conns_per_host": 32, "idle_conns": 256},
                    },
                    **sections,
                }
            )
        )
        names = ["proxy", *(f"target{number}" for number in range(ntargets))]
        self.nodes = [Node(self, name, ports[3 * i : 3 * i + 3]) for i, name in enumerate(names)]

    @property
    def targets(self) -> list[Node]:
        return self.nodes[1:]

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        self.wait()

    def wait(self) -> None:
        """Until buckets can be made, and what the primary calls its rebalancing state is final: the proxy calls itself
        ready long before either, and refuses changes and GetBatch until then.
        """
        deadline = time.monotonic() + STARTS_S
        last = "no attempt"
        while time.monotonic() < deadline:
            for node in self.nodes:
                if node.ended():
                    raise RuntimeError(f"AIStore's {node.name} ended: {node.said()}")
            try:
                self.call("POST", "/v1/buckets/mlstor-ready", {"action": "create-bck"})
                self.call("DELETE", "/v1/buckets/mlstor-ready", {"action": "destroy-bck"})
                self.call("GET", "/v1/health?prr=true")
                return
            except OSError as error:
                last = str(error)
                time.sleep(0.3)
        raise TimeoutError(f"AIStore did not come up ({last}): {self.nodes[0].said()}")

    def call(self, method: str, path: str, action: dict[str, Any] | None = None) -> Any:
        """A request to the proxy, by another HTTP client than mlstor's; the answer's JSON, None if there is none."""
        body = None if action is None else json.dumps(action).encode()
        request = urllib.request.Request(self.endpoint + path, body, method=method)
        if body:
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            said = answer.read()
        return json.loads(said) if said.startswith((b"{", b"[")) else None

    def map(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.call("GET", "/v1/daemon?what=smap")
        return answer

    def node_of(self, target_id: str) -> Node:
        url = self.map()["tmap"][target_id]["public_net"]["direct_url"]
        return next(node for node in self.targets if node.url == url)

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.stop()


@contextmanager
def running(directory: Path, ntargets: int = 2, **sections: Any) -> Iterator[Cluster]:
    """A cluster that is up; `sections` of the cluster's configuration replace or add to the usual ones."""
    cluster = Cluster(directory, ntargets, **sections)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


_shared: Cluster | None = None
_users = 0


@pytest.fixture(scope="session")
def aistore(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster of two targets for all tests of a session, which make buckets of their own."""
    # a fixture that several modules import is one in each of them
    global _shared, _users
    if _shared is None:
        cluster = Cluster(tmp_path_factory.mktemp("aistore"))
        try:
            cluster.start()
        except BaseException:
            cluster.stop()
            raise
        _shared = cluster
    _users += 1
    yield _shared
    _users -= 1
    if not _users:
        _shared.stop()
        _shared = None
