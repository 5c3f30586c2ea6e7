"""Rows of goals that compare medians of alternating runs."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.goals import Goal
from benchmarks.harness import Sample, median, paired_ratios
from benchmarks.streams.parts import Samples

LEAST_ROUNDS = 5  # fewer are no median that a goal could be judged by


def cpu_s_per_operation(sample: Sample) -> float:
    """CPU seconds of the client per object."""
    return sample.cpu_s / sample.operations


def judged(what: str, figure: str, target: str, met: bool, rounds: int) -> Goal:
    """The row of a median of `rounds` runs; too few of them give a figure and no verdict."""
    if rounds < LEAST_ROUNDS:
        return Goal(what, f"{figure}, of {rounds} rounds", f"{target}, of {LEAST_ROUNDS} rounds", None)
    return Goal(what, figure, target, met)


def rate(samples: Samples, what: str, ours: str, theirs: Sequence[str], least: float) -> Goal:
    """Median of the per-round ratios to the peer with the best median rate; all of `theirs` must have been measured."""
    target = f">= {least:.2f}"
    missing = [key for key in (ours, *theirs) if key not in samples]
    if missing:
        return Goal(what, not_measured(missing, (ours, *theirs)), target, None)
    best = max(theirs, key=lambda key: median(sample.rate for sample in samples[key]))
    ratio = median(paired_ratios(samples[ours], samples[best]))
    figure = f"{ratio:.2f} ({best.split('-', 3)[3]})" if len(theirs) > 1 else f"{ratio:.2f}"
    return judged(what, figure, target, ratio >= least, len(samples[ours]))


def cost(samples: Samples, what: str, ours: str, theirs: Sequence[str], most: float) -> Goal:
    """Median of the per-round ratios of CPU per operation to the cheapest of the peers, who must all be there.

    Objects of a row are of one size, so that the ratio per GB is the same.
    """
    target = f"<= {most:.2f}"
    missing = [key for key in (ours, *theirs) if key not in samples]
    if missing:
        return Goal(what, not_measured(missing, (ours, *theirs)), target, None)
    cheapest = min(theirs, key=lambda key: median(map(cpu_s_per_operation, samples[key])))
    ratio = median(
        cpu_s_per_operation(mine) / cpu_s_per_operation(other)
        for mine, other in zip(samples[ours], samples[cheapest], strict=True)
    )
    figure = f"{ratio:.2f} ({cheapest.split('-', 3)[3]})" if len(theirs) > 1 else f"{ratio:.2f}"
    return judged(what, figure, target, ratio <= most, len(samples[ours]))


def not_measured(missing: Sequence[str], keys: Sequence[str]) -> str:
    """The figure of a row for which some of `keys` are missing; they are named if others are there."""
    if len(missing) == len(keys):
        return "not measured"
    return f"not measured: without {', '.join(missing)}"
