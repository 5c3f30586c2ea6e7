"""mlstor: what your storage gives a training job, and a library that gives the job that figure.

Everything here is looked up when first used, so that ``import mlstor`` loads neither the native core nor numpy, torch
or MPI.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AlignedBuffer": "mlstor._io",
    "DURABLE": "mlstor.operations",
    "Damage": "mlstor.operations",
    "Engine": "mlstor._io",
    "Extent": "mlstor.operations",
    "Late": "mlstor.operations",
    "Pattern": "mlstor._io",
    "ReadFile": "mlstor.operations",
    "Request": "mlstor._io",
    "Result": "mlstor.operations",
    "Step": "mlstor.operations",
    "WriteFile": "mlstor.operations",
    "default_engine": "mlstor._io",
    "evict": "mlstor._io",
    "resident": "mlstor._io",
    "CorruptionError": "mlstor.errors",
    "MlstorError": "mlstor.errors",
    "UsageError": "mlstor.errors",
    "Settings": "mlstor.settings",
    "ObjectStream": "mlstor.stream.objects",
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from mlstor._io import (
        AlignedBuffer as AlignedBuffer,
        Engine as Engine,
        Pattern as Pattern,
        Request as Request,
        default_engine as default_engine,
        evict as evict,
        resident as resident,
    )
    from mlstor.errors import (
        CorruptionError as CorruptionError,
        MlstorError as MlstorError,
        UsageError as UsageError,
    )
    from mlstor.operations import (
        DURABLE as DURABLE,
        Damage as Damage,
        Extent as Extent,
        Late as Late,
        ReadFile as ReadFile,
        Result as Result,
        Step as Step,
        WriteFile as WriteFile,
    )
    from mlstor.settings import Settings as Settings
    from mlstor.stream.objects import ObjectStream as ObjectStream


def __getattr__(name: str) -> Any:
    try:
        module = importlib.import_module(_HOME[name])
    except KeyError:
        raise AttributeError(f"module 'mlstor' has no attribute {name!r}") from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return list(__all__)
