"""Who shares what: the ranks that see one set of objects, by the URLs that they were given."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mlstor.agreement import agreed
from mlstor.checkpoint import targets
from mlstor.errors import UsageError
from mlstor.storage.posix import path_of
from mlstor.storage.store import open_store, scheme_of

if TYPE_CHECKING:
    from mlstor.storage.store import Store
    from mlstor.stream.options import Options
    from mlstor.world import World

T = TypeVar("T")


class Group(NamedTuple):
    """The ranks that share one set of objects, as one of them sees it.

    Attributes
    ----------
    url : str
        Of this rank's store; a directory's is absolute.
    scheme : str
        ``"file"``, ``"s3"`` or ``"ais"``.
    rank, size : int
        This process among those of its group.
    alone : bool
        Whether all ranks are one group.
    per_node : bool
        Whether each host is a group, with directories of one name.
    sharing : targets.Sharing or None
        What was found out of directories.
    """

    url: str
    scheme: str
    rank: int
    size: int
    alone: bool
    per_node: bool
    sharing: targets.Sharing | None

    @property
    def leads(self) -> bool:
        """Whether this process is the first of its group."""
        return self.rank == 0


def find(world: World, options: Options, run_id: str, writes: bool) -> Group:
    """Resolve the URLs and see who shares them; every process calls this.

    Raises
    ------
    UsageError
        On every process: for a URL that can't be used.
    """

    def resolve() -> tuple[str, str]:
        url = targets.chosen(options.urls, rank=world.rank, local_rank=world.local_rank, hostname=world.hostname)
        scheme = scheme_of(url)
        if scheme == "file":
            url = path_of(url)
            if options.store_options.get("create") is True and world.local_rank == 0:
                mended_by_user(lambda: os.makedirs(url, exist_ok=True), url)
        return url, scheme

    def check() -> None:
        if scheme == "file":
            targets.check_directory(url, write=writes)

    url, scheme = agreed(world, resolve)
    agreed(world, check)
    said = [tuple(json.loads(text)) for text in world.allgather(json.dumps([url, scheme]).encode())]
    schemes = {found for _, found in said}

    def same_kind() -> None:
        if len(schemes) > 1:
            raise UsageError(f"ranks were given different kinds of URL ({', '.join(sorted(schemes))}): give one kind")
        if options.sharing is not None and schemes != {"file"}:
            raise UsageError(f"--{options.sharing} is about directories; all hosts see the objects of {url}")

    agreed(world, same_kind)
    sharing = None
    if scheme == "file":
        sharing = targets.discover(world, [url], run_id, asserted=options.sharing, read_only=not writes)
    per_node = sharing is not None and "per-node" in (sharing.kind, options.sharing)
    keys = [(one, world.host_of_rank[rank] if per_node else 0) for rank, (one, _) in enumerate(said)]
    mine = keys[world.rank]
    return Group(
        url,
        scheme,
        rank=keys[: world.rank].count(mine),
        size=keys.count(mine),
        alone=len(set(keys)) == 1,
        per_node=per_node and len({one for one, _ in keys}) == 1,
        sharing=sharing,
    )


def open_it(group: Group, options: Options) -> Store:
    """The store of this rank's URL.

    Raises
    ------
    UsageError
        If an option is not known to that kind of store, or the store can't be reached as it was said.
    """
    return open_url(group.url, options.store_options)


def open_url(url: str, options: Mapping[str, Any]) -> Store:
    """The store behind a URL; raises as `open_it`."""
    try:
        return open_store(url, **options)
    except OSError as error:
        raise UsageError(said(error, url)) from None


def said(error: OSError, url: str) -> str:
    """One sentence of an error of the store."""
    return f"{error.filename or url}: {error.strerror or error}"


def mended_by_user(step: Callable[[], T], url: str) -> T:
    """The result of a step whose `OSError` is the user's to mend: it becomes a `UsageError`."""
    try:
        return step()
    except OSError as error:
        raise UsageError(said(error, url)) from None
