"""Command line options that say how a store is reached, the same for every verb."""

from __future__ import annotations

import argparse
from typing import Any

from mlstor.errors import UsageError
from mlstor.units import parse_size


def assignment(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``: yes and no, numbers, and sizes where the name ends with ``_bytes``."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not an option: write it as NAME=VALUE")
    if name == "token":  # command lines are seen by other users, and kept in records
        raise argparse.ArgumentTypeError(
            "token=... would stand in the run's record: give the token by AIS_AUTHN_TOKEN or AIS_AUTHN_TOKEN_FILE"
        )
    if value.lower() in ("yes", "true", "on"):
        return name, True
    if value.lower() in ("no", "false", "off"):
        return name, False
    if name.endswith("_bytes"):
        try:
            return name, parse_size(value)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return name, int(value) if value.isdecimal() else value


def add_store_options(group: argparse._ActionsContainer) -> None:
    """``--endpoint`` and ``-o``."""
    group.add_argument("--endpoint", metavar="URL", help="of the S3 or AIStore server (environment, profile files)")
    group.add_argument(
        "-o",
        dest="store_options",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the store, as region=eu-1, anonymous=yes, part_bytes=16MiB, via_proxy=yes",
    )


def store_options(given: argparse.Namespace) -> dict[str, Any]:
    """What `add_store_options` has taken, by keyword as `storage.store.open_store` takes it."""
    said: dict[str, Any] = dict(given.store_options)
    if given.endpoint is not None:
        said["endpoint"] = given.endpoint
    return said
