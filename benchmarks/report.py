"""What a run found: tables in Markdown, a JSON record, one picture, and the place in docs/performance.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import fio
from benchmarks.footprint import Footprint
from benchmarks.goals import Goal, goals
from benchmarks.harness import Contender, Sample, SelfCheck, median, paired_ratios, self_checks
from mlstor.errors import UsageError

TITLES = {"write": "Write", "read": "Read", "random": "Random 4 KiB reads, 64 in flight"}
COLOURS = {True: "#1b6ca8", False: "#9aa5b1"}  # mlstor, others


@dataclass(frozen=True)
class Run:
    """All that a report is made of.

    Attributes
    ----------
    kind : str
        ``"disk"`` or ``"fast"``.
    contenders : sequence of Contender
        In the order of the tables.
    samples : mapping
        Samples by contender's key, in round order.
    cells : mapping
        fio's chosen cell by group.
    sweeps : mapping
        Rates of all cells by group.
    help_times_s : sequence of float
        Empty if not measured.
    rank : Footprint or None
        None if not measured.
    environment : mapping
        Host, versions and parameters, as text.
    """

    kind: str
    contenders: Sequence[Contender]
    samples: Mapping[str, Sequence[Sample]]
    cells: Mapping[str, fio.Cell]
    sweeps: Mapping[str, Mapping[fio.Cell, Sequence[float]]]
    help_times_s: Sequence[float]
    rank: Footprint | None
    environment: Mapping[str, str]

    @property
    def goals(self) -> list[Goal]:
        """What mlstor has to reach, with this run's figures."""
        return goals(self.samples, self.kind, self.help_times_s, self.rank)

    @property
    def checks(self) -> list[SelfCheck]:
        """The harness against itself."""
        return self_checks(self.contenders, self.samples)


def markdown(run: Run) -> str:
    """The whole report in Markdown."""
    parts = [", ".join(f"{name} {value}" for name, value in run.environment.items()) + "."]
    parts.append(self_check_text(run.checks))
    rows = [
        [goal.what, goal.figure, goal.target, {True: "yes", False: "**no**", None: "-"}[goal.met]] for goal in run.goals
    ]
    parts.append(table(["what", "figure", "target", "met"], rows))
    for group, title in TITLES.items():
        if any(contender.group == group for contender in run.contenders):
            parts.append(f"**{title}**" + (f" (fio: {run.cells[group]})" if group in run.cells else ""))
            parts.append(group_table(run, group))
    return "\n\n".join(parts) + "\n"


def group_table(run: Run, group: str) -> str:
    """One row per contender of `group`: median, spread, ratio to fio, CPU, memory."""
    unit, factor = ("kIOPS", 1e3) if group == "random" else ("GB/s", 1e9)
    yardstick = run.samples.get(f"fio-{group}")
    rows = []
    for contender in run.contenders:
        if contender.group != group:
            continue
        samples = run.samples[contender.key]
        rates = [sample.rate / factor for sample in samples]
        extra = max(sample.extra_rss_bytes for sample in samples)
        rows.append(
            [
                contender.label,
                f"{median(rates):.2f}",
                f"{min(rates):.2f}-{max(rates):.2f}",
                f"{median(paired_ratios(samples, yardstick)):.2f}" if yardstick else "-",
                f"{median(sample.cpu_s_per_gb for sample in samples):.3f}",
                f"{extra / (1 << 20):.0f}" if extra >= 0 else "-",
                ", ".join(sorted({sample.detail.get("path", "") for sample in samples})) or "-",
            ]
        )
    return table(["contender", unit, "least-most", "x fio", "CPU s/GB", "more memory, MiB", "path"], rows)


def self_check_text(checks: Sequence[SelfCheck]) -> str:
    """One sentence per pair of twins."""
    if not checks:
        return "Self-check of the harness: not run."
    words = [
        f"{check.label}: ratio {check.ratio:.3f} ({min(check.ratios):.2f}-{max(check.ratios):.2f}), "
        + (
            "within 10% of 1"
            if check.passed
            else "**not within 10% of 1: this machine was too uneven for the figures below**"
        )
        for check in checks
    ]
    return "Self-check of the harness, the same function on both sides: " + "; ".join(words) + "."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def record(run: Run) -> dict[str, Any]:
    """Everything that was measured, for the JSON file."""
    return {
        "format": 1,
        "kind": run.kind,
        "environment": dict(run.environment),
        "goals": [dataclasses.asdict(goal) for goal in run.goals],
        "self_checks": [
            {**dataclasses.asdict(check), "ratio": check.ratio, "passed": check.passed} for check in run.checks
        ],
        "samples": {key: [dataclasses.asdict(sample) for sample in samples] for key, samples in run.samples.items()},
        "fio": {
            group: {
                "chosen": str(run.cells[group]),
                "rates": {str(cell): list(rates) for cell, rates in cells.items()},
            }
            for group, cells in run.sweeps.items()
        },
        "help_times_s": list(run.help_times_s),
        "rank_footprint": dataclasses.asdict(run.rank) if run.rank else None,
    }


def draw(run: Run, path: Path) -> None:
    """One picture: a bar per contender with the median, a whisker from the slowest to the fastest round."""
    from matplotlib.figure import Figure

    groups = [group for group in TITLES if any(contender.group == group for contender in run.contenders)]
    counts = [sum(contender.group == group for contender in run.contenders) for group in groups]
    figure = Figure(figsize=(9, 1.2 + 0.32 * sum(counts) + 0.6 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[count + 1 for count in counts])
    for axis, group in zip(axes[:, 0], groups, strict=True):
        chosen = [contender for contender in run.contenders if contender.group == group]
        factor = 1e3 if group == "random" else 1e9
        rates = [[sample.rate / factor for sample in run.samples[contender.key]] for contender in chosen]
        middles = [median(values) for values in rates]
        whiskers = [
            [middle - min(values) for middle, values in zip(middles, rates, strict=True)],
            [max(values) - middle for middle, values in zip(middles, rates, strict=True)],
        ]
        colours = [COLOURS[contender.key.startswith("mlstor")] for contender in chosen]
        axis.barh([contender.label for contender in chosen], middles, xerr=whiskers, color=colours, ecolor="#444444")
        axis.invert_yaxis()
        axis.set_title(TITLES[group], loc="left", fontsize=10)
        axis.set_xlabel(
            "thousand reads per second" if group == "random" else "GB/s, median; whisker: slowest to fastest round"
        )
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def require_matplotlib() -> None:
    """Raise a `UsageError` if the picture could not be drawn, before an hour of measurements."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError("the picture needs matplotlib: pip install matplotlib")


def markers(kind: str) -> tuple[str, str]:
    """The lines between which docs/performance.md holds the report of `kind`."""
    return f"<!-- benchmarks {kind}: begin -->", f"<!-- benchmarks {kind}: end -->"


def insert(document: str, kind: str, text: str) -> str:
    """`document` with `text` between the markers of `kind`, in place of what was there.

    Raises
    ------
    UsageError
        If the markers are not there once each and in order.
    """
    begin, end = markers(kind)
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise UsageError(f"docs/performance.md must hold the lines {begin} and {end} once each, in this order")
    before, rest = document.split(begin)
    return f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end)[1]}"


def save(run: Run, directory: Path) -> tuple[Path, Path, Path]:
    """Write report, record and picture below `directory`; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / f"benchmark-{run.kind}"
    text, data, picture = stem.with_suffix(".md"), stem.with_suffix(".json"), stem.with_suffix(".svg")
    text.write_text(markdown(run))
    data.write_text(json.dumps(record(run), indent=1) + "\n")
    draw(run, picture)
    return text, data, picture


def publish(run: Run, docs: Path) -> None:
    """Put tables and picture into ``performance.md`` of the directory `docs`."""
    page = docs / "performance.md"
    picture = docs / f"performance-{run.kind}.svg"
    text = f"{markdown(run)}\n![Medians of all contenders]({picture.name})"
    page.write_text(insert(page.read_text(), run.kind, text))
    draw(run, picture)
