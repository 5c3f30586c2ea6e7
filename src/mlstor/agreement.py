"""Steps that all processes of a run take, and that end alike on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mlstor.errors import MlstorError
from mlstor.world import World

T = TypeVar("T")


def agreed(world: World, step: Callable[[], T], took_part: bool = True) -> T:
    """The result of a step that every process takes; its `MlstorError` is raised on all.

    `took_part`: whether this process had a share in it, see `World.agree`.
    """
    error: MlstorError | None = None
    result: T | None = None
    try:
        result = step()
    except MlstorError as raised:
        error = raised
    world.agree(error, took_part=took_part)
    return result  # type: ignore[return-value]  # agree raises where there is none


def together(world: World, make: Callable[[], str]) -> str:
    """What process 0 makes, on every process."""
    return world.bcast(make().encode() if world.rank == 0 else b"").decode()
