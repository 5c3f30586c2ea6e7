"""Checkpoints and data sets for PyTorch on the engine: durable, verified, in the formats that PyTorch reads itself.

Everything here is looked up when first used: ``import mlstor.torch`` loads neither torch nor the native core.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Arena": "mlstor.torch.arena",
    "AsyncSave": "mlstor.torch.saving_async",
    "BusyError": "mlstor.torch.arena",
    "CheckpointDirectory": "mlstor.torch.checkpoint_directory",
    "CheckpointIO": "mlstor.torch.lightning",
    "EpochSampler": "mlstor.torch.sampler",
    "ObjectDataset": "mlstor.torch.dataset",
    "ObjectIterableDataset": "mlstor.torch.iterable",
    "StorageReader": "mlstor.torch.dcp_reader",
    "StorageWriter": "mlstor.torch.dcp_writer",
    "TokenDataset": "mlstor.torch.token_dataset",
    "UnverifiedWarning": "mlstor.torch.loading",
    "async_save": "mlstor.torch.saving_async",
    "load": "mlstor.torch.loading",
    "load_safetensors": "mlstor.torch.safetensors",
    "save": "mlstor.torch.saving",
    "save_safetensors": "mlstor.torch.safetensors",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from mlstor.torch.arena import Arena as Arena, BusyError as BusyError
    from mlstor.torch.checkpoint_directory import CheckpointDirectory as CheckpointDirectory
    from mlstor.torch.dataset import ObjectDataset as ObjectDataset
    from mlstor.torch.dcp_reader import StorageReader as StorageReader
    from mlstor.torch.dcp_writer import StorageWriter as StorageWriter
    from mlstor.torch.iterable import ObjectIterableDataset as ObjectIterableDataset
    from mlstor.torch.lightning import CheckpointIO as CheckpointIO
    from mlstor.torch.loading import UnverifiedWarning as UnverifiedWarning, load as load
    from mlstor.torch.safetensors import load_safetensors as load_safetensors, save_safetensors as save_safetensors
    from mlstor.torch.sampler import EpochSampler as EpochSampler
    from mlstor.torch.saving import save as save
    from mlstor.torch.saving_async import AsyncSave as AsyncSave, async_save as async_save
    from mlstor.torch.token_dataset import TokenDataset as TokenDataset


def __getattr__(name: str) -> Any:
    try:
        module = importlib.import_module(_HOME[name])
    except KeyError:
        raise AttributeError(f"module 'mlstor.torch' has no attribute {name!r}") from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return list(__all__)
