"""Logical ranks dealt to processes, or to hosts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from mlstor.errors import UsageError

HOW = ("block", "round-robin")


def parse_ranks(text: str, nranks: int) -> list[int]:
    """Ranks of a list such as ``"3"``, ``"0-7"`` or ``"0,2,8-15"``, ascending and without repeats.

    Raises
    ------
    UsageError
        If `text` is not such a list or names a rank that is not below `nranks`.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        if match is None:
            raise UsageError(f"{text!r} is not a list of ranks; write it as 3, 0-7 or 0,2,8-15")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise UsageError(f"{part.strip()!r} runs backwards; write it as {last}-{first}")
        if last >= nranks:
            raise UsageError(f"there is no rank {last}; ranks are 0 to {nranks - 1}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def deal(nranks: int, nprocs: int, how: str = "block", only: Sequence[int] | None = None) -> list[list[int]]:
    """Ranks of each process.

    Parameters
    ----------
    nranks
        Ranks of the layout.
    nprocs
        Processes (or hosts) to deal them to; more than there are ranks leaves the last ones with none.
    how
        ``"block"``: consecutive ranks, counts that differ by one at most, the larger first.
        ``"round-robin"``: the i-th rank goes to process ``i % nprocs``.
    only
        Deal these ranks and no others.

    Raises
    ------
    UsageError
        If there is no process, or if `how` is neither of the two.
    """
    if nprocs < 1:
        raise UsageError(f"ranks can't be dealt to {nprocs} processes; give 1 or more")
    ranks = list(range(nranks)) if only is None else list(only)
    if how == "round-robin":
        return [ranks[i::nprocs] for i in range(nprocs)]
    if how != "block":
        raise UsageError(f"ranks can't be dealt by {how!r}; give {' or '.join(HOW)}")
    each, rest = divmod(len(ranks), nprocs)
    starts = [i * each + min(i, rest) for i in range(nprocs + 1)]
    return [ranks[start:stop] for start, stop in pairwise(starts)]
