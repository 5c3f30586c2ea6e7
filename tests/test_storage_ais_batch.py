"""The TAR that a GetBatch brings, walked against Python's own tarfile."""

from __future__ import annotations

import io
import tarfile
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from mlstor._http import HttpEngine
from mlstor.storage.ais_batch import BatchReader, walk

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300)
MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=2000), st.booleans()), max_size=8)


def tar(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@given(members=MEMBERS)
def test_each_member_is_found_and_those_that_are_missing_marked(
    members: list[tuple[str, bytes, bool]], form: int
) -> None:
    told = [(f"__404__/{name}" if gone else f"n/{name}", b"" if gone else content) for name, content, gone in members]
    data = tar(told, form)
    starts, sizes, missing = walk(data, len(members))
    found = [data[start : start + size] for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)]
    assert found == [content for _, content in told]
    assert missing.tolist() == [gone for _, _, gone in members]


def test_an_empty_object_is_not_a_missing_one() -> None:
    assert walk(tar([("bucket/__404__/empty", b"")]), 1)[2].tolist() == [False]
    assert walk(tar([("__404__/not/empty", b"x")]), 1)[2].tolist() == [False]


@pytest.mark.parametrize("kept", [0, 100, 512, 700, 1024, 1536, 2048])
def test_an_answer_that_ends_early_is_refused(kept: int) -> None:
    data = tar([("a", b"x" * 600), ("b", b"y")])
    with pytest.raises(ValueError):
        walk(data[:kept], 2)


def test_one_member_too_few_or_too_many_is_refused() -> None:
    data = tar([("a", b"1"), ("b", b"2")])
    for count in (1, 3):
        with pytest.raises(ValueError, match="2 members of"):
            walk(data, count)


class Marking:
    """A cluster that marks members as missing though it was not asked to go on without them: a real one gave an answer
    with all its members once, which can't be brought about.
    """

    tls: dict[str, Any] = {}  # noqa: RUF012  # as the real one's
    endpoint, query, bucket = "http://127.0.0.1:1", "", "b"

    def add(self, engine: HttpEngine, url: str, **options: Any) -> int:
        return 0

    def call(self, *arguments: Any, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(body=tar([("b/a", b"x"), ("__404__/b/c", b"")]), url=self.endpoint)


def test_members_marked_as_missing_are_an_error_if_they_are_not_to_be() -> None:
    client: Any = Marking()
    with BatchReader(client, "") as reader:
        assert reader.get(["a", "c"], missing_ok=True).missing.tolist() == [False, True]
        with pytest.raises(FileNotFoundError, match="1 of 2 missing") as caught:
            reader.get(["a", "c"])
        assert caught.value.filename == "c"


def test_what_is_no_tar_is_refused() -> None:
    with pytest.raises(ValueError):
        walk(b"<html>" * 400, 1)
    with pytest.raises(ValueError, match="no TAR"):
        walk(b"\0" * 600 + b"x" * 600, 0)
