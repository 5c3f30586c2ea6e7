"""Command lines of mlpstorage v2.0 and v3.0, said in mlstor's own options.

``mlpstorage checkpointing {datasize|run}`` (v2.0) and ``mlpstorage {closed|open|whatif} checkpointing
{datasize|run} [file|object]`` (v3.0). Every flag is translated, accepted with a note when it has no effect
here, or refused with a sentence. Source: mlcommons/storage, ``mlpstorage/cli.py`` (v2.0),
``mlpstorage_py/cli/checkpointing_args.py`` and ``common_args.py`` (v3.0.26).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NoReturn

from mlstor.checkpoint.mlpstorage_launch import launcher, spread_hosts
from mlstor.checkpoint.models import MODELS
from mlstor.errors import UsageError

_MODES = ("closed", "open", "whatif")
_MODELS = ("llama3-8b", "llama3-70b", "llama3-405b", "llama3-1t")
_MPI_SUBSET = 8  # processes of MLPerf's subset run, rule 4.3.5
_FORM = (
    "[closed|open|whatif] checkpointing datasize|run [file] --model MODEL --num-processes N "
    "--checkpoint-folder PATH ..."
)

_HELP = f"""\
usage: mlstor mlpstorage {_FORM}

Take the command lines of MLPerf Storage's checkpointing, v2.0 and v3.0: datasize prints what would be written, run
starts the processes as mlpstorage does and measures with the profile mlperf. `mlstor mlpstorage checkpointing run
--help` lists the flags; docs/checkpoint-layout.md says what becomes of each."""

# Accepted, and without effect here: flag -> why.
_WITHOUT_EFFECT = {
    "--dlio-bin-path": "DLIO is not used",
    "--debug": "mlstor has no log levels",
    "--verbose": "mlstor has no log levels",
    "--quiet": "mlstor has no log levels",
    "--stream-log-level": "mlstor has no log levels",
    "--verify-lockfile": "it checks mlpstorage's own installation",
    "--skip-validation": "mlstor checks each run before its first byte, and this can't be skipped",
    "--timeseries-interval": "every result has its own series",
    "--skip-timeseries": "every result has its own series",
    "--max-timeseries-samples": "every result has its own series",
    "--systemname": "results are not filed under a system's name",
}
_OPEN_ONLY = (
    "--loops",
    "--params",
    "--allow-invalid-params",
    "--timeseries-interval",
    "--skip-timeseries",
    "--max-timeseries-samples",
)


@dataclass
class Translated:
    """A command line of mlpstorage in mlstor's terms.

    Attributes
    ----------
    action
        ``"datasize"`` (a plan, no I/O) or ``"run"``.
    options
        Arguments of ``mlstor checkpoint``.
    nprocs
        Processes, one per logical rank.
    hosts
        Names of the hosts, without their slots.
    mpirun
        Words that start the processes as mlpstorage would, to be put before the command of a run.
    expect
        Options to add when `mpirun` is used: they stop a launch that reached fewer hosts or ranks.
    loops
        Times to repeat the run.
    folder
        Where a run writes.
    notes
        One sentence for each flag that was accepted and has no effect.
    """

    action: str
    options: list[str]
    nprocs: int
    hosts: list[str] = field(default_factory=list)
    mpirun: list[str] = field(default_factory=list)
    expect: list[str] = field(default_factory=list)
    loops: int = 1
    folder: str | None = None
    notes: list[str] = field(default_factory=list)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"mlpstorage command line: {message}; its form is {_FORM}")


def _memory(text: str) -> str:
    """A size for ``--client-memory``; mlpstorage's GB of memory are GiB (it multiplies by 1024^3)."""
    try:
        nbytes = int(Fraction(text) * 2**30)
    except (ValueError, ZeroDivisionError):
        nbytes = 0
    if nbytes <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give the GiB of one client's memory")
    whole, rest = divmod(nbytes, 2**30)
    return f"{nbytes}B" if rest else f"{whole}GiB"


def _parser(action: str) -> _Parser:
    parser = _Parser(prog=f"mlstor mlpstorage checkpointing {action}")
    add = parser.add_argument
    add("--model", "-m", choices=_MODELS, required=True)
    add("--num-processes", "-np", type=int, required=True)
    add("--client-host-memory-in-gb", "-cm", type=_memory)
    add("--checkpoint-folder", "-cf")
    add("--hosts", "-s", nargs="+", default=["127.0.0.1"])
    add("--num-checkpoints-read", "-ncr", type=int, default=10)
    add("--num-checkpoints-write", "-ncw", type=int, default=10)
    add("--params", "-p", nargs="+", action="append")
    add("--exec-type", "-et", choices=("mpi", "docker"), default="mpi")
    add("--mpi-bin", choices=("mpirun", "mpiexec"), default="mpirun")
    add("--mpi-btl", choices=("auto", "vader", "tcp"), default="auto")
    add("--mpi-params", action="append")
    for flag in (
        "--oversubscribe",
        "--allow-run-as-root",
        "--o-direct",
        "--dry-run",
        "--open",
        "--closed",
        "--what-if",
    ):
        add(flag, action="store_true")
    add("--allow-invalid-params", "-aip", action="store_true", default=None)
    add("--results-dir", "-rd")
    add("--config-file", "-c")
    add("--loops", type=int)
    short = {"--dlio-bin-path": "-dp", "--systemname": "-sn"}
    switches = (
        "--debug",
        "--verbose",
        "--quiet",
        "--skip-validation",
        "--skip-timeseries",
    )
    for flag in _WITHOUT_EFFECT:
        names = [flag, short[flag]] if flag in short else [flag]
        if flag in switches:
            add(*names, action="store_true", default=None)
        else:
            add(*names)
    return parser


def _words(argv: Sequence[str]) -> tuple[str | None, str, list[str]]:
    """(mode word or None, action, the rest) of a command line."""
    words = list(argv)
    mode = words.pop(0) if words and words[0] in _MODES else None
    if not words or words[0] != "checkpointing":
        what = f"{words[0]!r} is not translated" if words else "nothing was asked for"
        raise UsageError(f"mlpstorage command line: {what}; only checkpointing is: {_FORM}")
    action = words[1] if len(words) > 1 else ""
    if action not in ("datasize", "run"):
        raise UsageError(
            f"mlpstorage command line: checkpointing {action or '(nothing)'} is not translated; give datasize or run"
        )
    return mode, action, words[2:]


def main(argv: list[str]) -> int:
    """Run ``mlstor mlpstorage``: translate the command line, say what has no effect, and carry it out."""
    if argv[:1] in (["-h"], ["--help"]):
        print(_HELP)
        return 0
    asked = translate(argv)
    from mlstor.checkpoint.mlpstorage_run import carry_out

    return carry_out(asked)


def _boolean(key: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UsageError(f"--params {key}={value}: give true or false")
    return value.lower() == "true"


def _count(key: str, value: str) -> int:
    if not value.isdecimal():
        raise UsageError(f"--params {key}={value}: give a whole number")
    return int(value)


def _apply_params(given: argparse.Namespace, notes: list[str]) -> None:
    """Take over what ``--params`` says of the checkpoint; refuse what can't be done, or note it (-aip)."""
    for pair in [pair for group in given.params or [] for pair in group]:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--params {pair} is not key=value")
        refusal = None
        match key:
            case "checkpoint.checkpoint_folder":
                given.checkpoint_folder = value
            case "checkpoint.num_checkpoints_write":
                given.num_checkpoints_write = _count(key, value)
            case "checkpoint.num_checkpoints_read":
                given.num_checkpoints_read = _count(key, value)
            case "checkpoint.rank_sync":
                notes.append(f"{key} has no effect: a phase always ends with its slowest rank")
            case "checkpoint.fsync" if not _boolean(key, value):
                refusal = "fsync is always inside the clock"
            case "checkpoint.randomize_tensor" if not _boolean(key, value):
                refusal = "data is always incompressible"
            case "checkpoint.time_between_checkpoints" if value not in ("5", "5.0"):
                refusal = "the mlperf profile pauses for 5 s"
            case "checkpoint.recovery_rank_shift" if _boolean(key, value):
                refusal = "it says no distance, run mlstor checkpoint with --rank-shift N for that"
            case (
                "checkpoint.fsync"
                | "checkpoint.randomize_tensor"
                | "checkpoint.time_between_checkpoints"
                | "checkpoint.recovery_rank_shift"
            ):
                pass  # asks for what is done anyway
            case _:
                refusal = "it has no counterpart here"
        if refusal and not given.allow_invalid_params:
            raise UsageError(f"--params {pair} is refused: {refusal}; leave it out, or add -aip to go on without it")
        if refusal:
            notes.append(f"--params {pair} has no effect: {refusal}")


def _check_closed(given: argparse.Namespace) -> None:
    """Rules of MLPerf's CLOSED division that a command line can break: 4.3.5, 4.6.1, 4.6.3, 4.7.1."""
    keys = {pair.partition("=")[0] for group in given.params or [] for pair in group}
    if other := sorted(keys - {"checkpoint.checkpoint_folder"}):
        raise UsageError(f"closed lets --params change checkpoint.checkpoint_folder alone, not {other[0]}; use open")
    writes, reads = given.num_checkpoints_write, given.num_checkpoints_read
    if {writes, reads} - {0, 10} or writes == reads == 0:
        raise UsageError(
            f"closed takes 10 or 0 checkpoints and not 0 of both, not {writes} written and {reads} read; use open"
        )
    own = MODELS[given.model].nranks
    if given.num_processes not in (own, _MPI_SUBSET):
        counts = f"{own} processes or a subset of {_MPI_SUBSET}" if own != _MPI_SUBSET else f"{own} processes"
        raise UsageError(
            f"closed runs {given.model} with {counts}, not {given.num_processes}; use open for other counts"
        )


def _check(given: argparse.Namespace, mode: str | None, environ: Mapping[str, str]) -> list[str]:
    """Refuse what can't be done; give the notes on flags without effect."""
    for flag, value in (("--num-processes", given.num_processes), ("--loops", given.loops)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value} is too low; give 1 or more")
    if given.exec_type == "docker":
        raise UsageError("--exec-type docker is not supported; start the container yourself and leave the option out")
    if given.config_file is not None:
        raise UsageError("--config-file is not read; put its settings on the command line")
    if mode and (given.closed or given.open or given.what_if):
        raise UsageError(f"--closed, --open and --what-if are v2.0's; this line starts with {mode}, so leave them out")
    used = {flag for flag in (*_WITHOUT_EFFECT, *_OPEN_ONLY) if _value(given, flag) is not None}
    if mode == "closed" and (refused := [flag for flag in _OPEN_ONLY if flag in used]):
        raise UsageError(f"{refused[0]} is for open and whatif; leave it out or start the line with open")
    notes = [f"{flag} has no effect: {why}" for flag, why in _WITHOUT_EFFECT.items() if flag in used]
    if given.systemname is None and environ.get("MLPERF_SYSTEMNAME"):
        notes.append(f"MLPERF_SYSTEMNAME has no effect: {_WITHOUT_EFFECT['--systemname']}")
    return notes


def _value(given: argparse.Namespace, flag: str) -> object:
    return getattr(given, flag.removeprefix("--").replace("-", "_"))


def _path(given: argparse.Namespace, action: str) -> str | None:
    path: str | None = given.checkpoint_folder
    if path is None and action == "run":
        raise UsageError("a run needs --checkpoint-folder: the directory that the checkpoints are written to")
    if path is not None and "://" in path:
        raise UsageError(
            f"--checkpoint-folder {path}: mlpstorage's command lines write to directories; for a bucket there is "
            "`mlstor checkpoint --profile mlperf`"
        )
    return path


def _ranks(model: str, nprocs: int) -> list[str]:
    own = MODELS[model].nranks
    return ["--subset", str(nprocs)] if nprocs == _MPI_SUBSET < own else ["--ranks", str(nprocs)]


def translate(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Translated:
    """Translate the words that follow ``mlpstorage``.

    Parameters
    ----------
    argv
        The command line without its first word.
    environ
        Where ``MLPERF_RESULTS_DIR`` and ``MLPERF_SYSTEMNAME`` are looked for; default: the process's
        environment.

    Raises
    ------
    UsageError
        If the line is not one of mlpstorage's, asks for what can't be done here, or breaks a rule of the
        CLOSED division that it asks for.
    """
    environ = os.environ if environ is None else environ
    mode, action, rest = _words(argv)
    given, left = _parser(action).parse_known_args(rest)
    if mode is not None and left[:1] == ["object"]:
        raise UsageError(
            "mlpstorage's object protocol is not taken: give file and a directory, or "
            "use `mlstor checkpoint --profile mlperf URL`"
        )
    if mode is not None and left[:1] == ["file"]:
        left = left[1:]
    if left:
        raise UsageError(
            f"mlpstorage command line: {left[0]!r} is not an argument of checkpointing {action}; its form is {_FORM}"
        )
    notes = _check(given, mode, environ)
    _apply_params(given, notes)
    for flag, value in (
        ("--num-checkpoints-write", given.num_checkpoints_write),
        ("--num-checkpoints-read", given.num_checkpoints_read),
    ):
        if value < 0:
            raise UsageError(f"{flag} {value} is too low; give 0 or more")
    if mode == "closed" or given.closed:
        _check_closed(given)

    hosts = spread_hosts(given.hosts, given.num_processes)
    names = list(dict.fromkeys(name for name, _ in hosts))
    path = _path(given, action)
    options = ["--model", given.model, *_ranks(given.model, given.num_processes)]
    options += ["--writes", str(given.num_checkpoints_write), "--reads", str(given.num_checkpoints_read)]
    options += ["--profile", "mlperf"] + (["--direct", "require"] if given.o_direct else [])
    if given.client_host_memory_in_gb is not None:
        options += ["--client-memory", given.client_host_memory_in_gb]
    result = Translated(action, options, given.num_processes, names, loops=given.loops or 1, notes=notes)
    if action == "datasize" or given.dry_run:
        result.action = "datasize"
        how = "round-robin" if mode and len(names) > 1 else "block"
        options += ["--plan", "--hosts", str(len(names)), "--deal", how]
        return result

    results = given.results_dir or environ.get("MLPERF_RESULTS_DIR")
    options += ["--results", results] if results else []
    if 0 in (given.num_checkpoints_write, given.num_checkpoints_read):
        # A writing and a reading run find each other by this name, as mlpstorage's do by the folder.
        options += ["--run-id", f"mlpstorage-{given.model}-{given.num_processes}"]
    options.append(str(path))
    result.folder = path
    result.mpirun = launcher(given, hosts, v3=mode is not None)
    result.expect = ["--expect-nodes", str(len(names)), "--expect-ranks", str(given.num_processes)]
    return result
