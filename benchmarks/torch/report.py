"""Tables of the PyTorch benchmark, its JSON, and its place in docs/performance.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import fio
from benchmarks.goals import Goal
from benchmarks.harness import Contender, Sample, SelfCheck, median, self_checks
from benchmarks.report import insert, self_check_text, table
from benchmarks.torch.contenders import GROUPS
from benchmarks.torch.goals import goals

MET = {True: "yes", False: "**no**", None: "-"}


@dataclass(frozen=True)
class Run:
    """What the rounds gave; `kind` is ``"disk"`` or ``"fast"``, `cells` are fio's best by mode."""

    kind: str
    contenders: Sequence[Contender]
    samples: Mapping[str, Sequence[Sample]]
    cells: Mapping[str, fio.Cell]
    environment: Mapping[str, str]

    @property
    def goals(self) -> list[Goal]:
        """What has to be reached."""
        return goals(self.samples)

    @property
    def checks(self) -> list[SelfCheck]:
        """The harness against itself."""
        return self_checks(self.contenders, self.samples)


def markdown(run: Run) -> str:
    """The whole report."""
    parts = [
        ", ".join(f"{name} {value}" for name, value in run.environment.items()) + ".",
        self_check_text(run.checks),
        table(
            ["what", "figure", "target", "met"],
            [[goal.what, goal.figure, goal.target, MET[goal.met]] for goal in run.goals],
        ),
    ]
    for group, title in GROUPS.items():
        if any(contender.group == group for contender in run.contenders):
            parts += [f"**{title}**", group_table(run, group)]
    if run.cells:
        cells = ", ".join(f"{mode}: {cell}" for mode, cell in run.cells.items())
        parts.append(f"fio's best cells: {cells}.")
    return "\n\n".join(parts) + "\n"


def group_table(run: Run, group: str) -> str:
    """One row per contender: time, spread, rate, CPU, memory."""
    rows = []
    for contender in run.contenders:
        if contender.group != group:
            continue
        samples = run.samples[contender.key]
        times_s = [sample.elapsed_s for sample in samples]
        extra = max(sample.extra_rss_bytes for sample in samples)
        rows.append(
            [
                contender.label,
                f"{median(times_s):.3f}",
                f"{min(times_s):.3f}-{max(times_s):.3f}",
                f"{median(sample.nbytes / sample.elapsed_s for sample in samples) / 1e9:.2f}",
                f"{median(sample.cpu_s_per_gb for sample in samples):.3f}",
                f"{extra / (1 << 20):,.0f}" if extra >= 0 else "-",
            ]
        )
    return table(["contender", "s", "least-most", "GB/s", "CPU s/GB", "more memory, MiB"], rows)


def save(run: Run, directory: Path) -> tuple[Path, Path]:
    """Write report and all samples below `directory`; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    text, data = directory / f"torch-{run.kind}.md", directory / f"torch-{run.kind}.json"
    text.write_text(markdown(run))
    record = {
        "format": 1,
        "kind": run.kind,
        "environment": dict(run.environment),
        "goals": [dataclasses.asdict(goal) for goal in run.goals],
        "self_checks": [
            {**dataclasses.asdict(check), "ratio": check.ratio, "passed": check.passed} for check in run.checks
        ],
        "fio": {mode: str(cell) for mode, cell in run.cells.items()},
        "samples": {key: [dataclasses.asdict(sample) for sample in samples] for key, samples in run.samples.items()},
    }
    data.write_text(json.dumps(record, indent=1) + "\n")
    return text, data


def publish(run: Run, docs: Path) -> None:
    """Put the tables into ``performance.md`` of the directory `docs`."""
    page = docs / "performance.md"
    page.write_text(insert(page.read_text(), f"torch {run.kind}", markdown(run)))
