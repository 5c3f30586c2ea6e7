"""Which operations follow one another: drawn in percent, each draw independent of all others."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Kinds = npt.NDArray[np.uint8]


class Kind(IntEnum):
    """What is done, as the record tells it apart; `LABELS` has the names."""

    GET = 0
    GET_RANGE = 1
    PUT = 2
    HEAD = 3
    DELETE = 4
    GET_PARALLEL = 5
    GET_ARCHIVED = 6
    BATCH = 7
    PUT_PARTS = 8
    PUT_SHARD = 9


LABELS = (
    "get",
    "get-range",
    "put",
    "head",
    "delete",
    "get-parallel",
    "get-archived",
    "batch",
    "put-parts",
    "put-shard",
)


class Mix:
    """A sequence of operations.

    Parameters
    ----------
    percent
        How often each kind is drawn; together 100.
    draws
        The stream for this decision, see `draws.generator`. A single kind takes nothing from it.
    """

    def __init__(self, percent: Mapping[Kind, float], draws: np.random.Generator) -> None:
        self.percent = {kind: share for kind, share in percent.items() if share > 0}
        self._kinds = np.array(list(self.percent), np.uint8)
        ends = np.cumsum(list(self.percent.values()))
        self._ends = ends / ends[-1]
        self._draws = draws
        self._put_off = np.zeros(0, np.uint8)

    @property
    def only(self) -> Kind | None:
        """The kind, if there is but one."""
        return Kind(int(self._kinds[0])) if len(self._kinds) == 1 else None

    def take(self, count: int, deletable: int) -> Kinds:
        """The next `count` kinds; fewer only where nothing but deletions is left, and nothing to delete.

        Parameters
        ----------
        deletable
            Objects that may be deleted. A deletion that finds none waits, in its turn, until there is one; what was
            drawn behind it goes first.
        """
        sequence, kept = self._put_off, np.zeros(0, bool)
        while True:
            deletes = sequence == Kind.DELETE
            kept = ~deletes | (np.cumsum(deletes) <= deletable)
            if kept.sum() >= count or (self.only is Kind.DELETE and len(sequence) >= count):
                break
            sequence = np.concatenate([sequence, self._draw(count)])
        chosen = np.flatnonzero(kept)[:count]
        self._put_off = np.delete(sequence, chosen)
        return sequence[chosen]

    def put_back(self, kinds: Kinds) -> None:
        """Kinds that were taken and could not be used come first again."""
        self._put_off = np.concatenate([kinds, self._put_off])

    def _draw(self, count: int) -> Kinds:
        if len(self._kinds) == 1:
            return np.full(count, self._kinds[0], np.uint8)
        return self._kinds[np.searchsorted(self._ends, self._draws.random(count), side="right")]
