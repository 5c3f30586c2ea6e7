"""Who takes part, in which group, and which files must be there first."""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks import fio
from benchmarks.child import Job, run_child
from benchmarks.harness import Contender, Sample
from benchmarks.torch.job import TorchJob
from mlstor.errors import UsageError

MIB = 1 << 20
SMALL_BYTES = 2048  # of a small tensor
OBJECTS, OBJECT_BYTES = 2000, 128 << 10  # of the data sets
S3_BYTES = 512 * MIB  # at most, of a checkpoint in a bucket: the server has the same two cores

GROUPS = {
    "save": "Save one file",
    "load": "Load one file into new memory",
    "into": "Load one file into a state that is there",
    "dcp-save": "DCP save, one rank",
    "dcp-load": "DCP load, one rank",
    "small-save": "Save many small tensors",
    "small-load": "Load many small tensors",
    "small-dcp-save": "DCP save of many small tensors, one rank",
    "small-dcp-load": "DCP load of many small tensors, one rank",
    "stall": "What an asynchronous save keeps the training, from the second one on",
    "s3-save": "Save to a bucket",
    "s3-load": "Load from a bucket",
    "dataset": "Objects of a bucket in a DataLoader with two workers",
}
SERVED = ("s3-save", "s3-load", "dataset")


@dataclass(frozen=True)
class Entry:
    """A contender before it has paths.

    Attributes
    ----------
    key, group, label, twin_of : str
        As in `Contender`.
    function : str
        ``module:function`` of the child, in this package; empty for fio.
    how : str
        For the function.
    source : str
        What is read: a key of `SOURCES`.
    threads : int
        Of DCP's writer.
    package : str
        Of a peer, or one that it needs; a peer that is not installed is left out, and its goals say so.
    """

    key: str
    group: str
    label: str
    function: str = ""
    how: str = ""
    source: str = ""
    threads: int = 1
    twin_of: str = ""
    package: str = ""


def _peers(group: str, function: str) -> list[Entry]:
    """The loaders of one file: for new memory, and for a state that is there."""
    return [
        Entry(f"{group}-torch", group, "torch.load", function, "torch", "torch.pt"),
        Entry(f"{group}-torch-mmap", group, "torch.load, mmap, copied", function, "torch, mmap", "torch.pt"),
        Entry(f"{group}-safetensors", group, "safetensors, mmap, copied", function, "safetensors, mmap",
              "state.safetensors"),
        Entry(f"{group}-safetensors-pread", group, "safetensors, pread", function, "safetensors, pread",
              "state.safetensors"),
        Entry(f"{group}-runai", group, "Run:ai model streamer", function, "Run:ai", "state.safetensors",
              package="runai_model_streamer"),
        Entry(f"{group}-fastsafetensors", group, "fastsafetensors", function, "fastsafetensors", "state.safetensors",
              package="fastsafetensors"),
    ]  # fmt: skip


def _dcp(prefix: str) -> list[Entry]:
    """The writers and readers of a distributed checkpoint."""
    save, load = f"{prefix}-save", f"{prefix}-load"
    return [
        Entry(f"{save}-mlstor", save, "mlstor StorageWriter", "ours:dcp_save"),
        *(
            Entry(f"{save}-{n}", save, f"FileSystemWriter, {n} thread{'s' * (n > 1)}", "peers:dcp_save", threads=n)
            for n in (1, 2, 4, 8)
        ),
        Entry(f"{load}-mlstor", load, "mlstor StorageReader, verified", "ours:dcp_load", source="mlstor.dcp"),
        Entry(f"{load}-stock", load, "FileSystemReader", "peers:dcp_load", source="torch.dcp"),
    ]


# What makes each thing that is read.
SOURCES = {
    "torch.pt": ("peers:save", "torch"),
    "state.safetensors": ("peers:save", "safetensors"),
    "mlstor.pt": ("ours:save", ""),
    "torch.dcp": ("peers:dcp_save", ""),
    "mlstor.dcp": ("ours:dcp_save", ""),
    "connector.pt": ("objects:connector_save", ""),
    "ours.pt": ("objects:save", ""),
    "connector.dcp": ("objects:connector_dcp_save", ""),
    "ours.dcp": ("objects:dcp_save", ""),
    "samples": ("loaders:fill", ""),
}

ENTRIES = (
    Entry("save-mlstor", "save", "mlstor save", "ours:save"),
    Entry("save-mlstor-safetensors", "save", "mlstor save_safetensors", "ours:save_safetensors"),
    Entry("save-fio", "save", "fio"),
    Entry("save-torch", "save", "torch.save + fsync", "peers:save", "torch"),
    Entry("save-torch-again", "save", "torch.save + fsync, again", "peers:save", "torch", twin_of="save-torch"),
    Entry("save-torch-no-crc", "save", "torch.save without CRC + fsync", "peers:save", "torch without CRC"),
    Entry("save-safetensors", "save", "safetensors save_file + fsync", "peers:save", "safetensors"),
    Entry("load-mlstor", "load", "mlstor load, verified", "ours:load", source="mlstor.pt"),
    Entry("load-mlstor-unverified", "load", "mlstor load, not verified", "ours:load", "unverified", "mlstor.pt"),
    Entry("load-mlstor-of-torch", "load", "mlstor load of torch.save's file, verified", "ours:load", source="torch.pt"),
    Entry("load-mlstor-safetensors", "load", "mlstor load_safetensors", "ours:load_safetensors",
          source="state.safetensors"),
    Entry("load-fio", "load", "fio", source="torch.pt"),
    *_peers("load", "peers:load"),
    Entry("load-torch-again", "load", "torch.load, again", "peers:load", "torch", "torch.pt", twin_of="load-torch"),
    Entry("into-mlstor", "into", "mlstor load(into=), verified", "ours:load_into", source="mlstor.pt"),
    Entry("into-mlstor-safetensors", "into", "mlstor load_safetensors(into=)", "ours:load_safetensors", "into",
          "state.safetensors"),
    Entry("into-fio", "into", "fio", source="torch.pt"),
    *_peers("into", "peers:into"),
    *_dcp("dcp"),
    Entry("small-save-mlstor", "small-save", "mlstor save", "ours:save"),
    Entry("small-save-mlstor-safetensors", "small-save", "mlstor save_safetensors", "ours:save_safetensors"),
    Entry("small-save-torch", "small-save", "torch.save + fsync", "peers:save", "torch"),
    Entry("small-save-torch-no-crc", "small-save", "torch.save without CRC + fsync", "peers:save", "torch without CRC"),
    Entry("small-save-safetensors", "small-save", "safetensors save_file + fsync", "peers:save", "safetensors"),
    Entry("small-load-mlstor", "small-load", "mlstor load, verified", "ours:load", source="mlstor.pt"),
    Entry("small-load-mlstor-safetensors", "small-load", "mlstor load_safetensors", "ours:load_safetensors",
          source="state.safetensors"),
    *_peers("small-load", "peers:load"),
    *_dcp("small-dcp"),
    Entry("stall-mlstor", "stall", "mlstor async_save", "stalls:ours"),
    Entry("stall-dcp", "stall", "dcp.async_save, its defaults", "stalls:dcp", "default"),
    Entry("stall-dcp-stager", "stall", "dcp.async_save, one DefaultStager kept", "stalls:dcp", "stager"),
    Entry("s3-save-mlstor", "s3-save", "mlstor save", "objects:save"),
    Entry("s3-save-mlstor-dcp", "s3-save", "mlstor StorageWriter", "objects:dcp_save"),
    Entry("s3-save-connector", "s3-save", "torch.save to S3Checkpoint", "objects:connector_save",
          package="s3torchconnector"),
    Entry("s3-save-connector-dcp", "s3-save", "S3StorageWriter, 8 threads", "objects:connector_dcp_save",
          package="tenacity"),
    Entry("s3-load-mlstor", "s3-load", "mlstor load, verified", "objects:load", source="ours.pt"),
    Entry("s3-load-mlstor-dcp", "s3-load", "mlstor StorageReader, verified", "objects:dcp_load", source="ours.dcp"),
    Entry("s3-load-connector", "s3-load", "torch.load from S3Checkpoint", "objects:connector_load",
          source="connector.pt", package="s3torchconnector"),
    Entry("s3-load-connector-dcp", "s3-load", "S3StorageReader", "objects:connector_dcp_load",
          source="connector.dcp", package="tenacity"),
    Entry("dataset-mlstor", "dataset", "mlstor ObjectDataset", "loaders:our_map", source="samples"),
    Entry("dataset-mlstor-iterable", "dataset", "mlstor ObjectIterableDataset", "loaders:our_iterable",
          source="samples"),
    Entry("dataset-connector", "dataset", "S3MapDataset", "loaders:connector_map", source="samples",
          package="s3torchconnector"),
    Entry("dataset-connector-iterable", "dataset", "S3IterableDataset, in order", "loaders:connector_iterable",
          source="samples", package="s3torchconnector"),
)  # fmt: skip
MODES = {"save": "write", "load": "read", "into": "read"}  # fio's, by group


def choose(only: str) -> list[Entry]:
    """Entries whose keys match a comma-separated shell pattern of `only`, all if it is empty; with the twins of their
    groups, and without the peers that are not installed.

    Raises
    ------
    UsageError
        If a pattern matches nothing.
    """
    keys = [entry.key for entry in ENTRIES]
    patterns = [pattern.strip() for pattern in only.split(",")] if only else ["*"]
    for pattern in patterns:
        if not fnmatch.filter(keys, pattern):
            raise UsageError(f"--only {pattern!r} matches no contender; there are {', '.join(keys)}")
    chosen = {key for pattern in patterns for key in fnmatch.filter(keys, pattern)}
    groups = {entry.group for entry in ENTRIES if entry.key in chosen}
    for entry in ENTRIES:
        if entry.twin_of and entry.group in groups:
            chosen |= {entry.key, entry.twin_of}
    return [entry for entry in ENTRIES if entry.key in chosen and _is_there(entry.package)]


def _is_there(package: str) -> bool:
    return not package or importlib.util.find_spec(package) is not None


def sources(entries: Sequence[Entry]) -> list[str]:
    """Names of what `entries` read, in the order of `SOURCES`."""
    return [name for name in SOURCES if any(entry.source == name for entry in entries)]


def job_of(group: str, job: TorchJob, small: int) -> TorchJob:
    """The job of a group: its payload, and its number of tensors or objects."""
    if group.startswith("small"):
        return replace(job, nbytes=small * SMALL_BYTES, count=small)
    if group == "dataset":
        return replace(job, nbytes=OBJECTS * OBJECT_BYTES, count=OBJECTS)
    if group in SERVED:
        return replace(job, nbytes=min(job.nbytes, S3_BYTES))
    return job


def room_bytes(entries: Sequence[Entry], nbytes: int) -> int:
    """Bytes of disk that the group with the most files takes: what is read, two that are written, 5% and 512 MiB."""
    files = [len(sources([one for one in entries if one.group == group])) + 2 for group in GROUPS]
    return int(max(files) * nbytes * 1.05) + (512 << 20)


def make_sources(entries: Sequence[Entry], base: str, job: TorchJob) -> None:
    """Write what the entries of one group read below `base`, a directory or a bucket's URL."""
    for name in sources(entries):
        function, how = SOURCES[name]
        run_child(f"torch.{function}", replace(job, path=f"{base}/{name}", how=how, touch_bytes=0))


def bind(
    entries: Sequence[Entry], base: str, written: str, job: TorchJob, cells: dict[str, fio.Cell]
) -> list[Contender]:
    """Contenders of one group. What is read lies below `base`, what is written goes below `written`; `cells` holds
    fio's best cell by mode.
    """
    bound = []
    for entry in entries:
        path = f"{base}/{entry.source}" if entry.source else f"{written}/new-{entry.key}"
        run: Callable[[], Sample]
        if entry.function:
            mine = replace(job, path=path, how=entry.how, threads=entry.threads)
            run = partial(run_child, f"torch.{entry.function}", mine)
        else:
            run = partial(run_fio, cells[MODES[entry.group]], MODES[entry.group], Path(path), job)
        is_file = not job.endpoint
        reads = (Path(path),) if is_file and entry.source else ()
        leaves = (Path(path),) if is_file and not entry.source else ()
        bound.append(Contender(entry.key, entry.group, entry.label, run, reads, leaves, entry.twin_of))
    return bound


def run_fio(cell: fio.Cell, mode: str, path: Path, job: TorchJob) -> Sample:
    """One run of fio, after the same touch of memory that the others get in their own process."""
    run_child("child:touch_only", Job("", job.nbytes, job.touch_bytes))
    return fio.run(cell, mode, path, job.nbytes)
