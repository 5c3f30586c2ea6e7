"""The plan: totals, shares of hosts, what is printed, and its JSON."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from fractions import Fraction

import pytest
from rich.console import Console

from mlstor import cli
from mlstor.checkpoint import models
from mlstor.checkpoint.layout import Layout
from mlstor.checkpoint.plan import Plan, plan_json, print_plan, span
from mlstor.errors import UsageError


def plan_of(name: str, **arguments) -> Plan:
    return Plan(Layout(models.get(name)), **arguments)


def printed(plan: Plan, width: int = 140) -> str:
    stream = io.StringIO()
    print_plan(plan, Console(file=stream, width=width))
    return stream.getvalue()


def test_capacity_is_that_of_all_checkpoints_written():
    plan = plan_of("llama3-8b", writes=10)
    assert plan.total_nbytes == 112_425_623_552
    assert plan.capacity_nbytes == 10 * 112_425_623_552
    assert plan.ninodes == 10 * (16 + 1) + 3


def test_read_only_run_needs_no_room():
    plan = plan_of("llama3-8b", writes=0)
    assert (plan.capacity_nbytes, plan.ninodes) == (0, 0)
    assert plan.total_nbytes == 112_425_623_552


def test_blocks_give_the_first_half_of_the_hosts_the_model_files():
    hosts = plan_of("llama3-405b", nhosts=8).hosts
    assert [share.nfiles for share in hosts[4:]] == [64] * 4
    assert hosts[0].nbytes == 8 * 13_226_441_600 + 56 * 12_701_105_024
    assert hosts[-1].nbytes == 64 * 9_513_171_840


def test_round_robin_gives_every_host_the_same_mix():
    hosts = plan_of("llama3-405b", nhosts=8, how="round-robin").hosts
    assert len({share.nbytes for share in hosts}) == 1
    assert hosts[3].ranks == list(range(3, 512, 8))


@pytest.mark.parametrize("how", ["block", "round-robin"])
def test_hosts_add_up_to_the_plan(how):
    plan = plan_of("llama3-1t", writes=3, nhosts=7, how=how)
    assert sum(share.nbytes for share in plan.hosts) == plan.total_nbytes
    assert sum(share.nfiles for share in plan.hosts) == plan.nfiles
    assert sum(share.capacity_nbytes for share in plan.hosts) == plan.capacity_nbytes
    assert sorted(rank for share in plan.hosts for rank in share.ranks) == plan.ranks


def test_memory_of_a_host_is_that_of_its_processes():
    hosts = plan_of("llama3-70b", nhosts=2, process_nbytes=1000).hosts
    assert [share.memory_nbytes for share in hosts] == [32_000, 32_000]


def test_only_the_named_ranks_are_planned():
    plan = plan_of("llama3-70b", only=[3, 9])
    assert [file.rank for file in plan.files()] == [3, 3, 9, 9]
    assert (plan.nfiles, plan.total_nbytes) == (4, 2 * 15_287_602_688)
    assert "Only rank 3, 9" in printed(plan)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"writes": -1}, "--writes -1 is too low"),
        ({"nhosts": 0}, "--hosts 0 is too low"),
        ({"only": []}, "no rank takes part"),
    ],
)
def test_senseless_counts_are_refused(arguments, complaint):
    with pytest.raises(UsageError, match=complaint):
        plan_of("llama3-8b", **arguments)


def test_json_lists_every_file_in_write_order():
    plan = plan_of("llama3-405b", writes=10, nhosts=4, process_nbytes=192 << 20)
    document = json.loads(plan_json(plan))
    assert document["files"] == [
        {"name": file.name, "bytes": file.nbytes, "rank": file.rank}
        for rank in range(512)
        for file in plan.layout.files(rank)
    ]
    assert document["checkpoint_bytes"] == 5_682_508_791_808
    assert document["capacity_bytes"] == 56_825_087_918_080
    assert document["nfiles"] == len(document["files"]) == 1544
    assert document["ranks"] == len(document["per_rank"]) == 512
    assert document["per_rank"][256] == {
        "rank": 256,
        "files": 1,
        "bytes": 9_513_171_840,
        "capacity_bytes": 95_131_718_400,
        "memory_bytes": 192 << 20,
    }
    assert [host["memory_bytes"] for host in document["per_host"]] == [128 * (192 << 20)] * 4
    assert document["memory_bytes_per_process"] == 192 << 20
    assert document["scale"] == "1"


def test_json_says_the_scale_as_a_ratio():
    layout = Layout(models.get("llama3-8b"), scale=Fraction(1, 16))
    assert json.loads(plan_json(Plan(layout)))["scale"] == "1/16"


def test_tables_show_kinds_roles_and_totals():
    text = printed(plan_of("llama3-405b", writes=10, nhosts=16, how="round-robin", process_nbytes=192 << 20))
    for expected in (
        "405,853,388,800 parameters",
        "all 512 ranks of llama3-405b (TP 8 x PP 32 x DP 2)",
        "796,983,296",
        "8-239",
        "12,701,105,024",
        "5.68 TB (5.17 TiB)",
        "56.83 TB",
        "192.00 MiB of memory per process",
    ):
        assert expected in text


def test_tables_of_many_ranks_stay_short():
    text = printed(Plan(Layout(models.get("llama3-405b"), ranks=16384), nhosts=128))
    assert len(text.splitlines()) < 60


def test_span_is_short():
    assert span([3]) == "3"
    assert span([0, 1, 2, 4]) == "0-2, 4"
    assert span([0, 8, 16]) == "0-16 by 8"
    assert span([0, 2]) == "0, 2"
    assert span([n for n in range(100) if n % 3]).endswith("19-20, ... 97-98")


def test_planning_imports_neither_numpy_nor_yaml_nor_mpi():
    code = (
        "import sys; from mlstor.checkpoint import layout, models, plan;"
        "plan.plan_json(plan.Plan(layout.Layout(models.get('llama3-1t'))));"
        "print([m for m in ('numpy', 'yaml', 'mpi4py', 'rich', 'msgspec', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("profile", ["native", "mlperf"])
def test_the_plans_memory_is_what_a_run_asks_for_before_its_first_byte(bench, capsys, profile):
    ran = bench("--profile", profile, "--pause", "0s", "--writes", 1, "--reads", 0, "--ranks", 1)
    (memory,) = (check for check in ran.record.preflight.checks if check.name == "memory")
    words = bench.arguments("--profile", profile, "--writes", 1, "--ranks", 1, "--plan", "--json")
    assert cli.main(["checkpoint", *words]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["memory_bytes_per_process"] == memory.needed
    assert planned["memory_bytes_per_process"] > 128 << 20


def whole_figures(plan: Plan) -> set[str]:
    """Every figure of the plan's tables."""
    sizes = {file.nbytes for file in plan.files()} | {share.nbytes for share in plan.hosts} | {plan.total_nbytes}
    return {f"{nbytes:,}" for nbytes in sizes}


@pytest.mark.parametrize("columns", ["80", "200"])
def test_a_pipe_gets_every_name_and_figure_whole(columns):
    words = ["checkpoint", "--plan", "--model", "llama3-1t", "--hosts", "16", "--writes", "10"]
    done = subprocess.run(
        [sys.executable, "-m", "mlstor", *words],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": columns, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "\u2026" not in done.stdout
    for whole in ("layer_*-model_*_model_states.pt", "zero_pp_rank_*_mp_rank_*_optim_states.pt"):
        assert whole in done.stdout
    for figure in whole_figures(plan_of("llama3-1t", nhosts=16)):
        assert figure in done.stdout


@pytest.mark.parametrize("name", ["llama3-1t", "opt-175b-full", "llama3-8b"])
def test_a_narrow_terminal_folds_names_and_cuts_nothing(name):
    plan = plan_of(name, nhosts=4, writes=10, process_nbytes=192 << 20)
    text = printed(plan, width=80)
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= 80
    for figure in whole_figures(plan):
        assert figure in text
