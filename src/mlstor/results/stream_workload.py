"""What an object stream, and a copy, were asked to do: the `workload` of their records. Integers only."""

from __future__ import annotations

from typing import Literal

import msgspec

from mlstor.results.phase import Count

Plain = int | bool | str | None


class StoreUsed(msgspec.Struct, kw_only=True):
    """A store of the run: its URL without credentials, what it was for, and what `Store.describe` says of it: scheme,
    endpoint, direct or by a proxy, signed or anonymous, options.
    """

    url: str
    role: Literal["store", "source", "destination"] = "store"
    facts: dict[str, Plain] = {}


class StreamWorkload(msgspec.Struct, kw_only=True, tag_field="kind", tag="stream"):
    """Every parameter of an object stream. `profile` and `pattern` as the command line has them; `client` is who makes
    the requests. The catalog: objects and bytes that the reads choose from, where their names come from, and its digest
    in hexadecimal.

    A limit of null was not set: epochs, duration_ns, limit_nbytes (read and written), limit_ops. warmup_ns is run
    before and not counted. mix_ppm are parts of a million by operation (get, put, head, delete), update_ppm those of
    the GETs that are followed by a PUT of the same object. `sizes` says in words how the sizes of PUTs are chosen, from
    min_nbytes to max_nbytes; `ranges` in words how ranges of GETs are, null for whole objects, each range_nbytes long
    (null: it varies). `workers` are those of process 0, each with up to `in_flight` transfers under way.
    rate_milliops_per_s is the intended rate of all processes in thousandths of an operation per second, null in a
    closed loop; p99_goal_ns is what p99 from the intended start is to keep. `verify` says what was checked: bytes
    against the pattern that was written, or the store's checksum.
    """

    urls: list[str]
    profile: str | None = None
    pattern: Literal["objects", "tokens"] = "objects"
    client: str = "mlstor"
    ranks: Count
    seed: Count = 0
    order: Literal["permutation", "sequential", "replacement"] = "permutation"
    epoch_scope: Literal["world", "client"] = "world"
    uneven: Literal["exact", "drop", "pad"] = "exact"
    catalog_count: Count = 0
    catalog_nbytes: Count | None = None
    catalog_source: Literal["listing", "file", "synthetic", "none"] = "none"
    catalog_digest: str = ""
    epochs: Count | None = None
    duration_ns: Count | None = None
    limit_nbytes: Count | None = None
    limit_ops: Count | None = None
    warmup_ns: Count = 0
    mix_ppm: dict[str, Count]
    update_ppm: Count = 0
    sizes: str | None = None
    min_nbytes: Count | None = None
    max_nbytes: Count | None = None
    compressibility_percent: Count = 0
    part_nbytes: Count | None = None
    ranges: str | None = None
    range_nbytes: Count | None = None
    batch_count: Count | None = None
    keep_handles: bool = True
    workers: Count
    in_flight: Count
    rate_milliops_per_s: Count | None = None
    p99_goal_ns: Count | None = None
    verify: Literal["no", "checksum", "pattern"] = "no"
    subdirectories: Count = 0
    cleanup: bool = False
    server_memory_bytes: Count | None = None
    server_memory_source: str = ""


class CopyWorkload(msgspec.Struct, kw_only=True, tag_field="kind", tag="copy"):
    """Every parameter of a copy: objects and bytes at the source; per_node: each node keeps a copy of its own;
    `resumed`: objects that were there already were left alone; `workers` and `in_flight` as in `StreamWorkload`, for
    each side.
    """

    source: str
    destination: str
    ranks: Count
    count: Count
    nbytes: Count
    per_node: bool = False
    resumed: bool = False
    verify: Literal["no", "checksum", "bytes"] = "checksum"
    part_nbytes: Count | None = None
    workers: Count
    in_flight: Count
