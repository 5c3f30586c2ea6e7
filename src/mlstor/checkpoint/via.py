"""``--via``: the ways in which a training job can save and load a state, each with the calls that it would make.

A file of the layout is a state of the tensors that the model has there. Every way is as durable as it can be made with
its own means within the clock (fsync for files), and a load has ended when all bytes are in memory of its own.
"""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mlstor import __version__
from mlstor.errors import UsageError
from mlstor.storage.store import scheme_of

if TYPE_CHECKING:
    import torch

State = Mapping[str, "torch.Tensor"]


class Spec(NamedTuple):
    """A tensor of a state: its elements, the name of its torch type, and where it begins in the pattern, bytes."""

    nelements: int
    dtype: str
    offset: int


class Route(Protocol):
    """One way."""

    #: as the command line has it
    name: str
    #: what has to be installed
    packages: tuple[str, ...]
    #: kinds of PATH
    schemes: tuple[str, ...]
    #: what ends a write, as the record says it
    steps: tuple[str, ...]

    def prepare(self, path: str) -> None:
        """What a process does once, before the first clock: importing DCP alone takes seconds. `path` is a PATH."""

    def save(self, state: State, path: str) -> None:
        """Write a state, durably."""

    def load(self, path: str, specs: Mapping[str, Spec]) -> State:
        """Read it whole."""


class Torch:
    """``torch.save`` and ``torch.load``."""

    name = "torch"
    packages: tuple[str, ...] = ("torch",)
    schemes: tuple[str, ...] = ("file",)
    steps: tuple[str, ...] = ("write", "fsync")

    def prepare(self, path: str) -> None:
        import torch.utils.serialization.config  # noqa: F401

    def save(self, state: State, path: str) -> None:
        import torch

        torch.save(state, path)
        _sync(path)

    def load(self, path: str, specs: Mapping[str, Spec]) -> State:
        import torch

        found: State = torch.load(path, weights_only=True)
        return found


class Dcp:
    """``torch.distributed.checkpoint`` of each rank for itself, as it comes: one thread, ``sync_files``."""

    name = "dcp"
    packages: tuple[str, ...] = ("torch",)
    schemes: tuple[str, ...] = ("file",)
    steps: tuple[str, ...] = ("write", "fsync", "rename")

    def prepare(self, path: str) -> None:
        import torch.distributed.checkpoint.filesystem
        import torch.distributed.checkpoint.state_dict_loader
        import torch.distributed.checkpoint.state_dict_saver
        import torch.utils.serialization.config  # noqa: F401

    def save(self, state: State, path: str) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        _alone_is_meant()
        save(dict(state), storage_writer=FileSystemWriter(path), no_dist=True)

    def load(self, path: str, specs: Mapping[str, Spec]) -> State:
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        state = empty(specs)
        _alone_is_meant()
        load(state, storage_reader=FileSystemReader(path), no_dist=True)
        return state


class Safetensors:
    """``safetensors.torch``; what it maps is copied, for a map alone has read nothing."""

    name = "safetensors"
    packages: tuple[str, ...] = ("safetensors", "torch")
    schemes: tuple[str, ...] = ("file",)
    steps: tuple[str, ...] = ("write", "fsync")

    def prepare(self, path: str) -> None:
        import safetensors.torch  # noqa: F401

    def save(self, state: State, path: str) -> None:
        from safetensors.torch import save_file

        save_file(dict(state), path)
        _sync(path)

    def load(self, path: str, specs: Mapping[str, Spec]) -> State:
        from safetensors.torch import load_file

        return {name: tensor.clone() for name, tensor in load_file(path).items()}


class S3TorchConnector:
    """``s3torchconnector.S3Checkpoint`` with ``torch.save`` and ``torch.load``."""

    name = "s3torchconnector"
    packages: tuple[str, ...] = ("s3torchconnector", "torch")
    schemes: tuple[str, ...] = ("s3",)
    steps: tuple[str, ...] = ("put", "complete")

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._checkpoints: dict[str, Any] = {}  # by bucket: a client has its threads for as long as it lives

    def prepare(self, path: str) -> None:
        import torch.utils.serialization.config  # noqa: F401

        self._checkpoint(path)

    def save(self, state: State, path: str) -> None:
        import torch

        with self._checkpoint(path).writer(path) as writer:
            torch.save(state, writer)

    def load(self, path: str, specs: Mapping[str, Spec]) -> State:
        import torch

        with self._checkpoint(path).reader(path) as reader:
            found: State = torch.load(reader, weights_only=True)
            return found

    def _checkpoint(self, url: str) -> Any:
        bucket = url.split("/")[2]
        if bucket not in self._checkpoints:
            from s3torchconnector import S3Checkpoint, S3ClientConfig

            from mlstor.storage.store import open_store

            # the store finds endpoint, region and addressing as for mlstor's own requests
            store = open_store(f"s3://{bucket}", **self._options)
            facts = store.describe()
            store.close()
            config = S3ClientConfig(
                unsigned=facts["signed"] == "anonymous",
                force_path_style=facts["addressing"] == "path",
                profile=self._options.get("profile"),
            )
            endpoint = None if facts["endpoint_from"] == "AWS" else facts["endpoint"]
            self._checkpoints[bucket] = S3Checkpoint(facts["region"], endpoint=endpoint, s3client_config=config)
        return self._checkpoints[bucket]


class Mlstor:
    """`mlstor.torch.save` and `mlstor.torch.load`, which verifies."""

    name = "mlstor"
    packages: tuple[str, ...] = ("torch",)
    schemes: tuple[str, ...] = ("file", "s3", "ais")

    def __init__(self, options: Mapping[str, Any], scheme: str) -> None:
        self._options = dict(options) or None
        files = ("preallocate", "write", "fdatasync", "rename", "fsync_dir")
        self.steps: tuple[str, ...] = files if scheme == "file" else ("put", "complete")

    def prepare(self, path: str) -> None:
        import torch.utils.serialization.config  # noqa: F401

        import mlstor.blob.files
        import mlstor.blob.objects
        import mlstor.torch.loading
        import mlstor.torch.saving  # noqa: F401

    def save(self, state: State, path: str) -> None:
        from mlstor.torch import save

        save(dict(state), path, options=self._options)

    def load(self, path: str, specs: Mapping[str, Spec]) -> State:
        from mlstor.torch import load

        found: State = load(path, options=self._options)
        return found


NAMES = ("torch", "dcp", "safetensors", "s3torchconnector", "mlstor")


def route_of(name: str, path: str, options: Mapping[str, Any]) -> Route:
    """The way of that name to PATH.

    Parameters
    ----------
    name
        One of `NAMES`.
    path
        One of the run's PATHs.
    options
        Of its store.

    Raises
    ------
    UsageError
        If that way does not lead to that kind of path, or a package is missing.
    """
    scheme = scheme_of(path)
    made: dict[str, Route] = {
        "torch": Torch(),
        "dcp": Dcp(),
        "safetensors": Safetensors(),
        "s3torchconnector": S3TorchConnector(options),
        "mlstor": Mlstor(options, scheme),
    }
    route = made[name]
    if scheme not in route.schemes:
        kinds = {"file": "directories", "s3": "s3:// URLs", "ais": "ais:// URLs"}
        takes = " and ".join(kinds[one] for one in route.schemes)
        others = [other.name for other in made.values() if scheme in other.schemes]
        raise UsageError(f"--via {name} is for {takes}, not for {path}: try --via {' or '.join(others)}")
    version_of(route)
    return route


def version_of(route: Route) -> str:
    """What carries states out, with versions: ``torch 2.13.0``.

    Raises
    ------
    UsageError
        If a package is missing.
    """
    found = [] if route.name != "mlstor" else [f"mlstor {__version__}"]
    for package in route.packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            raise UsageError(f"--via {route.name} needs {package}: `pip install {package}`") from None
    return ", ".join(found)


def _alone_is_meant() -> None:
    """DCP warns of every ``no_dist``, also where it was asked for."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def empty(specs: Mapping[str, Spec]) -> dict[str, torch.Tensor]:
    """A state of these tensors, its bytes not yet set."""
    import torch

    return {name: torch.empty(spec.nelements, dtype=getattr(torch, spec.dtype)) for name, spec in specs.items()}


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
