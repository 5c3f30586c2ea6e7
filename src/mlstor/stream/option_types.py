"""How the options' words are read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

from mlstor.errors import UsageError
from mlstor.units import parse_duration, parse_size

T = TypeVar("T")
_SERVER_MEMORY = "x-server-memory"


def said(parse_text: Callable[[str], T]) -> Callable[[str], T]:
    """A parser of `units` for argparse, which puts the option's name before the message."""

    def parsed(text: str) -> T:
        try:
            return parse_text(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def refusing(text: str, wanted: str) -> argparse.ArgumentTypeError:
    """The error for a text that is not what is wanted."""
    return argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


def count(text: str) -> int:
    """A whole number; underscores may part its digits."""
    digits = text.replace("_", "")
    if not (digits.isascii() and digits.isdecimal()):
        raise refusing(text, "a whole number")
    return int(digits)


def number(text: str, wanted: str) -> float:
    """A number from 0 on; else the text is not `wanted`."""
    try:
        value = float(text)
    except ValueError:
        raise refusing(text, wanted) from None
    if not math.isfinite(value) or value < 0:
        raise refusing(text, wanted)
    return value


def percent(text: str) -> float:
    """``30``, ``30%``, ``0.5%``."""
    value = number(text.removesuffix("%"), "a percentage: write it as 30%")
    if value > 100:
        raise refusing(text, "a percentage: write it as 30%")
    return value


def rate(text: str) -> float:
    """``5000``, ``5000/s``."""
    value = number(text.removesuffix("/s"), "a rate: write it as 5000, operations per second")
    if value < 0.001:
        raise refusing(text, "a rate: give at least 0.001 operations per second")
    return value


def limit(text: str) -> int | float:
    """Bytes; as a float the factor of ``3x-server-memory``."""
    if text.endswith(_SERVER_MEMORY):
        return number(text.removesuffix(_SERVER_MEMORY), "a size: write it as 3x-server-memory")
    return said(parse_size)(text)


def warmup(text: str) -> tuple[float, int]:
    """Seconds and epochs, of which one is 0."""
    number = text.removesuffix("s").removesuffix("epoch")
    if number != text and text.rstrip("s").endswith("epoch"):
        return 0.0, count(number.strip())
    return said(parse_duration)(text), 0
