"""Transfers that failed, as the `OSError` that a caller expects: errno, URL or key, and what was said."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from mlstor.storage.transfers import Kind

if TYPE_CHECKING:
    from mlstor.storage.transfers import Transfers

_ERRNO = {
    Kind.CONNECT: errno.ECONNREFUSED,
    Kind.RESET: errno.ECONNRESET,
    Kind.STALLED: errno.ETIMEDOUT,
    Kind.SHORT: errno.ENODATA,
    Kind.LENGTH: errno.EIO,
    Kind.CHECKSUM: errno.EBADMSG,
    Kind.REDIRECT: errno.ELOOP,
    Kind.CANCELLED: errno.ECANCELED,
    Kind.TLS: errno.EPROTO,
    Kind.RESOLVE: errno.EHOSTUNREACH,
    Kind.OTHER: errno.EIO,
}
_STATUS_ERRNO = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 412: errno.ESTALE, 416: errno.ENODATA}
_TEXT = {
    Kind.SHORT: "the object ended before its length",
    Kind.LENGTH: "the object has another length than the catalog says: list again if it was replaced",
    Kind.CHECKSUM: "what was read has another checksum than the store says",
    Kind.REDIRECT: "redirects that lead nowhere",
}


def failed(transfers: Transfers, completion: Any, key: str) -> OSError:
    """The error of a completion whose kind is not OK.

    Parameters
    ----------
    transfers
        Asked for what else is known of it.
    completion
        A record of COMPLETION_DTYPE.
    key
        The object's, for when nothing else is known.
    """
    kind, status = Kind(int(completion["kind"])), int(completion["status"])
    tag = int(completion["tag"])
    known = next((failure for failure in transfers.failures() if failure.tag == tag), None)
    if kind is Kind.SYSTEM:
        code = -int(completion["result"])
    elif kind is Kind.HTTP:
        code = _STATUS_ERRNO.get(status, errno.EIO)
    else:
        code = _ERRNO[kind]
    said = [_TEXT.get(kind, os.strerror(code))]
    if status and kind is Kind.HTTP:
        said.append(f"HTTP {status}")
    if known is not None and known.message:
        said.append(known.message)
    return OSError(code, ": ".join(said), key if known is None or not known.url else known.url)
