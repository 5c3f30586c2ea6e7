"""How aisloader's command line is read: Go's flags, with every option of the table in `options`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from mlstor.aisloader.options import ALIASES, FLAGS, REFUSED, Flag
from mlstor.errors import UsageError

_TRUE = ("1", "t", "true", "y", "yes", "on")
_FALSE = ("0", "f", "false", "n", "no", "off", "")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgtpe])?(?:i?b)?)", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)")
_SECONDS = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
}
#: Words that stand for the first argument alone, as aisloader has them.
_WORDS = ("usage", "help", "version")


class Given(dict[str, Any]):
    """Values of all options by today's name, with the defaults of those that were left out.

    Attributes
    ----------
    said : set of str
        Options that were given.
    asked : str
        ``"usage"`` or ``"version"`` if that is all that was wanted.
    """

    def __init__(self) -> None:
        super().__init__({flag.name: flag.default for flag in FLAGS})
        self.said: set[str] = set()
        self.asked = ""


def parse(argv: list[str]) -> Given:
    """The options in `argv`, each as ``-x=v``, ``-x v``, ``--x=v`` or ``--x v``; a yes or no takes no second word.

    Raises
    ------
    UsageError
        For an option that aisloader never had, one that has no counterpart here, or a value that is not understood.
    """
    given = Given()
    if not argv or argv[0] in _WORDS or argv[0].lstrip("-") in ("h", "help"):
        given.asked = "version" if argv[:1] == ["version"] else "usage"
        return given
    flags = {flag.name: flag for flag in FLAGS}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not re.match(r"--?[^-=]", word):
            raise UsageError(f"{word!r} is not an option; write values as -pctput=30, yes and no as -cleanup=false")
        name, equals, value = word.lstrip("-").partition("=")
        name = _known(name, flags)
        if name not in flags:
            _refuse(name, value if equals else None, words)
            continue
        flag = flags[name]
        if not equals:
            if flag.kind == "bool":
                value = "true"
            elif not words:
                raise UsageError(f"-{flag.name} needs a value: write -{flag.name}=...")
            else:
                value = words.pop(0)
        given[name] = read_value(flag, value)
        given.said.add(name)
    given.asked = "usage" if given["usage"] else "version" if given["version"] else ""
    return given


def _known(name: str, flags: dict[str, Flag]) -> str:
    name = ALIASES.get(name, name)
    if name in flags or name in REFUSED:
        return name
    near = difflib.get_close_matches(name, [*flags, *ALIASES], n=1)
    advice = f"did you mean -{near[0]}?" if near else "`mlstor aisloader -usage` lists the options"
    raise UsageError(f"aisloader has no option -{name}; {advice}")


def _refuse(name: str, value: str | None, words: list[str]) -> None:
    """Refuse an option without a counterpart, unless it is given as what it is anyway: off."""
    refused = REFUSED[name]
    if value is None and refused.kind != "bool":
        value = words.pop(0) if words else ""
    said = value is None or read_value(refused, value) if refused.kind == "bool" else value
    if said:
        raise UsageError(f"-{name}: {refused.becomes}")


def read_value(flag: Flag, text: str) -> Any:
    """A value as aisloader reads it.

    Raises
    ------
    UsageError
        If it is not understood; with the option's name.
    """
    try:
        return _READ[flag.kind](text.strip())
    except ValueError as error:
        raise UsageError(f"-{flag.name}={text}: {error}") from None


def _bool(text: str) -> bool:
    word = text.lower()
    if word not in _TRUE + _FALSE:
        raise ValueError("write true or false")
    return word in _TRUE


def _count(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise ValueError("write a whole number") from None
    if value < 0:
        raise ValueError("write a whole number from 0 on")
    return value


def size(text: str) -> int:
    """Bytes; aisloader reads K, KB and KiB alike as 1024 (cos.ParseSize with UnitsIEC).

    Raises
    ------
    ValueError
        If it is no size, or no whole number of bytes.
    """
    if not text:
        return 0
    found = _SIZE.fullmatch(text)
    if not found:
        raise ValueError("write a size as 64K, 1MiB or a number of bytes")
    nbytes = Fraction(found[1]) * 1024 ** " kmgtpe".index((found[2] or " ").lower())
    if nbytes.denominator != 1:
        raise ValueError("that is no whole number of bytes")
    return int(nbytes)


def duration(text: str) -> float:
    """Seconds in Go's notation: ``1h30m``, ``90s``, ``0``.

    Raises
    ------
    ValueError
        If it is none.
    """
    if text in ("0", "+0", "-0"):
        return 0.0
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("write a duration as 90s, 15m or 1h30m")
    return float(sum(Fraction(number) * _SECONDS[unit] for number, unit in parts))


_READ: dict[str, Callable[[str], Any]] = {
    "bool": _bool,
    "count": _count,
    "size": size,
    "text": str,
    "duration": duration,
}
