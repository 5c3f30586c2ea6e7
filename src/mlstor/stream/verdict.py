"""Was what was read what had been written, and what the run's exit code says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from mlstor import _io
from mlstor.results.notes import damage_text, plural
from mlstor.results.phase import MAX_DAMAGE, Cached, Damage, Verification

if TYPE_CHECKING:
    from mlstor.results.stream import StreamPhase
    from mlstor.stream.session import Session
    from mlstor.stream.tally import Tally
    from mlstor.world import World

_BLOCK_BYTES = 4096
#: Objects with damage that are read once more to say what lies there, and how large such a read may be.
_LOOKED_AT = 8
_LOOK_BYTES = 64 << 20


def verification(session: Session, tally: Tally, again: bool) -> Verification:
    """What the comparison of this process's reads has found; with `again` some damaged objects are read once more to
    describe it.
    """
    made = Verification(verified_nbytes=tally.verified_nbytes, damaged_blocks=tally.damaged_blocks)
    for index, offset, blocks in tally.damaged[:MAX_DAMAGE]:
        made.damage += _described(session, index, offset, blocks, again=again and len(made.damage) < _LOOKED_AT)
    made.damage = made.damage[:MAX_DAMAGE]
    made.damage_dropped = max(0, made.damaged_blocks - len(made.damage))
    return made


def _described(session: Session, index: int, offset: int, blocks: int, again: bool) -> list[Damage]:
    manifest, objects = session.read_of, session.objects
    assert manifest is not None
    assert objects is not None
    name = objects.name(index)
    found = []
    if again:
        pattern = _io.Pattern(manifest.run_key, 0, index, manifest.compressibility)
        nbytes = min(_LOOK_BYTES, blocks * _BLOCK_BYTES if offset else _LOOK_BYTES)
        try:
            size = session.store.stat(name).nbytes
            data = session.store.read(name, None, offset, max(0, min(nbytes, size - offset)))
        except OSError:  # it is gone or can't be read any more: that blocks were damaged is known all the same
            data = b""
        assert isinstance(data, bytes)
        found = pattern.check(data, offset)
    if not found:
        return [
            Damage(
                rank=session.world.rank,
                file=name,
                offset=offset,
                nbytes=blocks * _BLOCK_BYTES,
                kind="corrupt",
            )
        ]
    return [_damage(session, name, one) for one in found]


def _damage(session: Session, name: str, block: Any) -> Damage:
    manifest, objects = session.read_of, session.objects
    assert manifest is not None
    assert objects is not None
    stamped = block.kind.startswith("other-")
    own = block.run_id == manifest.run_key
    known = stamped and own and block.file_id < len(objects)
    return Damage(
        rank=session.world.rank,
        file=name,
        offset=block.offset,
        nbytes=block.nbytes,
        kind=block.kind,
        found_run=None if not stamped else manifest.run_id if own else f"{block.run_id:016x}",
        found_checkpoint=None,
        found_file=None if not stamped else objects.name(block.file_id) if known else f"object {block.file_id}",
        found_offset=block.found_offset if stamped else None,
    )


def cached(session: Session, reads: bool) -> Cached:
    """Whether this client's page cache may have answered for the storage."""
    if session.group.scheme != "file":
        return Cached(verdict="no", how="every byte went over a connection: there is no cache on the client")
    found = session.store.describe()
    if found["fs_type"] in ("tmpfs", "ramfs"):
        return Cached(verdict="yes", how="the files are in memory")
    if not reads and found["durable"]:
        return Cached(verdict="no", how="durable inside the clock")
    if found["direct"] == "yes":
        return Cached(verdict="no", how="O_DIRECT, confirmed by what the page cache held afterwards")
    return Cached(verdict="unknown", how=f"not known to be direct ({found['reason']})")


def exit_code(world: World, phases: Sequence[StreamPhase], failed: int, damaged: int, waited: int, err: TextIO) -> int:
    """The run's exit code on every process: 3 for damage, 1 for transfers that failed, else 0; process 0 says why.

    `waited` are those that had failed and were to be tried again when the time was over: they are told, and no failure
    where others ended well.
    """
    said = [json.loads(text) for text in world.allgather(json.dumps([failed, damaged, waited]).encode())]
    all_failed, all_damaged, all_waited = (sum(column) for column in zip(*said, strict=True))
    if world.rank == 0:
        lines = [text for text in (_damage_line(phases), _failure_line(phases, all_failed)) if text]
        if all_waited:
            text = f"{plural(all_waited, 'transfer')} had failed and waited to be tried again when the time was over"
            lines.append(f"{text} ({_retried(phases)})")
        for text in lines:
            err.write(f"mlstor: {text}\n")
    return 3 if all_damaged else 1 if all_failed else 0


def _damage_line(phases: Sequence[StreamPhase]) -> str:
    blocks = sum(phase.verification.damaged_blocks for phase in phases)
    if not blocks:
        return ""
    first = next(one for phase in phases for one in phase.verification.damage)
    more = "; the record lists further ones" if blocks > 1 else ""
    return f"{plural(blocks, 'damaged block')} of 4 KiB: {first.file}: {damage_text(first)}{more}"


def _retried(phases: Sequence[StreamPhase]) -> str:
    return ", ".join(sorted({word for phase in phases for one in phase.ops.values() for word in one.retried_by}))


def _failure_line(phases: Sequence[StreamPhase], failed: int) -> str:
    if not failed:
        return ""
    counts: dict[str, int] = {}
    for word, count in (pair for phase in phases for one in phase.ops.values() for pair in one.errors.items()):
        counts[word] = counts.get(word, 0) + count
    if not counts:
        return (
            f"nothing ended well: {plural(failed, 'transfer')} had failed and waited to be tried again when the time "
            f"was over ({_retried(phases)})"
        )
    text = f"{plural(failed, 'transfer')} failed ({', '.join(f'{count:,} {word}' for word, count in counts.items())})"
    first = next((one for phase in phases for one in phase.failures), None)
    if first is not None:
        message = f": {first.message}" if first.message else ""
        text += f"; the first of them: {first.op} {first.url}{message}"
    return text
