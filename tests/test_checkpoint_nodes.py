"""Runs over two nodes: ranks of one mpirun in mount and UTS namespaces of their own (``unshare -m -u``)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import launchers
import pytest
from checkpoint_support import MIB, MODULE, Bench, Ran

HOSTS = ["node-a", "node-b"]


class Nodes:
    """A bench whose ranks run on nodes of their own."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._mpi = launchers.find("openmpi")

    def run(self, setups: list[str], *options: object) -> Ran:
        """A rank per shell command of `setups`, which is run first in its namespaces."""
        command = [*self._mpi.mpirun, *self._mpi.unbound]
        for index, setup in enumerate(setups):
            shell = f'hostname {HOSTS[index]}; {setup or "true"}; exec "$@"'
            program = [self._mpi.python, *MODULE, *self.bench.arguments(*options)]
            rank = ["-n", "1", "unshare", "-m", "-u", "sh", "-c", shell, "sh", *program]
            command += [":", *rank] if index else rank
        done = launchers.run(command, self.bench.directory)
        return Ran(done.returncode, done.stdout, done.stderr, self.bench.results)

    def drives(self) -> list[str]:
        """Setups that give each node a drive of its own at one mount point, which outlives the run."""
        mountpoint = self.bench.target
        setups = []
        for host in HOSTS:
            image = self.bench.directory / f"{host}.ext4"
            with image.open("wb") as file:
                file.truncate(32 * MIB)
            subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
            setups.append(f"mount -o loop {image} {mountpoint}")
        return setups


@pytest.fixture
def nodes(bench: Bench) -> Nodes:
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    if subprocess.run(["unshare", "-m", "-u", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no namespaces")
    return Nodes(bench)


def test_a_shared_directory_with_a_rank_shift_to_the_other_node(nodes: Nodes) -> None:
    ran = nodes.run(["", ""], "--rank-shift", 4, "--direct", "off", "--shared", "--expect-nodes", 2, nodes.bench.target)
    assert ran.code == 0, ran.err
    record = ran.record
    assert [host.hostname for host in record.hosts] == HOSTS
    assert record.world.process_host == [0, 1]
    assert {(target.host, target.sharing, target.sharing_how) for target in record.targets} == {
        (0, "shared", "asserted"), (1, "shared", "asserted"),
    }  # fmt: skip
    read = record.phases[1]
    assert read.cached.verdict == "no"
    assert "another host had written what this one read" in read.cached.how
    assert read.verification.verified_nbytes == nodes.bench.layout().total_nbytes
    assert list(nodes.bench.target.iterdir()) == []
    room = [check for check in record.preflight.checks if check.name == "room"]
    assert [check.host for check in room] == [0, 1]
    assert all(check.needed >= nodes.bench.layout().total_nbytes for check in room)


def test_a_rank_shift_proves_the_first_read_of_a_checkpoint_alone(nodes: Nodes) -> None:
    """What a host has read through its own cache, the cache may answer the next time."""
    options = ("--rank-shift", 4, "--direct", "off", "--no-evict", "--writes", 2, "--reads", 3)
    ran = nodes.run(["", ""], *options, nodes.bench.target)
    assert ran.code == 0, ran.err
    reads = [(phase.checkpoint, phase.cached.verdict) for phase in ran.record.phases if phase.op == "read"]
    assert reads == [(1, "no"), (2, "no"), (1, "unknown")]


def test_drives_per_node(nodes: Nodes) -> None:
    """Manifest, room and files are per host; who lacks files is named; what one host wrote can be read there again."""
    bench = nodes.bench
    setups = nodes.drives()
    options = ("--run-id", "run", bench.target)
    wrote = nodes.run(setups, "--reads", 0, *options)
    assert wrote.code == 0, wrote.err
    record = wrote.record
    assert [(target.host, target.sharing, target.sharing_how) for target in record.targets] == [
        (0, "per-node", "found"), (1, "per-node", "found"),
    ]  # fmt: skip
    room = [check for check in record.preflight.checks if check.name == "room"]
    total = bench.layout().total_nbytes
    assert [total / 2 < check.needed < total for check in room] == [True, True]
    assert "per node" in wrote.out
    assert list(bench.target.iterdir()) == []  # all is below the nodes' own mounts
    read = nodes.run(setups, "--writes", 0, *options)
    assert read.code == 0, read.err
    assert read.record.phases[0].verification.verified_nbytes == total
    shifted = nodes.run(setups, "--writes", 0, "--rank-shift", 4, *options)
    assert shifted.code == 2
    assert "--rank-shift 4 reads what another host wrote, but the targets are per node" in shifted.sentence
    swapped = nodes.run(setups[::-1], "--writes", 0, *options)
    assert swapped.code == 2
    assert "node-a lacks " in swapped.sentence
    assert "zero_pp_rank_0_mp_rank_0_model_states.pt of run run" in swapped.sentence


def test_a_node_without_room_is_named(nodes: Nodes) -> None:
    target = nodes.bench.target
    sizes = [f"mount -t tmpfs -o size={size} tmpfs {target}" for size in ("64m", "512k")]
    ran = nodes.run(sizes, "--run-id", "run", target)
    assert ran.code == 2
    assert f"{target} on node-b has room for" in ran.sentence


def test_a_directory_per_host_on_one_file_system(nodes: Nodes) -> None:
    for host in HOSTS:
        (nodes.bench.target / host).mkdir()
    pattern = Path(nodes.bench.target, "{host}")
    ran = nodes.run(["", ""], "--run-id", "run", "--reads", 1, "--keep", pattern)
    assert ran.code == 0, ran.err
    for host, ranks in zip(HOSTS, ("0123", "4567"), strict=True):
        names = [Path(name).name for name in nodes.bench.files() if name.startswith(host) and name.endswith(".pt")]
        assert {name.split("_")[3] for name in names} == set(ranks)
    assert nodes.bench.command("clean", "run", pattern).code == 0
    assert nodes.bench.files() == {}


@pytest.mark.parametrize(
    ("options", "scarce"), [("size=1200k", "has room for"), ("size=64m,nr_inodes=22", "free inodes")]
)
def test_hosts_with_directories_on_one_file_system_need_room_together(nodes: Nodes, options: str, scarce: str) -> None:
    """There is enough for each of them alone."""
    target = nodes.bench.target
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", target], check=True)
    try:
        for host in HOSTS:
            (target / host).mkdir()
        ran = nodes.run(["", ""], "--run-id", "run", target / "{host}")
        assert ran.code == 2, ran.err
        assert scarce in ran.sentence
        assert nodes.bench.files() == {}
        alone = nodes.bench.run("--run-id", "run", "--only-ranks", "0-3", target / HOSTS[0])
        assert alone.code == 0, alone.err
    finally:
        subprocess.run(["umount", target], check=True)
