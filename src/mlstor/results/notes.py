"""What a printed record says in words, beside its tables: labelled lines for the run, its paths, its
verdicts, its damage. `stream_notes` has what only streams say.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from mlstor.results import figures
from mlstor.results.figures import GIB
from mlstor.results.phase import AnyPhase, Damage, Op, PathTaken, Phase, Requests
from mlstor.results.record import AnyRecord, Record, StreamRecord
from mlstor.results.stream import StreamPhase
from mlstor.units import format_both, format_ns

MAX_DAMAGE_LINES = 8
_LABEL_WIDTH = 13
_BACKENDS = {"io_uring": "io_uring", "threads": "threads (pread/pwrite)"}
_DIRECT = {"yes": "O_DIRECT confirmed", "no": "buffered, not direct", "unverified": "O_DIRECT unverified"}
_DONE: dict[Op, str] = {"write": "written", "read": "read"}
_SHARING = {
    "shared": "shared by all hosts",
    "per-node": "per node",
    "one-host": "one host",
    "unknown": "shared or per node: unknown",
}
_STATUS = {"complete": "complete", "partial": "PARTIAL", "failed": "FAILED"}


def phase_name(phase: Phase | StreamPhase) -> str:
    name = phase.name if isinstance(phase, StreamPhase) else f"{phase.op} {phase.checkpoint}"
    return name + ("" if phase.complete else " (partial)")


def rate_text(value: float | None) -> str:
    """Three significant digits, so that a laptop's 0.0734 GB/s and a cluster's 742 both say something."""
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}" if value >= 0.01 else f"{value:.3g}"


def line(out: Console, label: str, text: str, style: str = "") -> None:
    """A label in a column of its own; a long text wraps beside it and not below it."""
    width = max(20, out.width - _LABEL_WIDTH)
    for part in textwrap.wrap(text, width, break_on_hyphens=False) or [""]:
        out.print(Text.assemble((f"{label:<{_LABEL_WIDTH}}", "bold"), (part, style)), soft_wrap=True)
        label = ""


def plural(count: int, word: str) -> str:
    several = word + ("es" if word.endswith("s") else "s")
    return f"{count:,} {word if count == 1 else several}"


def heading(out: Console, record: Record) -> None:
    """What a checkpoint run was, who ran it and where."""
    work = record.workload
    title(out, record, "checkpoint")
    scale = (
        ""
        if work.scale_numerator == work.scale_denominator
        else f", scale {work.scale_numerator}/{work.scale_denominator}"
    )
    how = f"profile {work.profile}" if work.via is None else f"via {work.via_version}"
    line(
        out,
        "workload",
        f"{work.model}{scale}, {how}: {format_both(work.nbytes)} in {plural(work.nfiles, 'file')} per checkpoint",
    )
    line(out, "ranks", work.ranks_meaning)
    surroundings(out, record)


def title(out: Console, record: AnyRecord, kind: str) -> None:
    """The run's name and status, what ended it, and how the record was recovered."""
    if any(target.is_memory for target in record.targets):
        out.print("memory, not storage", style="bold red")
    status = _STATUS[record.status]
    style = "bold" if record.status == "complete" else "bold red"
    out.print(f"mlstor {escape(record.version)} {kind}, run {escape(record.run_id)}: {status}", style=style)
    if record.error is not None:
        error = record.error
        where = f"rank {error.rank} on {error.host}"
        if error.file is not None:
            where += f", {error.file}" + ("" if error.offset is None else f" at byte {error.offset}")
        line(out, "error", f"{where}: {error.message}", "red")
    if record.recovered is not None:
        found = record.recovered
        line(
            out,
            "recovered",
            f"from {plural(found.journals, 'journal')}; {found.missing_processes} missing; "
            f"{plural(found.torn_lines, 'torn line')}",
        )


def surroundings(out: Console, record: AnyRecord) -> None:
    """Who ran, on which targets, with which settings."""
    world = record.world
    line(
        out,
        "world",
        f"{plural(world.ranks, 'rank')} in {plural(world.processes, 'process')} on "
        f"{plural(world.hosts, 'host')}, launcher {world.launcher}",
    )
    seen: set[str] = set()
    for target in record.targets:
        text = ", ".join(word for word in (target.path, target.fs_type, target.device) if word)
        text += f", {_SHARING[target.sharing]}" + (" (asserted)" if target.sharing_how == "asserted" else "")
        if text not in seen:
            line(out, "" if seen else "target", text)
            seen.add(text)
    chosen = [f"{name} {one.value} ({one.source})" for name, one in record.settings.items() if one.source != "default"]
    if chosen:
        line(out, "settings", ", ".join(chosen))
    narrow = sorted(host.hostname for host in record.hosts if host.affinity_narrow)
    if narrow:
        names = ", ".join(narrow[:4]) + (f" and {len(narrow) - 4} more" if len(narrow) > 4 else "")
        line(
            out,
            "affinity",
            f"narrow on {names}: the launcher bound processes to few cores, which all their threads share",
            "yellow",
        )


def totals(out: Console, record: Record) -> None:
    for op, done in _DONE.items():
        complete = figures.phases(record, op)
        if complete:
            nbytes = sum(phase.nbytes for phase in complete)
            duration_ns = sum(figures.wall_ns(phase) for phase in complete)
            line(
                out,
                done,
                f"{format_both(nbytes)} in {format_ns(duration_ns)}: "
                f"{rate_text(figures.rate(nbytes, duration_ns))} GB/s "
                f"({rate_text(figures.rate(nbytes, duration_ns, GIB))} GiB/s)",
            )


def _path_text(path: PathTaken) -> str:
    text = f"{_BACKENDS.get(path.backend, path.backend)} + {_DIRECT[path.direct]}"
    return text + (f" on {path.fs_type}" if path.fs_type else "") + (f" ({path.reason})" if path.reason else "")


def grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Texts in order of appearance with the phases that they hold for."""
    names: dict[str, list[str]] = {}
    for name, text in pairs:
        names.setdefault(text, []).append(name)
    return list(names.items())


def for_whom(record: Record | StreamRecord, names: Sequence[str]) -> str:
    """The phases that a sentence is about; nothing where there is but one."""
    if isinstance(record, StreamRecord) and len(record.phases) == 1:
        return ""
    if len(names) == len(record.phases):
        return "all phases: "
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") + ": "


def paths(out: Console, record: Record | StreamRecord) -> None:
    """How the files were reached, and whether the page cache may have answered."""
    pairs = [
        (phase_name(p), "; ".join(f"{_path_text(path)}, {plural(path.nfiles, 'file')}" for path in p.paths))
        for p in record.phases
        if p.paths
    ]
    for at, (text, names) in enumerate(grouped(pairs)):
        line(out, "" if at else "path", for_whom(record, names) + text)
    cached = [
        (
            phase_name(p),
            f"{p.cached.verdict}" + (f" ({p.cached.how})" if p.cached.how else "") + _resident(p),
        )
        for p in record.phases
    ]
    for at, (text, names) in enumerate(grouped(cached)):
        line(
            out,
            "" if at else "cached",
            for_whom(record, names) + text,
            "" if text.startswith("no") else "yellow",
        )


def requests(out: Console, record: Record) -> None:
    """What object stores were asked, and what had to be asked again."""
    pairs = [(phase_name(p), _requests_text(p.requests)) for p in record.phases if p.requests is not None]
    for at, (text, names) in enumerate(grouped(pairs)):
        line(out, "" if at else "requests", for_whom(record, names) + text, "yellow" if "sent again" in text else "")


def _requests_text(found: Requests) -> str:
    text = f"{plural(found.sent, 'request')}, {plural(found.connections, 'connection')} made"
    if found.retries:
        objects = ", ".join(f"{word} {count:,}" for word, count in sorted(found.retried_by.items()))
        text += f", {found.retries:,} of them sent again" + (f" (objects: {objects})" if objects else "")
    return text


def _resident(phase: AnyPhase) -> str:
    cached = phase.cached
    if not cached.looked_at_bytes:
        return ""
    percent = 100 * cached.resident_bytes / cached.looked_at_bytes
    return f", {percent:.1f} % of what was looked at in the page cache"


def verdicts(out: Console, record: Record) -> None:
    limited = [(phase_name(p), p.client.reason) for p in record.phases if p.client.limited == "yes"]
    for text, names in grouped(limited):
        line(
            out,
            "client-bound",
            f"{for_whom(record, names)}the client, not the storage, was the limit: {text}",
            "bold red",
        )
    if limited:
        line(out, "", f"Rule: {record.phases[0].client.rule}")
    rule = record.preflight.mlperf_memory_rule
    if rule is not None:
        memory = "unknown" if rule.client_memory_bytes is None else format_both(rule.client_memory_bytes)
        line(
            out,
            "3 x memory",
            f"MLPerf's rule {rule.verdict}: {format_both(rule.nbytes_per_client)} per client against "
            f"{rule.factor} x {memory} ({rule.memory_source})",
            "" if rule.verdict == "met" else "yellow",
        )
    preflight(out, record)


def preflight(out: Console, record: AnyRecord) -> None:
    """Verdicts before the first byte that were not ok."""
    for check in record.preflight.checks:
        if check.verdict != "ok":
            available = "unknown" if check.available is None else f"{check.available:,}"
            by = f" ({check.limited_by})" if check.limited_by else ""
            line(
                out,
                check.name,
                f"{check.verdict}: {check.needed:,} {check.unit} needed, {available} available{by}",
                "yellow",
            )


def verification(out: Console, reads: Sequence[Phase | StreamPhase]) -> None:
    """What comparing the phases that read has found; nothing where there are none."""
    if not reads:
        return
    verified = sum(phase.verification.verified_nbytes for phase in reads)
    blocks = sum(phase.verification.damaged_blocks for phase in reads)
    if not verified:
        line(out, "verified", "nothing: what was read was not compared with what had been written", "yellow")
        return
    word = "no damage" if not blocks else f"{plural(blocks, 'block')} of 4 KiB DAMAGED"
    line(
        out,
        "verified",
        f"{format_both(verified)} compared byte by byte: {word}",
        "bold red" if blocks else "",
    )
    shown = [(phase_name(phase), one) for phase in reads for one in phase.verification.damage]
    for (name, rank, file), places in groupby(
        shown[:MAX_DAMAGE_LINES], lambda pair: (pair[0], pair[1].rank, pair[1].file)
    ):
        line(out, "", f"{name}, rank {rank}: {file}", "red")
        for _, one in places:
            line(out, "", f"  {damage_text(one)}", "red")
    dropped = len(shown[MAX_DAMAGE_LINES:]) + sum(phase.verification.damage_dropped for phase in reads)
    if dropped:
        line(out, "", f"and {plural(dropped, 'place')} more", "red")


def damage_text(one: Damage) -> str:
    """What is wrong where in a file, and what lies there instead."""
    fields = {
        "run": one.found_run,
        "checkpoint": one.found_checkpoint,
        "file": one.found_file,
        "offset": one.found_offset,
    }
    found = ", ".join(f"{label} {value}" for label, value in fields.items() if value is not None)
    return f"{plural(one.nbytes, 'byte')} at offset {one.offset}: {one.kind}" + (f", found {found}" if found else "")
