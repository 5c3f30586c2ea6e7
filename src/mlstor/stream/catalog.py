"""The objects of a run: names and sizes in a memory-mapped file that opens at once, whatever their number."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from mlstor.errors import UsageError
from mlstor.storage.store import Page
from mlstor.storage.transfers import WHOLE
from mlstor.stream import catalog_file
from mlstor.stream.catalog_file import HEADER_BYTES, Digest, Runs

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Default of `Catalog.build`: 10^8 names of 40 bytes make a hundred runs.
RUN_BYTES = 64 << 20
_LISTED_LINES = 4096
_VERIFY_BYTES = 1 << 20


class Packed(NamedTuple):
    """Names and sizes of some objects, as `Transfers.submit` takes them."""

    #: a buffer that holds the names; of a mapped catalog it is the map itself
    names: Any
    #: where in `names` each begins
    key_start: NDArray[np.uint64]
    key_nbytes: NDArray[np.uint32]
    #: of the objects, bytes; WHOLE where it is not known
    sizes: NDArray[np.uint64]


class Objects(Protocol):
    """What `Catalog` and `Synthetic` have in common."""

    @property
    def digest(self) -> str:
        """Of names and sizes, hex; the same on every machine."""

    @property
    def total_bytes(self) -> int | None:
        """Of all objects, bytes; None if some sizes are not known."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The key of an object. Raises IndexError as `pack` does."""

    def pack(self, indices: NDArray[np.uint64]) -> Packed:
        """Names and sizes of many objects, without a Python object for each.

        Raises
        ------
        IndexError
            If an index is not below the number of objects.
        """


class Catalog:
    """A catalog file, mapped. Made by `open`, `build` or `from_list_file`; takes no heap per object.

    Pickles to its path, and is opened again in the other process.

    Attributes
    ----------
    path : str
        Of the file. It may be removed while it is mapped; then the catalog can't be pickled any more.
    digest : str
        Of names and sizes, hex. Names are sorted by their bytes, so that it does not depend on the order in which a
        store lists them.
    total_bytes : int or None
        Of all objects, bytes; None if some sizes are not known.
    sizes : array of u64
        Of the objects, bytes; WHOLE where it is not known. Read-only, mapped.
    """

    def __init__(self, path: str, mapped: mmap.mmap, header: catalog_file.Header) -> None:
        self.path = path
        self.digest = header.digest.hex()
        self.total_bytes = None if header.total_bytes == WHOLE else header.total_bytes
        self.sizes: NDArray[np.uint64] = np.frombuffer(mapped, "<u8", header.n, HEADER_BYTES)
        self._starts: NDArray[np.uint64] = np.frombuffer(mapped, "<u8", header.n + 1, header.starts_at)
        self._names: Any = np.frombuffer(mapped, np.uint8, header.names_nbytes, header.names_at)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Catalog:
        """Map a file that `build` made; only its header is read.

        Raises
        ------
        UsageError
            If it is not a whole catalog of this version.
        OSError
            If it can't be opened.
        """
        path = os.fspath(path)
        with open(path, "rb") as file:
            header = catalog_file.read_header(path, file.fileno())
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)  # a random order looks here and there: no readahead
        return cls(path, mapped, header)

    @classmethod
    def build(cls, pages: Iterable[Page], path: str | os.PathLike[str], *, run_bytes: int = RUN_BYTES) -> Catalog:
        """Write `pages` as a catalog at `path`, and open it.

        Memory is bounded whatever the number of names: sorted runs go to a temporary file beside `path` and are merged
        from there. The catalog appears under its name when it is whole; a file that was there is replaced.

        Parameters
        ----------
        pages
            In any order, as `Store.list` gives them.
        run_bytes
            Bytes of names, and 32 for each, that are sorted in memory at once; Python takes about four times as much.

        Raises
        ------
        UsageError
            If a name comes twice: no epoch could then read every object once.
        OSError
            If the file can't be written.
        """
        target = Path(path)
        with tempfile.TemporaryFile(dir=target.parent) as spool:
            runs = Runs(spool, run_bytes)
            for page in pages:
                runs.add(page)
            catalog_file.write(target, runs)
        return cls.open(target)

    @classmethod
    def from_list_file(cls, listing: str | os.PathLike[str], path: str | os.PathLike[str]) -> Catalog:
        """Build a catalog at `path` from a text file: a name per line, and behind a tab its size in bytes, if known.

        Names are UTF-8 and may hold spaces; empty lines are left out.

        Raises
        ------
        UsageError
            If a size is not a number, a name comes twice, or there is no name at all.
        OSError
            If a file can't be read or written.
        """
        catalog = cls.build(_listed(os.fspath(listing)), path)
        if not len(catalog):
            raise UsageError(f"{os.fspath(listing)} holds no names: write one per line")
        return catalog

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, index: int) -> str:
        """The key of an object; bytes that are not UTF-8 come as `os.fsdecode` gives them.

        Raises
        ------
        IndexError
            If there is no such object.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"object {index} of {len(self)}")
        name = self._names[int(self._starts[index]) : int(self._starts[index + 1])]
        return bytes(name).decode("utf-8", "surrogateescape")

    def pack(self, indices: NDArray[np.uint64]) -> Packed:
        """Names and sizes of many objects; `names` is the map itself, nothing of it is copied.

        Raises
        ------
        IndexError
            If an index is not below the number of objects.
        """
        sizes = self.sizes[indices]
        start = self._starts[indices]
        nbytes = self._starts[np.asarray(indices, np.uint64) + np.uint64(1)] - start
        return Packed(self._names, start, nbytes.astype(np.uint32), sizes)

    def verify(self) -> None:
        """Read the whole file and compare it with its digest, which `open` does not.

        Raises
        ------
        UsageError
            If it was changed or damaged since it was made.
        """
        digest = Digest()
        columns: list[tuple[Any, Any]] = [
            (self.sizes, digest.sizes),
            (self._starts[1:], digest.ends),
            (self._names, digest.names),
        ]
        for column, into in columns:
            step = _VERIFY_BYTES // column.itemsize
            for first in range(0, len(column), step):
                into.update(column[first : first + step])
        if digest.value(len(self)).hex() != self.digest:
            raise UsageError(f"{self.path} is not what was written: make it anew")

    def __reduce__(self) -> Any:
        return _reopen, (os.path.abspath(self.path), self.digest)


def _reopen(path: str, digest: str) -> Catalog:
    catalog = Catalog.open(path)
    if catalog.digest != digest:
        raise UsageError(f"the catalog {path} was replaced by another one in the meantime: start again")
    return catalog


def _listed(path: str) -> Iterator[Page]:
    page = Page([], [])
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            name, tab, size = line.rstrip("\r\n").partition("\t")
            if not name:
                continue
            if tab and not (size.isascii() and size.isdigit() and int(size) < WHOLE):
                raise UsageError(f"{path}, line {number}: {size!r} behind the tab is not a size in bytes")
            page.keys.append(name)
            page.sizes.append(int(size) if tab else WHOLE)
            if len(page.keys) == _LISTED_LINES:
                yield page
                page = Page([], [])
    yield page
