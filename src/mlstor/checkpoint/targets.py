"""The directories that a run writes to: one for each rank, and whether hosts see one another's files."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mlstor.errors import UsageError
from mlstor.mounts import mount_of
from mlstor.world import World

_FIELD = re.compile(r"\{([^{}]*)\}")
_TOKEN = ".mlstor-token-"

# A network file system may hide a new name for as long as it trusts what it has cached of a directory (NFS:
# acdirmin, 30 s). Tokens are new names that nobody has looked up before, so that the first look asks the
# server; a few more looks are for servers that are themselves behind one another.
_LOOK_FOR_S = 3.0
_LOOK_EVERY_S = 0.1

# Never on two hosts at once: a token that isn't seen there at once never will be.
_LOCAL_FS_TYPES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "ramfs", "zfs"})

Kind = Literal["shared", "per-node", "one-host", "unknown"]


@dataclass(frozen=True)
class Sharing:
    """Whether the hosts of a run see one another's files in the targets.

    Attributes
    ----------
    kind : str
        ``"shared"`` or ``"per-node"``, as the tokens showed; ``"one-host"`` if there is no other to look;
        ``"unknown"`` if a read-only run could leave no tokens.
    asserted : bool
        Whether the user had said so; of an unknown `kind` it is then all that is known.
    targets_by_host : tuple of tuple of str
        For each host index, the directories that its ranks use.
    """

    kind: Kind
    asserted: bool
    targets_by_host: tuple[tuple[str, ...], ...]


def resolve(paths: Sequence[str], *, rank: int, local_rank: int, hostname: str) -> str:
    """The target directory of one rank: what `chosen` gives, as an absolute path."""
    found = chosen(paths, rank=rank, local_rank=local_rank, hostname=hostname)
    return os.path.abspath(found.removeprefix("file://"))


def chosen(paths: Sequence[str], *, rank: int, local_rank: int, hostname: str) -> str:
    """The path or URL of one rank.

    Parameters
    ----------
    paths : sequence of str
        As the user gave them. Several are dealt round robin by local rank; each may hold ``{rank}``,
        ``{local_rank}`` and ``{host}``.
    rank, local_rank : int
        Of the process, or the logical rank where one process runs several.

    Raises
    ------
    UsageError
        If there is no path, or one holds another name in braces.
    """
    if not paths:
        raise UsageError("no PATH given: name the directory that is to be measured")
    fields = {"rank": str(rank), "local_rank": str(local_rank), "host": hostname}

    def substitute(match: re.Match[str]) -> str:
        if match[1] not in fields:
            raise UsageError(f"{match[0]} in {path!r} is unknown; PATH may hold {{rank}}, {{local_rank}} and {{host}}")
        return fields[match[1]]

    path = paths[local_rank % len(paths)]
    return _FIELD.sub(substitute, path)


def by_host(world: World, targets: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """For each host index the targets that its ranks use; every rank calls this with its own."""
    said = [json.loads(text) for text in world.allgather(json.dumps(sorted(set(targets))).encode())]
    found: list[dict[str, None]] = [{} for _ in world.hosts]
    for rank, paths in enumerate(said):
        found[world.host_of_rank[rank]].update(dict.fromkeys(paths))
    return tuple(tuple(paths) for paths in found)


def discover(
    world: World,
    targets: Iterable[str],
    run_id: str,
    *,
    asserted: Literal["shared", "per-node"] | None = None,
    read_only: bool = False,
    look_for_s: float = _LOOK_FOR_S,
) -> Sharing:
    """Find out whether targets are shared; every rank calls this with the directories that it uses.

    The first rank of each host leaves an empty file ``.mlstor-token-<run id>-<host index>`` in its host's
    directories and looks for those of the other hosts, under the names that they use. All tokens are removed
    before this returns.

    Parameters
    ----------
    asserted : {"shared", "per-node"}, optional
        What the user says; other findings are refused.
    read_only : bool
        The run writes nothing: directories that take no token make the answer ``"unknown"`` instead of an
        error.
    look_for_s : float
        How long a token is looked for that doesn't show, in seconds.

    Raises
    ------
    UsageError
        On every rank: if a token can't be written, if some hosts see a token and others don't, if some
        targets are shared and some per node, or if the finding contradicts `asserted`.
    """
    targets_by_host = by_host(world, targets)
    if world.nhosts == 1:
        return Sharing("one-host", asserted is not None, targets_by_host)

    leader = world.local_rank == 0
    tokens = _Tokens(run_id, world.host_index, targets_by_host)
    try:
        if leader:
            tokens.clear_stale()
        world.barrier("tokens")
        refused = tokens.leave() if leader else None
        if not read_only:
            world.agree(refused, took_part=leader)
        elif any(world.allgather(b"refused" if refused else b"")):
            return Sharing("unknown", asserted is not None, targets_by_host)
        sights = world.allgather(json.dumps(tokens.look(look_for_s) if leader else None).encode())
    finally:
        tokens.remove()  # by now every host has looked, or the run is ending
    found = _judge(world, [_Sight(*fields) for text in sights if (fields := json.loads(text)) is not None])
    if asserted is not None and found.kind != asserted:
        world.agree(
            UsageError(f"--{asserted} was given, but {found.proof}; leave --{asserted} out or check the mounts")
        )
    return Sharing(found.kind, asserted is not None, targets_by_host)


def check_rank_shift(world: World, sharing: Sharing, shift: int) -> None:
    """Refuse a rank shift where a host can't see the files of another; every rank calls this.

    Raises
    ------
    UsageError
        If `shift` is not 0 and targets are per node.
    """
    refused = None
    if shift and sharing.kind == "per-node":
        refused = UsageError(
            f"--rank-shift {shift} reads what another host wrote, but the targets are per node: no host sees "
            "another's files; leave it out (direct or evicted reads are honest too) or use a shared PATH"
        )
    world.agree(refused)


def check_directory(path: str, *, write: bool = True) -> None:
    """Refuse a target that can't be used, by trying it: with `write`, a file is made there and removed.

    Raises
    ------
    UsageError
        If `path` doesn't exist, is no directory, lies on a read-only file system, or takes no files (or,
        without `write`, can't be listed).
    """
    try:
        if write:
            fd, name = tempfile.mkstemp(prefix=".mlstor-try-", dir=path)
            os.close(fd)
            os.unlink(name)
        else:
            os.listdir(path)
    except FileNotFoundError:
        raise UsageError(f"{path} doesn't exist: create it (mkdir -p {path}) or check that it is mounted") from None
    except NotADirectoryError:
        raise UsageError(f"{path} is not a directory: name the directory that is to hold the files") from None
    except PermissionError:
        verb = "writable" if write else "readable"
        raise UsageError(f"{path} is not {verb} for this user (uid {os.geteuid()}): choose another PATH") from None
    except OSError as error:
        if error.errno == errno.EROFS:
            raise UsageError(f"{path} lies on a read-only file system: remount it rw or choose another PATH") from None
        raise UsageError(f"no file can be made in {path}: {error.strerror}; choose another PATH") from error


class _Sight(NamedTuple):
    """What a host saw of the others' tokens: an example each, as (host index, directory), or None."""

    host_index: int
    saw: list[Any] | None
    missed: list[Any] | None


class _Found(NamedTuple):
    kind: Literal["shared", "per-node"]
    proof: str


class _Tokens:
    """This host's tokens, and those of the others as it sees them."""

    def __init__(self, run_id: str, host_index: int, targets_by_host: tuple[tuple[str, ...], ...]) -> None:
        self._prefix = f"{_TOKEN}{run_id}-"
        self._host_index = host_index
        self._targets_by_host = targets_by_host
        self._left: list[str] = []

    def clear_stale(self) -> None:
        """Remove what a killed run of the same id has left, which would be taken for another host's."""
        for path in self._targets_by_host[self._host_index]:
            for name in _names(path):
                if name.startswith(self._prefix):
                    # Another host may have been faster; a token that can't be removed is reported by `leave`.
                    with suppress(OSError):
                        os.unlink(os.path.join(path, name))

    def leave(self) -> UsageError | None:
        """Create this host's tokens; the reason why not, if so."""
        for path in self._targets_by_host[self._host_index]:
            token = os.path.join(path, f"{self._prefix}{self._host_index}")
            try:
                check_directory(path)
                os.close(os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            except UsageError as error:
                return error
            except OSError as error:
                return UsageError(f"no token can be left at {token}: {error.strerror}; choose another PATH")
            self._left.append(token)
        return None

    def look(self, look_for_s: float) -> _Sight:
        """Look for the other hosts' tokens until all show or `look_for_s` is over."""
        wanted: dict[str, list[int]] = {}
        for owner, paths in enumerate(self._targets_by_host):
            for path in paths:
                if owner != self._host_index:
                    wanted.setdefault(path, []).append(owner)
        deadline = time.monotonic() + look_for_s
        saw: list[Any] | None = None
        while True:
            for path, owners in list(wanted.items()):
                # One listing for all hosts, then a lookup for what a cached listing may lack.
                names = set(_names(path))
                for owner in list(owners):
                    token = f"{self._prefix}{owner}"
                    if token in names or os.path.lexists(os.path.join(path, token)):
                        saw = saw or [owner, path]
                        owners.remove(owner)
                if not owners:
                    del wanted[path]
            if not wanted or time.monotonic() >= deadline or not any(map(_may_show_later, wanted)):
                break
            time.sleep(_LOOK_EVERY_S)
        missed = next(([owners[0], path] for path, owners in wanted.items()), None)
        return _Sight(self._host_index, saw, missed)

    def remove(self) -> None:
        """Remove this host's tokens.

        Raises
        ------
        OSError
            If one can't be removed though it could be created.
        """
        for token in self._left:
            with suppress(FileNotFoundError):  # two hosts of one name and path, or a user who tidied up
                os.unlink(token)
        self._left.clear()


def _judge(world: World, sights: list[_Sight]) -> _Found:
    seeing = [sight for sight in sights if sight.saw]
    blind = [sight for sight in sights if sight.missed]

    def tell(sight: _Sight, example: list[Any], verb: str) -> str:
        return f"{world.hosts[sight.host_index]} {verb} what {world.hosts[example[0]]} wrote in {example[1]}"

    if not seeing and blind:
        return _Found("per-node", tell(blind[0], blind[0].missed or [], "does not see"))
    if not blind:
        return _Found("shared", tell(seeing[0], seeing[0].saw or [], "sees"))
    names = [world.hosts[sight.host_index] for sight in blind]
    hosts = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    world.agree(
        UsageError(
            f"targets are shared for some hosts and per node for others: "
            f"{tell(seeing[0], seeing[0].saw or [], 'sees')}, "
            f"but {tell(blind[0], blind[0].missed or [], 'does not see')} (not all is seen by {hosts}): "
            f"mount PATH on every "
            "host, or give paths that are all shared or all per node"
        )
    )
    raise AssertionError("agree() raises when an error is given")


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:  # not there, on this host: then nothing is seen in it
        return []


def _may_show_later(path: str) -> bool:
    mount = mount_of(path)
    return os.path.isdir(path) and (mount is None or mount.fs_type not in _LOCAL_FS_TYPES)
