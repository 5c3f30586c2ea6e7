"""Known scenarios as defaults of options: what is said on the command line beside a profile holds."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlstor.stream.options import Options


class Profile(NamedTuple):
    """Defaults of a scenario: percent of writes, size of what is written, and nodes x GPUs x loaders, each of which has
    one object under way.
    """

    put: float
    size: str | None
    nodes: int = 8
    gpus: int = 8
    loaders: int = 5


# AIStore's seed scenario: shards of 1 GiB are written, and then streamed in random order by the data loaders of 8 nodes
# with 8 GPUs each.
PROFILES = {"shards-fill": Profile(100.0, "1GiB"), "shards-stream": Profile(0.0, None)}


def apply(given: Options) -> None:
    """Put the defaults of the profile where nothing was said."""
    if given.profile not in PROFILES:
        return
    profile = PROFILES[given.profile]
    if given.put is None and given.get is None:
        given.put = profile.put
    if given.size is None and given.min_nbytes is None and given.max_nbytes is None:
        given.size = profile.size
    given.nodes = given.nodes or profile.nodes
    given.gpus = given.gpus or profile.gpus
    given.loaders = given.loaders or profile.loaders


def under_way(given: Options, rank: int, size: int) -> tuple[int, int]:
    """Worker threads of a process and transfers under way in each; 0 where neither was said.

    A profile's loaders are dealt to the processes, however many there are: 320 processes have one each, 64 have five.
    """
    if given.profile not in PROFILES or given.in_flight is not None or given.workers is not None:
        return given.workers or 0, given.in_flight or 0
    loaders = given.nodes * given.gpus * given.loaders
    mine = max(1, loaders // size + (rank < loaders % size))
    most = min(mine, len(os.sched_getaffinity(0)))
    workers = next(count for count in range(most, 0, -1) if mine % count == 0)
    return workers, mine // workers
