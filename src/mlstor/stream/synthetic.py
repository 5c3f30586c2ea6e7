"""Objects whose names follow from their numbers, as `--put` writes them: no list, whatever their number."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mlstor.errors import UsageError
from mlstor.stream.catalog import Packed
from mlstor.stream.catalog_file import DIGEST_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FIELD = re.compile(r"\{(index|dir):0([1-9][0-9]?)([dx])\}")
_TOTAL_STEP = 1 << 20


class Synthetic:
    """`n` objects with names made from a template; the same interface as `Catalog`.

    Parameters
    ----------
    template : str
        A key in which ``{index:012d}`` (or ``x``: hexadecimal) stands for the object's number, with leading zeros, and
        ``{dir:06x}`` for the number modulo `dirs`.
    n : int
    sizes : int or callable
        Bytes of every object, or what gives those of an array of numbers; always the same for the same number.
    dirs : int
        Directories over which the objects are dealt in turn.
    sizes_name : str
        Tells one callable from another in the digest: its distribution, bounds and seed.

    Raises
    ------
    UsageError
        If the template has no such field, or too few digits for `n`.
    """

    def __init__(
        self,
        template: str,
        n: int,
        sizes: int | Callable[[NDArray[np.uint64]], NDArray[np.uint64]],
        *,
        dirs: int = 1,
        sizes_name: str = "",
    ) -> None:
        if n < 0 or dirs < 1:
            raise ValueError(f"{n} objects in {dirs} directories")
        self.template = template
        self._n = n
        self._dirs = dirs
        self._sizes = sizes
        self._sizes_name = sizes_name
        self._total: int | None = None
        #: text between the fields, and the fields: (name, digits, base)
        self._texts: list[bytes] = []
        self._fields: list[tuple[str, int, int]] = []
        place = 0
        for found in _FIELD.finditer(template):
            base = 10 if found[3] == "d" else 16
            most = max((n if found[1] == "index" else min(n, dirs)) - 1, 0)
            if base ** int(found[2]) <= most:
                raise UsageError(f"{found[0]} in {template!r} has too few digits for numbers up to {most}")
            self._texts.append(template[place : found.start()].encode())
            self._fields.append((found[1], int(found[2]), base))
            place = found.end()
        self._texts.append(template[place:].encode())
        if "index" not in [name for name, _, _ in self._fields]:
            raise UsageError(f"{template!r} gives all objects one name: it needs a field such as {{index:012d}}")
        self.key_nbytes = sum(map(len, self._texts)) + sum(digits for _, digits, _ in self._fields)

    @property
    def digest(self) -> str:
        """Of what the names and sizes follow from, hex."""
        sizes = self._sizes_name if callable(self._sizes) else str(self._sizes)
        text = "\0".join((self.template, str(self._n), str(self._dirs), sizes))
        return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Of all objects, bytes; added up when it is first asked for."""
        if self._total is None:
            if callable(self._sizes):
                steps = range(0, self._n, _TOTAL_STEP)
                numbers = (np.arange(i, min(i + _TOTAL_STEP, self._n), dtype=np.uint64) for i in steps)
                self._total = sum(int(self._sizes(part).sum()) for part in numbers)
            else:
                self._total = self._n * self._sizes
        return self._total

    def __len__(self) -> int:
        return self._n

    def name(self, index: int) -> str:
        """The key of an object.

        Raises
        ------
        IndexError
            If there is no such object.
        """
        return bytes(self.pack(np.array([index], np.uint64)).names).decode()

    def pack(self, indices: NDArray[np.uint64]) -> Packed:
        """Names and sizes of many objects; the names are made here.

        Raises
        ------
        IndexError
            If an index is not below the number of objects.
        """
        indices = np.asarray(indices, np.uint64)
        count = len(indices)
        if count and int(indices.max()) >= self._n:
            raise IndexError(f"object {int(indices.max())} of {self._n}")
        names = np.empty((count, self.key_nbytes), np.uint8)
        place = 0
        for text, field in zip(self._texts, [*self._fields, None], strict=True):
            names[:, place : place + len(text)] = np.frombuffer(text, np.uint8)
            place += len(text)
            if field is not None:
                kind, digits, base = field
                numbers = indices if kind == "index" else indices % np.uint64(self._dirs)
                _write_digits(names[:, place : place + digits], numbers, base)
                place += digits
        start = np.arange(count, dtype=np.uint64) * np.uint64(self.key_nbytes)
        sizes = self._sizes(indices) if callable(self._sizes) else np.full(count, self._sizes, np.uint64)
        return Packed(names.reshape(-1), start, np.full(count, self.key_nbytes, np.uint32), sizes)


_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)


def _write_digits(columns: NDArray[np.uint8], numbers: NDArray[np.uint64], base: int) -> None:
    rest = numbers
    for column in range(columns.shape[1] - 1, -1, -1):
        rest, digit = np.divmod(rest, np.uint64(base))
        columns[:, column] = _DIGITS[digit.astype(np.intp)]
