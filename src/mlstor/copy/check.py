"""Whether an object that is there already is the source's."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from mlstor.copy.resume import version_of
from mlstor.storage.transfers import Digest

if TYPE_CHECKING:
    from mlstor.copy.resume import Proof
    from mlstor.copy.session import CopySession
    from mlstor.stream.draws import U64

_THREADS = 16
_BATCH = 4096


def proven_or_same(session: CopySession, there: U64) -> Any:
    """Of each of these objects, whose name and size the destination has, whether it may be left alone.

    It may if the journal of an interrupted copy proves it, and the source has not changed since. What the journal lacks
    may not with ``--verify read``; where both sides have a checksum of one type it may if these agree; and otherwise
    name and size have to do.
    """
    objects, verify = session.objects, session.options.verify
    both = session.source.digest is session.destination.digest is not Digest.NONE
    may = np.zeros(len(there), bool)
    waiting = iter(range(len(there)))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="mlstor-check") as pool:
        while batch := list(islice(waiting, _BATCH)):
            indices = there[batch]
            keys = [objects.name(int(index)) for index in indices]
            known = session.proven.knows(keys, objects.pack(indices).sizes.tolist())
            proven = [at for at, proof in enumerate(known) if proof is not None]
            same = pool.map(lambda at: _unchanged(session, keys[at], known[at]), proven)  # noqa: B023 - used up here
            unchanged = {at for at, answer in zip(proven, same, strict=True) if answer}
            may[[batch[at] for at in unchanged]] = True
            # what has changed is copied again whatever its size
            asked = [at for at, proof in enumerate(known) if proof is None]
            if verify == "no" or (verify == "checksum" and not both):
                may[[batch[at] for at in asked]] = True
            elif verify == "checksum":
                same = pool.map(lambda at: _agree(session, keys[at]), asked)  # noqa: B023 - it is used up in this round
                for at, answer in zip(asked, same, strict=True):
                    may[batch[at]] = answer
    return may


def _unchanged(session: CopySession, key: str, proof: Proof | None) -> bool:
    """Whether the source still is what was read then, as far as it tells; False also if it can't be asked any more."""
    assert proof is not None
    side = session.source
    try:
        if side.scheme == "file":
            found = os.stat(os.path.join(side.url, key))
            return max(found.st_mtime_ns, found.st_ctime_ns) < proof.version
        info = side.store.stat(key)
    except OSError:
        return False
    if proof.version and info.etag:
        return version_of(info.etag.encode()) == proof.version
    kind, value = info.checksum or ("", "")
    if proof.version and value:
        return version_of(value.encode()) == proof.version
    if side.digest is Digest.XXH64 and kind.startswith("xxhash") and proof.digest:
        return int(value, 16) == proof.digest
    return True


def _agree(session: CopySession, key: str) -> bool:
    """False also if one can't be asked any more: then copying will say why."""
    try:
        one, other = session.source.store.stat(key), session.destination.store.stat(key)
    except OSError:
        return False
    if one.nbytes != other.nbytes:
        return False
    if one.checksum is None or other.checksum is None or one.checksum[0] != other.checksum[0]:
        return True
    return one.checksum[1] == other.checksum[1]
