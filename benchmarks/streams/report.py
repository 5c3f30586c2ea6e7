"""Tables of the stream benchmark, its JSON, and its place in docs/performance.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.goals import Goal
from benchmarks.harness import Contender, Sample, SelfCheck, median, self_checks
from benchmarks.report import insert, self_check_text, table
from benchmarks.streams.contenders import PARTS
from benchmarks.streams.goals import goals
from benchmarks.streams.parts import Sweep
from benchmarks.streams.ratios import LEAST_ROUNDS, cpu_s_per_operation
from mlstor.errors import UsageError

TITLES = {"s3": "SeaweedFS, S3", "ais": "AIStore", "files": "a directory"}
MET = {True: "yes", False: "**no**", None: "-"}


@dataclass(frozen=True)
class Run:
    """What one server's rounds gave, and the sweeps before them."""

    server: str
    contenders: Sequence[Contender]
    samples: Mapping[str, Sequence[Sample]]
    environment: Mapping[str, str]
    sweeps: Sequence[Sweep] = ()

    @property
    def goals(self) -> list[Goal]:
        """What has to be reached."""
        return goals(self.samples, self.server)

    @property
    def checks(self) -> list[SelfCheck]:
        """The harness against itself, each with the name of its group."""
        twins = [
            dataclasses.replace(one, label=f"{one.group.partition(' ')[2]} {one.label}")
            for one in self.contenders
            if one.twin_of
        ]
        return self_checks(twins, self.samples)


def markdown(run: Run) -> str:
    """The whole report."""
    parts = [
        ", ".join(f"{name} {value}" for name, value in run.environment.items()) + ".",
        self_check_text(run.checks),
        table(
            ["what", "figure", "target", "met"],
            [[goal.what, goal.figure, goal.target, MET[goal.met]] for goal in run.goals],
        ),
        rates(run),
        *(part.table(run.contenders, run.samples) for part in PARTS if part.table),
        *(sweep_text(one) for one in run.sweeps),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def rates(run: Run) -> str:
    """One row per contender that no part has a table for, the groups one after the other."""
    own = {key for part in PARTS if part.table for key in part.keys(run.server)}
    shown = [contender for contender in run.contenders if contender.key not in own]
    rows = []
    for group in dict.fromkeys(contender.group for contender in shown):
        for contender in shown:
            if contender.group != group:
                continue
            samples = run.samples[contender.key]
            per_second = [sample.rate for sample in samples]
            rows.append(
                [
                    group.partition(" ")[2],
                    contender.label,
                    number(median(per_second)),
                    f"{number(min(per_second))}-{number(max(per_second))}",
                    f"{median(sample.nbytes / sample.elapsed_s for sample in samples) / 1e9:.2f}",
                    f"{median(map(cpu_s_per_operation, samples)) * 1e6:,.0f}",
                    f"{median(sample.cpu_s_per_gb for sample in samples):.3f}",
                ]
            )
    head = ["", "client", "objects/s", "least-most", "GB/s", "CPU us per object", "CPU s/GB"]
    return table(head, rows) if rows else ""


def number(per_second: float) -> str:
    """A rate of objects: large ones are few per second."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"


def sweep_text(sweep: Sweep) -> str:
    """Medians of all settings, in one sentence."""
    words = [f"{setting}: {median(rates):,.0f}" for setting, rates in sweep.rates.items()]
    return f"Sweep of {sweep.what} before the rounds, objects/s: {'; '.join(words)}. Best: {'; '.join(sweep.chosen)}."


def save(run: Run, directory: Path) -> tuple[Path, Path]:
    """Write report and all samples below `directory`; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    text, data = directory / f"streams-{run.server}.md", directory / f"streams-{run.server}.json"
    text.write_text(markdown(run))
    record = {
        "format": 2,
        "server": run.server,
        "environment": dict(run.environment),
        "goals": [dataclasses.asdict(goal) for goal in run.goals],
        "self_checks": [
            {**dataclasses.asdict(check), "ratio": check.ratio, "passed": check.passed} for check in run.checks
        ],
        "sweeps": [dataclasses.asdict(sweep) for sweep in run.sweeps],
        "samples": {key: [dataclasses.asdict(sample) for sample in samples] for key, samples in run.samples.items()},
    }
    data.write_text(json.dumps(record, indent=1) + "\n")
    return text, data


def check_publishable(rounds: int) -> None:
    """Raise a `UsageError` before anything is measured, if too few rounds would be published."""
    if rounds < LEAST_ROUNDS:
        raise UsageError(f"--publish takes --rounds {LEAST_ROUNDS} or more: medians of fewer are no figures to tell")


def publish(run: Run, docs: Path) -> None:
    """Put the tables into ``performance.md`` of the directory `docs`."""
    page = docs / "performance.md"
    page.write_text(insert(page.read_text(), f"streams {run.server}", markdown(run)))
