"""What the tests of distributed checkpoints share: states, saves and loads in one process, comparison."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from mlstor.torch import StorageReader, StorageWriter

torch.set_num_threads(1)


def a_state(seed: int = 0) -> dict[str, Any]:
    """Tensors of several kinds and sizes, and what is no tensor."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    base = normal(700, 900)
    return {
        "large": normal(1500, 1001, dtype=torch.bfloat16),
        "two": {"a": normal(64, 65), "b": [normal(3), normal(0, 4)]},
        "scalar": torch.tensor(3.5 + seed, dtype=torch.float64),
        "bool": normal(100) > 0,
        "complex": torch.complex(normal(10), normal(10)),
        "slice": base[100:600],
        "strided": base[:, 10:500],
        "transposed": normal(800, 650).t(),
        "channels": normal(4, 3, 20, 20).to(memory_format=torch.channels_last),
        "conjugate": torch.complex(normal(6), normal(6)).conj(),
        "expanded": normal(5, 1).expand(5, 700),
        "parameter": torch.nn.Parameter(normal(33, 7)),
        "step": 7 + seed,
        "text": "x" * 70_000,
    }


def blank(value: Any) -> Any:
    """A state of the same shape with other content, row-major."""
    if isinstance(value, torch.Tensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    if isinstance(value, dict):
        return {key: blank(part) for key, part in value.items()}
    if isinstance(value, list):
        return [blank(part) for part in value]
    return type(value)()


def assert_same(found: Any, wanted: Any, where: str = "state") -> None:
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype, where
        assert torch.equal(found, wanted), where
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}[{key!r}]")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for index, part in enumerate(wanted):
            assert_same(found[index], part, f"{where}[{index}]")
    else:
        assert found == wanted, where


def quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Without the warning that there is no process group, and with all others as errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        return call(*args, **kwargs)


def save(state: dict[str, Any], path: Path | str, **options: Any) -> StorageWriter:
    writer = StorageWriter(path, **options)
    quietly(dcp.save, state, storage_writer=writer)
    return writer


def load(state: dict[str, Any], path: Path | str, **options: Any) -> tuple[dict[str, Any], StorageReader]:
    """What is loaded into a blank state, and the reader."""
    into = blank(state)
    reader = StorageReader(path, **options)
    quietly(dcp.load, into, storage_reader=reader)
    return into, reader
