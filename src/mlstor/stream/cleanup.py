"""What a run has written and leaves, and how it is removed: only names that the run itself has made."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from mlstor.agreement import agreed
from mlstor.stream import group as groups, manifest as manifests

if TYPE_CHECKING:
    from mlstor.stream.live import StreamLive
    from mlstor.stream.options import Options
    from mlstor.stream.session import Session
    from mlstor.stream.sources import Writes
    from mlstor.world import World


def note_written(session: Session, writes: Writes | None, ended: bool) -> None:
    """A phase has ended, the last one if `ended`: say in the manifest what there is now; every process calls this."""
    if writes is None or session.written is None:
        return
    group = session.group
    mine = json.dumps([group.url, session.world.host_index if group.per_node else 0, writes.begun, writes.whole])
    said = [json.loads(text) for text in session.world.allgather(mine.encode())]
    own = json.loads(mine)[:2]
    found = manifests.written([(begun, whole) for *key, begun, whole in said if key == own])
    session.written.begun, session.written.whole = found
    session.written.ended = ended  # else a next phase may write more, and be interrupted
    if group.leads:
        manifests.save(session.store, session.written)
    session.world.barrier("manifest")


def tidy(session: Session, live: StreamLive) -> None:
    """Remove what this run has written; every process calls this."""
    if session.written is None:
        return
    count = manifests.remove_objects(session.store, session.written, session.group.rank, session.group.size)
    counts = session.world.allgather(str(count).encode())
    if session.group.leads:
        manifests.remove_marks(session.store, session.written)
    session.world.barrier("cleanup")
    session.claimed = False
    live.say(f"removed: {sum(map(int, counts)):,} objects of run {session.run_id}")


def remedy(session: Session) -> str:
    """How to remove what the run leaves, as the end of a sentence; empty if it leaves nothing."""
    if not session.claimed:
        return ""
    words = ["mlstor", "stream", "--clean", session.run_id, *session.options.urls]
    words += [f"--endpoint={session.options.endpoint}"] if session.options.endpoint else []
    for name, value in session.options.store_options.items():
        if name not in ("endpoint", "client"):
            text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
            words += ["-o", f"{name}={text}"]
    return f"; `{shlex.join(words)}` removes it"


def clean(world: World, options: Options, live: StreamLive) -> int:
    """``--clean RUN``: remove what a run has written, and nothing else; every process calls this.

    Raises
    ------
    UsageError
        If there is no such run.
    """
    run_id = options.clean
    assert run_id is not None
    group = groups.find(world, options, run_id, writes=True)
    store = agreed(world, lambda: groups.open_it(group, options))
    try:
        found = agreed(world, lambda: manifests.wanted(store, run_id))
        count = manifests.remove_objects(store, found, group.rank, group.size)
        counts = world.allgather(str(count).encode())
        if group.leads:
            manifests.remove_marks(store, found)
        live.say(f"{group.url}: {sum(map(int, counts)):,} objects of run {run_id} removed")
    finally:
        store.close()
    return 0
