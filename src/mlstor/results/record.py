"""The result record of one run: integers only, one JSON file, with a JSON Schema beside this module.
 ``python -m mlstor.results.record`` prints the schema; ``schema.json`` is its output. What is derived (GB/s,
percentiles, MLPerf's fields) is not stored but computed when shown, by `figures`, `percentiles` and `mlperf`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlstor.errors import UsageError
from mlstor.results.phase import Count, Phase
from mlstor.results.stream import StreamPhase
from mlstor.results.stream_workload import CopyWorkload, Plain, StoreUsed, StreamWorkload

SCHEMA_NAME = "mlstor-record/1"
STREAM_SCHEMA_NAME = "mlstor-stream-record/1"
RECORD_FILE = "record.json"

Source = Literal["argument", "environment", "profile", "default"]


class RunError(msgspec.Struct, kw_only=True):
    """What ended the run: the failing rank and host, and the file and offset where they are known."""

    rank: Count
    host: str
    message: str
    file: str | None = None
    offset: Count | None = None


class Setting(msgspec.Struct, kw_only=True):
    """A setting's value and where it came from."""

    value: Plain
    source: Source


class Workload(msgspec.Struct, kw_only=True):
    """Every parameter of a checkpoint run. `scale` is numerator / denominator; `ranks_meaning` is the
    sentence that says what the number of logical ranks stands for; only_ranks is null when all ranks ran;
    keep is the number of checkpoints left behind (null: all); `steps` are the steps of a write in order;
    nbytes and nfiles are of one checkpoint as run; pause_ns is slept before each phase, outside the clock.
    block_bytes is of one write, the largest of any target (each target has its own); depth is the most that
    a worker has in flight; workers are those of one process while it writes; backend is what was asked for
    (a phase's paths have what was used). direct is that of the first target. compressibility_percent is that
    of the data, which a read-only run finds. via is what carried the files in place of the profile's own way, with
    via_version; null without --via.
    """

    model: str
    workload_file: str | None = None
    scale_numerator: Count = 1
    scale_denominator: Count = 1
    subset: Count | None = None
    ranks: Count
    ranks_meaning: str
    only_ranks: list[Count] | None = None
    deal: Literal["blocks", "round-robin"] = "blocks"
    profile: Literal["native", "mlperf"] = "native"
    via: str | None = None
    via_version: str | None = None
    writes: Count
    reads: Count
    read_run: str | None = None
    rank_shift: int = 0
    verify: bool = True
    keep: Count | None = 0
    steps: list[str] = []
    direct: Literal["auto", "require", "off"] = "auto"
    backend: Literal["auto", "io_uring", "threads"] = "auto"
    block_bytes: Count
    depth: Count
    workers: Count
    pause_ns: Count = 0
    compressibility_percent: Count = 0
    nbytes: Count
    nfiles: Count


class World(msgspec.Struct, kw_only=True):
    """Who ran: logical ranks dealt to processes on hosts. process_host[p]: process p's index in `hosts`."""

    ranks: Count
    processes: Count
    hosts: Count
    launcher: str = "none"
    mpi_library: str | None = None
    process_host: list[Count] = []


class Cgroup(msgspec.Struct, kw_only=True):
    """Limits of the processes' control group; null where there is none. version is 0 outside any, else 1 or
    2.
    """

    version: Count = 0
    memory_limit_bytes: Count | None = None
    memory_used_bytes: Count | None = None
    cpu_limit_millicores: Count | None = None


class NumaNode(msgspec.Struct, kw_only=True):
    """A NUMA node: its CPUs as a kernel list ("0-3,8") and its memory."""

    node: Count
    cpus: str
    memory_bytes: Count | None = None


class Host(msgspec.Struct, kw_only=True):
    """A host as the first of its processes saw it. `affinity` is that process's CPU mask as a kernel list,
    `affinities` are the distinct masks of all its processes, and affinity_narrow says that of any of them the
    mask, not the machine, limits the threads.
    """

    hostname: str
    kernel: str
    cpu_model: str
    cores_online: Count
    affinity: str
    affinity_narrow: bool
    affinities: list[str] = []
    memory_bytes: Count
    cgroup: Cgroup = msgspec.field(default_factory=Cgroup)
    numa: list[NumaNode] = []
    versions: dict[str, str] = {}
    build: dict[str, Plain] = {}
    boot_id: str = ""


class Target(msgspec.Struct, kw_only=True):
    """A directory that was measured, as seen from host `host` (index): shared by all hosts or one per node
    (one-host: there is no other host to see it; unknown: a read-only run could leave no tokens), and whether
    the user asserted that or the run found it out. is_memory: its files are in memory (tmpfs), not on storage.
    block_bytes and direct are what held for its files, since a stored profile may tell them by target.
    """

    path: str
    resolved_path: str
    host: Count = 0
    sharing: Literal["shared", "per-node", "one-host", "unknown"]
    sharing_how: Literal["asserted", "found"]
    fs_type: str
    mount_options: str = ""
    device: str = ""
    memory_align_bytes: Count | None = None
    offset_align_bytes: Count | None = None
    is_memory: bool = False
    block_bytes: Count | None = None
    direct: Literal["auto", "require", "off"] = "auto"


class Check(msgspec.Struct, kw_only=True):
    """A verdict before the first byte: what was needed and what there was, in `unit`, and what set that
    limit.
    """

    name: Literal["room", "inodes", "memory"]
    verdict: Literal["ok", "warning", "refused", "unknown"]
    unit: Literal["bytes", "inodes"]
    needed: Count
    available: Count | None = None
    limited_by: str = ""
    target: str | None = None
    host: Count | None = None


class MemoryRule(msgspec.Struct, kw_only=True):
    """MLPerf Storage's rule 4.3.1: the bytes written by a client are to exceed `factor` times its memory,
    else the page cache must be flushed between writing and reading. client_memory_bytes is the least
    client's, from `memory_source`.
    """

    verdict: Literal["met", "not met", "unknown"]
    factor: Count = 3
    nbytes_per_client: Count
    client_memory_bytes: Count | None
    memory_source: str


class Preflight(msgspec.Struct, kw_only=True):
    """All verdicts before the first byte."""

    checks: list[Check] = []
    mlperf_memory_rule: MemoryRule | None = None


class Recovered(msgspec.Struct, kw_only=True):
    """The record was made of the journals of a run that did not end itself: journals found, lines that could
    not be read (the last line of a process that was killed while it wrote), and processes of which there was
    no journal.
    """

    journals: Count
    torn_lines: Count
    missing_processes: Count


class AnyRecord(msgspec.Struct, kw_only=True, tag_field="schema"):
    """What the record of any run has."""

    run_id: str
    status: Literal["complete", "partial", "failed"]
    error: RunError | None = None
    start_unix_ns: Count
    end_unix_ns: Count | None = None
    command: list[str]
    version: str
    settings: dict[str, Setting]
    world: World
    hosts: list[Host]
    targets: list[Target]
    preflight: Preflight
    recovered: Recovered | None = None


class Record(AnyRecord, kw_only=True, tag=SCHEMA_NAME):
    """What one checkpoint run of mlstor measured, and where. Integers only: ns, bytes and counts. `stores` are the
    object stores among `targets`, which are URLs then.
    """

    workload: Workload
    stores: list[StoreUsed] = []
    phases: list[Phase]


class StreamRecord(AnyRecord, kw_only=True, tag=STREAM_SCHEMA_NAME):
    """What one object stream, or one copy, measured, and where. Integers only: ns, bytes and counts. `targets` are the
    directories among `stores`.
    """

    workload: StreamWorkload | CopyWorkload
    stores: list[StoreUsed]
    phases: list[StreamPhase]


def setting(value: object, source: Source) -> Setting:
    """A `Setting`; what is neither an integer, a bool, a string nor None (a path, a ratio, a float) is kept
    as text.
    """
    return Setting(value=value if isinstance(value, int | bool | str | None) else str(value), source=source)


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of `Record` and `StreamRecord`; which of them it is stands in ``schema``."""
    made = msgspec.json.schema(Record | StreamRecord)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mlstor result record",
        **made,
    }


def schema_text() -> str:
    """`schema()` as it lies in ``schema.json``."""
    return msgspec.json.format(msgspec.json.encode(schema()), indent=2).decode() + "\n"


def write_durably(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that after a crash there is the former file or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save(record: AnyRecord, run_dir: str | os.PathLike[str]) -> Path:
    """Write `record` durably to ``<run_dir>/record.json``, making the directory if need be, and return its
    path.

    Raises
    ------
    OSError
        If the directory can't be made or the file not be written.
    """
    path = Path(run_dir) / RECORD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, msgspec.json.encode(record))
    return path


def load_any(path: str | os.PathLike[str]) -> Record | StreamRecord:
    """The record in `path`, which is its file or a run's directory.

    Raises
    ------
    UsageError
        If there is no record at `path`, or it is not one that this version reads.
    """
    file = Path(path)
    if file.is_dir():
        file = file / RECORD_FILE
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"no record can be read from {file}: {error.strerror}; name a run's directory or its {RECORD_FILE}"
        ) from None
    try:
        return msgspec.json.decode(data, type=Record | StreamRecord)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise UsageError(
            f"{file} is not a record that this version reads ({SCHEMA_NAME}, {STREAM_SCHEMA_NAME}): {error}"
        ) from None


def load(path: str | os.PathLike[str]) -> Record:
    """The record of a checkpoint run in `path`, as `load_any`, which raises the same for others.

    Raises
    ------
    UsageError
        Also if the record at `path` is that of another kind of run.
    """
    record = load_any(path)
    if not isinstance(record, Record):
        raise UsageError(f"{path} is the record of an object stream, not of a checkpoint run; `mlstor show` prints it")
    return record


if __name__ == "__main__":
    print(schema_text(), end="")
