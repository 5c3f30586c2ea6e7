"""Shapes read from the workload files of DLIO and mlpstorage, as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlstor.checkpoint.models import Shape, Transformer
from mlstor.errors import UsageError

# DLIO dlio_benchmark/checkpointing/base_checkpointing.py get_datatype_size
_ITEMSIZE_BYTES = {"int8": 1, "uint8": 1, "fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
_RANK_STATE_BYTES = 10240  # DLIO's default of model.model_size_bytes
_ARCHITECTURE = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_kv_heads", "vocab_size")


class _Section:
    """A mapping of the file, with errors that name file and key."""

    def __init__(self, path: str | os.PathLike[str], name: str, content: Any):
        if not isinstance(content, Mapping):
            raise UsageError(f"{path}: {name or 'the file'} is not a YAML mapping; is this a DLIO workload file?")
        self.path, self.name, self.content = path, name, content

    def _key(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def section(self, key: str) -> _Section:
        content = self.content.get(key)
        return _Section(self.path, self._key(key), {} if content is None else content)

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.content.get(key, default)
        if value is None:
            raise UsageError(f"{self.path}: {self._key(key)} is missing; add it, as a whole number")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(
                f"{self.path}: {self._key(key)} is {value!r}; it must be a whole number of at least {least}"
            )
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.content.get(key) or []
        if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
            raise UsageError(f"{self.path}: {self._key(key)} is {value!r}; it must be a list of whole numbers")
        return tuple(n for n in value if n)

    def text(self, key: str, default: str) -> str:
        value = self.content.get(key, default)
        if not isinstance(value, str) or not value:
            raise UsageError(f"{self.path}: {self._key(key)} is {value!r}; it must be a word")
        return value

    def itemsize_bytes(self, key: str, default: str, elsewhere: _Section) -> int:
        """Bytes per element; DLIO's older files have the data types under `checkpoint`."""
        found = self if key in self.content else elsewhere
        datatype = found.text(key, default)
        if datatype not in _ITEMSIZE_BYTES:
            known = ", ".join(_ITEMSIZE_BYTES)
            raise UsageError(f"{self.path}: {found._key(key)} is {datatype!r}; it must be one of {known}")
        return _ITEMSIZE_BYTES[datatype]


def _load(path: str | os.PathLike[str]) -> Any:
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"can't read the workload file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{path}{where} is not YAML; give a workload file of DLIO or mlpstorage") from None


def from_workload_yaml(path: str | os.PathLike[str]) -> Shape:
    """The shape that a workload file of DLIO or mlpstorage describes.

    Read are `model` (architecture, data types, parallelism, or listed `layer_parameters` and
    `optimization_groups`) and `framework`; all else in the file concerns other parts of DLIO. As these files
    leave DP out, a shape has DP = 1 unless `model.parallelism.data` says otherwise; more ranks then raise DP.

    Raises
    ------
    UsageError
        If the file can't be read, is not YAML, lacks a key, or describes what DLIO itself refuses.
    """
    top = _Section(path, "", _load(path))
    if "model" not in top.content:
        raise UsageError(f"{path}: model is missing; is this a DLIO workload file?")
    framework = top.text("framework", "pytorch")
    if framework != "pytorch":
        raise UsageError(f"{path}: framework is {framework!r}; only the files of pytorch checkpoints are known")
    model = top.section("model")
    parallelism = model.section("parallelism")
    name = model.text("name", Path(path).stem)
    if "/" in name or name in (".", ".."):
        raise UsageError(f"{path}: model.name is {name!r}; it names a directory and may not hold a /")

    layer_parameters = model.integers("layer_parameters")
    optimization_groups = model.integers("optimization_groups")
    architecture = dict.fromkeys(_ARCHITECTURE, 0) | {"num_attention_heads": 1}
    if not layer_parameters or not optimization_groups:
        transformer = model.section("transformer")
        architecture = {key: transformer.integer(key) for key in _ARCHITECTURE}
    rank_state_nbytes = 0
    if model.text("type", "default") != "transformer":
        rank_state_nbytes = model.integer("model_size_bytes", _RANK_STATE_BYTES, least=0)

    data_parallel = parallelism.integer("data", -1, least=-1)  # -1: DLIO takes it from the number of processes
    checkpoint = top.section("checkpoint")
    shape = Transformer(
        name=name,
        tp=parallelism.integer("tensor", 1),
        pp=parallelism.integer("pipeline", 1),
        dp=max(1, data_parallel),
        zero_stage=parallelism.integer("zero_stage", 0, least=0),
        nlayers=model.integer("num_layers"),
        hidden=architecture["hidden_size"],
        ffn=architecture["ffn_hidden_size"],
        heads=architecture["num_attention_heads"],
        kv_heads=architecture["num_kv_heads"],
        vocab=architecture["vocab_size"],
        model_itemsize=model.itemsize_bytes("model_datatype", "fp16", checkpoint),
        optimizer_itemsize=model.itemsize_bytes("optimizer_datatype", "fp32", checkpoint),
        layer_parameters=layer_parameters,
        optimization_groups=optimization_groups,
        rank_state_nbytes=rank_state_nbytes,
    )
    if shape.zero_stage > 3:
        raise UsageError(f"{path}: model.parallelism.zero_stage is {shape.zero_stage}; it must be 0, 1, 2 or 3")
    if shape.zero_stage == 3 and shape.pp > 1:
        raise UsageError(
            f"{path}: ZeRO stage 3 does not go with pipeline parallelism; set pipeline to 1 or zero_stage to 1"
        )
    if shape.nlayers < shape.pp:
        raise UsageError(
            f"{path}: {shape.nlayers} layers can't fill {shape.pp} pipeline stages; lower model.parallelism.pipeline"
        )
    return shape
