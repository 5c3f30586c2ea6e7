"""Model shapes: how a checkpoint of a model is cut into tensors and files.

A shape knows its own tensor-, pipeline- and data-parallel counts and gives the files of a *role*. Ranks of
one role (pipeline stage, first data-parallel replica or not) write files of the same sizes, so a layout of
thousands of ranks is laid out by role.

Sources: the Llama-3 rows and their rules are those of MLPerf Storage v3.0's checkpoint workload
(mlcommons/storage ``configs/dlio/workload/llama3_*.yaml``, DLIO
``dlio_benchmark/checkpointing/base_checkpointing.py``); the OPT rows are those of metaseq's
``metaseq/launcher/opt_job_constants.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from mlstor.errors import UsageError


class Tensor(NamedTuple):
    """One tensor of a file: number of elements, and bytes per element."""

    nelements: int
    itemsize_bytes: int


class FileRule(NamedTuple):
    """A file that each rank of a role writes.

    `template` is a `str.format` text of the data-parallel rank ``d``, the model-parallel rank ``m`` and the
    rank ``r``.
    """

    template: str
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Shape(ABC):
    """A model and the parallelism its checkpoint is written with.

    Attributes
    ----------
    name
        Also the name of the model's directory.
    tp, pp, dp
        Tensor-, pipeline- and data-parallel counts; rank r has tensor rank ``r % tp``, stage ``r // tp % pp``
        and data-parallel rank ``r // (tp * pp)``.
    zero_stage
        0 to 3, of DeepSpeed's ZeRO: what is sharded over the data-parallel ranks.
    """

    name: str
    tp: int
    pp: int
    dp: int
    zero_stage: int

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one replica of the model: TP x PP."""
        return self.tp * self.pp

    @property
    def nranks(self) -> int:
        """The model's own number of ranks: TP x PP x DP."""
        return self.model_parallel * self.dp

    @property
    @abstractmethod
    def nparameters(self) -> int:
        """Parameters of the model; 0 when the shape lists its tensors and not its architecture."""

    @abstractmethod
    def role_files(self, dp: int, stage: int, first_replica: bool) -> tuple[FileRule, ...]:
        """Files in write order that each rank of a role writes.

        Parameters
        ----------
        dp
            Data-parallel count of the layout; may differ from the shape's own.
        stage
            Pipeline stage of the rank, from 0.
        first_replica
            Whether the rank's data-parallel rank is 0.
        """


@dataclass(frozen=True)
class Transformer(Shape):
    """A transformer by DLIO's rules; a workload file may list its tensors instead.

    Attributes
    ----------
    nlayers, hidden, ffn, heads, kv_heads, vocab
        The architecture; gated MLP, grouped-query attention, untied embedding and head.
    model_itemsize, optimizer_itemsize
        Bytes per element of the model's and of the optimizer's tensors; 2 (fp16) and 4 (fp32) in MLPerf's
        four.
    layer_parameters
        Bytes of each tensor of a layer before they are divided by TP; replaces the architecture's layers when
        not empty.
    optimization_groups
        Bytes of each group of the optimizer on a rank; replaces the architecture's optimizer when not empty.
    rank_state_nbytes
        Bytes of one more file that each writing rank puts first; 0 for a transformer.
    """

    nlayers: int = 0
    hidden: int = 0
    ffn: int = 0
    heads: int = 1
    kv_heads: int = 1
    vocab: int = 0
    model_itemsize: int = 2
    optimizer_itemsize: int = 4
    layer_parameters: tuple[int, ...] = ()
    optimization_groups: tuple[int, ...] = ()
    rank_state_nbytes: int = 0

    @cached_property
    def _layer_elements(self) -> tuple[int, int, int, int]:
        """Elements of a layer's four matrices: qkv, dense, h to 4h (gated, hence twice), 4h to h."""
        # The head size is floored before it is multiplied: llama3-1t has heads of 134, not 134.75.
        kv_width = self.hidden // self.heads * self.kv_heads
        return (
            self.hidden * (self.hidden + 2 * kv_width),
            self.hidden * self.hidden,
            2 * self.hidden * self.ffn,
            self.hidden * self.ffn,
        )

    @property
    def nparameters(self) -> int:
        if not self.hidden:
            return 0
        per_layer = 2 * self.hidden + sum(self._layer_elements)
        return 2 * self.vocab * self.hidden + self.nlayers * per_layer + self.hidden

    def stage_layers(self, stage: int) -> list[int]:
        """Layers of a stage: 0 is the embedding, 1 to L are the blocks, L+1 the head, L+2 the last norm."""
        each, rest = divmod(self.nlayers, self.pp)
        first = 1 + stage * each + min(stage, rest)
        layers = list(range(first, first + each + (stage < rest)))
        if self.layer_parameters:  # DLIO: listed layers have neither embedding nor head
            return layers
        if stage == 0:
            layers.insert(0, 0)
        if stage == self.pp - 1:
            layers += [self.nlayers + 1, self.nlayers + 2]
        return layers

    def _layer_tensors(self, layer: int, split: int) -> tuple[Tensor, ...]:
        """Tensors of `layer` on one rank; `split` is DP where ZeRO shards the parameters too, else 1."""
        if self.layer_parameters:
            return tuple(Tensor(nbytes // self.tp, 1) for nbytes in self.layer_parameters)
        # Floored after each division, as DLIO does, and the norms are not sharded over TP.
        norm = self.hidden // split
        if layer == self.nlayers + 2:
            counts = [norm]
        elif layer in (0, self.nlayers + 1):
            counts = [self.hidden * self.vocab // self.tp // split]
        else:
            qkv, dense, up, down = (n // self.tp // split for n in self._layer_elements)
            counts = [norm, qkv, dense, norm, up, down]
        return tuple(Tensor(n, self.model_itemsize) for n in counts)

    def _optimizer_tensors(self, dp: int) -> tuple[Tensor, ...]:
        if self.optimization_groups:
            pairs = [Tensor(nbytes, 1) for nbytes in self.optimization_groups for _ in range(2)]
            return (*pairs, Tensor(sum(self.optimization_groups), 1))
        # Without ZeRO only the first replica saves its optimizer, and all of it.
        nshards = self.model_parallel * (dp if self.zero_stage else 1)
        shard = self.nparameters // nshards
        if not shard:
            return ()
        return (Tensor(shard, self.optimizer_itemsize), Tensor(5 * self.hidden, self.optimizer_itemsize)) * 3

    def role_files(self, dp: int, stage: int, first_replica: bool) -> tuple[FileRule, ...]:
        if self.zero_stage == 0 and not first_replica:
            return ()
        rules = []
        if self.rank_state_nbytes:
            rules.append(FileRule("model_states-{r}.pt", (Tensor(self.rank_state_nbytes, 1),)))
        split = dp if self.zero_stage == 3 else 1
        layers = [(i, self._layer_tensors(i, split)) for i in self.stage_layers(stage)]
        together = tuple(tensor for _, tensors in layers for tensor in tensors)
        if self.zero_stage in (0, 3):
            rules.append(FileRule("zero_pp_rank_{d}_mp_rank_{m}_model_states.pt", together))
        elif first_replica and self.pp > 1:
            rules += [FileRule(f"layer_{i}-model_{{m}}_model_states.pt", tensors) for i, tensors in layers]
        elif first_replica:
            rules.append(FileRule("model_{m}_model_states.pt", together))
        rules.append(FileRule("zero_pp_rank_{d}_mp_rank_{m}_optim_states.pt", self._optimizer_tensors(dp)))
        return tuple(rule for rule in rules if rule.tensors)


@dataclass(frozen=True)
class FlatShards(Shape):
    """A model kept as one flat vector per model-parallel rank, sharded over the data-parallel ranks (FSDP).

    Every rank writes one file, named as metaseq names its latest checkpoint with ``--use-sharded-state``.

    Attributes
    ----------
    nlayers, hidden
        The architecture: OPT, with an MLP of 4 x hidden and a tied embedding.
    itemsizes
        Bytes per parameter of each vector that is saved.
    """

    nlayers: int
    hidden: int
    itemsizes: tuple[int, ...]

    # metaseq: vocabulary padded to 51196 rows, 2050 learned positions (2048 and an offset of 2).
    EMBEDDING_ROWS = 51196 + 2050

    @property
    def nparameters(self) -> int:
        h = self.hidden
        return self.nlayers * (12 * h * h + 13 * h) + 2 * h + self.EMBEDDING_ROWS * h

    def role_files(self, dp: int, stage: int, first_replica: bool) -> tuple[FileRule, ...]:
        shard = -(-self.nparameters // (self.model_parallel * dp))  # FSDP pads the flat vector to equal shards
        tensors = tuple(Tensor(shard, itemsize) for itemsize in self.itemsizes)
        return (FileRule("checkpoint_last-model_part-{m}-shard{d}.pt", tensors),)


_LLAMA3 = {  # name: layers, hidden, ffn, heads, kv heads, TP, PP, DP of MLPerf's CLOSED division, ZeRO stage
    "llama3-8b": (32, 4096, 14336, 32, 8, 1, 1, 8, 3),
    "llama3-70b": (80, 8192, 28672, 128, 8, 8, 1, 8, 3),
    "llama3-405b": (126, 16384, 53248, 128, 8, 8, 32, 2, 1),
    "llama3-1t": (128, 25872, 98304, 192, 32, 8, 64, 2, 1),
}
_LLAMA3_VOCAB = 128256

_OPT = {  # name: layers, hidden, model-parallel ranks
    "opt-125m": (12, 768, 2),
    "opt-350m": (24, 1024, 2),
    "opt-760m": (24, 1536, 2),
    "opt-1.3b": (24, 2048, 2),
    "opt-2.7b": (32, 2560, 4),
    "opt-6.7b": (32, 4096, 2),
    "opt-13b": (40, 5120, 2),
    "opt-30b": (48, 7168, 2),
    "opt-66b": (64, 9216, 8),
    "opt-175b": (96, 12288, 8),
}
_OPT_RANKS = 8  # the table has no count of its own; one node of eight accelerators
_OPT_STATES = {
    "fp16": (2,),  # weights alone
    "lean": (2, 4, 4),  # --memory-efficient-fp16: weights, Adam's two moments in fp32
    "full": (2, 4, 4, 4),  # and the fp32 master weights
}


def _builtin() -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name, (nlayers, hidden, ffn, heads, kv_heads, tp, pp, dp, zero_stage) in _LLAMA3.items():
        shapes[name] = Transformer(
            name, tp, pp, dp, zero_stage, nlayers, hidden, ffn, heads, kv_heads, vocab=_LLAMA3_VOCAB
        )
    for model, (nlayers, hidden, parts) in _OPT.items():
        for states, itemsizes in _OPT_STATES.items():
            name = f"{model}-{states}"
            shapes[name] = FlatShards(name, parts, 1, _OPT_RANKS // parts, 3, nlayers, hidden, itemsizes)
    return shapes


MODELS: dict[str, Shape] = _builtin()


def get(name: str) -> Shape:
    """The built-in shape of that name.

    Raises
    ------
    UsageError
        If there is none; the message has the closest names and all of them.
    """
    if name in MODELS:
        return MODELS[name]
    import difflib

    wanted = name.lower()
    closest = [known for known in MODELS if known.startswith(wanted + "-")]
    closest = closest or difflib.get_close_matches(wanted, MODELS, n=3, cutoff=0.5)
    llama = ", ".join(_LLAMA3)
    opt = ", ".join(model.removeprefix("opt-") for model in _OPT)
    hint = f"did you mean {' or '.join(closest)}? " if closest else ""
    raise UsageError(
        f"unknown model {name!r}; {hint}Known are {llama}, and opt-SIZE-STATE with SIZE {opt} and STATE "
        f"{', '.join(_OPT_STATES)}; for any other model give its workload file with --workload"
    )
