"""What the printed record of an object stream, or of a copy, says in words."""

from __future__ import annotations

from rich.console import Console

from mlstor.results import figures
from mlstor.results.figures import GIB
from mlstor.results.notes import line, phase_name, plural, rate_text, surroundings, title, verification
from mlstor.results.percentiles import percentile
from mlstor.results.record import StreamRecord
from mlstor.results.stream import OpFigures, StreamPhase
from mlstor.results.stream_merge import add_ops
from mlstor.results.stream_workload import CopyWorkload, StreamWorkload
from mlstor.units import format_both, format_ns

MAX_FAILURE_LINES = 8


def per_s_text(value: float | None) -> str:
    """Operations per second: whole ones from a hundred on, else three digits."""
    return f"{value:,.0f}" if value is not None and value >= 100 else rate_text(value)


def heading(out: Console, record: StreamRecord) -> None:
    """What a stream or copy was, who ran it and where."""
    work = record.workload
    if isinstance(work, CopyWorkload):
        title(out, record, "copy")
        line(out, "workload", _copied(work))
    else:
        title(out, record, "stream")
        line(out, "workload", _streamed(work))
        line(out, "", _limits(work))
        if work.catalog_count:
            size = "" if work.catalog_nbytes is None else f", {format_both(work.catalog_nbytes)}"
            line(out, "catalog", f"{plural(work.catalog_count, 'object')}{size} ({work.catalog_source})")
    for store in record.stores:
        facts = [f"{name} {value}" for name, value in store.facts.items() if value not in (None, "")]
        line(out, store.role, ", ".join([store.url, *facts]))
    surroundings(out, record)


def _copied(work: CopyWorkload) -> str:
    text = f"{work.source} to {work.destination}: {plural(work.count, 'object')}, {format_both(work.nbytes)}"
    text += ", a copy per node" if work.per_node else ""
    text += ", resumed" if work.resumed else ""
    return text + {"no": "", "checksum": ", checksums compared", "bytes": ", compared byte by byte"}[work.verify]


def _streamed(work: StreamWorkload) -> str:
    mix = ", ".join(f"{ppm / 10_000:g} % {name}" for name, ppm in work.mix_ppm.items() if ppm)
    words = [" ".join(work.urls), mix]
    if work.update_ppm:
        words.append(f"{work.update_ppm / 10_000:g} % of the GETs updated")
    if work.pattern == "tokens":
        words.append("token reads, " + ("handles kept" if work.keep_handles else "a file opened per read"))
    words += [text for text in (work.ranges, work.sizes) if text]
    words.append(f"order {work.order}, seed {work.seed}")
    if work.uneven != "exact":
        words.append(f"uneven {work.uneven}")
    if work.epoch_scope == "client":
        words.append("each client its own epochs")
    if work.client != "mlstor":
        words.append(f"by {work.client}")
    return ", ".join(word for word in words if word) + (f" (profile {work.profile})" if work.profile else "")


def _limits(work: StreamWorkload) -> str:
    words = [
        None if work.epochs is None else plural(work.epochs, "epoch"),
        None if work.duration_ns is None else format_ns(work.duration_ns),
        None if work.limit_nbytes is None else format_both(work.limit_nbytes),
        None if work.limit_ops is None else plural(work.limit_ops, "operation"),
    ]
    found = [word for word in words if word]
    text = f"until {' or '.join(found)}; " if found else ""
    text += f"{plural(work.workers, 'worker')} a process, {work.in_flight} in flight each"
    if work.rate_milliops_per_s is not None:
        text += f", open loop at {per_s_text(work.rate_milliops_per_s / 1000)} operations/s"
    return text + (f", warm-up of {format_ns(work.warmup_ns)} not counted" if work.warmup_ns else "")


def headline(phase: StreamPhase) -> str:
    """What a phase moved, in which time, at which rate."""
    together = add_ops(list(phase.ops.values()))
    wall_ns = figures.measured_ns(phase)
    count = phase.ops["put"].count if phase.name == "copy" and "put" in phase.ops else together.count
    word = "object" if phase.name == "copy" else "operation"
    rate, rate_gib = figures.rate(phase.nbytes, wall_ns), figures.rate(phase.nbytes, wall_ns, GIB)
    text = (
        f"{phase_name(phase)}: {format_both(phase.nbytes)} in {format_ns(wall_ns)}: {rate_text(rate)} GB/s "
        f"({rate_text(rate_gib)} GiB/s); {plural(count, word)}, "
        f"{per_s_text(figures.per_s(count, figures.covered_ns(phase)))}/s"
    )
    if phase.skipped_count:
        text += (
            f"; {plural(phase.skipped_count, 'object')} ({format_both(phase.skipped_nbytes)}) left alone, already there"
        )
    return text


def phase_lines(out: Console, record: StreamRecord, phase: StreamPhase) -> None:
    """The verdicts on a phase, beside its tables."""
    together = add_ops(list(phase.ops.values()))
    ends = figures.spread(phase.ranks.end_ns)
    if ends is not None and len(phase.ranks.rank) > 1:
        first, middle, last = map(format_ns, (ends.min, ends.median, ends.max))
        slowest = phase.ranks.rank[phase.ranks.end_ns.index(ends.max)]
        line(out, "ranks' ends", f"{first} to {last}, median {middle}; rank {slowest} was the last")
    _faults(out, phase)
    _opens(out, phase, together)
    _goal(out, record, together)
    _client(out, phase, together)
    cache = phase.server_cache
    if cache is not None:
        memory = (
            "the servers' memory is not known"
            if cache.server_memory_bytes is None
            else f"servers' memory {format_both(cache.server_memory_bytes)} ({cache.memory_source})"
        )
        line(
            out,
            "server cache",
            f"{cache.verdict}: {format_both(cache.working_set_bytes)} of distinct objects read, {memory}",
            "" if cache.verdict == "exceeded" else "yellow",
        )
        if cache.verdict != "exceeded":
            line(out, "", f"Rule: {cache.rule}")


def _faults(out: Console, phase: StreamPhase) -> None:
    for name, op in phase.ops.items():
        if op.failed:
            line(out, "failed", f"{op.failed:,} of {op.count + op.failed:,} {name}: {_counted(op.errors)}", "bold red")
        if op.retries or op.retried_by:
            times = [percentile(op.retried, percent) for percent in (50, 99)]
            slow = (
                "" if None in times else f"; they took p50 {format_ns(times[0] or 0)}, p99 {format_ns(times[1] or 0)}"
            )
            line(
                out,
                "retried",
                f"{sum(op.retried_by.values()):,} {name} were {'' if op.retries else 'to be '}tried again "
                f"({_counted(op.retried_by)}), {op.retries:,} further attempts{slow}",
                "yellow",
            )
        if op.cancelled:
            line(out, "cancelled", f"{op.cancelled:,} {name} at the end of the run")
    for one in phase.failures[:MAX_FAILURE_LINES]:
        message = f": {one.message}" if one.message else ""
        line(
            out,
            "",
            f"rank {one.rank}, {one.op} {one.url}: {one.fault} after {plural(one.attempts, 'attempt')}{message}",
            "red",
        )
    dropped = len(phase.failures[MAX_FAILURE_LINES:]) + phase.failures_dropped
    if dropped:
        line(out, "", f"and {plural(dropped, 'failure')} more", "red")


def _counted(words: dict[str, int]) -> str:
    return ", ".join(f"{word} {count:,}" for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0])))


def _opens(out: Console, phase: StreamPhase, together: OpFigures) -> None:
    if not phase.opens:
        return
    text = (
        f"{plural(phase.opens, 'file')} opened, {per_s_text(figures.per_s(phase.opens, figures.covered_ns(phase)))}/s"
    )
    if phase.fetched_bytes is None:
        text += "; bytes really fetched: unknown"
    elif together.nbytes:
        ratio = phase.fetched_bytes / together.nbytes
        text += f"; {format_both(phase.fetched_bytes)} really fetched, {ratio:.2f} x what was asked for"
    line(out, "opens", text)


def _goal(out: Console, record: StreamRecord, together: OpFigures) -> None:
    work = record.workload
    if isinstance(work, CopyWorkload) or work.p99_goal_ns is None:
        return
    p99 = percentile(together.from_intended, 99)
    if p99 is None:
        line(out, "goal", "unknown: nothing was timed from an intended start", "yellow")
        return
    # of what was never begun, more than one in a hundred are late, however fast the others were
    missed = 100 * together.cancelled > together.count + together.cancelled
    holds = p99 <= work.p99_goal_ns and not together.failed and not missed
    word = "holds" if holds else "DOES NOT HOLD"
    failed = f", {together.failed:,} failed" if together.failed else ""
    failed += f", {together.cancelled:,} never begun" if missed else ""
    line(
        out,
        "goal",
        f"{word}: p99 from the intended start {format_ns(p99)}, to be at most {format_ns(work.p99_goal_ns)}{failed}",
        "" if holds else "bold red",
    )


def _client(out: Console, phase: StreamPhase, together: OpFigures) -> None:
    per_gb = figures.cpu_s_per_gb(phase)
    done = together.count + together.failed
    words = [
        None if per_gb is None else f"{per_gb:.3f} s of CPU per GB",
        None if not done else f"{format_ns(figures.cpu_ns(phase) / done)} of CPU per operation",
        f"{plural(together.connections, 'connection')} made" if together.connections else None,
    ]
    rss = max(phase.processes.peak_rss_bytes, default=0)
    words.append(f"peak RSS {rss / 2**20:.0f} MiB" if rss else None)
    line(out, "client", "; ".join(word for word in words if word) or "nothing was measured")
    client, network = phase.client, phase.network
    if client.limited == "yes":
        line(out, "client-bound", f"the client, not the storage, was the limit: {client.reason}", "bold red")
        line(out, "", f"Rule: {client.rule}")
    elif client.limited == "no":
        line(out, "", f"not the limit: {client.reason}")
    else:
        line(out, "", f"unknown whether it was the limit: {client.reason}", "yellow")
    if network.limited == "yes":
        line(out, "network", f"the client's network, not the storage, was the limit: {network.reason}", "bold red")
        line(out, "", f"Rule: {network.rule}")
    elif network.limited == "no":
        line(out, "network", f"not the limit: {network.reason}")
    else:
        line(out, "network", f"unknown whether it was the limit: {network.reason}")


def verified(out: Console, record: StreamRecord) -> None:
    """What comparing has found, bytes or checksums; nothing where nothing was read."""
    reads = [phase for phase in record.phases if any(name.startswith(("get", "batch")) for name in phase.ops)]
    if record.workload.verify != "checksum":
        verification(out, reads)
        return
    together = add_ops([op for phase in record.phases for op in phase.ops.values()])
    wrong = together.errors.get("checksum", 0)
    line(
        out,
        "verified",
        f"the store's checksum of {together.compared:,} of {plural(together.count + together.failed, 'transfer')}: "
        + (f"{wrong:,} DIFFER" if wrong else "no difference"),
        "bold red" if wrong else "yellow" if not together.compared else "",
    )
