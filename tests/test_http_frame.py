"""Where an answer's lines and body begin and end: in any cut the same, and nothing in two ways."""

from __future__ import annotations

import ctypes as ct
import http.client
import io
import itertools
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from hypothesis import assume, given, settings, strategies as st
from leaf_library import CSRC

MORE, LINE, BODY, END, ERROR = range(5)
SETTINGS = settings(max_examples=200)


class Frame(ct.Structure):
    _fields_ = [
        ("state", ct.c_int),
        *((name, ct.c_bool) for name in ("is_head", "keep", "sized", "chunked", "line_taken")),
        ("status", ct.c_uint),
        ("left", ct.c_uint64),
        ("length", ct.c_uint64),
        ("nhead", ct.c_size_t),
        ("line", ct.c_void_p),
        ("nline", ct.c_size_t),
        ("line_room", ct.c_size_t),
        ("error", ct.c_char_p),
    ]


class Piece(ct.Structure):
    _fields_ = [("at", ct.c_void_p), ("n", ct.c_size_t)]


class Read(NamedTuple):
    """What was made of an answer; `left` is what came after its end."""

    event: int
    lines: list[bytes]
    body: bytes
    left: bytes
    keep: bool
    error: str


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> ct.CDLL:
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler (cc) on this machine")
    path = tmp_path_factory.mktemp("http_frame") / "libframe.so"
    command = [cc, "-std=gnu11", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
    subprocess.run([*command, "-o", str(path), str(CSRC / "http/http_frame.c")], check=True, timeout=120)
    library = ct.CDLL(str(path))
    library.mls_frame_direct.restype = ct.c_uint64
    library.mls_frame_eof.restype = ct.c_bool
    library.mls_frame_skip.argtypes = [ct.POINTER(Frame), ct.c_uint64]
    library.mls_frame_begin.argtypes = [ct.POINTER(Frame), ct.c_bool]
    library.mls_frame_next.argtypes = [
        ct.POINTER(Frame), ct.c_char_p, ct.c_size_t, ct.POINTER(ct.c_size_t), ct.POINTER(Piece)
    ]  # fmt: skip
    return library


def pieces(data: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    """`data` cut at these places."""
    for begin, end in itertools.pairwise([0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]):
        yield data[begin:end]


def read(
    frames: ct.CDLL, data: bytes, cuts: Sequence[int] = (), head: bool = False, eof: bool = False, direct: bool = False
) -> Read:
    """Feeds the pieces; with `direct` bodies go past the parser, as to their place in memory."""
    frame, piece, used = Frame(), Piece(), ct.c_size_t()
    frames.mls_frame_begin(ct.byref(frame), head)
    lines, body, event, left = [], b"", MORE, b""
    for part in pieces(data, cuts):
        used.value = 0
        event = MORE
        while event not in (END, ERROR):
            if direct and (most := frames.mls_frame_direct(ct.byref(frame))) and used.value < len(part):
                some = min(most, len(part) - used.value)
                body += part[used.value : used.value + some]
                used.value += some
                frames.mls_frame_skip(ct.byref(frame), some)
            event = frames.mls_frame_next(ct.byref(frame), part, len(part), ct.byref(used), ct.byref(piece))
            if event == MORE:
                break
            if event == LINE:
                lines.append(ct.string_at(piece.at, piece.n))
            elif event == BODY:
                body += ct.string_at(piece.at, piece.n)
        if event == END:
            left += part[used.value :]
        assert used.value <= len(part)
    if eof and event == MORE:
        event = END if frames.mls_frame_eof(ct.byref(frame)) else ERROR
    found = Read(event, lines, body, left, frame.keep, (frame.error or b"").decode())
    frames.mls_frame_free(ct.byref(frame))
    return found


TOKENS = st.text("abcXYZ-_.09", min_size=1, max_size=12).map(lambda name: "X-" + name)
VALUES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=30)
CUTS = st.lists(st.integers(0, 800), max_size=12)


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, bytes, list[bytes]]:
    """An answer, its body, its header lines."""
    end = draw(st.sampled_from([b"\r\n", b"\n"]))
    status = draw(st.sampled_from([200, 206, 404, 503]))
    body = draw(st.binary(max_size=300))
    headers = [
        f"{name}: {value}".encode("latin-1") for name, value in draw(st.lists(st.tuples(TOKENS, VALUES), max_size=5))
    ]
    if draw(st.booleans()):
        framing, sent = b"Content-Length: %d" % len(body), body
    else:
        framing, sent = b"transfer-encoding: Chunked", b""
        for part in pieces(body, draw(CUTS)):
            if part:
                sent += (
                    draw(st.sampled_from([b"%x", b"%X", b"0%x;name=value", b"%x ; a"])) % len(part) + end + part + end
                )
        sent += b"0" + end + draw(st.sampled_from([b"", b"Content-Length: 3" + end, b"X: y" + end])) + end
    headers.insert(draw(st.integers(0, len(headers))), framing)
    before = draw(
        st.sampled_from([b"", b"HTTP/1.1 100 Continue" + end + end, b"HTTP/1.1 103 Hints" + end + b"a: b" + end + end])
    )
    lines = [b"HTTP/1.1 %d Some Reason" % status, *headers, b""]
    return before + b"".join(line + end for line in lines) + sent, body, [line + end for line in lines]


@SETTINGS
@given(answer=answers(), cuts=CUTS, direct=st.booleans(), after=st.binary(max_size=5))
def test_any_cut_of_an_answer_is_read_the_same(frames, answer, cuts, direct, after):
    data, body, lines = answer
    found = read(frames, data + after, cuts, direct=direct)
    assert (found.event, found.body, found.left, found.keep) == (END, body, after, True)
    assert found.lines[-len(lines) :] == lines
    assert read(frames, data, [*range(len(data))], direct=direct)[:3] == (END, found.lines, body)


@SETTINGS
@given(answer=answers())
def test_pythons_own_client_reads_the_same(frames, answer):
    data, body, lines = answer
    assume(lines[0].endswith(b"\r\n") and b" 103 " not in data)  # which it does not know

    class Connection:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(data)

    theirs = http.client.HTTPResponse(Connection())
    theirs.begin()
    assert theirs.read() == read(frames, data).body == body


@SETTINGS
@given(answer=answers(), keep=st.integers(0, 2000), cuts=CUTS)
def test_an_answer_that_breaks_off_is_never_complete(frames, answer, keep, cuts):
    data, body, _ = answer
    found = read(frames, data[: min(keep, len(data) - 1)], cuts, eof=True)
    assert found.event == ERROR
    assert body.startswith(found.body)


@SETTINGS
@given(
    answer=answers(),
    changes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=4),
    cuts=CUTS,
)
def test_a_damaged_answer_is_read_the_same_in_any_cut(frames, answer, changes, cuts):
    damaged = bytearray(answer[0])
    for place, byte in changes:
        damaged[place % len(damaged)] = byte
    whole = read(frames, bytes(damaged), eof=True)
    assert read(frames, bytes(damaged), cuts, eof=True)[:3] == whole[:3]
    assert read(frames, bytes(damaged), cuts, eof=True, direct=True)[:3] == whole[:3]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.2 200 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 099 Odd\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0x1\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775808\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length : 1\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: no name\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1g\r\na\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000000\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
        b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 12_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 3000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: a\r\n" * 12_000,
    ],
)
def test_what_can_be_read_in_two_ways_or_has_no_end_is_refused(frames, answer):
    found = read(frames, answer)
    assert (found.event, found.keep, bool(found.error)) == (ERROR, False, True)
    assert read(frames, answer, range(0, len(answer), 7)).event == ERROR


@pytest.mark.parametrize(
    ("answer", "head", "body", "left", "keep"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", True, b"", b"", True),
        (b"HTTP/1.1 204 No Content\r\n\r\nx", False, b"", b"x", True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", False, b"", b"", True),
        (b"HTTP/1.1 200\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na", False, b"a", b"", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: TE, Close\r\n\r\n", False, b"", b"", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na", False, b"a", b"", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\nConnection: Keep-Alive\r\n\r\na", False, b"a", b"", True),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil it closes", False, b"until it closes", b"", False),
    ],
)
def test_an_answer_without_body_or_length(frames, answer, head, body, left, keep):
    found = read(frames, answer, head=head, eof=True)
    assert (found.event, found.body, found.left, found.keep) == (END, body, left, keep)
