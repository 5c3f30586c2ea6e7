"""Bytes that several ranks on one host want are read by one of them, and handed over through shared memory.

The coordinator deals out what is wanted more than once; each rank then reads its share as it reads everything, and the
ranks pass it on in ``/dev/shm``, without collectives: they know of the default process group only, which need not be
the one that loads. A rank whose giver fails or dies reads for itself.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

#: Less is read by each rank: handing over costs more.
LEAST_BYTES = 64 << 10
#: Of the memory through which one rank hands over.
SEGMENT_BYTES = 32 << 20
SHM = "/dev/shm"


class Key(NamedTuple):
    """Bytes of a checkpoint."""

    name: str
    part: torch.Size | None
    offsets: torch.Size
    lengths: torch.Size


@dataclass(frozen=True)
class Offer:
    """Where a rank runs: ranks with the same `host` see the same shared memory and the same process ids."""

    host: tuple[object, ...]
    pid: int
    #: what this rank loads. Without collectives each rank has metadata of its own: equal names are not equal bytes
    checkpoint: object


class Slot(NamedTuple):
    """An item that one rank reads for others."""

    nbytes: int
    #: as stored
    dtype: torch.dtype
    takers: tuple[int, ...]


@dataclass
class Share:
    """What a rank is told by the coordinator."""

    token: str
    rank: int
    #: process ids of the host's ranks
    pids: dict[int, int]
    #: what each giver hands over, in order
    slots: dict[int, list[Slot]] = field(default_factory=dict)
    #: this rank's items: by giver, (number of the slot, which item)
    places: dict[int, list[tuple[int, Key]]] = field(default_factory=dict)


def local_offer(plan: LoadPlan, checkpoint: object) -> LoadPlan:
    """The plan with this rank's host, and with what tells the checkpoint from others."""
    if not os.access(SHM, os.R_OK | os.W_OK | os.X_OK):
        return plan
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read()
        host = (boot, os.stat(SHM).st_dev, os.stat("/proc/self/ns/pid").st_ino, os.getuid())
    except OSError:  # no shared memory here: this rank reads for itself
        return plan
    return replace(plan, storage_data=Offer(host, os.getpid(), checkpoint))


def shared_plans(
    plans: Sequence[LoadPlan], checkpoint: object, sizes: Callable[[ReadItem], tuple[int, torch.dtype]]
) -> list[LoadPlan]:
    """The plans with each rank's part in the sharing; unchanged where nothing is shared.

    Parameters
    ----------
    plans
        Of all ranks.
    checkpoint
        The one that `sizes` knows; ranks that load another share nothing.
    sizes
        Bytes and stored type of an item; 0 bytes for one that is no tensor.
    """
    hosts: dict[tuple[object, ...], list[int]] = {}
    for rank, plan in enumerate(plans):
        if isinstance(plan.storage_data, Offer) and plan.storage_data.checkpoint == checkpoint:
            hosts.setdefault(plan.storage_data.host, []).append(rank)
    shares = {rank: share for ranks in hosts.values() for rank, share in _deal(ranks, plans, sizes).items()}
    return [replace(plan, storage_data=shares.get(rank)) for rank, plan in enumerate(plans)]


def _deal(
    ranks: Sequence[int], plans: Sequence[LoadPlan], sizes: Callable[[ReadItem], tuple[int, torch.dtype]]
) -> dict[int, Share]:
    """Who reads what on one host: what is wanted twice goes to the rank that has least to read."""
    wanted: dict[Key, list[int]] = {}
    load = dict.fromkeys(ranks, 0)
    kinds: dict[Key, tuple[int, torch.dtype]] = {}
    for rank in ranks:
        for item in plans[rank].items:
            nbytes, dtype = sizes(item)
            key = _key(item)
            if nbytes >= LEAST_BYTES and rank not in wanted.get(key, ()):
                wanted.setdefault(key, []).append(rank)
                kinds[key] = (nbytes, dtype)
            else:
                load[rank] += nbytes
    shared = {key: wanting for key, wanting in wanted.items() if len(wanting) > 1}
    for key in wanted.keys() - shared.keys():
        load[wanted[key][0]] += kinds[key][0]
    if not shared:
        return {}
    token = uuid.uuid4().hex
    pids = {rank: plans[rank].storage_data.pid for rank in ranks}
    shares = {rank: Share(token, rank, pids) for rank in ranks}
    slots: dict[int, list[Slot]] = {}
    for key in sorted(shared, key=lambda key: -kinds[key][0]):
        giver = min(shared[key], key=lambda rank: load[rank])
        load[giver] += kinds[key][0]
        number = len(slots.setdefault(giver, []))
        slots[giver].append(Slot(*kinds[key], tuple(rank for rank in shared[key] if rank != giver)))
        for rank in shared[key]:
            shares[rank].places.setdefault(giver, []).append((number, key))
    for share in shares.values():
        share.slots = slots
    return shares


def exchange(
    share: Share, items: Sequence[ReadItem], tensors: Mapping[int, torch.Tensor], load: Callable[[list[int]], None]
) -> None:
    """Reads what this rank is to read, and gives and takes the rest.

    Parameters
    ----------
    share
    items
        Of the plan.
    tensors
        Destinations, by index in the plan.
    load
        Reads items, by index in the plan, into their destinations.
    """
    from mlstor.torch.dcp_handover import Handover

    index_of = {_key(item): index for index, item in reversed(list(enumerate(items)))}
    places = {
        giver: {slot: index_of[key] for slot, key in given if key in index_of} for giver, given in share.places.items()
    }
    taken = {index for giver, given in places.items() if giver != share.rank for index in given.values()}
    with Handover(share, places, tensors) as handover:
        load([index for index in range(len(items)) if index not in taken])
        missed = handover.run()
    if missed:
        load(missed)


def give_up(share: Share) -> None:
    """Tells the others on this host that nothing comes of this rank: without it they would wait."""
    from mlstor.torch.dcp_handover import Handover

    handover = Handover(share, {}, {})
    handover.__enter__()
    handover.leave("failed")


def _key(item: ReadItem) -> Key:
    return Key(item.storage_index.fqn, item.storage_index.offset, item.storage_offsets, item.lengths)
