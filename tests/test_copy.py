"""Copies as users run them: what arrives, what is left alone, what is said of what did not arrive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import copy_support
import launchers
import msgspec
import pytest
from copy_support import MIB, NAMES, PART, SMALL_PARTS, CopyBench, files, make
from fuse_faults import faulty

from mlstor.copy import parts, resume
from mlstor.copy.tally import CopyTally
from mlstor.results.stream_workload import CopyWorkload


@pytest.fixture
def copy(tmp_path: Path) -> CopyBench:
    return CopyBench(tmp_path)


def journals(bench: CopyBench) -> list[Path]:
    return sorted(bench.results.glob(".copy-*/*"))


SIZES = {name: 7 * at * at for at, name in enumerate(NAMES)}
MANY = SIZES | {"empty": 0, "one part": PART, "large": 5 * PART + 1, "larger": 700_001, "whole parts": 4 * PART}


def test_files_of_all_sizes_and_names_arrive(copy: CopyBench) -> None:
    made = make(copy.source, MANY)
    record = copy(*SMALL_PARTS).stream
    assert files(copy.destination) == made
    phase, work = record.phases[0], record.workload
    assert isinstance(work, CopyWorkload)
    assert (record.status, phase.name, phase.complete, phase.skipped_count) == ("complete", "copy", True, 0)
    assert (work.count, work.nbytes, work.resumed, work.part_nbytes) == (len(made), sum(MANY.values()), False, PART)
    for op in ("get", "put"):
        assert (phase.ops[op].count, phase.ops[op].nbytes, phase.ops[op].failed) == (len(made), sum(MANY.values()), 0)
        assert phase.ops[op].total.count == len(made)
    assert phase.nbytes == sum(MANY.values())
    assert [store.role for store in record.stores] == ["source", "destination"]
    assert len(record.targets) == 2
    assert not journals(copy)


def test_many_small_files_share_slots_and_none_is_lost(copy: CopyBench) -> None:
    made = make(copy.source, {f"d{at % 7}/{at:04d}": at % 9000 for at in range(700)})
    record = copy("--memory", "256KiB", "--part", "64KiB").stream
    assert files(copy.destination) == made
    assert record.phases[0].ops["put"].count == 700


def test_an_object_is_held_in_parts_and_never_whole(copy: CopyBench, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlstor.copy.mover as mover

    taken: list[int] = []
    buffer = mover.AlignedBuffer

    def counted(nbytes: int) -> object:
        taken.append(nbytes)
        return buffer(nbytes)

    monkeypatch.setattr(mover, "AlignedBuffer", counted)
    made = make(copy.source, {"large": 4 * MIB + 5})
    copy(*SMALL_PARTS)
    assert files(copy.destination) == made
    assert taken == [512 << 10]


def test_what_is_there_with_the_same_size_is_left_alone(copy: CopyBench) -> None:
    made = make(copy.source, {"a": 10, "b": 20, "c": PART * 3})
    copy(*SMALL_PARTS)
    (copy.destination / "a").write_bytes(b"0123456789")
    (copy.destination / "b").write_bytes(b"shorter")
    record = copy(*SMALL_PARTS).stream
    assert files(copy.destination) == made | {"a": b"0123456789"}
    phase = record.phases[0]
    assert (phase.skipped_count, phase.skipped_nbytes, phase.ops["put"].count) == (2, 10 + 3 * PART, 1)
    assert isinstance(record.workload, CopyWorkload)
    assert record.workload.resumed


def test_overwrite_copies_all_of_it(copy: CopyBench) -> None:
    made = make(copy.source, {"a": 10, "b": 20})
    copy()
    (copy.destination / "a").write_bytes(b"0123456789")
    record = copy("--overwrite").stream
    assert files(copy.destination) == made
    assert (record.phases[0].skipped_count, record.phases[0].ops["put"].count) == (0, 2)


def test_a_prefix_chooses_and_other_files_of_the_destination_stay(copy: CopyBench) -> None:
    make(copy.source, {"train/a": 10, "train/b": 20, "test/c": 30})
    make(copy.destination, {"train/z": 5, "other": 6})
    copy("--prefix", "train/")
    assert set(files(copy.destination)) == {"train/a", "train/b", "train/z", "other"}


def test_read_again_finds_a_flipped_byte_and_where_and_removes_the_copy(
    copy: CopyBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(copy.source, {"good": 9000, "bad": 9000})
    with copy_support.spoiling(monkeypatch, copy.destination, ["bad"]):
        ran = copy.run("--verify", "read", copy.source, copy.destination)
    assert ran.code == 3, ran.err
    assert "DAMAGED" in ran.err
    assert "bad" in ran.err
    phase = ran.stream.phases[0]
    assert phase.ops["put"].errors == {"checksum": 1}
    assert [(one.file, one.offset, one.kind) for one in phase.verification.damage] == [("bad", 4096, "corrupt")]
    assert phase.verification.damaged_blocks == 1
    assert not (copy.destination / "bad").exists()
    assert (copy.destination / "good").read_bytes() == made["good"]
    record = copy("--verify", "read").stream
    assert (copy.destination / "bad").read_bytes() == made["bad"]
    assert record.phases[0].skipped_count == 1  # the journal proves the good one
    assert record.phases[0].verification.verified_nbytes == 9000


def test_read_again_finds_a_flipped_byte_of_a_large_file(copy: CopyBench, monkeypatch: pytest.MonkeyPatch) -> None:
    make(copy.source, {"large": 5 * PART})
    plain = parts.FileParts.complete

    def complete(self: parts.FileParts, key: str, upload_id: str, all_parts: object) -> None:
        plain(self, key, upload_id, all_parts)  # type: ignore[arg-type]
        copy_support.flip(copy.destination / key, 3 * PART)

    monkeypatch.setattr(parts.FileParts, "complete", complete)
    ran = copy.run("--verify", "read", *SMALL_PARTS, copy.source, copy.destination)
    assert ran.code == 3
    damage = ran.stream.phases[0].verification.damage
    assert [(one.file, one.offset, one.nbytes) for one in damage] == [("large", 3 * PART, 4096)]
    assert not (copy.destination / "large").exists()


def test_without_read_again_a_directory_takes_what_was_not_proven_by_its_size(copy: CopyBench) -> None:
    make(copy.source, {"a": 9000})
    copy()
    copy_support.flip(copy.destination / "a", 5000)
    record = copy("--verify", "read").stream  # not proven: copied again
    assert record.phases[0].skipped_count == 0
    assert (copy.destination / "a").read_bytes() == (copy.source / "a").read_bytes()


def test_a_file_that_is_gone_fails_alone(copy: CopyBench, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlstor.copy.run as run

    made = make(copy.source, {"a": 10, "gone": 20, "gone too": 3 * PART, "z": 4 * PART})
    plain = run.Runner._phase

    def late(self: run.Runner, *rest: object) -> object:
        (copy.source / "gone").unlink()
        (copy.source / "gone too").unlink()
        return plain(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(run.Runner, "_phase", late)
    ran = copy.run(*SMALL_PARTS, copy.source, copy.destination)
    assert ran.code == 1
    assert "2 objects did not arrive" in ran.err
    phase = ran.stream.phases[0]
    assert phase.ops["get"].errors == {"ENOENT": 2}
    assert files(copy.destination) == {"a": made["a"], "z": made["z"]}
    assert {Path(one.url).name for one in phase.failures} == {"gone", "gone too"}


def test_a_file_that_has_grown_is_not_copied_as_if_it_were_whole(
    copy: CopyBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlstor.copy.run as run

    make(copy.source, {"a": 10, "b": 5000})
    plain = run.Runner._phase

    def late(self: run.Runner, *rest: object) -> object:
        (copy.source / "b").write_bytes(bytes(6000))
        return plain(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(run.Runner, "_phase", late)
    ran = copy.run(copy.source, copy.destination)
    assert ran.code == 1
    assert ran.stream.phases[0].ops["get"].errors == {"length": 1}
    assert set(files(copy.destination)) == {"a"}


@pytest.mark.parametrize("nbytes", [3 * MIB, 9 * MIB])
def test_a_full_disk_ends_the_copy_with_a_sentence_and_it_goes_on_later(
    copy: CopyBench, tmpfs_mount: Callable[[int], Path], nbytes: int
) -> None:
    mount = tmpfs_mount(32 * MIB)
    made = make(copy.source, {f"{at:02d}": nbytes for at in range(64 * MIB // nbytes)})
    ran = copy.run(copy.source, mount / "copy")
    assert ran.code == 1
    assert "No space left" in ran.sentence
    assert ran.stream.status == "failed"
    left = files(mount / "copy")
    assert all(made.get(name) == data for name, data in left.items()), "an interrupted file shows"
    subprocess.run(["mount", "-o", "remount,size=96m", str(mount)], check=True)
    ran = copy.run(copy.source, mount / "copy")
    assert ran.code == 0, ran.err
    assert files(mount / "copy") == made
    assert ran.stream.phases[0].skipped_count == len(left)


def test_after_kill_9_it_goes_on_and_nothing_half_shows(copy: CopyBench) -> None:
    sizes = {f"{at:03d}": 200_000 for at in range(300)} | {"zz large": 30 * MIB}
    made = make(copy.source, sizes)
    words = copy.words(*SMALL_PARTS, "--in-flight", 1, "--workers", 1, copy.source, copy.destination)
    running = launchers.Running(words, copy.directory)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if sum(path.stat().st_size >= 32 for path in journals(copy) if path.suffix == ".proven"):
            break
        time.sleep(0.005)
    running.process.send_signal(signal.SIGKILL)
    running.process.wait()
    shown = {name: data for name, data in files(copy.destination).items() if not name.endswith(".mlstor-tmp")}
    assert shown
    assert len(shown) < len(made)
    assert all(made[name] == data for name, data in shown.items())
    record = copy("--verify", "read", *SMALL_PARTS).stream
    phase = record.phases[0]
    assert 0 < phase.skipped_count <= len(shown)
    assert phase.skipped_count + phase.ops["put"].count == len(made)
    kept = files(copy.destination)
    assert {name: kept[name] for name in made} == made
    assert not [name for name in kept if "large" in name and name.endswith(".mlstor-tmp")]
    assert not journals(copy)


def test_ctrl_c_gives_a_partial_record_and_leaves_no_half_files(copy: CopyBench) -> None:
    with faulty(copy.directory) as mount:
        copy.source = mount.root
        make(mount.backing, {f"{at:03d}": 300_000 for at in range(100)} | {"aa": 10 * MIB})
        mount.slow("read", 0.02, nth=200)  # it is not done before the signal is sent
        words = copy.words(*SMALL_PARTS, "--in-flight", 1, "--workers", 1, copy.source, copy.destination)
        running = launchers.Running(words, copy.directory)
        deadline = time.monotonic() + 60
        while not copy.destination.exists() or len(os.listdir(copy.destination)) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        running.process.send_signal(signal.SIGINT)
        done = running.wait(60)
        assert done.returncode == 130, done.stderr
        record = copy_support.StreamRan(0, "", "", copy.results).stream
        assert record.status == "partial"
        assert not record.phases[0].complete
        assert not [name for name in files(copy.destination) if name.endswith(".mlstor-tmp")]
        assert "goes on where this one has ended" in done.stdout
        mount.heal()
        copy(*SMALL_PARTS)


def test_ranks_share_the_objects(copy: CopyBench) -> None:
    made = make(copy.source, {f"{at:03d}": 1000 + at for at in range(60)} | {"large": 6 * PART})
    ran = copy.mpi(3, *SMALL_PARTS, copy.source, copy.destination)
    assert ran.code == 0, ran.err + ran.out
    assert files(copy.destination) == made
    phase = ran.stream.phases[0]
    assert sum(phase.ranks.nfiles) == 61
    assert min(phase.ranks.nfiles) == 20
    assert phase.ops["put"].count == 61


def test_another_number_of_ranks_goes_on_with_what_is_proven(copy: CopyBench) -> None:
    make(copy.source, {f"{at:03d}": 1000 + at for at in range(30)})
    copy()
    key = json.dumps([[[str(copy.source), None], [str(copy.destination), None]], ""])
    proven = resume.Proven(str(copy.results), key, 7)
    proven.add([f"{at:03d}" for at in range(10)], [1000 + at for at in range(10)], [0] * 10, [proven.begun_ns] * 10)
    proven.save()
    with open(proven.directory / "7.proven", "ab") as file:
        file.write(b"cut off")
    ran = copy.mpi(2, "--verify", "read", copy.source, copy.destination)
    assert ran.code == 0, ran.err + ran.out
    assert (ran.stream.phases[0].skipped_count, ran.stream.phases[0].ops["put"].count) == (10, 20)


def test_a_file_that_has_changed_since_it_was_proven_is_copied_again(copy: CopyBench) -> None:
    made = make(copy.source, dict.fromkeys(("same", "changed", "replaced", "large"), 9000) | {"big": 3 * PART})
    copy(*SMALL_PARTS)
    key = json.dumps([[[str(copy.source), None], [str(copy.destination), None]], ""])
    proven = resume.Proven(str(copy.results), key, 0)
    proven.add(list(made), [len(data) for data in made.values()], [0] * 5, [proven.begun_ns] * 5)
    proven.save()
    for name in ("changed", "big"):
        copy_support.flip(copy.source / name, 100)
    other = copy.source.parent / "other"
    other.write_bytes(bytes(9000))
    os.utime(other, ns=(0, 0))  # its own time is that of another day: it shows by when its name came
    other.rename(copy.source / "replaced")
    (copy.source / ".mlstor-flipped-changed").unlink()
    (copy.source / ".mlstor-flipped-big").unlink()
    record = copy(*SMALL_PARTS).stream
    assert files(copy.destination) == files(copy.source)
    assert (record.phases[0].skipped_count, record.phases[0].ops["put"].count) == (2, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{source}", "{source}/inner"], "lie within one another"),
        (["{source}", "{source}"], "lie within one another"),
        (["{source}/none", "{destination}"], "doesn't exist"),
        (["{source}", "{destination}", "--per-node", "--part", "1000"], "multiple of 4 KiB"),
        (["{source}", "s3://bucket", "--per-node"], "in a directory of each node"),
        (["{source}", "s3://bucket", "--part", "1MiB"], "5MiB"),
        (["{source}", "{destination}", "--memory", "8MiB"], "no room for two"),
        (["{source}", "{destination}", "--endpoint", "http://x"], "directories"),
        (["{source}", "{destination}"], "has no objects"),
    ],
)
def test_what_can_not_be_meant_is_said_in_a_sentence(copy: CopyBench, words: list[str], said: str) -> None:
    ran = copy.run(*(word.format(source=copy.source, destination=copy.destination) for word in words))
    assert ran.code == 2
    assert said in ran.sentence


def on_two_nodes(copy: CopyBench, setups: list[str], *options: object) -> copy_support.StreamRan:
    """Two ranks on each of two nodes, in namespaces of their own."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "-u", "true"], check=False).returncode:
        pytest.skip("namespaces need root, and a machine that allows them")
    mpi = launchers.find("openmpi")
    command = [*mpi.mpirun, *mpi.unbound]
    program = [mpi.python, *copy_support.MODULE, *copy.arguments(*options)]
    for index, setup in enumerate(setups):
        shell = f'hostname node-{index}; {setup}; exec "$@"'
        rank = ["-n", "1", "unshare", "-m", "-u", "sh", "-c", shell, "sh", *program]
        command += [":", *rank] if index else rank
    done = launchers.run(command, copy.directory)
    return copy_support.StreamRan(done.returncode, done.stdout, done.stderr, copy.results)


def test_per_node_makes_a_whole_copy_on_each(copy: CopyBench) -> None:
    made = make(copy.source, {f"{at:02d}": 100 * at for at in range(20)} | {"large": 3 * PART})
    copy.destination.mkdir()
    places = [copy.directory / f"drive-{index}" for index in range(2)]
    for place in places:
        place.mkdir()
    setups = [f"mount -t tmpfs none {place}; mount --bind {place} {copy.destination}" for place in places]
    # what a node has mounted is gone with it: it is looked at from within
    ran = on_two_nodes(copy, setups, *SMALL_PARTS, copy.source, copy.destination)
    assert ran.code == 2
    assert "give --per-node" in ran.sentence
    binds = [f"mount --bind {place} {copy.destination}" for place in places]
    ran = on_two_nodes(copy, setups, "--per-node", *SMALL_PARTS, copy.source, copy.destination)
    assert ran.code == 0, ran.err + ran.out
    phase = ran.stream.phases[0]
    assert phase.ops["put"].count == 2 * len(made)
    assert list(phase.ranks.nfiles) == [len(made), len(made)]
    ran = on_two_nodes(copy, binds, "--per-node", *SMALL_PARTS, copy.source, copy.destination)
    assert ran.code == 0, ran.err + ran.out
    assert [files(place) for place in places] == [made, made]
    shared = on_two_nodes(copy, ["true", "true"], "--per-node", copy.source, copy.destination)
    assert shared.code == 2


def test_a_damaged_file_whose_name_is_not_utf_8_fits_into_a_record() -> None:
    tally = CopyTally(0, 0)
    tally.locate("b\udcff", [(0, 4096, False)])
    assert b"udcff" in msgspec.json.encode(tally.damage)
