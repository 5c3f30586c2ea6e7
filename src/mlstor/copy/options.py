"""What ``mlstor copy`` can be told."""

from __future__ import annotations

import argparse
from typing import Any, Literal

from mlstor.errors import UsageError
from mlstor.storage.arguments import assignment
from mlstor.stream import option_types as types
from mlstor.units import parse_size

PART_BYTES = 8 << 20
"""Default of ``--part``: what S3's own clients take (AWS CLI and SDKs, multipart_chunksize)."""
LEAST_PART_BYTES = 5 << 20
"""S3's smallest part of a multipart upload but the last."""
MEMORY_BYTES = 256 << 20
_BLOCK = 4096


class Options(argparse.Namespace):
    """The options of a copy, checked by `parse`."""

    source: str
    destination: str
    prefix: str
    per_node: bool
    overwrite: bool
    verify: Literal["no", "checksum", "read"]
    part_bytes: int
    memory_bytes: int
    workers: int | None
    in_flight: int | None
    source_options: dict[str, Any]
    destination_options: dict[str, Any]
    results_dir: str | None
    expect_nodes: int | None
    expect_ranks: int | None
    live: bool


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        prog="mlstor copy",
        description="Copy objects between directories, s3://BUCKET/PREFIX and ais://BUCKET/PREFIX; alone or under "
        "mpirun, where the objects are dealt to the ranks. Whatever is there already is left alone.",
        allow_abbrev=False,
    )
    made.add_argument("source", metavar="SRC", help="a directory, s3://BUCKET/PREFIX or ais://BUCKET/PREFIX")
    made.add_argument("destination", metavar="DST", help="the same; a directory is made if it does not exist")
    made.add_argument("--prefix", default="", metavar="TEXT", help="only objects whose key begins so (all)")
    made.add_argument("--per-node", action="store_true", help="DST is a local directory: a whole copy on each node")
    made.add_argument("--overwrite", action="store_true", help="copy also what is there already")
    made.add_argument(
        "--verify",
        choices=("no", "checksum", "read"),
        default="checksum",
        help="compare with the stores' checksums; or read every object once more from DST; sizes always (checksum)",
    )
    size = types.said(parse_size)
    made.add_argument(
        "--part", dest="part_bytes", type=size, default=PART_BYTES, metavar="SIZE",
        help="larger objects are copied in parts of it (8MiB)",
    )  # fmt: skip
    made.add_argument(
        "--memory", dest="memory_bytes", type=size, default=MEMORY_BYTES, metavar="SIZE",
        help="of a process for what is on its way (256MiB)",
    )  # fmt: skip
    made.add_argument("--workers", type=types.count, metavar="N", help="worker threads per side (the stores' choice)")
    made.add_argument("--in-flight", type=types.count, metavar="N", help="transfers under way per worker (8)")
    for side, of in (("source", "SRC"), ("destination", "DST")):
        made.add_argument(f"--{side}-endpoint", metavar="URL", help=f"of {of}'s server (environment, profile files)")
        made.add_argument(
            f"--{side}-option",
            dest=f"{side}_options",
            type=assignment,
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"of {of}'s store, as region=eu-1, anonymous=yes",
        )
    made.add_argument("--endpoint", metavar="URL", help="of both servers")
    made.add_argument("--results", dest="results_dir", metavar="DIR", help="where the record goes (results)")
    made.add_argument("--expect-nodes", type=types.count, metavar="N", help="refuse to run on another number of hosts")
    made.add_argument(
        "--expect-ranks", type=types.count, metavar="N", help="refuse to run with another number of processes"
    )
    made.add_argument("--live", action=argparse.BooleanOptionalAction, default=True, help="progress while it runs")
    return made


def parse(argv: list[str]) -> Options:
    """The options in `argv`.

    Raises
    ------
    UsageError
        For values that can't be meant.
    """
    from mlstor.storage.store import scheme_of

    given = parser().parse_args(argv, namespace=Options())
    for side in ("source", "destination"):
        options = dict(getattr(given, f"{side}_options"))
        if scheme_of(getattr(given, side)) != "file":
            endpoint = getattr(given, f"{side}_endpoint") or given.endpoint
            options |= {} if endpoint is None else {"endpoint": endpoint}
        elif getattr(given, f"{side}_endpoint") is not None:
            raise UsageError(f"--{side}-endpoint: {getattr(given, side)} is a directory, which has none")
        setattr(given, f"{side}_options", options)
    if given.endpoint is not None and {scheme_of(given.source), scheme_of(given.destination)} == {"file"}:
        raise UsageError("--endpoint: both sides are directories, which have none")
    if given.per_node and scheme_of(given.destination) != "file":
        raise UsageError(f"--per-node makes a copy in a directory of each node, and {given.destination} is none")
    if given.part_bytes < _BLOCK or given.part_bytes % _BLOCK:
        raise UsageError(f"--part {given.part_bytes} is not a multiple of 4 KiB: give 8MiB, for example")
    if scheme_of(given.destination) == "s3" and given.part_bytes < LEAST_PART_BYTES:
        raise UsageError("--part: S3 takes no parts below 5MiB; give more")
    if given.memory_bytes < 2 * given.part_bytes:
        raise UsageError(f"--memory {given.memory_bytes} has no room for two parts: give more, or a smaller --part")
    for option, value in (("--workers", given.workers), ("--in-flight", given.in_flight),
                          ("--expect-nodes", given.expect_nodes), ("--expect-ranks", given.expect_ranks)):  # fmt: skip
        if value is not None and value <= 0:
            raise UsageError(f"{option} {value} leaves nothing to do; give more, or leave it out")
    return given
