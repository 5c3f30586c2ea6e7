"""Tables of the stream benchmark, its JSON, and its place in docs/performance.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.goals import Goal
from benchmarks.harness import Contender, Sample, median, self_checks
from benchmarks.report import insert, self_check_text, table
from benchmarks.streams.goals import cpu_s_per_operation, goals

TITLES = {"s3": "SeaweedFS, S3", "ais": "AIStore", "files": "a directory"}


@dataclass(frozen=True)
class Run:
    """What one server's rounds gave."""

    server: str
    contenders: Sequence[Contender]
    samples: Mapping[str, Sequence[Sample]]
    environment: Mapping[str, str]

    @property
    def goals(self) -> list[Goal]:
        """What has to be reached."""
        return goals(self.samples, self.server)


def markdown(run: Run) -> str:
    """The whole report."""
    checks = self_checks(run.contenders, run.samples)
    parts = [", ".join(f"{name} {value}" for name, value in run.environment.items()) + ".", self_check_text(checks)]
    rows = [
        [goal.what, goal.figure, goal.target, {True: "yes", False: "**no**", None: "-"}[goal.met]] for goal in run.goals
    ]
    parts.append(table(["what", "figure", "target", "met"], rows))
    parts.append(table(["", "client", "objects/s", "least-most", "GB/s", "CPU us per object", "CPU s/GB"], rates(run)))
    return "\n\n".join(parts) + "\n"


def rates(run: Run) -> list[list[str]]:
    """One row per contender, the groups one after the other."""
    rows = []
    for group in dict.fromkeys(contender.group for contender in run.contenders):
        for contender in run.contenders:
            if contender.group != group:
                continue
            samples = run.samples[contender.key]
            per_second = [sample.rate for sample in samples]
            rows.append(
                [
                    group.partition(" ")[2],
                    contender.label,
                    f"{median(per_second):,.1f}" if median(per_second) < 100 else f"{median(per_second):,.0f}",
                    f"{min(per_second):,.0f}-{max(per_second):,.0f}",
                    f"{median(sample.nbytes / sample.elapsed_s for sample in samples) / 1e9:.2f}",
                    f"{median(map(cpu_s_per_operation, samples)) * 1e6:,.0f}",
                    f"{median(sample.cpu_s_per_gb for sample in samples):.3f}",
                ]
            )
    return rows


def save(run: Run, directory: Path) -> tuple[Path, Path]:
    """Write report and all samples below `directory`; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    text, data = directory / f"streams-{run.server}.md", directory / f"streams-{run.server}.json"
    text.write_text(markdown(run))
    record = {
        "format": 1,
        "server": run.server,
        "environment": dict(run.environment),
        "goals": [dataclasses.asdict(goal) for goal in run.goals],
        "samples": {key: [dataclasses.asdict(sample) for sample in samples] for key, samples in run.samples.items()},
    }
    data.write_text(json.dumps(record, indent=1) + "\n")
    return text, data


def publish(run: Run, docs: Path) -> None:
    """Put the tables into ``performance.md`` of the directory `docs`."""
    page = docs / "performance.md"
    page.write_text(insert(page.read_text(), f"streams {run.server}", markdown(run)))
