"""Was it the storage that answered, and with what had been written? Eviction, the cache verdict, damage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mlstor import _io
from mlstor.checkpoint.rundir import Manifest
from mlstor.results.phase import MAX_DAMAGE, Cached, Damage, PathTaken, Verification

if TYPE_CHECKING:
    from mlstor.checkpoint.phase import Chain
    from mlstor.checkpoint.session import Session
    from mlstor.operations import Damage as Block


#: Of a write phase: whatever the page cache took in had to leave it before the clock stopped.
WRITTEN = Cached(verdict="no", how="durable inside the clock")


class Evicted(NamedTuple):
    """What was still in the page cache after the files had been dropped from it, of all bytes looked at."""

    resident_bytes: int
    looked_at_bytes: int


def pattern(manifest: Manifest, checkpoint: int, file_id: int) -> _io.Pattern:
    """The contents of one file of a run."""
    return _io.Pattern(manifest.run_key, checkpoint, file_id, manifest.compressibility)


def evict(session: Session, checkpoint: int) -> Evicted:
    """Drop what this process will read from its host's page cache, and look page by page whether it is gone."""
    resident = looked_at = 0
    for rank in session.my_ranks:
        for placed in session.files(session.source_rank(rank), checkpoint):
            _io.evict(placed.path)
            found, nbytes = _io.resident(placed.path)
            resident += found
            looked_at += nbytes
    return Evicted(resident, looked_at)


def cached(
    session: Session, paths: Iterable[PathTaken], evicted: Evicted | None, first_read: bool, in_memory: bool
) -> Cached:
    """Whether this host's page cache may have answered for the storage.

    Parameters
    ----------
    evicted
        What `evict` has found, None if it was not asked.
    first_read
        Whether the run has not read this checkpoint before: each further time a host reads what it has read already.
    in_memory
        Whether anything that this process reads lies in memory and not on storage.
    """
    ways = list(paths)
    resident, looked_at = evicted or (0, 0)
    fs_types = {way.fs_type for way in ways}
    if not ways:
        return Cached(verdict="no", how="nothing was read")
    if in_memory or fs_types & {"tmpfs", "ramfs"}:
        return Cached(verdict="yes", how="the files are in memory", resident_bytes=resident, looked_at_bytes=looked_at)
    direct, fuse = all(way.direct == "yes" for way in ways), "fuse" in fs_types
    if direct and not fuse:
        return Cached(
            verdict="no",
            how="O_DIRECT, and nothing of each file's first block was in the page cache afterwards",
            resident_bytes=resident,
            looked_at_bytes=looked_at,
        )
    if resident and not direct:
        return Cached(
            verdict="yes", how="evicted, but pages stayed", resident_bytes=resident, looked_at_bytes=looked_at
        )
    if fuse:
        return Cached(verdict="unknown", how="a FUSE daemon may keep a cache", looked_at_bytes=looked_at)
    if first_read and _shifted_to_other_host(session):
        return Cached(verdict="no", how="rank shift: another host had written what this one read")
    if evicted is None:
        return Cached(verdict="unknown", how="neither direct nor evicted")
    return Cached(verdict="no", how="evicted, and every page checked", looked_at_bytes=looked_at)


def _shifted_to_other_host(session: Session) -> bool:
    if not session.options.rank_shift or not session.options.writes:
        return False
    host_of = {
        rank: session.world.host_of_rank[process] for process, ranks in enumerate(session.dealt) for rank in ranks
    }
    return all(host_of[session.source_rank(rank)] != session.world.host_index for rank in session.my_ranks)


def verification(session: Session, chains: Sequence[Chain], checkpoint: int) -> Verification:
    """What the comparison of this process's reads has found."""
    made = Verification()
    if not session.verify:
        return made
    for chain in chains:
        for result in chain.results:
            made.verified_nbytes += result.nbytes
            made.damaged_blocks += result.damaged_blocks
            room = MAX_DAMAGE - len(made.damage)
            if result.damaged_blocks and room > 0:
                places = session.site.damage(session, checkpoint, result, room)
                made.damage += [_damage(session, chain.rank, result.path, block) for block in places]
    # of a block that is read again, and is another block then, there may be more places than were counted
    made.damage_dropped = max(0, made.damaged_blocks - len(made.damage))
    return made


def _damage(session: Session, rank: int, path: str, block: Block) -> Damage:
    stamped = block.kind.startswith("other-")
    own = block.run_id == session.manifest.run_key
    name = session.layout.file_name_of(block.file_id) if stamped and own else None
    return Damage(
        rank=rank,
        file=path,
        offset=block.offset,
        nbytes=block.nbytes,
        kind=block.kind,  # type: ignore[arg-type]  # the core's words are the record's
        found_run=None if not stamped else session.run_id if own else f"{block.run_id:016x}",
        found_checkpoint=block.checkpoint if stamped else None,
        found_file=None if not stamped else name or f"file id {block.file_id:#x}",
        found_offset=block.found_offset if stamped else None,
    )
