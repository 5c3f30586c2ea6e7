"""What the tests of the HTTP engine share: transfers by keyword, and what became of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
from http_faults import FaultServer
from numpy.typing import NDArray

from mlstor._http import HttpEngine
from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Op, zeros

#: Who carries transfers over http://: the engine's own connections, or libcurl.
TRANSPORTS = ("own", "libcurl")
QUICK: dict[str, Any] = {"workers": 2, "in_flight": 4, "backoff_s": 0.01, "backoff_most_s": 0.5, "stall_timeout_s": 0.5}


@contextmanager
def carried_by(transport: str) -> Iterator[None]:
    """What `engine_on` makes meanwhile."""
    before = QUICK.get("libcurl_only", False)
    QUICK["libcurl_only"] = transport == "libcurl"
    try:
        yield
    finally:
        QUICK["libcurl_only"] = before


@contextmanager
def engine_on(server: FaultServer, **options: Any) -> Iterator[HttpEngine]:
    """An engine that gives up soon; endpoint 0 is the server."""
    with HttpEngine(**{**QUICK, **options}) as engine:
        assert engine.endpoint(server.url) == 0
        yield engine


class Asked:
    """Transfers under construction, with the names they refer to."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.names = bytearray()

    def add(self, key: str, query: str = "", **fields: Any) -> Asked:
        """One more; by default the whole object is read and dropped. Its tag is its index."""
        row = {"tag": len(self.rows), "nbytes": WHOLE if fields.get("op", Op.READ) == Op.READ else 0,
               "object_nbytes": WHOLE, **fields}  # fmt: skip
        for name, text in (("key", key), ("query", query)):
            row[f"{name}_start"], row[f"{name}_nbytes"] = len(self.names), len(text.encode())
            self.names += text.encode()
        self.rows.append(row)
        return self

    @property
    def array(self) -> Any:
        array = zeros(len(self.rows), TRANSFER_DTYPE)
        for record, row in zip(array, self.rows, strict=True):
            for name, value in row.items():
                record[name] = value
        return array


def reap_all(engine: HttpEngine) -> NDArray[Any]:
    """All that are outstanding, by tag."""
    found = []
    while engine.outstanding:
        out = zeros(256, COMPLETION_DTYPE)
        count = engine.reap(out, timeout_s=60)
        assert count, "nothing came back for 60 s"
        found.append(out[:count])
    return numpy.sort(numpy.concatenate(found), order="tag")


def run(engine: HttpEngine, asked: Asked, buffer: Any = None, pattern: Any = None) -> NDArray[Any]:
    """Submits and waits for all."""
    assert engine.submit(asked.array, asked.names, buffer, pattern) == len(asked.rows)
    return reap_all(engine)


def run_one(
    engine: HttpEngine, key: str, query: str = "", buffer: Any = None, pattern: Any = None, **fields: Any
) -> Any:
    """One transfer's completion."""
    [done] = run(engine, Asked().add(key, query, **fields), buffer, pattern)
    return done
