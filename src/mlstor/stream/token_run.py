"""Token reads as a part of a run: the handles that are kept, what was opened, and what was fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlstor.errors import UsageError
from mlstor.results.phase import Cached, PathTaken
from mlstor.stream import token_records, tokens
from mlstor.stream.fetched import Fetched

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlstor._io import Pattern
    from mlstor.results.stream import StreamReport
    from mlstor.storage.transfers import Transfers
    from mlstor.stream.handles import Handles
    from mlstor.stream.session import Session

_MEMORY_FS_TYPES = ("tmpfs", "ramfs")


def kept_of(session: Session) -> Handles | None:
    """The handles that a session's token reads keep; None where they keep none.

    Raises
    ------
    UsageError
        If the URL is no directory: there are no handles to keep.
    """
    options, objects, written = session.options, session.objects, session.read_of
    if options.tokens is None or options.tokens.handles == "open" or objects is None:
        return None
    if session.group.scheme != "file":
        raise UsageError(f"{session.group.url} has no handles to keep: give --handles open, or a mounted directory")
    pattern_of: Callable[[int], Pattern] | None = None
    if options.verify == "pattern" and written is not None:
        from mlstor._io import Pattern

        run_key, compressibility = written.run_key, written.compressibility

        def pattern_of(index: int) -> Pattern:
            return Pattern(run_key, 0, index, compressibility)

    in_flight = session.workers * session.in_flight
    return token_records.kept(session.group.url, objects, options.tokens, in_flight, pattern_of)


def p99_goal_ns(session: Session) -> int | None:
    """What p99 from the intended start is to keep, see `tokens.p99_goal_ns`; None without token reads or a rate."""
    if session.options.tokens is None or session.rate is None:
        return None
    return tokens.p99_goal_ns(session.workers * session.in_flight * session.world.size, session.rate)


class Opened:
    """Files opened for the reads of a phase, how, and bytes fetched for them.

    Parameters
    ----------
    session : Session
    source
        Of the phase's reads: kept handles, or a store's transfers, which open the file for each read.
    """

    def __init__(self, session: Session, source: Transfers | Handles) -> None:
        self._source = source
        self._before = self._opens()
        of_host = session.world.local_rank == 0
        self._fetched = Fetched(session.group.url, of_host) if session.group.scheme == "file" else None

    def _opens(self) -> int:
        opens: int | None = getattr(self._source, "opens", None)
        return self._source.counters().requests if opens is None else opens

    def write(self, report: StreamReport) -> None:
        """Put the figures into the report."""
        report.opens = self._opens() - self._before
        report.fetched_bytes = None if self._fetched is None else self._fetched.nbytes()
        ways: dict[tuple[str, str, str], int] = getattr(self._source, "ways_taken", {})
        if ways:
            report.paths = [
                PathTaken(
                    backend=getattr(self._source, "backend", ""),
                    direct=direct,  # type: ignore[arg-type]  # one of its words
                    reason=reason,
                    fs_type=fs_type,
                    nfiles=opens,
                    nbytes=report.ranks[0].nbytes if len(ways) == 1 and report.ranks else 0,
                )
                for (direct, reason, fs_type), opens in ways.items()
            ]
            report.cached = _cached(report.paths)


def _cached(paths: list[PathTaken]) -> Cached:
    if any(path.fs_type in _MEMORY_FS_TYPES for path in paths):
        return Cached(verdict="yes", how="the files are in memory")
    other = [path.reason for path in paths if path.direct != "yes"]
    if other:
        return Cached(verdict="unknown", how=f"not known to be direct ({other[0]})")
    return Cached(verdict="no", how="O_DIRECT, confirmed by what the page cache held afterwards")
