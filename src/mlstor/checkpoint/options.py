"""The command line of ``mlstor checkpoint``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from mlstor.checkpoint.via import NAMES
from mlstor.errors import UsageError
from mlstor.storage.arguments import add_store_options, store_options
from mlstor.units import parse_duration, parse_fraction, parse_size

if TYPE_CHECKING:
    from mlstor.checkpoint.layout import Layout
    from mlstor.checkpoint.models import Shape

T = TypeVar("T")
_EVERY = "all"  # what --keep without a number stands for
_EPILOG = """\
PATH is a directory, s3://BUCKET/PREFIX or ais://BUCKET/PREFIX. It may be given several times or hold {local_rank},
{rank} or {host}, for nodes with several drives.
Examples:
  mlstor checkpoint --plan --model llama3-70b
  python -m mlstor.checkpoint --model llama3-8b --scale 1/16 /mnt/nvme
  mpirun -n 64 python -m mlstor.checkpoint --model llama3-70b /mnt/lustre/ckpt
  mpirun -n 64 python -m mlstor.checkpoint --model llama3-70b s3://bucket/ckpt
"""


class Options(argparse.Namespace):
    """What the user asked for; None where nothing was said."""

    paths: list[str]
    model: str | None
    workload: str | None
    ranks: int | None
    subset: int | None
    only_ranks: str | None
    deal: Literal["block", "round-robin"]
    scale: Fraction
    writes: int | None
    reads: int | None
    profile: Literal["native", "mlperf"]
    via: str | None
    direct: str | None
    block_bytes: int | None
    depth: int | None
    workers: int | None
    backend: str | None
    compressibility: int
    rank_shift: int
    verify: bool | None
    evict: bool
    pause_s: float | None
    keep: str | None
    client_memory_bytes: int | None
    run_id: str | None
    results_dir: str | None
    sharing: Literal["shared", "per-node"] | None
    expect_nodes: int | None
    expect_ranks: int | None
    hosts: int | None
    plan: bool
    json: bool
    live: bool
    endpoint: str | None
    store_options: dict[str, Any]

    @property
    def keep_count(self) -> int | None:
        """How many of the newest checkpoints are left behind; None: all."""
        if self.keep is None:  # nothing was said: a write-only run is there to be read by another
            return None if not self.reads or not self.writes else 0
        return None if self.keep == _EVERY else int(self.keep)

    def layout(self, nprocs: int) -> Layout:
        """The layout of logical ranks over files that was asked for, on `nprocs` processes."""
        from mlstor.checkpoint.layout import Layout

        return Layout(self._shape(), self.ranks, self.subset, self.scale, nprocs)

    def _shape(self) -> Shape:
        if (self.model is None) == (self.workload is None):
            raise UsageError("give --model MODEL or --workload FILE, one of them; `--model help` lists the models")
        if self.workload is not None:
            from mlstor.checkpoint.workload_file import from_workload_yaml

            return from_workload_yaml(self.workload)
        from mlstor.checkpoint import models

        assert self.model is not None
        return models.get(self.model)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` lists the options")


def parser() -> argparse.ArgumentParser:
    """The parser of all options; `parse` is what commands call."""
    made = _Parser(
        prog="mlstor checkpoint",
        description="Write and read a model's checkpoint as its ranks would, and say what the storage gave.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "paths", metavar="PATH", nargs="*", help="directory, s3://BUCKET/PREFIX or ais://BUCKET/PREFIX to measure"
    )
    what = made.add_argument_group("what is written")
    what.add_argument("--model", help="llama3-8b, llama3-70b, opt-175b-full, ...; help: list them")
    what.add_argument("--workload", metavar="FILE", help="a DLIO or mlpstorage workload YAML, in place of --model")
    what.add_argument("--ranks", type=int, metavar="N", help="logical ranks (default: the model's own count)")
    what.add_argument("--subset", type=int, metavar="N", help="the first N ranks of the full layout; MLPerf's has 8")
    what.add_argument("--only-ranks", metavar="LIST", help="run these logical ranks only: 3, 0-7 or 0,2,8-15")
    what.add_argument(
        "--scale",
        type=_said(parse_fraction),
        default=Fraction(1),
        metavar="R",
        help="shrink every tensor, as 1/16",
    )
    what.add_argument(
        "--compressibility",
        type=int,
        default=0,
        metavar="PERCENT",
        help="of each 4 KiB block, zeros (default 0)",
    )
    how = made.add_argument_group("how")
    how.add_argument("--writes", type=int, metavar="W", help="checkpoints to write (1; mlperf 10)")
    how.add_argument("--reads", type=int, metavar="R", help="checkpoints to read then (1; mlperf 10)")
    how.add_argument(
        "--profile",
        choices=("native", "mlperf"),
        default="native",
        help="native: direct, deep queue, durable; mlperf: the very I/O of MLPerf Storage v3.0 (default native)",
    )
    how.add_argument(
        "--via",
        choices=NAMES,
        help="carry the files as a training job would: torch.save, DCP, safetensors, s3torchconnector, mlstor.torch",
    )
    how.add_argument("--direct", choices=("auto", "require", "off"), help="O_DIRECT (auto; mlperf off)")
    how.add_argument(
        "--block",
        dest="block_bytes",
        type=_said(parse_size),
        metavar="SIZE",
        help="of one transfer (1MiB, or what the file system prefers); of objects a part's (the store's)",
    )
    how.add_argument("--depth", type=int, metavar="N", help="transfers in flight per worker (up to 8)")
    how.add_argument("--workers", type=int, metavar="N", help="worker threads per process (automatic)")
    how.add_argument("--backend", choices=("auto", "io_uring", "threads"), help="how I/O is submitted (auto)")
    how.add_argument("--rank-shift", type=int, default=0, metavar="N", help="rank r reads what rank r + N wrote")
    how.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare every byte read (native: yes; mlperf: no)",
    )
    how.add_argument(
        "--evict",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="drop the files from the page cache before reading, and check that (yes)",
    )
    how.add_argument(
        "--pause",
        dest="pause_s",
        type=_said(parse_duration),
        metavar="T",
        help="before each phase (0; mlperf 5s)",
    )
    add_store_options(how)
    where = made.add_argument_group("where it runs, and what it leaves")
    where.add_argument("--deal", choices=("block", "round-robin"), default="block", help="ranks to processes (block)")
    where.add_argument("--run-id", metavar="ID", help="name of the run; a read-only run names the one it reads")
    where.add_argument(
        "--keep", nargs="?", const=_EVERY, metavar="N", help="leave the newest N checkpoints (no N: all)"
    )
    where.add_argument("--results", dest="results_dir", metavar="DIR", help="where the record goes (results)")
    sharing = where.add_mutually_exclusive_group()
    sharing.add_argument(
        "--shared",
        dest="sharing",
        action="store_const",
        const="shared",
        help="assert: all hosts see PATH's files",
    )
    sharing.add_argument(
        "--per-node",
        dest="sharing",
        action="store_const",
        const="per-node",
        help="assert: no host sees another's",
    )
    where.add_argument("--expect-nodes", type=int, metavar="N", help="refuse to run on another number of hosts")
    where.add_argument("--expect-ranks", type=int, metavar="N", help="refuse to run with another number of processes")
    where.add_argument(
        "--client-memory",
        dest="client_memory_bytes",
        type=_said(parse_size),
        metavar="SIZE",
        help="of one host, for MLPerf's rule",
    )
    where.add_argument("--live", action=argparse.BooleanOptionalAction, default=True, help="progress while it runs")
    plan = made.add_argument_group("plan only")
    plan.add_argument("--plan", action="store_true", help="print files, bytes and needs, without any I/O")
    plan.add_argument("--json", action="store_true", help="with --plan: as JSON, every file")
    plan.add_argument("--hosts", type=int, metavar="H", help="with --plan: hosts that the ranks are dealt to")
    return made


def parse(argv: list[str]) -> Options:
    """The options in `argv`.

    Raises
    ------
    UsageError
        For values that can't be meant: negative counts, a scale of zero, options that exclude one another.
    """
    given = parser().parse_args(argv, namespace=Options())
    if given.model == "help":
        return given
    if given.keep is not None and given.keep != _EVERY and not given.keep.isdecimal():
        given.paths.insert(0, given.keep)  # `--keep PATH`: the count was left out
        given.keep = _EVERY
    given.store_options = store_options(given)
    default_count = 10 if given.profile == "mlperf" else 1
    given.writes = default_count if given.writes is None else given.writes
    given.reads = default_count if given.reads is None else given.reads
    for option, value, least in (
        ("--writes", given.writes, 0),
        ("--reads", given.reads, 0),
        ("--compressibility", given.compressibility, 0),
        ("--expect-nodes", given.expect_nodes, 1),
        ("--expect-ranks", given.expect_ranks, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{option} {value} is too low; give {least} or more")
    if given.profile == "mlperf":
        _refuse_beside_mlperf(given)
    if given.via is not None:
        _refuse_beside_via(given)
    if given.compressibility > 100:
        raise UsageError(f"--compressibility {given.compressibility} is a percentage: give 0 to 100")
    if given.plan:
        return given
    if given.json or given.hosts is not None:
        raise UsageError("--json and --hosts belong to --plan; a run's record is JSON already, under --results")
    if not given.writes and not given.reads:
        raise UsageError("--writes 0 --reads 0 leaves nothing to do; give one of them")
    if not given.writes and given.run_id is None:
        raise UsageError("a read-only run needs --run-id: the run whose checkpoints it reads")
    if not given.paths:
        raise UsageError("name the directory to measure, or a URL: mlstor checkpoint --model MODEL PATH")
    if given.run_id is not None and (not given.run_id or given.run_id in (".", "..") or "/" in given.run_id):
        raise UsageError(f"--run-id {given.run_id!r} is used as a directory's name: letters, digits, - and _")
    return given


def _refuse_beside_mlperf(given: Options) -> None:
    own = {
        "--block": given.block_bytes,
        "--depth": given.depth,
        "--workers": given.workers,
        "--backend": given.backend,
    }
    said = [option for option, value in own.items() if value is not None]
    if said:
        raise UsageError(
            f"--profile mlperf fixes block, depth, workers and backend, since they are MLPerf's: leave out "
            f"{', '.join(said)}, or use --profile native"
        )


def _refuse_beside_via(given: Options) -> None:
    if given.profile == "mlperf":
        raise UsageError("--profile mlperf is a way of its own: leave it out, or --via")
    own = {
        "--direct": given.direct,
        "--block": given.block_bytes,
        "--depth": given.depth,
        "--workers": given.workers,
        "--backend": given.backend,
    }
    said = [option for option, value in own.items() if value is not None]
    if said:
        raise UsageError(f"--via {given.via} decides itself how its bytes move: leave out {', '.join(said)}")
    if not given.writes:
        raise UsageError("a run --via reads what it has written itself, for only it knows its tensors: give --writes")


def _said(parse_text: Callable[[str], T]) -> Callable[[str], T]:
    """A parser of `units` for argparse, which puts the option's name before the message."""

    def parsed(text: str) -> T:
        try:
            return parse_text(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed
