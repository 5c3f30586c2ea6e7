"""How far a stream has come: what is saved, and what is refused when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

from mlstor.errors import UsageError
from mlstor.stream.order import MOST_OBJECTS, Kind, Scope, Uneven

VERSION = 1
"""Of the saved dictionary, and of the orders that a seed stands for."""

_ANEW = "start a new stream instead"
_ADVICE = {
    "n": "list the same objects, or " + _ANEW,
    "catalog": "names or sizes have changed: use the catalog that it was made with, or " + _ANEW,
    "client": "with epoch scope client each rank loads the state that it saved",
}


@dataclass(frozen=True, kw_only=True)
class State:
    """A place in an order from which a stream can go on exactly, also with another number of ranks.

    Parameters
    ----------
    seed, n, order, client
        Of the `Order` (`order` is its kind).
    uneven, scope
        Of the `Share`.
    catalog : str
        The catalog's digest.
    epoch : int
    position : int
        Every position below it has been visited, by whichever rank, and none from it on; 0 to n. With scope "client"
        that of the one client.
    """

    seed: int
    epoch: int
    position: int
    n: int
    catalog: str
    order: Kind = "permutation"
    uneven: Uneven = "exact"
    scope: Scope = "world"
    client: int | None = None

    def as_dict(self) -> dict[str, int | str | None]:
        """Plain integers and strings, for JSON, pickle or a checkpoint."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> State:
        """What `as_dict` gave.

        Raises
        ------
        UsageError
            If it is something else, or of another version.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(saved, Mapping) or not names | {"version"} <= saved.keys():
            raise UsageError("this is no state of an object stream; give what its state_dict() returned")
        if saved["version"] != VERSION:
            raise UsageError(f"the state is of version {saved['version']!r}, this mlstor has {VERSION}; {_ANEW}")
        state = cls(**{name: saved[name] for name in names})
        if wrong := state._wrong():
            raise UsageError(f"the state's {wrong} is {getattr(state, wrong)!r}, which can't be; was it damaged?")
        return state

    def _wrong(self) -> str | None:
        """The first field that no stream could have."""

        def is_int(value: object, most: int, least: int = 0) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

        fine = {
            "seed": is_int(self.seed, 2**64 - 1),
            "epoch": is_int(self.epoch, 2**64 - 1),
            "n": is_int(self.n, MOST_OBJECTS, 1),
            "position": is_int(self.n, MOST_OBJECTS, 1) and is_int(self.position, self.n),
            "catalog": isinstance(self.catalog, str),
            "order": self.order in get_args(Kind),
            "uneven": self.uneven in get_args(Uneven),
            "scope": self.scope in get_args(Scope),
            "client": is_int(self.client, MOST_OBJECTS) if self.scope == "client" else self.client is None,
        }
        return next((name for name, holds in fine.items() if not holds), None)

    def check(self, stream: State) -> None:
        """Refuse this saved state for `stream`, the state of the one that is to go on from here, if they don't fit.

        Raises
        ------
        UsageError
            If they differ in anything but epoch and position; the message names it and both values.
        """
        for name in ("scope", "client", "n", "catalog", "seed", "order", "uneven"):
            saved, here = getattr(self, name), getattr(stream, name)
            if saved != here:
                advice = _ADVICE.get(name, f"give {name}={saved!r}, or {_ANEW}")
                raise UsageError(f"the saved state has {name} {saved!r}, this stream {here!r}; {advice}")

    @staticmethod
    def agree(states: Sequence[State]) -> State:
        """The one state of a world whose ranks were stopped at `states`, in the order of their ranks.

        What all ranks together have visited must be the beginning of the order: all stand at one position, or the
        first ranks are one object ahead of the others, as they are after an epoch with "exact".

        Raises
        ------
        UsageError
            If the ranks disagree, as they do when their states were not saved at the same step.
        ValueError
            If there is no state, or the scope is "client": each client then has a state of its own.
        """
        if not states:
            raise ValueError("no state was given")
        first = states[0]
        if first.scope == "client":
            raise ValueError("with scope client every rank has a state of its own")
        for rank, state in enumerate(states):
            for name in ("seed", "n", "catalog", "order", "uneven", "scope", "client"):
                if getattr(state, name) != getattr(first, name):
                    mine, other = getattr(first, name), getattr(state, name)
                    raise UsageError(f"ranks' states disagree: {name} is {mine!r} at rank 0, {other!r} at rank {rank}")
        world = len(states)
        # Beyond the last object a rank has nothing to visit, and stays where it began.
        moving = states[: first.n] if first.uneven == "exact" else states
        epoch = max(state.epoch for state in moving)
        # The end of an epoch is the beginning of the next.
        if any(state.epoch < epoch for state in moving):
            moving = [state._begun(epoch) for state in moving]
        least = min(state.position for state in moving)
        ahead = sum(state.position > least for state in moving)
        expected = [min(least + world, first.n)] * ahead + [least] * (len(moving) - ahead)
        if any((state.epoch, state.position) != (epoch, there) for state, there in zip(moving, expected, strict=True)):
            places = [(state.epoch, state.position, rank) for rank, state in enumerate(states[: len(moving)])]
            texts = [f"rank {rank} is in epoch {e} at position {p}" for e, p, rank in (min(places), max(places))]
            raise UsageError(
                f"ranks' states disagree: {', '.join(texts)}; load states that were saved "
                "at the same object of one epoch, or on as many ranks each its own"
            )
        return replace(first, epoch=epoch, position=min(least + ahead, first.n))

    def _begun(self, epoch: int) -> State:
        over = self.epoch == epoch - 1 and self.position == self.n
        return replace(self, epoch=epoch, position=0) if over else self
