"""Damage between writing and reading: verify names the file, the offset and what lies there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_support import Bench, Ran

from mlstor.checkpoint import rundir
from mlstor.results.phase import Damage

NAMES = [f"zero_pp_rank_{rank}_mp_rank_0_optim_states.pt" for rank in range(8)]
BLOCK = 4096


@pytest.fixture
def written(bench: Bench) -> Bench:
    bench("--run-id", "run", "--reads", 0, "--writes", 2)
    return bench


def put(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def read_damaged(bench: Bench, *options: object) -> tuple[Ran, list[Damage]]:
    ran = bench.run("--run-id", "run", "--writes", 0, "--reads", 2, *options, bench.target)
    assert ran.code == 3, ran.err
    record = ran.record
    assert record.status == "complete"
    return ran, [one for phase in record.phases for one in phase.verification.damage]


def test_one_flipped_byte(written: Bench) -> None:
    path = written.file("run", NAMES[3])
    put(path, 10_000, bytes([path.read_bytes()[10_000] ^ 0x10]))
    ran, [one] = read_damaged(written)
    assert (one.file, one.offset, one.nbytes, one.kind, one.rank) == (str(path), 10_000, 1, "corrupt", 3)
    assert ran.sentence == f"mlstor: 1 damaged block of 4 KiB: {path}: 1 byte at offset 10000: corrupt"
    assert "1 block of 4 KiB DAMAGED" in ran.out


def test_the_last_byte_of_a_file(written: Bench) -> None:
    path = written.file("run", NAMES[7], checkpoint=2)
    size = path.stat().st_size
    put(path, size - 1, bytes([path.read_bytes()[-1] ^ 1]))
    _, [one] = read_damaged(written)
    assert (one.file, one.offset, one.nbytes) == (str(path), size - 1, 1)


def test_a_zeroed_block(written: Bench) -> None:
    path = written.file("run", NAMES[0])
    put(path, 3 * BLOCK, bytes(BLOCK))
    ran, [one] = read_damaged(written)
    assert (one.file, one.offset, one.nbytes, one.kind) == (str(path), 3 * BLOCK, BLOCK, "zeroed")
    assert f"{path}: 4,096 bytes at offset 12288: zeroed" in ran.sentence


def test_two_files_swapped(written: Bench) -> None:
    first, second = written.file("run", NAMES[1]), written.file("run", NAMES[2])
    first.rename(first.with_suffix(".x"))
    second.rename(first)
    first.with_suffix(".x").rename(second)
    ran, damage = read_damaged(written)
    by_file = {one.file: one for one in damage if one.offset < BLOCK}
    assert {one.kind for one in damage} == {"other-file"}
    assert (by_file[str(first)].found_file, by_file[str(second)].found_file) == (NAMES[2], NAMES[1])
    phase = ran.record.phases[0]
    blocks = sum(-(-path.stat().st_size // BLOCK) for path in (first, second))
    assert phase.verification.damaged_blocks == blocks
    assert len(phase.verification.damage) + phase.verification.damage_dropped == blocks
    assert f"{blocks} damaged blocks of 4 KiB" in ran.sentence
    assert "the record lists further ones" in ran.sentence


def test_a_block_of_another_offset(written: Bench) -> None:
    path = written.file("run", NAMES[1])
    put(path, 5 * BLOCK, path.read_bytes()[2 * BLOCK : 3 * BLOCK])
    _, [one] = read_damaged(written)
    assert (one.kind, one.offset, one.found_offset) == ("other-offset", 5 * BLOCK, 2 * BLOCK)


def test_a_file_of_another_checkpoint(written: Bench) -> None:
    first, second = (written.file("run", NAMES[4], checkpoint) for checkpoint in (1, 2))
    second.write_bytes(first.read_bytes())
    _, damage = read_damaged(written)
    assert {(one.file, one.kind, one.found_checkpoint) for one in damage} == {(str(second), "other-checkpoint", 1)}


def test_a_stale_file_of_an_older_run_of_the_same_id(written: Bench) -> None:
    path = written.file("run", NAMES[5])
    old = path.read_bytes()
    manifest = rundir.load(str(written.target), "run")
    assert manifest is not None
    written("--run-id", "run", "--reads", 0, "--writes", 2)
    path.write_bytes(old)
    ran, damage = read_damaged(written)
    assert {(one.file, one.kind, one.found_run) for one in damage} == {
        (str(path), "other-run", f"{manifest.run_key:016x}")
    }
    assert "other-run" in ran.sentence


def test_a_file_cut_short_is_refused_before_the_first_read(written: Bench) -> None:
    path = written.file("run", NAMES[6])
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    ran = written.run("--run-id", "run", "--writes", 0, written.target)
    assert ran.code == 2
    assert f"{path} has {size - 1} bytes" in ran.sentence
    assert f"but {size} were written" in ran.sentence
    path.unlink()
    assert f"lacks {path} of run run" in written.run("--run-id", "run", "--writes", 0, written.target).sentence


@pytest.mark.parametrize("backend", ["io_uring", "threads"])
@pytest.mark.parametrize("direct", ["auto", "off"])
def test_damage_is_found_by_every_way_of_reading(written: Bench, backend: str, direct: str) -> None:
    path = written.file("run", NAMES[3])
    put(path, 40_000, b"????")
    _, [one] = read_damaged(written, "--backend", backend, "--direct", direct)
    assert (one.file, one.kind) == (str(path), "corrupt")
    assert 40_000 <= one.offset < 40_004


def test_mlperf_compares_only_when_asked(written: Bench) -> None:
    put(written.file("run", NAMES[3]), 40_000, b"????")
    options = ("--run-id", "run", "--writes", 0, "--reads", 1, "--profile", "mlperf", "--pause", 0)
    ran = written(*options)
    assert "nothing: what was read was not compared" in ran.out
    assert written.run(*options, "--verify", written.target).code == 3
    assert written.run(*options[:6], "--no-verify", written.target).code == 0


def test_under_mpirun_every_rank_knows_and_one_says(written: Bench) -> None:
    path = written.file("run", NAMES[7])  # rank 7 is read by the last process
    put(path, 0, b"????")
    ran = written.mpi(2, "--run-id", "run", "--writes", 0, written.target)
    assert ran.code == 3
    assert f"1 damaged block of 4 KiB: {path}: " in ran.sentence


def broken_after_the_write(bench: Bench, change: Callable[[Path], None]) -> Ran:
    """A run whose file is changed between its write and its read phase."""
    options = ("--run-id", "run", "--pause", "0.5s", bench.target)
    underway = bench.start(*options, scale="1/65536")
    path = bench.file("run", NAMES[2])
    manifest = bench.target / "run/manifest.json"
    underway.wait_for(lambda: manifest.exists() and b'"complete": [\n  1' in manifest.read_bytes())
    change(path)
    return underway.wait()


def test_a_file_cut_short_between_the_phases_fails_the_run_naming_it(bench: Bench) -> None:
    def cut(path: Path) -> None:
        with path.open("r+b") as file:
            file.truncate(5000)

    ran = broken_after_the_write(bench, cut)
    path = bench.file("run", NAMES[2])
    assert ran.code == 1
    assert "the file is shorter than it should be: bytes from 5000 on are missing" in ran.sentence
    assert str(path) in ran.sentence
    record = ran.record
    assert (record.status, [phase.op for phase in record.phases]) == ("failed", ["write", "read"])
    assert record.error is not None
    assert (record.error.rank, record.error.file) == (0, str(path))
    assert bench.command("clean", "run", bench.target).code == 0
    assert list(bench.target.iterdir()) == []
