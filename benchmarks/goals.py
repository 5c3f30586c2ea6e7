"""What mlstor has to reach, each with the figure that this run gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.footprint import Footprint
from benchmarks.harness import Sample, median, paired_ratios

Samples = Mapping[str, Sequence[Sample]]

HELP_S = 0.25
PEAK_RSS_BYTES = 400 << 20
CPU_S_PER_GB = 0.15
CPU_ALIGNED_S_PER_GB = 0.03
TORCH_RATIO = 3.0
WRITE_RATIO = {"disk": 0.95, "fast": 0.85}  # on the RAM-backed one the cores also play the device
VERIFIED_RATIO = {"disk": 0.90, "fast": 0.80}
DROPPED_RATIO = {"disk": 0.95, "fast": 0.95}
RANDOM_RATIO = {"disk": 0.90, "fast": 0.90}


@dataclass(frozen=True)
class Goal:
    """One row: `met` is None where the run did not measure it."""

    what: str
    figure: str
    target: str
    met: bool | None


def goals(samples: Samples, kind: str, help_times_s: Sequence[float], rank: Footprint | None) -> list[Goal]:
    """All rows for a run on the ``"disk"`` or the ``"fast"`` file system."""
    return [
        ratio_goal(samples, "write, pattern generated / fio", "mlstor-write", "fio-write", WRITE_RATIO[kind]),
        ratio_goal(samples, "read, verified / fio", "mlstor-read-verified", "fio-read", VERIFIED_RATIO[kind]),
        ratio_goal(samples, "read, unverified / fio", "mlstor-read", "fio-read", DROPPED_RATIO[kind]),
        torch_goal(samples),
        ratio_goal(samples, "random 4 KiB reads, depth 64 / fio", "mlstor-random", "fio-random", RANDOM_RATIO[kind]),
        cpu_goal(samples, "CPU, write incl. generation", "mlstor-write", CPU_S_PER_GB),
        cpu_goal(samples, "CPU, read incl. verification", "mlstor-read-verified", CPU_S_PER_GB),
        cpu_goal(samples, "CPU, write from aligned memory", "mlstor-write-aligned", CPU_ALIGNED_S_PER_GB),
        cpu_goal(samples, "CPU, read into aligned memory", "mlstor-read-aligned", CPU_ALIGNED_S_PER_GB),
        rss_goal(rank),
        help_goal(help_times_s),
    ]


def ratio_goal(samples: Samples, what: str, ours: str, theirs: str, least: float) -> Goal:
    """Median of the per-round ratios of the rates against `least`."""
    target = f">= {least:.2f}"
    if ours not in samples or theirs not in samples:
        return Goal(what, "not measured", target, None)
    ratio = median(paired_ratios(samples[ours], samples[theirs]))
    return Goal(what, f"{ratio:.3f}", target, ratio >= least)


def torch_goal(samples: Samples) -> Goal:
    """3 x torch.save, or 0.95 x fio where fio itself stays below 3 x: there the device gives no more."""
    what, target = "write / torch.save + fsync", f">= {TORCH_RATIO:.0f}"
    if "mlstor-write" not in samples or "torch-save" not in samples:
        return Goal(what, "not measured", target, None)
    ratio = median(paired_ratios(samples["mlstor-write"], samples["torch-save"]))
    if ratio >= TORCH_RATIO or "fio-write" not in samples:
        return Goal(what, f"{ratio:.2f}", target, ratio >= TORCH_RATIO)
    ceiling = median(paired_ratios(samples["fio-write"], samples["torch-save"]))
    if ceiling >= TORCH_RATIO:
        return Goal(what, f"{ratio:.2f}", target, False)
    against_fio = median(paired_ratios(samples["mlstor-write"], samples["fio-write"]))
    least = WRITE_RATIO["disk"]
    figure = f"{ratio:.2f}; {against_fio:.3f} x fio"
    return Goal(what, figure, f">= {least:.2f} x fio, which is {ceiling:.2f} x torch.save here", against_fio >= least)


def cpu_goal(samples: Samples, what: str, key: str, most: float) -> Goal:
    """Median CPU seconds per GB against `most`."""
    target = f"<= {most:.2f} s/GB"
    if key not in samples:
        return Goal(what, "not measured", target, None)
    figure = median(sample.cpu_s_per_gb for sample in samples[key])
    return Goal(what, f"{figure:.3f} s/GB", target, figure <= most)


def rss_goal(rank: Footprint | None) -> Goal:
    """Peak resident memory of one rank of llama3-1t."""
    what, target = "peak RSS, one rank of llama3-1t (13.9 GB), write + read + verify", "<= 400 MiB"
    if rank is None or rank.note:
        return Goal(what, "not measured" if rank is None else rank.note, target, None)
    return Goal(what, f"{rank.peak_rss_bytes / (1 << 20):.0f} MiB", target, rank.peak_rss_bytes <= PEAK_RSS_BYTES)


def help_goal(times_s: Sequence[float]) -> Goal:
    """Median time of ``--help``."""
    what, target = "python -m mlstor.checkpoint --help", f"<= {HELP_S:.2f} s"
    if not times_s:
        return Goal(what, "not measured", target, None)
    figure = median(times_s)
    return Goal(what, f"{figure:.3f} s", target, figure <= HELP_S)
