"""What streams have to reach, each with the figure that this run gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.goals import Goal
from benchmarks.harness import Sample, median, paired_ratios
from benchmarks.streams.contenders import LOADER_WORKERS, key_of

Samples = Mapping[str, Sequence[Sample]]
Figure = Callable[[Sample], float]


def cpu_s_per_operation(sample: Sample) -> float:
    """CPU seconds of the client per object."""
    return sample.cpu_s / sample.operations


def goals(samples: Samples, server: str) -> list[Goal]:
    """All rows for the runs on one server."""
    return {"s3": s3_goals, "ais": ais_goals, "files": file_goals}[server](samples)


def s3_goals(samples: Samples) -> list[Goal]:
    """Against the Python clients of S3."""

    def key(op: str, size: str, client: str) -> str:
        return key_of("s3", op, size, client)

    peers = ("s3torchconnector", "boto3", "obstore, threads", "obstore, asyncio")
    ours, connector = key("get", "64KiB", "mlstor"), key("get", "64KiB", "s3torchconnector")
    small = [key("get", "64KiB", f"obstore, {how}") for how in ("threads", "asyncio")]
    return [
        cost(samples, "GET 8 MiB: CPU per GB / s3torchconnector", key("get", "8MiB", "mlstor"),
             [key("get", "8MiB", "s3torchconnector")], 0.5),
        cost(samples, "GET 64 KiB: CPU per operation / s3torchconnector", ours, [connector], 1 / 3),
        cost(samples, "GET 64 KiB: CPU per operation / obstore", ours, small, 1 / 3),
        *(
            rate(samples, f"{op.upper()} {size}: rate / best of the peers", key(op, size, "mlstor"),
                 [key(op, size, peer) for peer in peers], least)
            for op, size, least in (("get", "64KiB", 1.3), ("get", "8MiB", 1.1), ("put", "8MiB", 1.0))
        ),
    ]  # fmt: skip


def ais_goals(samples: Samples) -> list[Goal]:
    """Against aisloader."""
    rows = []
    for size, way, most, least in (
        ("64KiB", "direct", 0.5, 1.3),
        ("64KiB", "by the proxy", 0.8, 1.1),
        ("8MiB", "direct", 0.8, 1.0),
    ):
        ours, theirs = key_of("ais", "get", size, f"mlstor, {way}"), key_of("ais", "get", size, "aisloader")
        rows.append(cost(samples, f"GET {size}, {way}: CPU per operation / aisloader", ours, [theirs], most))
        rows.append(rate(samples, f"GET {size}, {way}: rate / aisloader", ours, [theirs], least))
    return rows


def file_goals(samples: Samples) -> list[Goal]:
    """Against a DataLoader and fio."""
    ours = key_of("files", "get", "64KiB", "mlstor")
    loaders = [key_of("files", "get", "64KiB", f"DataLoader, {workers} workers") for workers in LOADER_WORKERS]
    return [
        rate(samples, "64 KiB files, cold, random order: rate / best DataLoader", ours, loaders, 2.0),
        rate(
            samples, "64 KiB files, cold, random order: rate / fio", ours, [key_of("files", "get", "64KiB", "fio")], 0.9
        ),
    ]


def rate(samples: Samples, what: str, ours: str, theirs: Sequence[str], least: float) -> Goal:
    """Median of the per-round ratios to the peer with the best median rate."""
    target = f">= {least:.2f}"
    there = [key for key in theirs if key in samples]
    if ours not in samples or not there:
        return Goal(what, "not measured", target, None)
    best = max(there, key=lambda key: median(sample.rate for sample in samples[key]))
    ratio = median(paired_ratios(samples[ours], samples[best]))
    return Goal(
        what, f"{ratio:.2f} ({best.split('-', 3)[3]})" if len(theirs) > 1 else f"{ratio:.2f}", target, ratio >= least
    )


def cost(samples: Samples, what: str, ours: str, theirs: Sequence[str], most: float) -> Goal:
    """Median of the per-round ratios of CPU per operation to the cheapest of the peers."""
    target = f"<= {most:.2f}"
    there = [key for key in theirs if key in samples]
    if ours not in samples or not there:
        return Goal(what, "not measured", target, None)
    cheapest = min(there, key=lambda key: median(map(cpu_s_per_operation, samples[key])))
    ratio = median(
        cpu_s_per_operation(mine) / cpu_s_per_operation(other)
        for mine, other in zip(samples[ours], samples[cheapest], strict=True)
    )
    return Goal(what, f"{ratio:.2f}", target, ratio <= most)
