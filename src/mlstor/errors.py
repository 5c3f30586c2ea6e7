"""Errors that mlstor raises on purpose.

A `UsageError` is a user's mistake: the command prints its one sentence and exits 2, without a traceback. Failures of
the storage are plain `OSError` with errno and file name; damage found by verification is a `CorruptionError`.
"""

from __future__ import annotations

import errno
import os


class MlstorError(Exception):
    """Base class of what mlstor raises on purpose."""

    exit_code = 1


class UsageError(MlstorError):
    """A request that can't be carried out as asked; the message says what to try. Exit code 2."""

    exit_code = 2


class CorruptionError(MlstorError):
    """Bytes that were read are not the bytes that were written; the message names file, offset and kind of damage."""

    exit_code = 3


class WorldError(MlstorError):
    """The ranks of a run do not agree, or one of them failed; the message names rank and host."""

    exit_code = 4


#: What was being done when an operation failed; the index is csrc/operation.h's mls_stage.
_STAGES = (
    "cancelled",
    "open",
    "allocation",
    "transfer",
    "late extents' callback",
    "write of the last partial block",
    "sync",
    "close",
    "rename",
    "sync of the directory",
)

_ADVICE = {
    errno.ENOSPC: "free some room, or write less",
    errno.EDQUOT: "the quota is used up: free some room, or ask for more",
    errno.EFBIG: "the file is larger than RLIMIT_FSIZE or the file system allows: see `ulimit -f`",
    errno.EACCES: "check the permissions of the file and of its directories",
    errno.EPERM: "check the permissions, and for an immutable or sealed file",
    errno.EROFS: "the file system is mounted read-only",
    errno.ENOENT: "check that the directory still exists",
    errno.EISDIR: "name a file, not a directory",
    errno.ENXIO: "it is a device, pipe or socket: name a file",
    errno.EMFILE: "raise the limit of open files: see `ulimit -n`",
    errno.EOPNOTSUPP: "direct I/O does not work here: use direct='auto' or 'off'",
    errno.EINVAL: "the file system refused the transfer; try direct='off' and look at `mlstor doctor PATH`",
    errno.EIO: "the device or the server failed: look at the kernel's log",
    errno.ESTALE: "the server no longer knows the file: was it removed by another host?",
}


def storage_error(code: int, stage: int, offset: int, path: str, detail: str = "") -> OSError:
    """The `OSError` for a failed operation: what happened, where, and what to try; of a transfer with an `offset`.

    Parameters
    ----------
    code
        An errno.
    stage
        Index of what was being done, as csrc/operation.h counts.
    offset
        Where in the file, bytes; said only for a transfer.
    detail
        The reason that the core noted, if any.
    """
    where = f" at offset {offset}" if _STAGES[stage] == "transfer" else ""
    advice = _ADVICE.get(code)
    text = f"{os.strerror(code)} ({_STAGES[stage]}{where})"
    text += f": {detail}" if detail else ""
    error = OSError(code, f"{text}; {advice}" if advice else text, path)
    if where:
        vars(error)["offset"] = offset  # OSError itself chooses the subclass by errno: one of ours would not
    return error


def short_error(path: str, file_nbytes: int, offset: int) -> OSError:
    """The `OSError` for a file that ends at `offset`, before the bytes that were asked for."""
    return OSError(
        errno.ENODATA,
        f"the file is shorter than it should be: bytes from {offset} on are missing (size at open {file_nbytes}); "
        "was its writer interrupted?",
        path,
    )
