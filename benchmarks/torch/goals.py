"""What the PyTorch parts have to reach, each with the figure that this run gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.goals import Goal
from benchmarks.harness import Sample, median, paired_ratios
from benchmarks.streams.ratios import judged, not_measured

Samples = Mapping[str, Sequence[Sample]]

DEVICE_SHARE = 0.9  # of fio's rate, where fio itself does not reach the ratio to the peer
INTO_CPU_S_PER_GB = 0.15
SAVERS = ("save-torch", "save-torch-no-crc", "save-safetensors")
DCP_SAVERS = tuple(f"dcp-save-{n}" for n in (1, 2, 4, 8))


def loaders(group: str) -> tuple[str, ...]:
    """The peers that load one file."""
    names = ("torch", "torch-mmap", "safetensors", "safetensors-pread", "runai", "fastsafetensors")
    return tuple(f"{group}-{name}" for name in names)


def goals(samples: Samples) -> list[Goal]:
    """All rows."""
    load, into = loaders("load"), loaders("into")
    return [
        rate(samples, "save / torch.save + fsync", "save-mlstor", ["save-torch"], 3.0, "save-fio"),
        rate(samples, "DCP save / best thread count of FileSystemWriter", "dcp-save-mlstor", DCP_SAVERS, 1.5),
        rate(samples, "load, verified / torch.load", "load-mlstor", ["load-torch"], 2.0, "load-fio"),
        rate(samples, "load, verified / best peer", "load-mlstor", load, 1.3, "load-fio"),
        rate(samples, "load(into=), verified / best peer with copy_", "into-mlstor", into, 1.5, "into-fio"),
        cpu(samples, "CPU, load(into=), verified", "into-mlstor", INTO_CPU_S_PER_GB),
        rate(samples, "DCP load, verified / FileSystemReader", "dcp-load-mlstor", ["dcp-load-stock"], 3.0),
        cost(samples, "CPU per GB, save / cheapest peer", "save-mlstor", SAVERS, 0.5),
        cost(samples, "CPU per GB, load, verified / cheapest peer", "load-mlstor", load, 0.5),
        rate(samples, "save, many small tensors / torch.save + fsync", "small-save-mlstor", ["small-save-torch"], 1.0),
        rate(samples, "load, many small tensors / torch.load", "small-load-mlstor", ["small-load-torch"], 1.0),
        stall(samples, "stall of async_save / dcp.async_save, its defaults", "stall-dcp"),
        stall(samples, "stall of async_save / dcp.async_save, one DefaultStager kept", "stall-dcp-stager"),
    ]


def rate(samples: Samples, what: str, ours: str, theirs: Sequence[str], least: float, device: str = "") -> Goal:
    """Median of the per-round ratios to the peer with the best median rate. Where `device`, fio, does not reach the
    ratio either, 0.9 of its rate is enough.
    """
    target = f">= {least:.1f}"
    missing = [key for key in (ours, *theirs) if key not in samples]
    if missing:
        return Goal(what, not_measured(missing, (ours, *theirs)), target, None)
    best = max(theirs, key=lambda key: median(sample.rate for sample in samples[key]))
    rounds = len(samples[ours])
    ratio = median(paired_ratios(samples[ours], samples[best]))
    figure = f"{ratio:.2f}" + (f" ({best})" if len(theirs) > 1 else "")
    if ratio >= least or device not in samples:
        return judged(what, figure, target, ratio >= least, rounds)
    ceiling = median(paired_ratios(samples[device], samples[best]))
    share = median(paired_ratios(samples[ours], samples[device]))
    figure += f"; {share:.2f} x fio"
    if ceiling >= least:
        return judged(what, figure, target, False, rounds)
    target = f">= {DEVICE_SHARE:.1f} x fio, which is {ceiling:.2f} x the peer here"
    return judged(what, figure, target, share >= DEVICE_SHARE, rounds)


def cost(samples: Samples, what: str, ours: str, theirs: Sequence[str], most: float) -> Goal:
    """Median of the per-round ratios of CPU per GB to the cheapest of the peers."""
    target = f"<= {most:.2f}"
    missing = [key for key in (ours, *theirs) if key not in samples]
    if missing:
        return Goal(what, not_measured(missing, (ours, *theirs)), target, None)
    cheapest = min(theirs, key=lambda key: median(sample.cpu_s_per_gb for sample in samples[key]))
    ratio = median(
        mine.cpu_s_per_gb / other.cpu_s_per_gb for mine, other in zip(samples[ours], samples[cheapest], strict=True)
    )
    return judged(what, f"{ratio:.2f} ({cheapest})", target, ratio <= most, len(samples[ours]))


def cpu(samples: Samples, what: str, key: str, most: float) -> Goal:
    """Median CPU seconds per GB against `most`."""
    target = f"<= {most:.2f} s/GB"
    if key not in samples:
        return Goal(what, "not measured", target, None)
    figure = median(sample.cpu_s_per_gb for sample in samples[key])
    return judged(what, f"{figure:.3f} s/GB", target, figure <= most, len(samples[key]))


def stall(samples: Samples, what: str, theirs: str) -> Goal:
    """Time that the second call takes, against one of DCP's ways."""
    target = "<= 0.33"
    missing = [key for key in ("stall-mlstor", theirs) if key not in samples]
    if missing:
        return Goal(what, not_measured(missing, ("stall-mlstor", theirs)), target, None)
    ratio = 1 / median(paired_ratios(samples["stall-mlstor"], samples[theirs]))
    return judged(what, f"{ratio:.2f}", target, ratio <= 1 / 3, len(samples[theirs]))
