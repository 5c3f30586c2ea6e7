"""The command line of ``mlstor stream``."""

from __future__ import annotations

import argparse
import math
from typing import Any, Literal, NoReturn

from mlstor.errors import UsageError
from mlstor.storage.arguments import add_store_options, store_options
from mlstor.stream import option_types as types, tokens
from mlstor.stream.profiles import PROFILES, apply
from mlstor.units import parse_duration, parse_size

_LAST = "last"  # what --objects-of without a name stands for
_VERIFY = ("pattern", "checksum")
_EPILOG = """\
URL is a directory, s3://BUCKET/PREFIX or ais://BUCKET/PREFIX. Several, or one that holds {local_rank}, {rank} or
{host}, give ranks targets of their own. Sums (--bytes, --ops, --rate) are those of all ranks together.
Examples:
  mlstor stream --put 100% --size 1MiB --ops 10000 /mnt/nvme/objects
  mlstor stream --epochs 2 /mnt/nvme/objects
  mpirun -n 8 python -m mlstor.stream s3://bucket/train --duration 2h
  mpirun -n 320 python -m mlstor.stream ais://bucket --profile shards-stream
"""


class Options(argparse.Namespace):
    """What the user asked for; None where nothing was said."""

    urls: list[str]
    profile: str | None
    nodes: int
    gpus: int
    loaders: int
    get: float
    put: float
    head: float
    delete: float
    fill: int | None
    size: str | None
    min_nbytes: int | None
    max_nbytes: int | None
    compressibility: int
    prefix_dirs: int
    checksum: bool
    read_nbytes: int | None
    read_offset: int
    range: Literal["fixed", "random", "records"] | None
    range_align: int | None
    verify: Literal["pattern", "checksum"] | None
    order: Literal["permutation", "sequential", "replacement"]
    epoch_scope: Literal["world", "client"]
    uneven: Literal["exact", "drop", "pad"]
    seed: int
    catalog: str | None
    list_file: str | None
    objects_of: str | None
    epochs: int | None
    duration_s: float | None
    limit_nbytes: int | None
    server_memory_times: float | None
    ops: int | None
    warmup_s: float
    warmup_epochs: int
    rate: float | None
    workers: int | None
    in_flight: int | None
    endpoint: str | None
    store_options: dict[str, Any]
    client: str | None
    run_id: str | None
    results_dir: str | None
    cleanup: bool
    clean: str | None
    sharing: Literal["shared", "per-node"] | None
    expect_nodes: int | None
    expect_ranks: int | None
    server_memory_bytes: int | None
    live: bool
    pattern: Literal["objects", "tokens"]
    record_nbytes: int | None
    handles: Literal["open", "kept"] | None
    most_handles: int | None
    rate_per_node: float | None
    tokens: tokens.Tokens | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` lists the options")


def parser() -> argparse.ArgumentParser:
    """The parser of all options; `parse` is what commands call."""
    made = _Parser(
        prog="mlstor stream",
        description="Read, write, ask for and delete objects, and say what the storage gave.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("urls", metavar="URL", nargs="*", help="directory, s3://BUCKET/PREFIX or ais://BUCKET/PREFIX")
    _scenario(made.add_argument_group("a known scenario: options that hold where nothing else is said"))
    _what(made.add_argument_group("what is done"))
    _stops(made.add_argument_group("when it ends: whichever comes first (one epoch, or with --put alone say which)"))
    _reads(made.add_argument_group("what is read"))
    _writes(made.add_argument_group("what is written"))
    _how(made.add_argument_group("how"))
    tokens.add_options(made)
    _where(made.add_argument_group("where it runs, and what it leaves"))
    return made


def _scenario(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--profile",
        choices=(*PROFILES, tokens.PROFILE),
        help="shards of 1 GiB, written or streamed in random order; token reads",
    )
    for name, text in (("nodes", "nodes (8)"), ("gpus", "GPUs per node (8)"), ("loaders", "data loaders per GPU (5)")):
        group.add_argument(f"--{name}", type=types.count, metavar="N", help=f"with --profile: {text}")


def _what(group: argparse._ArgumentGroup) -> None:
    for name, text in (
        ("get", "reads of the objects that are there (100, or what the others leave)"),
        ("put", "writes of new objects"),
        ("head", "questions for an object's size"),
        ("delete", "removals of objects that this run, or the run of --objects-of, wrote"),
    ):
        group.add_argument(f"--{name}", type=types.percent, metavar="PERCENT", help=text)
    group.add_argument("--fill", type=types.count, metavar="N", help="write N objects first, and then read those")


def _stops(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=types.count, metavar="N", help="passes over all objects")
    group.add_argument(
        "--duration", dest="duration_s", type=types.said(parse_duration), metavar="T", help="90s, 15min, 2h"
    )
    group.add_argument(
        "--bytes",
        dest="limit_nbytes",
        type=types.limit,
        metavar="SIZE",
        help="read and written: 1TiB, or 3x-server-memory",
    )
    group.add_argument("--ops", type=types.count, metavar="N", help="operations")
    group.add_argument(
        "--warmup", type=types.warmup, metavar="T", help="run before and not counted: a time, or epochs as 1epoch (0)"
    )


def _reads(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--catalog", metavar="FILE", help="objects of a catalog that was built before, without listing")
    group.add_argument("--list-file", metavar="FILE", help="objects named in a file: a name per line, tab, bytes")
    group.add_argument(
        "--objects-of",
        nargs="?",
        const=_LAST,
        metavar="RUN",
        help="objects that a run of mlstor wrote there, without listing (no RUN: the last one)",
    )
    group.add_argument("--order", choices=("permutation", "sequential", "replacement"), default="permutation",
                       help="of the objects of an epoch (permutation)")  # fmt: skip
    group.add_argument("--seed", type=types.count, metavar="N", help="of the order and of all draws (0)")
    group.add_argument("--epoch-scope", choices=("world", "client"), default="world",
                       help="one pass by all ranks together, or by each (world)")  # fmt: skip
    group.add_argument("--uneven", choices=("exact", "drop", "pad"), default="exact",
                       help="what ranks do where the objects can't be dealt evenly (exact)")  # fmt: skip
    group.add_argument(
        "--read-bytes",
        dest="read_nbytes",
        type=types.said(parse_size),
        metavar="SIZE",
        help="of each read (whole objects)",
    )
    group.add_argument(
        "--read-offset", type=types.said(parse_size), default=0, metavar="SIZE", help="with --read-bytes: where (0)"
    )
    group.add_argument(
        "--range",
        choices=("fixed", "random", "records"),
        help="with --read-bytes: at --read-offset; anywhere; or each record of each object once per epoch (fixed)",
    )
    group.add_argument(
        "--range-align",
        type=types.said(parse_size),
        metavar="SIZE",
        help="with --range random: offsets are multiples of it (--read-bytes)",
    )
    group.add_argument(
        "--verify",
        nargs="?",
        const=_VERIFY[0],
        metavar="pattern|checksum",
        help="compare every byte with what --put wrote (pattern); or the store's checksum of whole objects",
    )


def _writes(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--size", metavar="SIZE", help="1MiB; lognormal:MEDIAN:SIGMA; @FILE of lines `SIZE WEIGHT` (1MiB)"
    )
    group.add_argument(
        "--min-size",
        dest="min_nbytes",
        type=types.said(parse_size),
        metavar="SIZE",
        help="sizes from here on, uniformly",
    )
    group.add_argument("--max-size", dest="max_nbytes", type=types.said(parse_size), metavar="SIZE", help="up to here")
    group.add_argument(
        "--compressibility", type=types.count, default=0, metavar="PERCENT", help="of each 4 KiB, zeros (0)"
    )
    group.add_argument(
        "--prefix-dirs", type=types.count, default=0, metavar="N", help="deal the objects to N directories (0)"
    )
    group.add_argument(
        "--checksum",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="send one, where the store takes it (yes)",
    )


def _how(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rate",
        type=types.rate,
        metavar="N",
        help="operations per second, begun in time whatever the storage does (as fast as it answers)",
    )
    group.add_argument(
        "--workers", type=types.count, metavar="N", help="worker threads per process (the store's choice)"
    )
    group.add_argument("--in-flight", type=types.count, metavar="N", help="transfers under way per worker (8)")
    add_store_options(group)
    group.add_argument(
        "--client",
        choices=("mlstor", "s3torchconnector"),
        help="who speaks S3: Amazon's connector, to compare (mlstor)",
    )
    group.add_argument(
        "--server-memory",
        dest="server_memory_bytes",
        type=types.said(parse_size),
        metavar="SIZE",
        help="of all servers together: could they have answered from it? (AIStore says itself)",
    )


def _where(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--run-id", metavar="ID", help="name of the run, and of the directory that it writes to")
    group.add_argument("--cleanup", action="store_true", help="at the end remove what this run wrote")
    group.add_argument("--clean", metavar="RUN", help="only remove what that run wrote, and do nothing else")
    group.add_argument("--results", dest="results_dir", metavar="DIR", help="where the record goes (results)")
    for kind, text in (("shared", "all hosts see URL's files"), ("per-node", "no host sees another's")):
        group.add_argument(f"--{kind}", dest="sharing", action="store_const", const=kind, help=f"assert: {text}")
    group.add_argument("--expect-nodes", type=types.count, metavar="N", help="refuse to run on another number of hosts")
    group.add_argument(
        "--expect-ranks", type=types.count, metavar="N", help="refuse to run with another number of processes"
    )
    group.add_argument("--live", action=argparse.BooleanOptionalAction, default=True, help="progress while it runs")


def parse(argv: list[str]) -> Options:
    """The options in `argv`.

    Raises
    ------
    UsageError
        For values that can't be meant, and options that exclude one another.
    """
    given = parser().parse_args(argv, namespace=Options())
    _sort_out(given)
    given.store_options = store_options(given)
    if given.client is not None:
        given.store_options["client"] = given.client
    given.warmup_s, given.warmup_epochs = given.warmup or (0.0, 0)
    given.server_memory_times = None
    if isinstance(given.limit_nbytes, float):
        given.limit_nbytes, given.server_memory_times = None, given.limit_nbytes
    if not given.urls:
        raise UsageError("say where: mlstor stream URL, a directory, s3://BUCKET/PREFIX or ais://BUCKET/PREFIX")
    if given.run_id is not None and (given.run_id in ("", ".", "..") or set(given.run_id) & set("/{}")):
        raise UsageError(f"--run-id {given.run_id!r} is used as a directory's name: letters, digits, - and _")
    if given.clean is not None:
        return given
    if given.profile is None and (given.nodes or given.gpus or given.loaders):
        raise UsageError("--nodes, --gpus and --loaders belong to --profile: say --in-flight, or which profile")
    given.tokens = tokens.apply(given)
    given.seed = given.seed or 0
    apply(given)
    _share_out(given)
    _check(given)
    return given


def _sort_out(given: Options) -> None:
    """A URL behind an option whose word may be left out is a URL."""
    if given.verify is not None and given.verify not in _VERIFY:
        given.urls.insert(0, given.verify)
        given.verify = "pattern"
    if given.objects_of not in (None, _LAST) and not given.urls:
        given.urls, given.objects_of = [given.objects_of], _LAST


def _share_out(given: Options) -> None:
    """GET is what the others leave, unless it was said; together they are 100."""
    said: dict[str, float | None] = {name: getattr(given, name) for name in ("get", "put", "head", "delete")}
    if given.fill is not None and said["put"] is None and said["get"] is None:
        said["put"] = 0.0
    if said["get"] is None:
        said["get"] = 100.0 - sum(value for value in said.values() if value is not None)
    shares = {name: value or 0.0 for name, value in said.items()}
    if min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 100.0, abs_tol=1e-6):
        told = ", ".join(f"--{name} {value:g}" for name, value in shares.items() if value)
        raise UsageError(f"{told} together are not 100 %; leave --get out, and it is what the others leave")
    for name, value in shares.items():
        setattr(given, name, value)


def _check(given: Options) -> None:
    reads = given.get > 0
    limited = [given.duration_s, given.limit_nbytes, given.server_memory_times, given.ops, given.epochs]
    if given.epochs is not None and not reads:
        raise UsageError("--epochs counts passes of reading: give --duration, --bytes or --ops for other operations")
    if all(limit is None for limit in limited):
        if not reads:
            raise UsageError("say when it ends: --ops, --bytes or --duration (only reading has epochs)")
        given.epochs = 1
    for option, value in (("--epochs", given.epochs), ("--ops", given.ops), ("--fill", given.fill),
                          ("--workers", given.workers), ("--in-flight", given.in_flight),
                          ("--expect-nodes", given.expect_nodes), ("--expect-ranks", given.expect_ranks),
                          ("--duration", given.duration_s), ("--bytes", given.limit_nbytes),
                          ("--read-bytes", given.read_nbytes)):  # fmt: skip
        if value is not None and value <= 0:
            raise UsageError(f"{option} {value} leaves nothing to do; give more, or leave it out")
    if given.compressibility > 100:
        raise UsageError(f"--compressibility {given.compressibility} is a percentage: give 0 to 100")
    named = [name for name in ("catalog", "list_file", "objects_of", "fill") if getattr(given, name) is not None]
    if len(named) > 1:
        words = " and ".join(f"--{name.replace('_', '-')}" for name in named)
        raise UsageError(f"{words} each say what is read: give one of them")
    _check_ranges(given)
    own = given.objects_of is not None or given.fill is not None
    if given.verify == "pattern" and not own:
        if named:
            raise UsageError(
                "--verify compares with what a run of mlstor wrote: give --objects-of, or --verify checksum"
            )
        given.objects_of, own = _LAST, True
    if given.verify is not None and not reads:
        raise UsageError("--verify is about reads, and there are none: give --get, or leave it out")
    if given.verify == "pattern" and given.put and given.objects_of is not None:
        raise UsageError(
            "--verify reads what another run wrote: leave --put out, or give --fill in place of --objects-of"
        )
    if given.delete > given.put and not (own and given.delete == 100):
        raise UsageError(
            "--delete removes only what mlstor wrote: give --put as much at least, or --delete 100% --objects-of RUN"
        )
    if given.warmup_epochs and not reads:
        raise UsageError("--warmup in epochs needs reads: give a time")


def _check_ranges(given: Options) -> None:
    if given.read_nbytes is None:
        if given.range is not None or given.read_offset or given.range_align is not None:
            raise UsageError("--range, --range-align and --read-offset go with --read-bytes: say how much is read")
        return
    given.range = given.range or "fixed"
    if given.read_offset and given.range != "fixed":
        raise UsageError(f"--read-offset is for --range fixed; --range {given.range} has offsets of its own")
    if given.range_align is not None and given.range != "random":
        raise UsageError(f"--range-align is for --range random; with --range {given.range} it means nothing")
    if given.range_align is not None and given.range_align <= 0:
        raise UsageError("--range-align is at least one byte")
    if given.verify == "checksum":
        raise UsageError("a store's checksum is of whole objects: leave --read-bytes out, or give --verify pattern")
