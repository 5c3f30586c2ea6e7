"""Which checkpoint ids are places that mlstor can write to and read from."""

from __future__ import annotations

import os
import re

from mlstor.errors import UsageError
from mlstor.storage.store import scheme_of


def check_target(path: str | os.PathLike[str]) -> str:
    """The path or URL as text.

    Raises
    ------
    UsageError
        If it is neither.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"{path!r} is no checkpoint's place: give a directory, or a URL as s3://BUCKET/PREFIX")
    text = os.fsdecode(path)
    if not text:
        raise UsageError("the checkpoint's place is empty: give a directory, or a URL as s3://BUCKET/PREFIX")
    if not isinstance(path, str) and re.match(r"[a-z][a-z0-9+.-]*:/(?!/)", text):
        raise UsageError(f"{text!r}: a Path makes one slash of a URL's two: give the URL as text")
    scheme_of(text)
    return text


def is_target(path: str | os.PathLike[str]) -> bool:
    """Whether `check_target` takes it."""
    try:
        check_target(path)
    except UsageError:
        return False
    return True
