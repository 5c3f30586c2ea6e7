"""Sizes, rates and times: parsed from what users type, printed with their unit. GB is 10^9 bytes and GiB 2^30."""

from __future__ import annotations

import re
from fractions import Fraction

from mlstor.errors import UsageError

_FACTOR = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtpe", start=1):
    _FACTOR[_letter + "b"] = 1000**_power
    _FACTOR[_letter + "ib"] = 1024**_power
    _FACTOR[_letter] = 1024**_power  # as dd, fio and mount read a bare K, M or G

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|min|h|d|)\s*")
_SECONDS: dict[str, Fraction | int] = {
    "ms": Fraction(1, 1000),
    "s": 1,
    "": 1,
    "m": 60,
    "min": 60,
    "h": 3600,
    "d": 86400,
}


def parse_size(text: str | int) -> int:
    """Bytes in `text`: ``"4MiB"``, ``"1.5GB"``, ``"512"``; a bare K, M, G or T is binary.

    Raises
    ------
    UsageError
        If `text` is not a size or not a whole number of bytes.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    factor = _FACTOR.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{text!r} is not a size; write it as 4MiB, 1.5GB or a number of bytes")
    nbytes = Fraction(match[1]) * factor
    if nbytes.denominator != 1:
        raise UsageError(f"{text!r} is not a whole number of bytes")
    return int(nbytes)


def parse_duration(text: str) -> float:
    """Seconds in `text`: ``"90"``, ``"1.5h"``, ``"500ms"``.

    Raises
    ------
    UsageError
        If `text` is not a duration.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a duration; write it as 90s, 15min or 2h")
    return float(Fraction(match[1]) * _SECONDS[match[2]])


def parse_fraction(text: str) -> Fraction:
    """A positive ratio such as ``"1/16"`` or ``"0.25"``.

    Raises
    ------
    UsageError
        If `text` is not a ratio above zero.
    """
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{text!r} is not a ratio; write it as 1/16 or 0.25") from None
    if value <= 0:
        raise UsageError(f"{text!r} is not above zero; write it as 1/16 or 0.25")
    return value


def format_gb(nbytes: float) -> str:
    """`nbytes` in GB (10^9 bytes), or in MB, kB or B where that is below one."""
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:.0f} B"


def format_gib(nbytes: float) -> str:
    """`nbytes` in GiB (2^30 bytes), or in MiB, KiB or B where that is below one."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes >= 1024**power:
            return f"{nbytes / 1024**power:.2f} {unit}"
    return f"{nbytes:.0f} B"


def format_both(nbytes: int) -> str:
    """`nbytes` in both units, for totals: ``"112.43 GB (104.70 GiB)"``."""
    return f"{format_gb(nbytes)} ({format_gib(nbytes)})"


def format_ns(duration_ns: float) -> str:
    """A duration with three significant digits in its natural unit."""
    for factor, unit in ((10**9, "s"), (10**6, "ms"), (10**3, "us")):
        if duration_ns >= factor:
            return (
                f"{duration_ns / factor:.3g} {unit}"
                if duration_ns < 999.5 * factor  # from there on three digits would be written 1e+03
                else f"{duration_ns / factor:.0f} {unit}"
            )
    return f"{duration_ns:.0f} ns"
