"""Targets: which rank writes where, and whether hosts see one another's files.

Nodes are real: ranks of one mpirun in mount and UTS namespaces of their own (``unshare -m -u``).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import launchers
import pytest

from mlstor.checkpoint import targets
from mlstor.errors import UsageError
from mlstor.world import Alone


def test_several_paths_are_dealt_round_robin_by_local_rank() -> None:
    drives = ["/nvme0", "/nvme1"]
    dealt = [targets.resolve(drives, rank=8 + i, local_rank=i, hostname="n1") for i in range(4)]
    assert dealt == ["/nvme0", "/nvme1", "/nvme0", "/nvme1"]


def test_fields_in_a_path_are_filled_in() -> None:
    path = targets.resolve(["/mnt/{host}/d{local_rank}/r{rank}"], rank=11, local_rank=3, hostname="n1")
    assert path == "/mnt/n1/d3/r11"


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert targets.resolve(["out"], rank=0, local_rank=0, hostname="n") == str(tmp_path / "out")


def test_an_unknown_field_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"\{node\}.*\{local_rank\} and \{host\}"):
        targets.resolve(["/mnt/{node}"], rank=0, local_rank=0, hostname="n")


def test_no_path_is_refused() -> None:
    with pytest.raises(UsageError, match="no PATH"):
        targets.resolve([], rank=0, local_rank=0, hostname="n")


def test_one_host_has_nobody_to_share_with(tmp_path: Path) -> None:
    sharing = targets.discover(Alone(), [str(tmp_path)], "run-1", asserted="shared")
    assert (sharing.kind, sharing.targets_by_host) == ("one-host", ((str(tmp_path),),))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "doesn't exist: create it"),
        (lambda path: path.write_text("x"), "is not a directory"),
    ],
)
def test_a_directory_that_is_none_is_refused(tmp_path: Path, make: object, message: str) -> None:
    assert callable(make)
    make(tmp_path / "target")
    for write in (True, False):
        with pytest.raises(UsageError, match=message):
            targets.check_directory(str(tmp_path / "target"), write=write)


def test_trying_a_directory_leaves_nothing(tmp_path: Path) -> None:
    targets.check_directory(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# --- nodes


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    if subprocess.run(["unshare", "-m", "-u", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no namespaces")
    return Nodes(tmp_path)


class Nodes:
    """Runs targets_case.py with each rank on a node of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._mpi = launchers.find("openmpi")

    def run(self, setups: list[str], *args: str) -> subprocess.CompletedProcess[str]:
        """A rank per shell command of `setups`, run in its namespaces, on hosts node-a, node-b, ..."""
        command = list(self._mpi.mpirun) + self._mpi.unbound
        for index, setup in enumerate(setups):
            program = [self._mpi.python, str(launchers.PROGRAMS / "targets_case.py"), *args]
            shell = f'hostname node-{"abcdef"[index]}; {setup or "true"}; exec "$@"'
            # prterun's temporary directory must stay visible: ranks find one another there
            rank = ["-n", "1", "unshare", "-m", "-u", "sh", "-c", shell, "sh", *program]
            command += [":", *rank] if index else rank
        return launchers.run(command, self.directory)


def _told(done: subprocess.CompletedProcess[str]) -> str:
    told = [line for line in done.stderr.splitlines() if line.startswith("told: ")]
    assert len(told) == 1, done.stderr
    return told[0]


def _tmpfs(path: Path) -> str:
    path.mkdir(exist_ok=True)
    return f"mount -t tmpfs -o size=1m tmpfs {path}"


def test_nodes_with_one_directory_find_it_shared(nodes: Nodes, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / ".mlstor-token-run-1-1").touch()  # of a killed run: must not be taken for a sight
    done = nodes.run(["", ""], str(target))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["kind"], answer["hosts"]) == ("shared", ["node-a", "node-b"])
    assert list(target.iterdir()) == []


def test_nodes_with_drives_of_their_own_are_per_node(nodes: Nodes, tmp_path: Path) -> None:
    mount = _tmpfs(tmp_path / "nvme")
    done = nodes.run([mount, mount], str(tmp_path / "nvme"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "per-node"


def test_a_directory_per_host_on_one_file_system_is_shared(nodes: Nodes, tmp_path: Path) -> None:
    for name in ("node-a", "node-b"):
        (tmp_path / name).mkdir()
    done = nodes.run(["", ""], str(tmp_path / "{host}"), "--rank-shift", "1")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["kind"] == "shared"
    assert answer["targets"] == [[str(tmp_path / "node-a")], [str(tmp_path / "node-b")]]


def test_what_only_some_nodes_see_is_refused_naming_them(nodes: Nodes, tmp_path: Path) -> None:
    target = tmp_path / "target"
    done = nodes.run(["", "", _tmpfs(target)], str(target))
    assert done.returncode == UsageError.exit_code
    told = _told(done)
    assert "shared for some hosts and per node for others" in told
    assert f"node-a does not see what node-c wrote in {target}" in told
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("private", "asserted", "seen"), [(True, "shared", "does not see"), (False, "per-node", "sees")]
)
def test_a_wrong_assertion_is_answered_with_what_was_seen(
    nodes: Nodes, tmp_path: Path, private: bool, asserted: str, seen: str
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    mount = _tmpfs(target) if private else ""
    done = nodes.run([mount, mount], str(target), "--asserted", asserted)
    assert done.returncode == UsageError.exit_code
    assert f"--{asserted} was given, but node-a {seen} what node-b wrote in {target}" in _told(done)


def test_a_rank_shift_across_private_drives_is_refused(nodes: Nodes, tmp_path: Path) -> None:
    mount = _tmpfs(tmp_path / "nvme")
    done = nodes.run([mount, mount], str(tmp_path / "nvme"), "--rank-shift", "1")
    assert done.returncode != 0
    assert "--rank-shift 1 reads what another host wrote, but the targets are per node" in done.stderr


def test_a_node_that_lacks_the_directory_is_named(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "mnt/sub").mkdir(parents=True)
    done = nodes.run(["", _tmpfs(tmp_path / "mnt")], str(tmp_path / "mnt/sub"))
    assert done.returncode == UsageError.exit_code
    told = _told(done)
    assert f"rank 1 on node-b: {tmp_path / 'mnt/sub'} doesn't exist" in told


def test_a_read_only_run_on_a_read_only_mount_knows_nothing(nodes: Nodes, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    mount = f"mount --bind {target} {target} && mount -o remount,ro,bind {target}"
    done = nodes.run([mount, mount], str(target), "--read-only")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "unknown"
    refused = nodes.run([mount, mount], str(target))
    assert refused.returncode == UsageError.exit_code
    assert "read-only file system" in _told(refused)
