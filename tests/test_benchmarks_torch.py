"""The PyTorch benchmark's lists, verdicts and small helpers; each way to save and load once. Nothing looks at speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks lie in the repository, not in the package")
pytest.importorskip("torch")

from benchmarks import machine
from benchmarks.harness import Contender, Sample
from benchmarks.report import markers
from benchmarks.torch import __main__ as command, contenders, goals, report
from benchmarks.torch.job import TorchJob, make_room, make_state, require_state

ROUNDS = 5


def sample(rate: float, cpu_s: float = 0.1) -> Sample:
    return Sample(1.0 / rate, cpu_s, 10**9)


# ---- who takes part ----


def test_every_key_is_there_once_and_every_source_can_be_made() -> None:
    keys = [entry.key for entry in contenders.ENTRIES]
    assert len(set(keys)) == len(keys)
    assert {entry.group for entry in contenders.ENTRIES} == set(contenders.GROUPS)
    assert {entry.source for entry in contenders.ENTRIES} - {""} == set(contenders.SOURCES)
    for entry in contenders.ENTRIES:
        assert entry.function or contenders.MODES[entry.group]


def test_every_function_is_there() -> None:
    import importlib

    named = {entry.function for entry in contenders.ENTRIES} | {one for one, _ in contenders.SOURCES.values()}
    for function in named - {""}:
        module, name = function.split(":")
        assert callable(getattr(importlib.import_module(f"benchmarks.torch.{module}"), name))


def test_the_twins_of_a_chosen_group_come_with_it() -> None:
    keys = [entry.key for entry in contenders.choose("save-mlstor")]
    assert keys == ["save-mlstor", "save-torch", "save-torch-again"]


# ---- states ----


@pytest.mark.parametrize("count", [0, 7])
def test_a_state_is_itself_and_nothing_else_is(count: int) -> None:
    job = TorchJob("", (64 << 20) if not count else 7 * 2048, 0, count=count)
    state = make_state(job)
    assert sum(tensor.nbytes for tensor in state.values()) == job.nbytes
    require_state(job, state)
    with pytest.raises(ValueError, match="was not loaded"):
        require_state(job, make_room(job))
    with pytest.raises(ValueError, match="were saved"):
        require_state(job, dict(list(state.items())[1:]))
    names = list(state)
    state[names[0]], state[names[1]] = state[names[1]], state[names[0]]
    with pytest.raises(ValueError, match="was not loaded"):
        require_state(job, state)


# ---- verdicts ----


def test_the_best_peer_decides_and_one_that_is_missing_is_named() -> None:
    samples = {
        "into-mlstor": [sample(2.0)] * ROUNDS,
        **{key: [sample(1.0)] * ROUNDS for key in goals.loaders("into")},
    }
    samples["into-runai"] = [sample(1.5)] * ROUNDS
    row = goals.rate(samples, "x", "into-mlstor", goals.loaders("into"), 1.5)
    assert (row.figure, row.met) == ("1.33 (into-runai)", False)
    del samples["into-torch"]
    row = goals.rate(samples, "x", "into-mlstor", goals.loaders("into"), 1.5)
    assert (row.figure, row.met) == ("not measured: without into-torch", None)
    assert goals.rate({}, "x", "into-mlstor", goals.loaders("into"), 1.5).met is None


@pytest.mark.parametrize(("device", "met"), [(2.1, True), (2.5, False), (3.5, False)])
def test_a_device_that_gives_less_is_the_measure(device: float, met: bool) -> None:
    samples = {"a": [sample(2.0)] * ROUNDS, "b": [sample(1.0)] * ROUNDS, "fio": [sample(device)] * ROUNDS}
    assert goals.rate(samples, "x", "a", ["b"], 3.0, "fio").met is met
    assert goals.rate(samples, "x", "a", ["b"], 3.0).met is False
    assert goals.rate(samples, "x", "a", ["b"], 2.0, "fio").met is True


def test_few_rounds_give_no_verdict_and_the_cheapest_peer_counts() -> None:
    samples = {"a": [sample(1, 0.3)] * ROUNDS, "b": [sample(1, 0.5)] * ROUNDS, "c": [sample(9, 0.9)] * ROUNDS}
    row = goals.cost(samples, "x", "a", ["b", "c"], 0.5)
    assert (row.figure, row.met) == ("0.60 (b)", False)
    assert goals.cpu(samples, "x", "a", 0.3).met is True
    assert goals.cpu({"a": [sample(1, 0.3)]}, "x", "a", 0.3).met is None
    stalls = {"stall-dcp": [sample(1.0)] * ROUNDS, "stall-mlstor": [sample(4.0)] * ROUNDS}
    row = goals.stall(stalls, "x", "stall-dcp")
    assert (row.figure, row.met) == ("0.25", True)


# ---- the report ----


def test_the_report_is_saved_and_goes_between_its_markers(tmp_path: Path) -> None:
    contender = Contender("save-mlstor", "save", "mlstor save", lambda: sample(1.0))
    run = report.Run("disk", [contender], {"save-mlstor": [sample(2.0)]}, {}, {"kernel": "6"})
    text, data = report.save(run, tmp_path)
    assert "| mlstor save | 0.500 |" in text.read_text()
    assert json.loads(data.read_text())["samples"]["save-mlstor"][0]["elapsed_s"] == 0.5
    (tmp_path / "performance.md").write_text("\n".join(markers("torch disk")) + "\n")
    report.publish(run, tmp_path)
    assert "mlstor save" in (tmp_path / "performance.md").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rounds", "0"], "must be 1 or more"),
        (["--small", "40000"], "1 to 32767"),
        (["--size", "100MiB"], "not a multiple of 256MiB"),
        (["--publish", "--rounds", "4"], "--publish takes --rounds 5 or more"),
        (["--only", "nothing-like-it"], "matches no contender"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words) == 2
    assert sentence in capsys.readouterr().err


# ---- each way once ----


@pytest.mark.skipif(machine.huge_pages() == "never", reason="the kernel gives no huge pages")
def test_torch_still_takes_the_variable_of_huge_pages() -> None:
    code = "import torch; a = torch.ones(64 << 20, dtype=torch.uint8); print(open('/proc/self/smaps_rollup').read())"
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (line,) = [line for line in said.stdout.splitlines() if line.startswith("AnonHugePages:")]
    assert int(line.split()[1]) >= 32 << 10  # of 64 MiB; the kernel may lack a few


@pytest.mark.parametrize("key", ["save-torch", "save-safetensors", "save-mlstor", "dcp-save-2", "dcp-save-mlstor"])
def test_a_saver_leaves_a_whole_file(key: str, tmp_path: Path) -> None:
    (entry,) = [one for one in contenders.ENTRIES if one.key == key]
    job = TorchJob(str(tmp_path / "saved"), 5 * 2048, 0, entry.threads, how=entry.how, count=5)
    assert call(entry.function, job).nbytes == job.nbytes
    reader = {
        "save-torch": ("peers:load", "torch"),
        "save-safetensors": ("peers:load", "safetensors, pread"),
        "save-mlstor": ("peers:load", "torch, mmap"),
        "dcp-save-2": ("peers:dcp_load", ""),
        "dcp-save-mlstor": ("ours:dcp_load", ""),
    }[key]
    call(reader[0], TorchJob(job.path, job.nbytes, 0, how=reader[1], count=5))


@pytest.mark.parametrize("key", ["load-mlstor", "into-mlstor", "into-safetensors"])
def test_a_loader_gives_what_was_saved(key: str, tmp_path: Path) -> None:
    (entry,) = [one for one in contenders.ENTRIES if one.key == key]
    function, how = contenders.SOURCES[entry.source]
    job = TorchJob(str(tmp_path / "saved"), 5 * 2048, 0, how=how, count=5)
    call(function, job)
    sample = call(entry.function, TorchJob(job.path, job.nbytes, 0, how=entry.how, count=5))
    assert sample.nbytes == job.nbytes


def call(function: str, job: TorchJob) -> Sample:
    import importlib

    module, name = function.split(":")
    found = getattr(importlib.import_module(f"benchmarks.torch.{module}"), name)(job)
    assert isinstance(found, Sample)
    return found
