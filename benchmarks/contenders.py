"""The contenders: which function runs on which file, and which files must be there first."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks import fio
from benchmarks.child import Job, run_child
from benchmarks.harness import Contender, Sample
from mlstor.errors import UsageError

FOOTPRINTS = ("help", "rss")
MODES = {"write": "write", "read": "read", "random": "randread"}  # fio's, by group


@dataclass(frozen=True)
class Entry:
    """A contender before it has paths.

    Attributes
    ----------
    key, group, label, twin_of : str
        As in `Contender`.
    function : str
        ``module:function`` of the child; empty for fio.
    source : str
        For reads, the file that is read: a key of `SOURCES`.
    threads : int
        Of DCP's writer.
    """

    key: str
    group: str
    label: str
    function: str = ""
    source: str = ""
    threads: int = 1
    twin_of: str = ""


# What makes each file that is read. mlstor and fio and the plain loop read the same file.
SOURCES = {
    "data.bin": "ours:write",
    "state.pt": "peers:torch_save",
    "state.safetensors": "peers:safetensors_save",
    "state.dcp": "peers:dcp_save",
}

ENTRIES = (
    Entry("mlstor-write", "write", "mlstor, pattern generated", "ours:write"),
    Entry("mlstor-write-aligned", "write", "mlstor, from aligned memory", "ours:write_aligned"),
    Entry("fio-write", "write", "fio"),
    Entry("torch-save", "write", "torch.save + fsync", "peers:torch_save"),
    Entry("safetensors-save", "write", "safetensors save_file + fsync", "peers:safetensors_save"),
    Entry("dcp-save-1", "write", "DCP save, 1 thread", "peers:dcp_save", threads=1),
    Entry("dcp-save-2", "write", "DCP save, 2 threads", "peers:dcp_save", threads=2),
    Entry("dcp-save-4", "write", "DCP save, 4 threads", "peers:dcp_save", threads=4),
    Entry("write-loop", "write", "write() 1 MiB + fsync", "peers:write_loop"),
    Entry("write-loop-again", "write", "write() 1 MiB + fsync, again", "peers:write_loop", twin_of="write-loop"),
    Entry("mlstor-read-verified", "read", "mlstor, every byte verified", "ours:read_verified", "data.bin"),
    Entry("mlstor-read", "read", "mlstor, dropped", "ours:read_dropped", "data.bin"),
    Entry("mlstor-read-aligned", "read", "mlstor, into aligned memory", "ours:read_aligned", "data.bin"),
    Entry("fio-read", "read", "fio", source="data.bin"),
    Entry("torch-load", "read", "torch.load", "peers:torch_load", "state.pt"),
    Entry(
        "safetensors-load",
        "read",
        "safetensors load_file, touched",
        "peers:safetensors_load",
        "state.safetensors",
    ),
    Entry("dcp-load", "read", "DCP load, into tensors", "peers:dcp_load", "state.dcp"),
    Entry("read-loop", "read", "read() 1 MiB, into new memory", "peers:read_loop", "data.bin"),
    Entry(
        "read-loop-again",
        "read",
        "read() 1 MiB, into new memory, again",
        "peers:read_loop",
        "data.bin",
        twin_of="read-loop",
    ),
    Entry("mlstor-random", "random", "mlstor, one worker", "ours:random_reads", "data.bin"),
    Entry("fio-random", "random", "fio, one job", source="data.bin"),
)


def choose(only: str) -> tuple[list[Entry], list[str]]:
    """Entries and footprints whose keys match a comma-separated shell pattern of `only`; all if it is empty.

    The twins of the self-check join whenever anything is timed: no report without it.

    Raises
    ------
    UsageError
        If a pattern matches nothing.
    """
    keys = [entry.key for entry in ENTRIES] + list(FOOTPRINTS)
    patterns = [pattern.strip() for pattern in only.split(",")] if only else ["*"]
    for pattern in patterns:
        if not fnmatch.filter(keys, pattern):
            raise UsageError(f"--only {pattern!r} matches no contender; there are {', '.join(keys)}")
    chosen = {key for pattern in patterns for key in fnmatch.filter(keys, pattern)}
    if chosen.difference(FOOTPRINTS):
        chosen |= {key for entry in ENTRIES if entry.twin_of for key in (entry.key, entry.twin_of)}
    return [entry for entry in ENTRIES if entry.key in chosen], [key for key in FOOTPRINTS if key in chosen]


def sources(entries: Sequence[Entry]) -> list[str]:
    """Names of the files that `entries` read, in the order of `SOURCES`."""
    return [name for name in SOURCES if any(entry.source == name for entry in entries)]


def room_bytes(entries: Sequence[Entry], nbytes: int) -> int:
    """Bytes of disk that a run takes: the files that are read, one that is written, 5% and 256 MiB."""
    files = len(sources(entries)) + any(entry.group == "write" for entry in entries)
    return int(files * nbytes * 1.05) + (256 << 20)


def make_sources(entries: Sequence[Entry], directory: Path, job: Job) -> None:
    """Write the files that `entries` read; a plain loop writes the common one if mlstor takes no part."""
    for name in sources(entries):
        function = SOURCES[name]
        if name == "data.bin" and not any(entry.function.startswith("ours:") for entry in entries):
            function = "peers:write_loop"
        run_child(function, replace(job, path=str(directory / name), threads=1))


def bind(entries: Sequence[Entry], directory: Path, job: Job, cells: dict[str, fio.Cell]) -> list[Contender]:
    """Contenders with their paths below `directory`; `cells` holds fio's best cell per group."""
    bound = []
    for entry in entries:
        path = directory / (entry.source or f"new-{entry.key}")
        run: Callable[[], Sample]
        if entry.function:
            run = partial(run_child, entry.function, replace(job, path=str(path), threads=entry.threads))
        else:
            run = partial(run_fio, cells[entry.group], entry.group, path, job)
        reads, leaves = ((path,), ()) if entry.source else ((), (path,))
        bound.append(Contender(entry.key, entry.group, entry.label, run, reads, leaves, entry.twin_of))
    return bound


def run_fio(cell: fio.Cell, group: str, path: Path, job: Job) -> Sample:
    """One run of fio, after the same touch of memory that the others get in their own process."""
    run_child("child:touch_only", job)
    return fio.run(cell, MODES[group], path, job.nbytes, job.seconds)
