"""`mlstor clean RUN` without a PATH: the run's record says where it wrote."""

from __future__ import annotations

import msgspec
from checkpoint_support import Bench

from mlstor.results.record import load, save


def test_a_kept_run_is_cleaned_by_its_record(bench: Bench) -> None:
    targets = [bench.target / name for name in ("0", "1")]
    for target in targets:
        target.mkdir()
    ran = bench.run("--run-id", "run", "--keep", bench.target / "{local_rank}", "--ranks", 2)
    assert ran.code == 0, ran.err
    assert all((target / "run/manifest.json").exists() for target in targets)
    cleaned = bench.command("clean", "run", "--results", bench.results)
    assert (cleaned.code, cleaned.err) == (0, "")
    assert [line.count(" files of run run removed") for line in cleaned.out.splitlines()] == [1, 1]
    assert all(list(target.iterdir()) == [] for target in targets)
    again = bench.command("clean", "run", "--results", bench.results)
    assert again.code == 2
    assert f"no run 'run' under {targets[0]}, {targets[1]}" in again.sentence


def test_what_is_no_runs_id_is_refused(bench: Bench) -> None:
    for run in ("", "..", "../target", "/", str(bench.target)):
        refused = bench.command("clean", run, bench.target)
        assert refused.code == 2
        assert "is no run's id" in refused.sentence


def test_the_results_directory_is_the_one_of_the_settings(bench: Bench, monkeypatch) -> None:
    bench("--run-id", "run", "--keep")
    monkeypatch.setenv("MLSTOR_RESULTS", str(bench.results))
    assert bench.command("clean", "run").code == 0
    assert list(bench.target.iterdir()) == []


def test_a_run_without_a_record_is_one_sentence(bench: Bench) -> None:
    ran = bench.command("clean", "absent", "--results", bench.results)
    assert ran.code == 2
    assert "there is no record of run 'absent'" in ran.sentence
    assert "mlstor clean RUN PATH" in ran.sentence


def test_a_run_that_only_read_takes_no_other_runs_files(bench: Bench) -> None:
    bench("--run-id", "run", "--reads", 0)
    read = bench("--run-id", "run", "--writes", 0).record
    refused = bench.command("clean", read.run_id, "--results", bench.results)
    assert refused.code == 2
    assert "only read the files of run run" in refused.sentence
    assert (bench.target / "run/manifest.json").exists()


def test_storage_of_other_hosts_is_not_said_to_be_clean(bench: Bench) -> None:
    bench("--run-id", "run", "--keep")
    record = load(bench.results / "run")
    (target,) = record.targets
    targets = [msgspec.structs.replace(target, host=host, sharing="per-node") for host in (0, 1)]
    save(msgspec.structs.replace(record, targets=targets, hosts=record.hosts * 2), bench.results / "run")
    cleaned = bench.command("clean", "run", "--results", bench.results)
    assert cleaned.code == 0
    assert "on each of 2 hosts: this cleans the one it runs on" in cleaned.out
    assert cleaned.out.count(" files of run run removed") == 1


def test_a_streams_objects_are_removed_by_its_record_and_by_their_place(bench: Bench) -> None:
    (bench.target / "foreign").write_bytes(b"x")
    write = ["stream", "--put", "100", "--ops", "5", "--size", "1000", "--no-live", "--results", bench.results]
    for words in ([], [bench.target]):
        assert bench.command(*write, "--run-id", "run", bench.target).code == 0
        cleaned = bench.command("clean", "run", *words, "--results", bench.results)
        assert (cleaned.code, cleaned.err) == (0, "")
        assert "5 objects of run run removed" in cleaned.out
        assert [path.name for path in bench.target.iterdir()] == ["foreign"]
    again = bench.command("clean", "run", "--results", bench.results)
    assert again.code == 2
    assert "no run 'run' under" in again.sentence


def test_a_copy_is_not_cleaned(bench: Bench) -> None:
    (bench.target / "from").mkdir()
    (bench.target / "from/a").write_bytes(b"x")
    places = [bench.target / "from", bench.target / "to"]
    assert bench.command("copy", *places, "--no-live", "--results", bench.results).code == 0
    [run] = [path.name for path in bench.results.iterdir() if not path.name.startswith(".")]
    refused = bench.command("clean", run, "--results", bench.results)
    assert refused.code == 2
    assert "is a run of mlstor copy" in refused.sentence
    assert (bench.target / "to/a").read_bytes() == b"x"
