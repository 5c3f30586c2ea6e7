"""In which order objects are visited, which rank visits which, and how far all have come.

Nothing here needs memory per object: the object at any position is computed (csrc/permute.h). A run has one order per
epoch. Its ranks take positions rank, rank + world, ..., so that together they visit every object once.

    share = Share(n, rank, world)
    order = Order(n, seed, client=share.client)
    positions = share.positions()
    order.indices(epoch, positions.start, positions.step, len(positions))
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal, get_args

from mlstor.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Kind = Literal["permutation", "sequential", "replacement"]
Uneven = Literal["exact", "drop", "pad"]
Scope = Literal["world", "client"]

MOST_OBJECTS = 2**63 - 1
"""Objects of an order: what Python takes as a length, and what a record of 64-bit integers holds."""
_WORDS = 2**64


def chosen(option: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises `UsageError` if an option's value is none of its choices."""
    if value not in choices:
        raise UsageError(f"{option} {value!r} is unknown; choose from {', '.join(choices)}")


def _within(what: str, value: int, most: int, least: int = 0) -> None:
    if not least <= value <= most:
        raise ValueError(f"{what} is {least} to {most}, not {value}")


class Order:
    """The objects 0 to n - 1, in an order of each epoch's own.

    Parameters
    ----------
    n : int
        Objects, 1 to `MOST_OBJECTS`.
    seed : int
        64 bits. The same seed gives the same orders on every machine.
    kind : {"permutation", "sequential", "replacement"}
        Each object once per epoch in random order; in the order of the catalog; independent draws, so that an epoch
        is n draws.
    client : int, optional
        None, the default: the order that all ranks share. Else the order of that client alone (`Share.client`).

    Raises
    ------
    UsageError
        If `kind` is unknown.
    ValueError
        If a number is out of range.
    """

    def __init__(self, n: int, seed: int = 0, kind: Kind = "permutation", client: int | None = None) -> None:
        chosen("order", kind, get_args(Kind))
        _within("the number of objects", n, MOST_OBJECTS, 1)
        _within("seed", seed, _WORDS - 1)
        self.n = n
        self.seed = seed
        self.kind: Kind = kind
        self.client = client
        self._key = seed
        if client is not None:
            words = seed.to_bytes(8, "little") + client.to_bytes(8, "little")
            self._key = int.from_bytes(
                hashlib.blake2b(words, digest_size=8, person=b"mlstor client").digest(), "little"
            )

    def __repr__(self) -> str:
        return f"Order({self.n}, seed={self.seed}, kind={self.kind!r}, client={self.client})"

    def indices(self, epoch: int, start: int, step: int, count: int) -> npt.NDArray[np.uint64]:
        """The objects at positions start, start + step, ...: `count` of them, in constant time each (about 20 ns).

        Positions from n on begin again with position 0 of the same epoch, which is what ``uneven="pad"`` needs.

        Raises
        ------
        ValueError
            If a number is negative, or a position beyond 2^64.
        """
        import numpy as np

        from mlstor import _io

        _within("epoch", epoch, _WORDS - 1)
        _within("start", start, _WORDS - 1)
        _within("step", step, _WORDS - 1)
        _within("count", count, MOST_OBJECTS)
        _within("the last position", start + step * max(count - 1, 0), _WORDS - 1)
        if self.kind == "sequential":
            places: npt.NDArray[np.uint64] = np.arange(count, dtype=np.uint64) * np.uint64(step) + np.uint64(start)
            places %= np.uint64(self.n)
            return places
        out = np.empty(count, np.uint64)
        fill = _io.permute if self.kind == "permutation" else _io.draw
        fill(out.data, self.n, self._key, epoch, start, step)
        return out


class Share:
    """Which positions of an epoch one rank visits.

    Parameters
    ----------
    n : int
        Objects.
    rank, world : int
        This process among how many.
    uneven : {"exact", "drop", "pad"}
        What becomes of n % world objects that are left over: the first ranks visit one more; nobody visits them in
        this epoch; or all ranks visit equally many, the last ones objects from the epoch's beginning again.
    scope : {"world", "client"}
        Who visits every object once per epoch: all ranks together, or each rank for itself (in an order of its own;
        `uneven` is then of no effect).

    Attributes
    ----------
    client : int or None
        For `Order`: the rank if `scope` is "client".

    Raises
    ------
    UsageError
        If an option is unknown, `rank` is not of the world, or "drop" leaves nothing because there are fewer objects
        than ranks.
    """

    def __init__(self, n: int, rank: int = 0, world: int = 1, uneven: Uneven = "exact", scope: Scope = "world") -> None:
        chosen("uneven", uneven, get_args(Uneven))
        chosen("epoch scope", scope, get_args(Scope))
        _within("the number of objects", n, MOST_OBJECTS, 1)
        if not 0 <= rank < world:
            raise UsageError(f"rank {rank} is not of a world of {world}; ranks are 0 to world - 1")
        if scope == "world" and uneven == "drop" and n < world:
            raise UsageError(
                f"uneven=drop leaves none of {n} objects for {world} ranks; use exact or pad, or fewer ranks"
            )
        self.n = n
        self.rank = rank
        self.world = world
        self.uneven: Uneven = uneven
        self.scope: Scope = scope
        self.client = rank if scope == "client" else None

    def positions(self, base: int = 0) -> range:
        """This rank's positions in an epoch of which the first `base` positions have been visited already.

        `base` is a `State`'s position, of any world size. With "exact" a rank's range may be empty; with "pad" its
        last position may be n or more, which `Order.indices` understands.
        """
        _within("position", base, self.n)
        if self.scope == "client":
            return range(base, self.n)
        left = self.n - base
        if self.uneven == "drop":
            left -= left % self.world
        elif self.uneven == "pad":
            left += -left % self.world
        return range(base + self.rank, base + left, self.world)

    def position_after(self, base: int, done: int) -> int:
        """The position for a `State`: this rank has visited the first `done` of ``positions(base)``.

        All ranks that have visited equally many say the same; it is n when the epoch is over. With "exact" a rank
        that gets one object less than others does not say n (see `State.agree`).
        """
        positions = self.positions(base)
        _within("done", done, len(positions))
        if self.scope == "client":
            return base + done
        if done == len(positions) and self.uneven != "exact":
            return self.n
        return min(base + done * self.world, self.n)
