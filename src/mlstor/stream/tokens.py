"""``--pattern tokens``: how a language model's training reads its tokens over a mounted file system.

Raw token files are cut into records of 4096 bytes (2048 tokens of 16 bits); what is left at a file's end is dropped.
One seeded permutation of all records of all files is dealt to the ranks. OLMo's loader opens the file for each record,
reads and closes it (``--handles open``); a loader that keeps its files open is ``--handles kept``.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal, NamedTuple

from mlstor.errors import UsageError
from mlstor.units import parse_size

RECORD_NBYTES = 4096
"""2048 tokens of 16 bits: OLMo-1B.yaml, max_sequence_length 2048, and memmap_dtype uint16."""

_MOST_HANDLES = 512  # half of the usual RLIMIT_NOFILE of 1024


class Tokens(NamedTuple):
    """How token reads are done."""

    #: open: the file is opened for each record; kept: it stays open
    handles: Literal["open", "kept"]
    #: files open at once, at most
    most_handles: int
    record_nbytes: int = RECORD_NBYTES


class Olmo1b(NamedTuple):
    """OLMo 1B on an Azure NDv5 node over blobfuse, by the model's configuration."""

    #: reads per second of a node
    reads_per_s: int = 10_000
    #: threads of a node: one rank for each of 8 GPUs, for each of which iterable_dataset.py takes 4 (num_workers is 0)
    threads: int = 32
    #: OLMo-1B.yaml; the epoch is added to it there, and is a part of the key here
    seed: int = 6198
    handles: Literal["open", "kept"] = "open"


OLMO_1B = Olmo1b()
PROFILE = "olmo-1b"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of token reads."""
    group = parser.add_argument_group("token reads")
    group.add_argument(
        "--pattern",
        choices=("objects", "tokens"),
        default="objects",
        help="tokens: records of 4096 bytes of large files, in one random order over all of them (objects)",
    )
    group.add_argument(
        "--record", dest="record_nbytes", type=_size, metavar="SIZE", help="with --pattern tokens: of a record (4096)"
    )
    group.add_argument(
        "--handles",
        choices=("open", "kept"),
        help="with --pattern tokens: open the file for each record, or keep files open (kept)",
    )
    group.add_argument(
        "--max-handles", dest="most_handles", type=int, metavar="N", help="with --handles kept: open at once (512)"
    )
    group.add_argument(
        "--rate-per-node",
        type=float,
        metavar="N",
        help="operations per second of each node, begun in time whatever the storage does",
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def apply(given: Any) -> Tokens | None:
    """Make the options of a stream those of token reads; None if they are not asked for.

    Called on the parsed options before they are checked. ``--profile olmo-1b`` fills in what was not said.

    Raises
    ------
    UsageError
        For options that token reads exclude, and token options without ``--pattern tokens``.
    """
    if given.profile == PROFILE:
        given.pattern = "tokens"
        given.handles = given.handles or OLMO_1B.handles
        given.seed = OLMO_1B.seed if given.seed is None else given.seed
        given.workers = given.workers or 1
        if given.rate is None and given.rate_per_node is None:
            given.rate_per_node = float(OLMO_1B.reads_per_s)
    if given.pattern != "tokens":
        for option, value in (
            ("--record", given.record_nbytes),
            ("--handles", given.handles),
            ("--max-handles", given.most_handles),
        ):
            if value is not None:
                raise UsageError(f"{option} is an option of --pattern tokens: add that, or leave it out")
        return None
    if given.put or given.head or given.delete:
        raise UsageError("--pattern tokens only reads: leave --put, --head, --delete out (--fill N writes the files)")
    if given.read_nbytes is not None or given.range is not None or given.read_offset:
        raise UsageError("--pattern tokens reads whole records: say their size with --record, and leave ranges out")
    if given.record_nbytes is not None and given.record_nbytes <= 0:
        raise UsageError(f"--record {given.record_nbytes} leaves nothing to read; OLMo's are 4096 bytes")
    most = _MOST_HANDLES if given.most_handles is None else given.most_handles
    if most <= 0:
        raise UsageError(f"--max-handles {most}: one file at least has to be open")
    given.read_nbytes = given.record_nbytes or RECORD_NBYTES
    given.range = "records"
    given.workers = given.workers or 1
    return Tokens(given.handles or "kept", most, given.read_nbytes)


def threads_of(given: Any, local_rank: int, local_size: int) -> int | None:
    """Reads that a process of a profile has under way: the node's threads, dealt to its processes; None without one."""
    if given.profile != PROFILE:
        return None
    return max(1, OLMO_1B.threads // local_size + (local_rank < OLMO_1B.threads % local_size))


def rate_of_all(given: Any, hosts: int) -> float | None:
    """Operations per second of all ranks together; None in a closed loop.

    Raises
    ------
    UsageError
        If both rates were given.
    """
    if given.rate_per_node is None:
        rate: float | None = given.rate
        return rate
    if given.rate is not None:
        raise UsageError("--rate is of all ranks together and --rate-per-node of each node: give one of them")
    if given.rate_per_node <= 0:
        raise UsageError(f"--rate-per-node {given.rate_per_node:g} leaves nothing to do; give more")
    return float(given.rate_per_node) * hosts


def p99_goal_ns(in_flight_of_all: int, rate_of_all: float) -> int:
    """What p99 may be if the threads, each of which reads one record at a time, are to keep the rate: threads / rate.

    By Little's law the mean may be that; a loader whose p99 is within it is never the one that waits. OLMo 1B: 32
    threads of a node at 10,000 reads/s have 3.2 ms.
    """
    return int(in_flight_of_all / rate_of_all * 1e9)
