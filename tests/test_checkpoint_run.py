"""A run of ``mlstor checkpoint``: what it writes, reads, verifies, records and leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from checkpoint_support import MODEL, Bench

from mlstor.checkpoint import rundir
from mlstor.results import record as r


def names_on_disk(bench: Bench, run_id: str, checkpoints: list[int], only: list[int] | None = None) -> dict[str, int]:
    """What the plan says that a kept run leaves, without its manifest."""
    layout = bench.layout()
    return {
        str(bench.file(run_id, file.name, checkpoint).relative_to(bench.target)): file.nbytes
        for checkpoint in checkpoints
        for rank in only or range(layout.nranks)
        for file in layout.files(rank)
    }


def test_a_run_writes_reads_verifies_records_and_tidies_up(bench: Bench) -> None:
    foreign = bench.target / "somebody's.bin"
    foreign.write_bytes(b"x")
    ran = bench("--writes", 2, "--reads", 2)
    assert bench.files() == {"somebody's.bin": 1}
    assert sorted(path.name for path in bench.target.iterdir()) == ["somebody's.bin"]
    stored = json.loads(next(bench.results.glob("*/record.json")).read_bytes())
    jsonschema.Draft202012Validator(r.schema()).validate(stored)
    record, layout = ran.record, bench.layout()
    assert record.status == "complete"
    assert [(p.number, p.op, p.checkpoint) for p in record.phases] == [
        (0, "write", 1), (1, "write", 2), (2, "read", 1), (3, "read", 2),
    ]  # fmt: skip
    for phase in record.phases:
        assert phase.complete
        assert phase.nbytes == layout.total_nbytes == sum(phase.ranks.nbytes)
        assert phase.ranks.rank == list(range(8))
        assert phase.ranks.nfiles == [2] * 8
        assert sum(path.nfiles for path in phase.paths) == 16
        # the last partial block of a file is written when its transfers are done, and not counted as one
        assert 0 <= layout.total_nbytes - sum(map(sum, phase.series.nbytes)) < 16 * 4096
        assert all(0 < first <= end for first, end in zip(phase.ranks.first_done_ns, phase.ranks.end_ns, strict=True))
        assert phase.processes.peak_rss_bytes[0] > 2**20
        assert phase.processes.cpu_user_ns[0] + phase.processes.cpu_system_ns[0] > 0
        assert phase.client.limited in ("yes", "no")
        assert phase.client.rule
    assert {"write", "sync"} <= record.phases[0].histograms.keys()
    assert record.phases[2].histograms["read"].count >= 16
    assert [p.verification.verified_nbytes for p in record.phases] == [0, 0, layout.total_nbytes, layout.total_nbytes]
    assert record.phases[2].cached.verdict != "yes"
    assert record.targets[0].sharing == "one-host"
    assert "client" in ran.out
    assert "peak" in ran.out
    assert "s/GB" in ran.out
    assert "no damage" in ran.out
    assert ", one host" in ran.out


def test_kept_files_are_those_of_the_plan_beside_a_manifest(bench: Bench) -> None:
    ran = bench("--run-id", "kept", "--keep", "--reads", 1)
    found = bench.files()
    manifest = json.loads((bench.target / "kept/manifest.json").read_bytes())
    assert found.pop("kept/manifest.json") > 0
    assert found == names_on_disk(bench, "kept", [1])
    plan = bench.command("checkpoint", "--plan", "--json", "--model", MODEL, "--scale", "1/65536")
    planned = {file["name"]: file["bytes"] for file in json.loads(plan.out)["files"]}
    assert {Path(path).name: nbytes for path, nbytes in found.items()} == {
        Path(name).name: nbytes for name, nbytes in planned.items()
    }
    assert {key: manifest[key] for key in ("run_id", "model", "ranks", "scale", "written", "complete")} == {
        "run_id": "kept", "model": MODEL, "ranks": 8, "scale": "1/65536", "written": 1, "complete": [1],
    }  # fmt: skip
    assert "kept: 1 checkpoint of run kept" in ran.out
    assert f"mlstor clean kept {bench.target}" in ran.out


def test_keep_leaves_the_newest(bench: Bench) -> None:
    bench("--run-id", "run", "--keep", 2, "--writes", 3, "--reads", 1)
    assert bench.files().keys() - {"run/manifest.json"} == names_on_disk(bench, "run", [2, 3]).keys()
    again = bench("--run-id", "run", "--writes", 0, "--reads", 3)
    assert [phase.checkpoint for phase in again.record.phases] == [2, 3, 2]


def test_keep_before_a_path_keeps_all(bench: Bench) -> None:
    assert bench.run("--run-id", "run", "--writes", 2, "--keep", bench.target).code == 0
    assert bench.files().keys() - {"run/manifest.json"} == names_on_disk(bench, "run", [1, 2]).keys()


def test_a_write_only_run_is_read_by_another_process_of_its_id_and_then_cleaned(bench: Bench) -> None:
    wrote = bench("--run-id", "run", "--reads", 0, "--writes", 2).record
    assert [phase.op for phase in wrote.phases] == ["write", "write"]
    read = bench.program("--run-id", "run", "--writes", 0, "--reads", 2, bench.target)
    assert read.code == 0, read.err
    assert [phase.checkpoint for phase in read.record.phases] == [1, 2]
    assert all(phase.verification.damaged_blocks == 0 for phase in read.record.phases)
    assert (wrote.workload.read_run, read.record.workload.read_run) == (None, "run")
    assert len(list(bench.results.glob("*/record.json"))) == 2
    assert bench.files().keys() - {"run/manifest.json"} == names_on_disk(bench, "run", [1, 2]).keys()
    cleaned = bench.command("clean", "run", bench.target)
    assert (cleaned.code, cleaned.err) == (0, "")
    assert "32 files of run run removed" in cleaned.out
    assert list(bench.target.iterdir()) == []
    assert "no run 'run'" in bench.command("clean", "run", bench.target).sentence


def test_a_read_only_run_records_the_compressibility_of_what_it_reads(bench: Bench) -> None:
    bench("--run-id", "run", "--reads", 0, "--compressibility", 30)
    read = bench("--run-id", "run", "--writes", 0, "--compressibility", 50).record
    assert read.workload.compressibility_percent == 30
    assert read.phases[0].verification.damaged_blocks == 0


def test_another_number_of_processes_reads_what_one_wrote(bench: Bench) -> None:
    bench("--run-id", "run", "--reads", 0)
    read = bench.mpi(3, "--run-id", "run", "--writes", 0, "--deal", "round-robin", bench.target)
    assert read.code == 0, read.err
    phase = read.record.phases[0]
    assert phase.verification.verified_nbytes == bench.layout().total_nbytes
    assert phase.ranks.process == [0, 1, 2, 0, 1, 2, 0, 1]


def test_only_ranks_writes_theirs_alone_and_others_are_not_there_to_read(bench: Bench) -> None:
    bench("--run-id", "run", "--only-ranks", "1,5-6", "--reads", 0)
    assert bench.files().keys() - {"run/manifest.json"} == names_on_disk(bench, "run", [1], [1, 5, 6]).keys()
    refused = bench.run("--run-id", "run", "--writes", 0, bench.target)
    assert refused.code == 2
    assert "no files of rank 0" in refused.sentence
    ran = bench("--run-id", "run", "--only-ranks", "5", "--writes", 0)
    assert ran.record.phases[0].ranks.rank == [5]
    assert ran.record.workload.ranks_meaning.startswith("rank 5 of all 8 ranks of llama3-8b")
    assert "rank 5 of all 8 ranks" in " ".join(ran.out.split())


def test_a_subset_is_the_first_ranks_of_the_whole(bench: Bench) -> None:
    ran = bench("--model", "llama3-70b", "--subset", 8, "--keep", "--run-id", "run", scale="1/262144")
    assert ran.record.workload.ranks == 8
    assert "the first 8 of the 64 ranks" in ran.out
    assert len(bench.files()) == 17
    assert (bench.target / "run/llama3-70b/global_epoch1_step1/zero_pp_rank_0_mp_rank_7_optim_states.pt").exists()
    assert bench.command("clean", "run", bench.target).code == 0
    assert list(bench.target.iterdir()) == []


def test_a_rank_shift_reads_the_files_of_another_rank(bench: Bench) -> None:
    ran = bench("--rank-shift", 3, "--writes", 1, "--reads", 1)
    assert ran.record.workload.rank_shift == 3
    assert ran.record.phases[1].verification.verified_nbytes == bench.layout().total_nbytes


def test_a_workload_file_need_not_outlive_its_run(bench: Bench) -> None:
    workload = bench.directory / "mine.yaml"
    workload.write_text(
        "model:\n  name: mine\n  type: transformer\n  num_layers: 2\n"
        "  parallelism: {tensor: 2, pipeline: 1, zero_stage: 1}\n"
        "  transformer: {hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, num_kv_heads: 2,\n"
        "                vocab_size: 512}\n"
    )
    bench("--workload", workload, "--run-id", "run", "--reads", 0, scale="1")
    manifest = rundir.load(str(bench.target), "run")
    assert manifest is not None
    before = bench.files()
    bench("--workload", workload, "--run-id", "run", "--writes", 0, scale="1")
    workload.unlink()
    assert len(before) > 2
    assert bench.command("clean", "run", bench.target).code == 0
    assert list(bench.target.iterdir()) == []


def test_foreign_files_survive_and_are_named(bench: Bench) -> None:
    bench("--run-id", "run", "--reads", 0)
    others = [bench.target / "run/notes.txt", bench.file("run", "mine.pt"), bench.target / f"run/{MODEL}/more/deep.txt"]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")
    cleaned = bench.command("clean", "run", bench.target)
    assert cleaned.code == 0
    stays = [line.split(" stays:")[0] for line in cleaned.out.splitlines() if " stays:" in line]
    assert stays == [str(others[1]), str(others[2].parent), str(others[0])]
    assert sorted(bench.files()) == sorted(str(other.relative_to(bench.target)) for other in others)


def test_a_directory_of_somebody_else_under_the_run_id_is_refused_untouched(bench: Bench) -> None:
    (bench.target / "run").mkdir()
    (bench.target / "run/data.bin").write_bytes(b"theirs")
    for options in (("--run-id", "run"), ("--run-id", "run", "--writes", 0)):
        refused = bench.run(*options, bench.target)
        assert refused.code == 2
        assert "holds no manifest.json of mlstor: nothing in it is touched" in refused.sentence
    assert "nothing in it is touched" in bench.command("clean", "run", bench.target).sentence
    assert bench.files() == {"run/data.bin": 6}


@pytest.mark.parametrize("content", ['{"format": 1}', "", "[]", '{"format": "mlstor-checkpoint/2", "run_id": "run"}'])
def test_a_manifest_that_is_none_is_refused(bench: Bench, content: str) -> None:
    (bench.target / "run").mkdir()
    (bench.target / "run/manifest.json").write_text(content)
    refused = bench.run("--run-id", "run", bench.target)
    assert refused.code == 2
    assert "run/manifest.json" in refused.sentence


def test_the_same_run_again_writes_its_own_files_over_and_another_one_is_refused(bench: Bench) -> None:
    bench("--run-id", "run", "--reads", 0, "--writes", 2)
    before = bench.file("run", "zero_pp_rank_0_mp_rank_0_optim_states.pt").read_bytes()
    bench("--run-id", "run", "--reads", 0)
    assert bench.file("run", "zero_pp_rank_0_mp_rank_0_optim_states.pt").read_bytes() != before
    manifest = rundir.load(str(bench.target), "run")
    assert manifest is not None
    assert (manifest.written, manifest.complete) == (2, (1,))  # the second is stale, and known
    read = bench("--run-id", "run", "--writes", 0, "--reads", 2)
    assert [phase.checkpoint for phase in read.record.phases] == [1, 1]
    kept = bench.files()
    refused = bench.run("--run-id", "run", bench.target, scale="1/32768")
    assert refused.code == 2
    assert "choose another --run-id, or `mlstor clean` it first" in refused.sentence
    assert bench.files() == kept
    bench("--run-id", "run")
    assert list(bench.target.iterdir()) == []


def test_a_read_of_another_shape_or_of_no_run_is_refused(bench: Bench) -> None:
    bench("--run-id", "run", "--reads", 0)
    other = bench.run("--run-id", "run", "--writes", 0, bench.target, scale="1/32768")
    assert (other.code, "was written with --model llama3-8b" in other.sentence) == (2, True)
    none = bench.run("--run-id", "none", "--writes", 0, bench.target)
    assert (none.code, "has no run none in" in none.sentence) == (2, True)
    assert "a read-only run needs --run-id" in bench.run("--writes", 0, bench.target).sentence


def test_several_paths_and_fields_deal_ranks_to_directories(bench: Bench) -> None:
    drives = [bench.directory / f"drive{i}" for i in range(8)]
    for drive in drives:
        drive.mkdir()
    pattern = bench.directory / "drive{local_rank}"
    assert bench.run("--run-id", "run", "--reads", 0, pattern).code == 0
    for rank, drive in enumerate(drives):
        assert [Path(name).name.split("_")[3] for name in bench.files(drive) if name.endswith(".pt")] == [str(rank)] * 2
    read = bench.run("--run-id", "run", "--writes", 0, "--rank-shift", 1, pattern)
    assert read.code == 0
    assert [target.path for target in read.record.targets] == list(map(str, drives))
    assert bench.command("clean", "run", pattern).code == 0
    assert [list(drive.iterdir()) for drive in drives] == [[]] * 8
    assert bench.run("--run-id", "two", "--reads", 0, *drives[:2]).code == 0
    assert [len(bench.files(drive)) for drive in drives[:3]] == [9, 9, 0]
    unknown = bench.run(bench.directory / "drive{node}")
    assert (unknown.code, "{node}" in unknown.sentence) == (2, True)
