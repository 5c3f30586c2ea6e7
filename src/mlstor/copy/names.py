"""Which keys a destination can have."""

from __future__ import annotations

_NAME_MAX = 255  # bytes of a file's name, linux/limits.h


def refusal(key: str, scheme: str) -> str:
    """Why an object can't have this key at the destination, "" if it can.

    Parameters
    ----------
    scheme
        Of the destination: file, s3 or ais.
    """
    if scheme != "file":
        return _refused_by_server(key, scheme)
    names = key.split("/")
    if "" in names:
        return "a file's path has no empty names: a key with // or a slash at its end can't be one"
    if "." in names or ".." in names:
        return "a name of . or .. means another place in a path"
    if "\0" in key:
        return "a file's name has no NUL"
    # written under a temporary name first, `.NAME.XXXXXXXX.mlstor-tmp`
    if any(len(name.encode("utf-8", "surrogateescape")) > _NAME_MAX - 21 for name in names[-1:]) or any(
        len(name.encode("utf-8", "surrogateescape")) > _NAME_MAX for name in names
    ):
        return "a file's name has 255 bytes at most, of which the temporary one takes 21"
    return ""


def _refused_by_server(key: str, scheme: str) -> str:
    try:
        key.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8, which keys of objects are"
    if scheme == "ais" and "" in key.split("/"):
        return "AIStore does not find a name again that begins or ends with a slash, or has two in a row"
    return ""
