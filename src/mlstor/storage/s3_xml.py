"""S3's XML, read and written: listings, multipart uploads, deletions, errors.

Document types are refused: nothing in S3's answers needs one, and entities in them can be made to grow without bound.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from urllib.parse import unquote_plus
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from mlstor.storage import crc32c
from mlstor.storage.uploads import Part

_XMLNS = "http://s3.amazonaws.com/doc/2006-03-01/"


class Listing(NamedTuple):
    """One answer to ListObjectsV2: whole keys, sizes in bytes, common prefixes, and the token of what follows."""

    keys: list[str]
    sizes: list[int]
    prefixes: list[str]
    token: str


class Upload(NamedTuple):
    """A multipart upload that is neither completed nor aborted: whole key, id, and when it began (ISO 8601)."""

    key: str
    upload_id: str
    initiated: str


class Refusal(NamedTuple):
    """An ``<Error>``: S3's code, the server's sentence, and the region that it says the bucket is in, if it does."""

    code: str
    message: str
    region: str


def _parse(body: bytes) -> ElementTree.Element:
    """The root of an answer, its tags without their namespace."""
    # A NUL is in every document of 16 or 32 bits a letter, where a document type would not be seen.
    if b"<!DOCTYPE" in body or b"<!ENTITY" in body or b"\0" in body:
        raise OSError(errno.EBADMSG, "the server's XML has a document type, or isn't UTF-8: S3's never is such")
    try:
        root = ElementTree.fromstring(body, ElementTree.XMLParser(encoding="utf-8"))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise OSError(errno.EBADMSG, f"the server's answer is not XML ({error}); is the endpoint one of S3?") from None
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def _root(body: bytes, *names: str) -> ElementTree.Element:
    root = _parse(body)
    if root.tag not in names:
        raise OSError(errno.EBADMSG, f"the server answered <{root.tag}> where <{names[0]}> was due")
    return root


def _text(element: ElementTree.Element, name: str) -> str:
    return element.findtext(name) or ""


def listing(body: bytes) -> Listing:
    """Read an answer to ``list-type=2``; keys are unescaped where the server says that it escaped them."""
    root = _root(body, "ListBucketResult")
    encoded = _text(root, "EncodingType").lower() == "url"
    keys, sizes = [], []
    for item in root.iterfind("Contents"):
        keys.append(_text(item, "Key"))
        size = _text(item, "Size")
        if not size.isdecimal():
            raise OSError(errno.EBADMSG, f"the server lists an object of {size!r} bytes")
        sizes.append(int(size))
    prefixes = [_text(item, "Prefix") for item in root.iterfind("CommonPrefixes")]
    if encoded:
        keys, prefixes = [unquote_plus(key) for key in keys], [unquote_plus(prefix) for prefix in prefixes]
    truncated = _text(root, "IsTruncated").lower() == "true"
    token = _text(root, "NextContinuationToken")
    if truncated and not token:
        raise OSError(errno.EBADMSG, "the server cut its listing short and gave no token to go on with")
    return Listing(keys, sizes, prefixes, token if truncated else "")


def uploads(body: bytes) -> tuple[list[Upload], str, str]:
    """Read an answer to ``?uploads``: uploads, and the two markers of what follows ("" at the end)."""
    root = _root(body, "ListMultipartUploadsResult")
    found = [
        Upload(_text(item, "Key"), _text(item, "UploadId"), _text(item, "Initiated"))
        for item in root.iterfind("Upload")
    ]
    if _text(root, "IsTruncated").lower() != "true":
        return found, "", ""
    return found, _text(root, "NextKeyMarker"), _text(root, "NextUploadIdMarker")


def refusal(body: bytes) -> Refusal | None:
    """Read an ``<Error>``; None if the body is none."""
    try:
        root = _parse(body)
    except OSError:
        return None  # an answer of a proxy, or none at all: the status alone tells
    if root.tag != "Error":
        return None
    return Refusal(_text(root, "Code"), " ".join(_text(root, "Message").split()), _text(root, "Region"))


def upload_id(body: bytes) -> str:
    """Of a new multipart upload."""
    found = _text(_root(body, "InitiateMultipartUploadResult"), "UploadId")
    if not found:
        raise OSError(errno.EBADMSG, "the server began a multipart upload without an id")
    return found


def completed_etag(body: bytes) -> str:
    """ETag of an object that was completed, without quotes."""
    return _text(_root(body, "CompleteMultipartUploadResult"), "ETag").strip('"')


def completion(parts: Sequence[Part]) -> bytes:
    """The body that completes an upload."""
    lines = [f'<CompleteMultipartUpload xmlns="{_XMLNS}">']
    for part in parts:
        lines.append(f"<Part><PartNumber>{part.number}</PartNumber><ETag>&quot;{escape(part.etag)}&quot;</ETag>")
        if part.crc32c is not None:
            lines.append(f"<ChecksumCRC32C>{crc32c.to_base64(part.crc32c)}</ChecksumCRC32C>")
        lines.append("</Part>")
    lines.append("</CompleteMultipartUpload>")
    return "".join(lines).encode()


def is_expressible(key: str) -> bool:
    """Whether XML 1.0 can hold a key: it has no way to write most control characters."""
    return all(c >= " " or c in "\t\n\r" for c in key) and not {"\ufffe", "\uffff"} & set(key)


def deletion(keys: Iterable[str]) -> bytes:
    """The body that deletes up to 1000 objects, and asks to be told of failures only."""
    lines = [f'<Delete xmlns="{_XMLNS}"><Quiet>true</Quiet>']
    lines += [f"<Object><Key>{escape(key, _BREAKS)}</Key></Object>" for key in keys]
    lines.append("</Delete>")
    return "".join(lines).encode()


# A parser makes a space or a line feed of these when they stand there as they are.
_BREAKS = {"\r": "&#13;", "\n": "&#10;", "\t": "&#9;"}


def deletion_failures(body: bytes) -> list[tuple[str, Refusal]]:
    """Read an answer to a deletion: the keys that are still there, and why."""
    return [
        (_text(item, "Key"), Refusal(_text(item, "Code"), _text(item, "Message"), ""))
        for item in _root(body, "DeleteResult").iterfind("Error")
    ]
