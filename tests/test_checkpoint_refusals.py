"""What can't be carried out is refused before the first byte, in one sentence, alone and under mpirun."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_support import MIB, Bench, Ran, need_root

LoopFactory = Callable[..., Path]


def refused(ran: Ran, *parts: str) -> str:
    """The sentence of a run that was refused as a user's mistake."""
    assert ran.code == 2, (ran.code, ran.out, ran.err)
    for part in parts:
        assert part in ran.sentence
    return ran.sentence


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model", "llama3-80b"], ["unknown model 'llama3-80b'; did you mean", "--workload"]),
        (["--scale", "-1"], ["--scale"]),
        (["--scale", "0"], ["--scale: '0' is not above zero; write it as 1/16"]),
        (["--scale", "half"], ["--scale", "half"]),
        (["--writes", "-1"], ["--writes -1 is too low; give 0 or more"]),
        (["--reads", "two"], ["--reads", "'two'"]),
        (["--writes", "0", "--reads", "0"], ["leaves nothing to do"]),
        (["--ranks", "0"], ["0"]),
        (["--ranks", "12", "--model", "llama3-70b", "--subset", "8"], ["--subset"]),
        (["--subset", "-3"], ["-3"]),
        (["--only-ranks", "8"], ["there is no rank 8; ranks are 0 to 7"]),
        (["--only-ranks", "a-b"], ["not a list of ranks"]),
        (["--depth", "5000"], ["depth"]),
        (["--workers", "-2"], ["workers"]),
        (["--block", "4000"], ["block"]),
        (["--block", "much"], ["--block", "much"]),
        (["--compressibility", "101"], ["0 to 100"]),
        (["--pause", "-1s"], ["--pause"]),
        (["--backend", "aio"], ["--backend", "io_uring"]),
        (["--profile", "fast"], ["--profile", "mlperf"]),
        (
            ["--profile", "mlperf", "--backend", "io_uring", "--block", "1MiB", "--depth", "4", "--workers", "9"],
            ["--profile mlperf fixes block", "leave out --block, --depth, --workers, --backend"],
        ),
        (["--run-id", "../x"], ["--run-id"]),
        (["--expect-ranks", "4"], ["--expect-ranks 4, but without a launcher there is 1 rank"]),
        (["--expect-nodes", "0"], ["--expect-nodes 0 is too low"]),
        (["--hosts", "4"], ["belong to --plan"]),
        (["--plan", "--hosts", "0"], ["0"]),
        (["--shared", "--per-node"], ["not allowed with argument"]),
        (["--wirtes", "4"], ["--wirtes", "--help"]),
        (["--workload", "/no/such.yaml"], ["can't read the workload file /no/such.yaml"]),
    ],
    ids=lambda value: "_".join(value) if value and value[0].startswith("--") else "",
)
def test_what_can_not_be_meant(bench: Bench, options: list[str], parts: list[str]) -> None:
    refused(bench.run(*options, bench.target), *parts)
    assert list(bench.target.iterdir()) == []
    assert list(bench.results.glob("*")) == []


def test_no_path_and_no_model(bench: Bench) -> None:
    refused(bench.run(), "name the directory to measure")
    refused(bench.command("checkpoint"), "name the directory to measure")
    refused(bench.command("checkpoint", bench.target), "--model MODEL or --workload FILE", "--model help")


def test_model_help_lists_the_models(bench: Bench) -> None:
    listed = bench.command("checkpoint", "--model", "help")
    assert listed.code == 0
    assert listed.out.startswith("llama3-8b ")
    assert "opt-175b-full" in listed.out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--wirtes", "4"], "--wirtes"),
        (["--model", "llama3-80b"], "mlstor: unknown model 'llama3-80b'"),
        (["/no/such/directory"], "mlstor: /no/such/directory doesn't exist"),
    ],
)
def test_under_mpirun_the_sentence_is_said_once(bench: Bench, options: list[str], sentence: str) -> None:
    """And not once more for each rank that the launcher stops because rank 0 has left."""
    paths = [] if Path(options[0]).is_absolute() else [bench.target]
    refused(bench.mpi(4, *options, *paths), sentence)


def test_under_mpirun_a_wrong_number_of_ranks_is_refused(bench: Bench) -> None:
    refused(bench.mpi(2, "--expect-ranks", 3, bench.target), "--expect-ranks 3, but Open MPI mpirun started 2 ranks")


def test_a_target_that_is_none(bench: Bench) -> None:
    file = bench.directory / "file"
    file.write_text("x")
    refused(bench.run(file), f"{file} is not a directory")
    refused(bench.run(bench.directory / "none"), "doesn't exist: create it (mkdir -p")


def test_results_that_can_not_be_kept(bench: Bench) -> None:
    bench.results.write_text("a file")
    refused(bench.run(bench.target), f"the results directory {bench.results} can't be made", "--results")
    assert list(bench.target.iterdir()) == []


def test_a_read_only_mount(bench: Bench, loop_fs: LoopFactory) -> None:
    mount = loop_fs("ext4", 16 * MIB)
    assert bench.run("--run-id", "run", "--reads", 0, mount).code == 0
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    refused(bench.run(mount), "lies on a read-only file system: remount it rw")
    read = bench.run("--run-id", "run", "--writes", 0, mount)
    assert read.code == 0, read.err
    assert read.record.phases[0].verification.verified_nbytes == bench.layout().total_nbytes


def test_a_tmpfs_that_is_too_small(bench: Bench, tmpfs_mount: Callable[[int], Path]) -> None:
    mount = tmpfs_mount(2 * MIB)
    refused(bench.run("--writes", 2, mount), "has room for", "free space of the file system", "but the run needs")
    assert list(mount.iterdir()) == []
    assert bench.run("--writes", 1, mount).code == 0


def test_too_few_inodes(bench: Bench, tmp_path: Path) -> None:
    need_root()
    mount = tmp_path / "few"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=18", "tmpfs", mount], check=True)
    try:
        refused(bench.run(mount), "free inodes, but the run needs", "fewer --writes")
    finally:
        subprocess.run(["umount", mount], check=True)


def test_the_ephemeral_storage_of_a_pod(bench: Bench, overlay_mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLSTOR_EPHEMERAL_STORAGE_LIMIT", "1MiB")
    refused(bench.run(overlay_mount), "the pod's ephemeral-storage limit")
    assert list(overlay_mount.iterdir()) == []
    monkeypatch.setenv("MLSTOR_EPHEMERAL_STORAGE_LIMIT", "64MiB")
    ran = bench.run(overlay_mount)
    assert ran.code == 0
    room = next(check for check in ran.record.preflight.checks if check.name == "room")
    assert (room.limited_by, room.available) == ("the pod's ephemeral-storage limit", 64 * MIB)
    assert ran.record.settings["ephemeral_storage_limit_bytes"].source == "environment"


def test_memory_is_not_storage(bench: Bench, tmpfs_mount: Callable[[int], Path]) -> None:
    ran = bench.run("--reads", 1, tmpfs_mount(16 * MIB))
    assert ran.code == 0, ran.err
    assert "\nmemory, not storage\n" in ran.out
    record = ran.record
    assert record.targets[0].is_memory
    assert record.phases[1].cached.verdict == "yes"


def test_a_file_system_in_an_image_in_memory_is_memory_too(
    bench: Bench, tmpfs_mount: Callable[[int], Path], overlay_mount: Path
) -> None:
    below = tmpfs_mount(40 * MIB)
    image, mount = below / "image", below / "mnt"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        for path in (mount, overlay_mount):
            ran = bench.run("--reads", 1, path)
            assert ran.code == 0, ran.err
            assert ran.record.targets[0].is_memory
            cached = ran.record.phases[1].cached
            assert (cached.verdict, cached.how) == ("yes", "the files are in memory")
    finally:
        subprocess.run(["umount", mount], check=True)


def test_the_rule_of_three_times_the_clients_memory(bench: Bench) -> None:
    met = bench("--client-memory", "100kB").record.preflight.mlperf_memory_rule
    assert met is not None
    assert (met.verdict, met.memory_source, met.client_memory_bytes) == ("met", "--client-memory", 100_000)
    ran = bench("--client-memory", "1GiB")
    assert "MLPerf's rule not met" in ran.out
    assert "is not exceeded: caches must be flushed" in ran.out
