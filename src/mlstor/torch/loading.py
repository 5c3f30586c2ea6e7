"""`load`: a drop-in for `torch.load` that reads in parallel, straight into the storages, and verifies every record."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from mlstor.blob.target import open_blob
from mlstor.blob.types import require_same
from mlstor.errors import CorruptionError, UsageError
from mlstor.formats.zip_directory import kind_of
from mlstor.torch import _stock, devices
from mlstor.torch.archive import Archive, Target, address_of
from mlstor.torch.into import copy_into, load_into
from mlstor.torch.records import Records, Unpickling, described_in, fetch, on_meta
from mlstor.torch.saving import name_of, opening
from mlstor.torch.storages import allocate

if TYPE_CHECKING:
    from mlstor._io import Engine
    from mlstor.blob.types import Blob
    from mlstor.storage.store import Store


class UnverifiedWarning(UserWarning):
    """A file was loaded that holds nothing to verify it by."""


def load(
    f: str | os.PathLike[str],
    map_location: Any = None,
    pickle_module: ModuleType | None = None,
    *,
    weights_only: bool | None = None,
    mmap: bool | None = None,
    verify: bool | None = None,
    into: Any = None,
    engine: Engine | None = None,
    store: Store | None = None,
    options: Mapping[str, Any] | None = None,
    **pickle_load_args: Any,
) -> Any:
    """Load what `save` or `torch.save` wrote; every byte is compared with its CRC-32 before anything is unpickled.

    Parameters
    ----------
    f
        A path, or the URL of an object.
    map_location, pickle_module, weights_only, pickle_load_args
        As in `torch.load`; ``weights_only=True`` by default.
    mmap
        Map the file instead of reading it (paths only). Default: torch's setting, which is not to.
    verify
        Default: True, but False with ``mmap=True``, where it would read the file that mapping avoids to read.
    into
        A state that is there already (nested mappings, lists and tuples with tensors, as state dicts are): its tensors
        are filled in place and its other values set; it is what is returned. There is no second copy of it in memory,
        but for tensors that lie otherwise in the file than here (256 MiB of them at a time), and for states with
        sparse, quantized or nested tensors or tensor subclasses (those are loaded beside it as a whole).
    engine
        The engine that reads files. Default: the process's own.
    store, options
        The object store, or the options to open it with. Default: by the URL.

    Returns
    -------
    Any
        The object that was saved.

    Raises
    ------
    CorruptionError
        If the file is not what was written; it names file, tensor and offset. Nothing is loaded, but with
        `into`, whose content is undefined then.
    UsageError
        If the state in the file and `into` differ in keys, shapes, dtypes or strides (nothing is touched then), or the
        file can't be loaded so; the message says what to do instead.
    pickle.UnpicklingError
        If ``weights_only=True`` meets a class that it does not allow.
    OSError
        If the storage fails, with errno and name.

    Warns
    -----
    UnverifiedWarning
        If the file holds no CRCs: the old format, or torch's ``save.compute_crc32=False``.
    """
    name = name_of(f)
    module = _stock.pickle_module_of(weights_only, pickle_module)
    if module is None and pickle_load_args:
        warnings.warn("encoding and the like only work with weights_only=False", UserWarning, stacklevel=2)
    arguments = {"encoding": "utf-8", **pickle_load_args}
    if name.endswith(".safetensors"):
        raise UsageError(f"{name}: torch.save does not write such files: use mlstor.torch.load_safetensors")
    if into is not None and (mmap or map_location is not None or _stock.passes_to_torch()):
        raise UsageError("into= reads to where its tensors are: leave mmap=, map_location= and FakeTensorMode out")
    blob = open_blob(name, engine=engine, **opening(store, options))
    remote = "://" in blob.name
    if remote and mmap:
        raise UsageError(f"{name}: an object can't be mapped: leave mmap=True out")
    mapped = not remote and into is None and (_stock.maps_by_default() if mmap is None else mmap)
    verifies = not mapped if verify is None else verify
    loading = _Loading(blob, map_location, Unpickling(module, arguments))
    if _stock.passes_to_torch():
        return loading.by_torch(mapped)
    info = blob.stat()
    kind = kind_of(blob.read(0, min(info.nbytes, _HEAD_BYTES)))
    if kind in ("legacy", "tar"):
        if verifies:
            _warn_unverified(f"{name}: the format of torch before 1.6 holds no CRCs")
        # torch opens a tar by its path only
        source = io.BytesIO(blob.read(0, info.nbytes)) if remote and kind == "legacy" else None
        state = _whole(name, lambda: loading.by_torch(mapped, source))
        return state if into is None else copy_into(state, into, name)
    try:
        archive = Archive(blob, info, verify=verifies)
    except CorruptionError as error:
        if kind != "unknown":
            raise
        raise CorruptionError(f"{error} Its beginning is not that of a file of torch.save either") from None
    except UsageError:
        if remote or into is not None or not _is_program(name):
            raise
        if verifies:
            _warn_unverified(f"{name}: a TorchScript program with compressed code goes to torch as a whole")
        return loading.by_torch(mapped)
    if verifies and not archive.directory.has_crc:
        _warn_unverified(f"{name}: every CRC-32 in it is zero (torch's save.compute_crc32=False)")
    if mapped or "constants.pkl" in archive.directory.entries:  # TorchScript, which torch passes on
        if into is not None:
            raise UsageError(f"{name}: a TorchScript program is no state that into= could be filled from")
        loading.check(archive)
        state = loading.by_torch(mapped)
        if archive.verifies:
            require_same(blob, info.etag)
        return state
    if into is not None:
        return load_into(archive, into, loading.how, lambda: loading.zip(archive))
    return loading.zip(archive)


#: Enough to tell a tar, whose magic is at 257.
_HEAD_BYTES = 512


def _whole(name: str, load: Callable[[], Any]) -> Any:
    """What torch makes of a file of the old format; that it ends too early is told with its name."""
    try:
        return load()
    except (EOFError, RuntimeError) as error:
        if isinstance(error, EOFError) or "unexpected EOF" in str(error):
            raise CorruptionError(f"{name}: the file ends early: was its writer interrupted?") from error
        raise


def _is_program(path: str) -> bool:
    """Whether a zip with compressed records is a TorchScript program, as torch.jit.save deflates its code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):  # damaged: it is told why it can't be read
        return False


def _warn_unverified(why: str) -> None:
    text = f"{why}: it is loaded, but not verified. Save it anew with mlstor.torch.save"
    warnings.warn(text, UnverifiedWarning, stacklevel=3)


class _Loading:
    """One call of `load`."""

    def __init__(self, blob: Blob, map_location: Any, how: Unpickling) -> None:
        self._blob = blob
        self._map_location = map_location
        self.how = how

    def by_torch(self, mmap: bool, source: Any = None) -> Any:
        """Leave it to `torch.load`: no bytes are wanted, or the file is mapped."""
        if source is None:
            source = self._blob.name
            if "://" in source:
                raise UsageError(f"{source}: only files can be loaded so: copy it to a file first")
        arguments = self.how.arguments if self.how.module is not None else {}
        return torch.load(
            source,
            map_location=self._map_location,
            pickle_module=self.how.module,
            weights_only=self.how.module is None,
            mmap=mmap,
            **arguments,
        )

    def check(self, archive: Archive) -> None:
        """Verify all records without keeping them."""
        if archive.verifies:
            fetch(archive, [Target(record, 0) for record in archive.directory.entries], None, self.how)

    def zip(self, archive: Archive) -> Any:
        if _stock.is_meta(self._map_location):
            pickled = archive.read(["data.pkl"])["data.pkl"]
            archive.find_offsets()
            return on_meta(archive, pickled, archive.offsets, self.how)
        entries = archive.directory.entries
        elsewhere = devices.storages_elsewhere(archive, self._map_location)
        data = [record for record in entries if record.startswith("data/") and record not in elsewhere]
        storages = dict(zip(data, allocate(entries[record].nbytes for record in data), strict=True))
        others = {r: bytearray(e.nbytes) for r, e in entries.items() if r not in storages and r not in elsewhere}
        targets = [Target(record, storage.data_ptr()) for record, storage in storages.items()]
        targets += [Target(record, address_of(buffer)) for record, buffer in others.items()]
        fetch(archive, targets, (storages, others), self.how)
        if elsewhere:
            devices.fill(archive, elsewhere, self.how)
            storages |= elsewhere
        contents = {record: bytes(others[record]) for record in described_in(archive)}
        reader = Records(archive, contents, storages, archive.offsets)
        return _stock.rebuild(reader, self._map_location, self.how.module, self.how.arguments)
