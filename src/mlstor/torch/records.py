"""An archive's records as torch's own loader wants them, and the tensors that lie in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from mlstor.errors import CorruptionError
from mlstor.formats.inert_pickle import stored
from mlstor.formats.zip_directory import RecordError
from mlstor.torch import _stock, walk
from mlstor.torch.archive import Archive, Target


class Unpickling(NamedTuple):
    """How `data.pkl` is read."""

    #: None: torch's restricted unpickler, which runs no code of the file
    module: ModuleType | None
    #: encoding and the like
    arguments: Mapping[str, Any]


def described_in(archive: Archive) -> list[str]:
    """The records that torch's loader reads as bytes."""
    archive.entry("data.pkl")
    return [record for record in ("data.pkl", "byteorder") if record in archive.directory.entries]


class Records:
    """What torch's loader asks for, from storages that are filled already.

    Parameters
    ----------
    archive
    contents
        The records of `described_in`.
    storages
        By record; none for a load to the meta device.
    offsets
        What torch is to note on storages of the meta device.
    """

    def __init__(
        self,
        archive: Archive,
        contents: Mapping[str, bytes],
        storages: Mapping[str, torch.UntypedStorage],
        offsets: Mapping[str, int],
    ) -> None:
        self._archive = archive
        self._contents = contents
        self._storages = storages
        self._offsets = offsets

    def has_record(self, name: str) -> bool:
        # .format_version is left out: torch would calculate offsets by how its own writer places records
        return name in self._contents

    def get_record(self, name: str) -> bytes:
        return self._contents[name]

    def get_record_offset(self, name: str) -> int:
        self._archive.entry(name)
        return self._offsets[name]

    def storage(self, name: str, nbytes: int) -> torch.UntypedStorage:
        """The storage that holds a record; on the meta device, with its offset noted, if there are none.

        Raises
        ------
        CorruptionError
            If the file has no such record, or one of another size.
        """
        entry = self._archive.entry(name)
        if entry.nbytes != nbytes:
            raise CorruptionError(
                f"{self._archive.name}: a tensor needs {nbytes} bytes of the record {name}, which has {entry.nbytes}"
            )
        return self._storages[name] if self._storages else _meta_storage(nbytes, self._offsets[name])

    def get_storage_from_record(self, name: str, nbytes: int, kind: Any) -> Any:
        return _stock.Holder(self.storage(name, nbytes))

    def serialization_id(self) -> str:
        return ""


def _meta_storage(nbytes: int, offset: int) -> torch.UntypedStorage:
    kind: Any = torch.UntypedStorage  # Any: torch types neither its constructor nor the note
    storage: Any = kind(nbytes, device="meta")
    storage._checkpoint_offset = offset
    made: torch.UntypedStorage = storage
    return made


def on_meta(archive: Archive, pickled: bytes, offsets: Mapping[str, int], how: Unpickling) -> Any:
    """The object with its tensors on the meta device, and `offsets` of their records noted on their storages."""
    # Without the byte order: torch would swap the bytes that a meta storage does not have
    return _stock.rebuild(Records(archive, {"data.pkl": pickled}, {}, offsets), "meta", how.module, how.arguments)


def outline(archive: Archive, pickled: bytes, how: Unpickling) -> tuple[Any, list[str]]:
    """The object on the meta device, and the records by number: `walk.record_number` of a tensor."""
    records = list(archive.directory.entries)
    numbers = {record: number for number, record in enumerate(records)}
    return on_meta(archive, pickled, numbers, how), records


def _owners(archive: Archive, damaged: Sequence[str], how: Unpickling) -> dict[str, list[str]]:
    """The names of the tensors in each record; none if they can't be found out, or the record that tells is damaged."""
    if "data.pkl" in damaged:
        return {}
    pickled = archive.read(["data.pkl"])["data.pkl"]
    try:
        tree, records = outline(archive, pickled, how)
        leaves = list(walk.leaves(tree))
    except Exception:  # quantized tensors, classes that are not allowed: a name for each stands in the pickle itself
        return _owners_said(pickled)
    found: dict[str, list[str]] = {}
    for path, leaf in leaves:
        number = walk.record_number(leaf)
        if number is not None:
            found.setdefault(records[number], []).append(path)
    return found


def _owners_said(pickled: bytes) -> dict[str, list[str]]:
    try:
        return {f"data/{key}": [one.tensor] for key, one in stored(pickled).items()}
    except ValueError:  # no pickle as torch's: the damage is told without names
        return {}


def fetch(archive: Archive, targets: Sequence[Target], keep: object, how: Unpickling, advice: str = "") -> None:
    """`Archive.fetch`, with an error for damaged records that names the tensors in them, and ends with `advice`.

    Raises
    ------
    CorruptionError
        If a record or its local header is not what was written.
    """
    try:
        damaged = archive.fetch(targets, keep)
    except RecordError as error:
        owner = ", ".join(_owners(archive, [error.record], how).get(error.record, ())[:_NAMED])
        of_tensor = f" (tensor {owner})" if owner else ""
        raise CorruptionError(f"{error}{of_tensor}{'. ' if advice else ''}{advice}") from None
    if damaged:
        raise archive.damage(damaged, _owners(archive, damaged, how), advice)


#: How many tensors of a record whose header is damaged a message names.
_NAMED = 4
