"""What every part of the stream benchmark knows of a run, and what it gives: contenders, goals, a table of its own."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.goals import Goal
from benchmarks.harness import Contender, Sample, median

Samples = Mapping[str, Sequence[Sample]]

FINALISTS = 3  # of a sweep, run twice more: the best of one look would be the luckiest one
TWIN = " (again)"


@dataclass(frozen=True)
class Sweep:
    """Settings that were tried once before the rounds, in which the best of them takes part.

    Attributes
    ----------
    what : str
        Whose settings.
    rates : mapping
        Operations per second of each look at a setting.
    chosen : str
        The settings with the best medians of those that were looked at three times.
    """

    what: str
    rates: Mapping[str, Sequence[float]]
    chosen: Sequence[str]


@dataclass(frozen=True)
class Place:
    """One server of a run, and how it is measured.

    Attributes
    ----------
    server : str
        ``"s3"``, ``"ais"`` or ``"files"``.
    url, endpoint : str
        Of the objects that are read; no endpoint for a directory.
    directory : Path
        Where a part may write; removed after the run.
    seconds : float
        Length of a run of GETs or PUTs that has a goal.
    touch_bytes : int
        Memory that is touched before each contender, at most.
    seed : int
        Of all orders.
    progress : callable
        Says a line to the user.
    sweeps : list of Sweep
        What parts have tried; printed with the report.
    """

    server: str
    url: str
    endpoint: str
    directory: Path
    seconds: float
    touch_bytes: int
    seed: int
    progress: Callable[[str], None]
    sweeps: list[Sweep] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """Contenders that are more than a client, an operation and a size, with their goals.

    Attributes
    ----------
    keys : callable
        The keys of its contenders on a server; none where it has nothing to do.
    bind : callable
        Makes what is needed below the place's directory, sweeps, and returns the contenders. Called once, before the
        rounds, and only if one of `keys` was asked for.
    goals : callable
        Rows for a run on a server, with "not measured" for what is not there.
    table : callable, optional
        A section in Markdown, empty if there is nothing to show; None: its contenders stand in the table of rates.
    sizes : tuple of str
        Objects to be read that must be there before `bind`.
    """

    keys: Callable[[str], list[str]]
    bind: Callable[[Place], list[Contender]]
    goals: Callable[[Samples, str], list[Goal]]
    table: Callable[[Sequence[Contender], Samples], str] | None = None
    sizes: tuple[str, ...] = ()


def group_of(server: str, op: str, size: str) -> str:
    """The table that a contender stands in."""
    return f"{server} {op} {size}"


def key_of(server: str, op: str, size: str, client: str) -> str:
    """A contender's name in ``--only`` and in the JSON."""
    return f"{group_of(server, op, size)} {client}".replace(",", "").replace(" ", "-")


def wanted(key: str, only: str) -> bool:
    """Whether `key` matches one of `only`'s comma-separated shell patterns, or there are none."""
    return not only or any(fnmatch.fnmatch(key, pattern.strip()) for pattern in only.split(","))


def twin(contender: Contender) -> Contender:
    """The same once more: its ratio to itself shows how even the machine was."""
    return replace(contender, key=contender.key + "-again", label=contender.label + TWIN, twin_of=contender.key)


def sweep(what: str, settings: Mapping[str, Callable[[], Sample]], place: Place) -> str:
    """The setting with the best median rate of a `sweep_for`."""
    return sweep_for(1, what, settings, place)[0]


def sweep_for(count: int, what: str, settings: Mapping[str, Callable[[], Sample]], place: Place) -> list[str]:
    """Run each setting once and the best three twice more; the `count` with the best median rates, at most three.

    The order is drawn, so that a machine that becomes faster does not favour the last ones.
    """
    rates: dict[str, list[float]] = {}
    generator = random.Random(place.seed)

    def look(setting: str) -> None:
        rates.setdefault(setting, []).append(settings[setting]().rate)
        place.progress(f"sweep of {what}: {setting}: {rates[setting][-1]:,.0f}/s")

    for setting in generator.sample(list(settings), len(settings)):
        look(setting)
    finalists = sorted(settings, key=lambda setting: rates[setting][0], reverse=True)[:FINALISTS]
    for _ in range(2):
        for setting in generator.sample(finalists, len(finalists)):
            look(setting)
    chosen = sorted(finalists, key=lambda setting: median(rates[setting]), reverse=True)[:count]
    place.sweeps.append(Sweep(what, {setting: rates[setting] for setting in settings}, chosen))
    return chosen
