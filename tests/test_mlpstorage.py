"""Command lines of mlpstorage v2.0 and v3.0 in mlstor's options."""

from __future__ import annotations

from argparse import Namespace

import pytest

from mlstor.checkpoint.mlpstorage import Translated, translate
from mlstor.checkpoint.mlpstorage_launch import launcher
from mlstor.errors import UsageError

V2 = "checkpointing run --model llama3-70b --num-processes 64 --client-host-memory-in-gb 256 --checkpoint-folder /ckpt"
V3 = "closed checkpointing run file --model llama3-70b --num-processes 64 --checkpoint-folder /ckpt"


def translated(line: str, environ: dict[str, str] | None = None) -> Translated:
    return translate(line.split(), environ or {})


def value(result: Translated, option: str) -> str | None:
    if option not in result.options:
        return None
    return result.options[result.options.index(option) + 1]


def test_v2_run():
    result = translated(V2 + " --hosts h1:32 h2:32 --allow-run-as-root --results-dir /res --oversubscribe")
    assert result.action == "run"
    assert " ".join(result.options) == (
        "--model llama3-70b --ranks 64 --writes 10 --reads 10 --profile mlperf --client-memory 256GiB "
        "--results /res /ckpt"
    )
    assert (result.nprocs, result.hosts, result.loops) == (64, ["h1", "h2"], 1)
    assert " ".join(result.mpirun) == ("mpirun -n 64 -host h1:32,h2:32 --oversubscribe --allow-run-as-root")
    assert result.expect == ["--expect-nodes", "2", "--expect-ranks", "64"]
    assert result.notes == []


def test_v3_line_from_the_field():
    result = translated(
        "closed checkpointing run file --checkpoint-folder /ckpt --client-host-memory-in-gb 1024 "
        "--model llama3-405b --num-processes 512 --hosts a,b,c --mpi-bin mpiexec "
        "--results-dir /res --systemname big"
    )
    assert " ".join(result.mpirun) == ("mpiexec -n 512 --ppn 171 --hosts a,b,c --cpu-bind none")
    assert value(result, "--ranks") == "512"
    assert value(result, "--client-memory") == "1024GiB"
    assert result.notes == ["--systemname has no effect: results are not filed under a system's name"]


def test_v3_goes_round_several_hosts_and_binds_to_sockets_of_one():
    assert " ".join(translated(V3 + " --hosts a b").mpirun) == (
        "mpirun -n 64 -host a:32,b:32 --bind-to none --map-by node"
    )

    assert " ".join(translated(V3 + " --mpi-btl tcp").mpirun) == (
        "mpirun -n 64 -host 127.0.0.1:64 --bind-to none --map-by socket --mca btl tcp,self"
    )


def test_mpi_params_take_the_place_of_defaults():
    result = translate([*V3.split(), "--mpi-params=--bind-to core -x PATH"], {})
    assert " ".join(result.mpirun) == ("mpirun -n 64 -host 127.0.0.1:64 --map-by socket --bind-to core -x PATH")


def test_uneven_processes_go_to_the_first_hosts():
    assert "a:22,b:21,c:21" in translated(V3 + " --hosts a b,c").mpirun


def test_short_flags():
    long = translated(V2 + " --num-checkpoints-write 3 --num-checkpoints-read 4 --results-dir /r --hosts x")
    short = translated("checkpointing run -m llama3-70b -np 64 -cm 256 -cf /ckpt -ncw 3 -ncr 4 -rd /r -s x -et mpi")
    assert short == long


@pytest.mark.parametrize(
    ("model", "nprocs", "options"),
    [
        ("llama3-70b", 8, ["--subset", "8"]),
        ("llama3-1t", 8, ["--subset", "8"]),
        ("llama3-8b", 8, ["--ranks", "8"]),
        ("llama3-70b", 32, ["--ranks", "32"]),
        ("llama3-70b", 128, ["--ranks", "128"]),
    ],
)
def test_number_of_processes_becomes_ranks_or_mlperfs_subset(model, nprocs, options):
    result = translated(f"open checkpointing run file --model {model} --num-processes {nprocs} -cf /c")
    assert result.options[2:4] == options


def test_o_direct_requires_direct():
    assert value(translated(V3 + " --o-direct"), "--direct") == "require"
    assert value(translated(V3), "--direct") is None


def test_datasize_becomes_a_plan_without_a_path():
    result = translated("checkpointing datasize -m llama3-405b -np 512 -cm 1024 -cf /ckpt --hosts a b")
    assert result.action == "datasize"
    assert result.options[-5:] == ["--plan", "--hosts", "2", "--deal", "block"]
    assert "/ckpt" not in result.options
    assert result.mpirun == []
    v3 = translated("closed checkpointing datasize -m llama3-405b -np 512 -cm 1024 --hosts a b")
    assert value(v3, "--deal") == "round-robin"


def test_dry_run_becomes_a_plan():
    assert translated(V3 + " --dry-run").action == "datasize"


def test_write_only_and_read_only_runs_share_a_run_id():
    write, read = translated(V3 + " -ncr 0"), translated(V3 + " -ncw 0")
    assert value(write, "--run-id") == value(read, "--run-id") == "mlpstorage-llama3-70b-64"
    assert (value(write, "--reads"), value(read, "--writes")) == ("0", "0")
    assert value(translated(V3), "--run-id") is None


def test_environment_gives_results_and_system_name():
    environ = {"MLPERF_RESULTS_DIR": "/env", "MLPERF_SYSTEMNAME": "big"}
    assert value(translated(V3, environ), "--results") == "/env"
    assert value(translated(V3 + " --results-dir /flag", environ), "--results") == "/flag"
    assert "MLPERF_SYSTEMNAME has no effect" in translated(V3, environ).notes[0]
    assert value(translated(V3), "--results") is None


def test_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("MLPERF_RESULTS_DIR", "/process")
    assert value(translate(V3.split()), "--results") == "/process"


def test_protocol_may_stand_behind_the_flags():
    assert translated("open checkpointing run -m llama3-8b -np 8 --checkpoint-folder /c file").action == "run"


def test_memory_may_be_a_fraction():
    line = "open checkpointing run file -m llama3-8b -np 8 -cf /c -cm "
    assert value(translated(line + "1.5"), "--client-memory") == f"{3 * 2**29}B"


def test_loops():
    assert translated(V3.replace("closed", "open") + " --loops 3").loops == 3


NO_EFFECT = (
    "--dlio-bin-path /x",
    "--debug",
    "--verbose",
    "--quiet",
    "--stream-log-level DEBUG",
    "--verify-lockfile /x",
    "--skip-validation",
    "--timeseries-interval 5",
    "--skip-timeseries",
    "--max-timeseries-samples 7",
    "--systemname s",
)


@pytest.mark.parametrize("flag", NO_EFFECT)
def test_flag_without_effect_changes_nothing_and_is_noted(flag):
    line = V3.replace("closed", "open")
    plain, result = translated(line), translated(f"{line} {flag}")
    assert result.options == plain.options
    assert [note.split()[0] for note in result.notes] == [flag.split()[0]]


def test_params_of_the_checkpoint_are_taken_over():
    result = translated(
        V2 + " --params checkpoint.num_checkpoints_write=2 checkpoint.num_checkpoints_read=3 "
        "checkpoint.checkpoint_folder=/other --params checkpoint.fsync=True checkpoint.rank_sync=True"
    )
    assert (value(result, "--writes"), value(result, "--reads"), result.options[-1]) == ("2", "3", "/other")
    assert [note.split()[0] for note in result.notes] == ["checkpoint.rank_sync"]


REFUSED_PARAMS = (
    "checkpoint.fsync=False",
    "checkpoint.randomize_tensor=false",
    "checkpoint.time_between_checkpoints=1",
    "checkpoint.recovery_rank_shift=true",
    "checkpoint.mode=subset",
    "model.num_layers=3",
    "num_checkpoints_write=3",
)


@pytest.mark.parametrize("pair", REFUSED_PARAMS)
def test_other_params_are_refused_unless_invalid_ones_are_allowed(pair):
    with pytest.raises(UsageError, match="is refused"):
        translated(f"{V2} --params {pair}")
    result = translated(f"{V2} -aip --params {pair}")
    assert result.options == translated(V2).options
    assert pair in result.notes[0]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "nothing was asked for"),
        ("closed", "nothing was asked for"),
        ("training run", "'training' is not translated"),
        ("reports reportgen", "'reports' is not translated"),
        ("checkpointing", "checkpointing (nothing) is not translated"),
        ("closed checkpointing configview file", "configview is not translated"),
        (V3.replace(" file", " object"), "use `mlstor checkpoint --profile mlperf URL`"),
        (V3.replace("/ckpt", "s3://bucket/ckpt"), "there is `mlstor checkpoint --profile mlperf`"),
        (V3.replace("llama3-70b", "llama3-7b"), "invalid choice: 'llama3-7b'"),
        (V3.replace(" --model llama3-70b", ""), "required: --model/-m"),
        (V3.replace(" --num-processes 64", ""), "required: --num-processes/-np"),
        (V3.replace(" --checkpoint-folder /ckpt", ""), "needs --checkpoint-folder"),
        (V3.replace("64", "many"), "invalid int value: 'many'"),
        (V3.replace("64", "0"), "--num-processes 0 is too low"),
        (V2 + " --exec-type docker", "docker is not supported"),
        (V2 + " --config-file c.yaml", "--config-file is not read"),
        (V2 + " --unheard-of", "'--unheard-of' is not an argument"),
        (V2.replace("run", "run file", 1), "'file' is not an argument"),
        (V2 + " --loops 0", "--loops 0 is too low"),
        (V2 + " -ncw -1", "--num-checkpoints-write -1 is too low"),
        (V2 + " --params nonsense", "is not key=value"),
        (V2 + " --params checkpoint.num_checkpoints_read=x", "give a whole number"),
        (V2 + " --params checkpoint.fsync=maybe", "give true or false"),
        (V2 + " -cm 1/0", "'1/0' is not a size"),
        (V2 + " -cm -4", "'-4' is not a size"),
        (V2 + " --hosts ,", "names no host"),
        (V2 + " --hosts a:8 b", "give every host its slots"),
        (V2 + " --hosts a:8 b:8", "16 slots for 64 processes"),
        (V2.replace("64", "1") + " --hosts a b", "less than one for each of 2 hosts"),
        (V3 + " --loops 2", "--loops is for open and whatif"),
        (V3 + " --params checkpoint.fsync=true", "--params is for open and whatif"),
        (V3 + " -aip", "--allow-invalid-params is for open and whatif"),
        (V3 + " --open", "are v2.0's"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(line, complaint):
    with pytest.raises(UsageError) as caught:
        translated(line)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("closed", [V3, V2 + " --closed"])
@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("64", "408", "closed runs llama3-70b with 64 processes or a subset of 8, not 408"),
        ("/ckpt", "/ckpt -ncw 5", "closed takes 10 or 0 checkpoints"),
        ("/ckpt", "/ckpt -ncw 0 -ncr 0", "not 0 of both"),
    ],
)
def test_closed_rules_hold_only_where_closed_was_asked_for(closed, old, new, complaint):
    with pytest.raises(UsageError) as caught:
        translated(closed.replace(old, new))
    assert complaint in str(caught.value)
    open_line = closed.replace("closed check", "open check").replace("--closed", "--open")
    assert translated(open_line.replace(old, new)).action == "run"


def test_closed_of_v2_lets_params_change_the_folder_alone():
    assert translated(V2 + " --closed --params checkpoint.checkpoint_folder=/o").options[-1] == "/o"
    with pytest.raises(UsageError, match=r"not checkpoint\.num_checkpoints_read"):
        translated(V2 + " --closed --params checkpoint.num_checkpoints_read=10")


@pytest.mark.parametrize(
    ("model", "nprocs"), [("llama3-8b", 8), ("llama3-70b", 64), ("llama3-405b", 512), ("llama3-1t", 8)]
)
def test_closed_counts_are_accepted(model, nprocs):
    assert translated(f"closed checkpointing run file -m {model} -np {nprocs} -cf /c").nprocs == nprocs


def test_mpi_params_with_an_open_quote_are_refused() -> None:
    with pytest.raises(UsageError, match="--mpi-params 'a: No closing quotation"):
        launcher(Namespace(mpi_params=["'a"], num_processes=1, mpi_bin="mpirun"), [], False)
