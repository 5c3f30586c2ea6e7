"""What S3's refusals mean, in one sentence that says what to try."""

from __future__ import annotations

import errno
import os
import re
from typing import NamedTuple

from mlstor.storage.s3_xml import Refusal
from mlstor.storage.singles import ERRNO
from mlstor.storage.transfers import Failure, Kind


class Asker(NamedTuple):
    """Who asked whom: what the sentences name. Holds no key."""

    bucket: str
    endpoint: str
    #: in words where the keys come from, "" if requests are not signed
    source: str
    #: why the keys could not be renewed, "" if they could
    problem: str = ""


_GONE = "there is no such object (deleted meanwhile?)"
#: By status, for answers that have no code, as those to HEAD.
_BY_STATUS = {
    400: "BadRequest",
    401: "AccessDenied",
    403: "AccessDenied",
    404: "NoSuchKey",
    416: "InvalidRange",
    429: "SlowDown",
    501: "NotImplemented",
    503: "SlowDown",
    507: "InsufficientStorage",
}
_SLOW = ("SlowDown", "ServiceUnavailable", "RequestLimitExceeded", "ThrottlingException", "Busy", "XMinioServerBusy")
_FULL = ("InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "EntityTooLargeForQuota", "StorageQuotaExceeded")


def sentence(status: int, refusal: Refusal, asker: Asker) -> tuple[int, str]:
    """The errno of a refusal, and what to say of it.

    ENOENT: bucket, object or upload isn't there. EACCES: credentials. EINVAL: what was asked for can't be done there.
    EAGAIN: the server wants fewer requests. ENOSPC: it is full. EIO: anything else.
    """
    code = refusal.code or _BY_STATUS.get(status, "")
    code_number, text = _known(code, refusal, asker)
    said = f"{status} {code}".strip() if status else code
    if text:
        return code_number, f"{text} ({said})"
    detail = f": {refusal.message}" if refusal.message else ""
    return errno.EIO, f"the server refused with {said}{detail}"


def _known(code: str, refusal: Refusal, asker: Asker) -> tuple[int, str]:
    keys = f"the credentials from {asker.source}"
    renewal = f"; they could not be renewed: {asker.problem}" if asker.problem else ""
    if code in ("NoSuchKey", "NotFound"):
        return errno.ENOENT, _GONE
    if code == "NoSuchBucket":
        return errno.ENOENT, f"there is no bucket {asker.bucket!r} at {asker.endpoint}: make it, or check both names"
    if code == "NoSuchUpload":
        return errno.ENOENT, "the multipart upload is gone: was it aborted by another process, or by a lifecycle rule?"
    if code in ("InvalidAccessKeyId", "InvalidClientTokenId"):
        return errno.EACCES, f"{asker.endpoint} does not know the access key from {asker.source}: check which is meant"
    if code == "SignatureDoesNotMatch":
        return errno.EACCES, f"the secret key from {asker.source} does not belong to its access key"
    if code in ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"):
        return errno.EACCES, f"{keys} have expired: get new ones{renewal}"
    if code == "InvalidToken":
        return errno.EACCES, f"the session token from {asker.source} is not valid: get a new one{renewal}"
    if code == "RequestTimeTooSkewed":
        return errno.EACCES, "this host's clock differs from the server's by too much: set it"
    if code in ("AccessDenied", "AllAccessDisabled", "Forbidden"):
        if not asker.source:
            return errno.EACCES, f"anonymous requests are not allowed to do this in {asker.bucket!r}: give credentials"
        return errno.EACCES, f"{keys} are not allowed to do this in {asker.bucket!r}{renewal}"
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        where = f"it is in {refusal.region}" if refusal.region else "AWS's console shows which"
        return errno.EINVAL, f"bucket {asker.bucket!r} is in another region: name that one ({where})"
    if code == "InvalidRange":
        return errno.EINVAL, "the object ends before the range that was asked for: was it replaced by a shorter one?"
    if code in ("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "InvalidDigest"):
        return errno.EIO, "the checksum of what arrived is not that of what was sent: the bytes were damaged on the way"
    if code in _SLOW:
        return errno.EAGAIN, "the server asks for fewer requests, and did so at every attempt"
    if code in _FULL:
        return errno.ENOSPC, "the store is full, or the quota used up"
    if code == "EntityTooLarge":
        return errno.EFBIG, "the object or part is larger than the server takes: change part_bytes"
    return errno.EIO, ""


def refused(url: str, status: int, refusal: Refusal | None, asker: Asker) -> OSError:
    """The `OSError` of a refusal: errno, sentence, URL; attributes `status`, `code`, and `answer` (its words)."""
    found = refusal or Refusal("", "", "")
    number, text = sentence(status, found, asker)
    error = OSError(number, text, url)
    # OSError chooses its subclass by errno: one of ours would not.
    answer = f"{found.code}: {found.message}" if found.message else found.code
    vars(error).update(status=status, code=found.code or _BY_STATUS.get(status, ""), answer=answer)
    return error


def _refusal_of(failure: Failure) -> Refusal:
    """The engine hands on an error's ``Code: Message``, or what else the body began with."""
    match = re.match(r"([A-Za-z][A-Za-z.]+)(?:: (.*))?$", failure.message, re.DOTALL)
    return Refusal(match[1], match[2] or "", "") if match else Refusal("", failure.message, "")


def explained(failure: Failure, asker: Asker) -> Failure:
    """A transfer's failure with a sentence for its message, if the server refused it."""
    if failure.kind is not Kind.HTTP:
        return failure
    return failure._replace(message=sentence(failure.status, _refusal_of(failure), asker)[1])


def failed(url: str, failure: Failure, asker: Asker) -> OSError:
    """The `OSError` of a transfer that failed; `failure` has the server's own words."""
    if failure.kind is Kind.HTTP:
        return refused(url, failure.status, _refusal_of(failure), asker)
    number = ERRNO.get(failure.kind, errno.EIO)
    return OSError(number, failure.message or os.strerror(number), url)
