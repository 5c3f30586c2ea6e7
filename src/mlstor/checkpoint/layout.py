"""Which logical rank writes which files, of how many bytes and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from mlstor.checkpoint.models import Shape, Tensor
from mlstor.errors import UsageError

# A file id is the rank in the upper half and the place in the rank's write order in the lower.
_INDEX_BITS = 32


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file of a checkpoint; `name` is relative to the directory of the checkpoint."""

    name: str
    nbytes: int
    rank: int
    index: int

    @property
    def file_id(self) -> int:
        """The stamp in the file's data: 64 bits, unique in the layout and the same in every run of it."""
        return self.rank << _INDEX_BITS | self.index


def step_dir(step: int) -> str:
    """Directory of checkpoint `step` (from 1) inside the model's: DLIO's ``global_epoch1_step{k}``."""
    return f"global_epoch1_step{step}"


def _scaled_nbytes(tensors: tuple[Tensor, ...], scale: Fraction) -> int:
    """Bytes of the tensors, each scaled to a whole number of elements, at least one unless it has none."""
    return sum(max(1, int(n * scale)) * itemsize for n, itemsize in tensors if n)


def _choose_ranks(shape: Shape, ranks: int | None, subset: int | None, nprocs: int) -> int:
    own = shape.nranks
    if subset is not None:
        if ranks is not None and ranks != subset:
            raise UsageError(f"--subset {subset} and --ranks {ranks} contradict each other; give one of them")
        if not 1 <= subset <= own:
            raise UsageError(f"--subset {subset} is not a part of {shape.name}, which has {own} ranks; give 1 to {own}")
        return subset
    if ranks is None:
        ranks, given = max(own, nprocs), f"{nprocs} processes, one rank each,"
    else:
        given = "1 rank" if ranks == 1 else f"{ranks} ranks"
    if ranks < 1:
        raise UsageError(f"{ranks} ranks can't write a checkpoint; give 1 or more, {shape.name} has {own}")
    group = shape.model_parallel
    if ranks > own and ranks % group:
        below = ranks // group * group
        raise UsageError(
            f"{given} do not fit {shape.name}: above its own {own} ranks the count must be a multiple "
            f"of TP x PP = {group}; "
            f"try --ranks {below} or --ranks {below + group}"
        )
    return ranks


class Layout:
    """The files of one checkpoint, dealt over logical ranks.

    Parameters
    ----------
    shape
        The model.
    ranks
        Number of logical ranks. Equal to the model's own: the full layout. Below: the first `ranks` of the
        full layout (what mlpstorage calls a subset). Above: DP = ranks / (TP x PP), which must be whole.
        Default: `subset`, else the model's own count, or `nprocs` where that is larger.
    subset
        The first `subset` ranks of the full layout; MLPerf's subset run has 8.
    scale
        Factor on the number of elements of each tensor, floored but at least one element; names and counts do
        not change.
    nprocs
        Processes of the run.

    Raises
    ------
    UsageError
        If the number of ranks fits nothing (the message has the nearest that do), or if `scale` is not above
        zero.
    """

    def __init__(
        self,
        shape: Shape,
        ranks: int | None = None,
        subset: int | None = None,
        scale: Fraction = Fraction(1),
        nprocs: int = 1,
    ):
        if scale <= 0:
            raise UsageError(f"--scale {scale} is not above zero; write it as 1/16 or 0.25")
        self.shape = shape
        self.scale = scale
        self.nranks = _choose_ranks(shape, ranks, subset, nprocs)
        self.dp = max(shape.dp, self.nranks // shape.model_parallel)
        # Per role, not per rank: (template, bytes) of each file.
        self._roles = {
            (stage, first): tuple(
                (rule.template, _scaled_nbytes(rule.tensors, scale)) for rule in shape.role_files(self.dp, stage, first)
            )
            for stage in range(shape.pp)
            for first in (True, False)
        }
        self._role_nbytes = {role: sum(nbytes for _, nbytes in files) for role, files in self._roles.items()}

    @property
    def meaning(self) -> str:
        """What this number of ranks means, in one sentence."""
        shape, own = self.shape, self.shape.nranks
        grid = f"TP {shape.tp} x PP {shape.pp} x DP {self.dp}"
        if self.nranks == own:
            return f"all {own} ranks of {shape.name} ({grid})" if own > 1 else f"the only rank of {shape.name} ({grid})"
        if self.nranks < own:
            first = "rank 0" if self.nranks == 1 else f"the first {self.nranks}"
            return f"{first} of the {own} ranks of {shape.name} ({grid}): a subset, the others' files are not written"
        return f"{self.nranks} ranks of {shape.name} instead of its own {own}, by more data parallelism ({grid})"

    def _role(self, rank: int) -> tuple[int, bool]:
        if not 0 <= rank < self.nranks:
            last = self.nranks - 1
            raise UsageError(f"there is no rank {rank}; the layout of {self.shape.name} has ranks 0 to {last}")
        return rank // self.shape.tp % self.shape.pp, rank < self.shape.model_parallel

    def files(self, rank: int) -> list[ShardFile]:
        """Files of `rank` in write order: model files by layer, then the optimizer's."""
        d, m = divmod(rank, self.shape.model_parallel)
        return [
            ShardFile(template.format(d=d, m=m, r=rank), nbytes, rank, index)
            for index, (template, nbytes) in enumerate(self._roles[self._role(rank)])
        ]

    def tensors(self, rank: int) -> list[tuple[Tensor, ...]]:
        """Of each of `files(rank)` its tensors as they are scaled; together they are the file's bytes."""
        return [
            tuple(Tensor(max(1, int(n * self.scale)), itemsize) for n, itemsize in rule.tensors if n)
            for rule in self.shape.role_files(self.dp, *self._role(rank))
        ]

    def rank_nbytes(self, rank: int) -> int:
        """Bytes that `rank` writes per checkpoint."""
        return self._role_nbytes[self._role(rank)]

    def rank_nfiles(self, rank: int) -> int:
        """Files that `rank` writes per checkpoint."""
        return len(self._roles[self._role(rank)])

    @cached_property
    def total_nbytes(self) -> int:
        """Bytes of one checkpoint over all ranks; what DLIO reports, in GiB, as ``checkpoint_size_GB``."""
        return sum(self.rank_nbytes(rank) for rank in range(self.nranks))

    @cached_property
    def nfiles(self) -> int:
        """Files of one checkpoint over all ranks."""
        return sum(self.rank_nfiles(rank) for rank in range(self.nranks))

    def all_files(self) -> Iterator[ShardFile]:
        """Files of all ranks, by rank and then in write order."""
        for rank in range(self.nranks):
            yield from self.files(rank)

    def file_name_of(self, file_id: int) -> str | None:
        """Name of the file whose data bears this id, or None where the layout has no such file."""
        rank, index = file_id >> _INDEX_BITS, file_id & ((1 << _INDEX_BITS) - 1)
        if not 0 <= rank < self.nranks or index >= self.rank_nfiles(rank):
            return None
        return self.files(rank)[index].name
