"""`EpochSampler`: the order of an epoch, dealt to ranks, with a position of a few integers to go on from exactly."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, SupportsIndex

from torch.utils.data import Sampler

from mlstor.errors import UsageError
from mlstor.stream.order import Order, Share
from mlstor.stream.state import State
from mlstor.torch._worker import placed

if TYPE_CHECKING:
    from mlstor.stream.order import Uneven

_CHUNK = 1024  # positions that are computed at once
_FRAMES = 8  # from a draw up to the loader that feeds workers: batch sampler, _next_index, _try_put_index


class EpochSampler(Sampler[int]):
    """Every sample once per epoch over all ranks, in a random order that needs no memory and is the same everywhere.

    Its state is a few integers whatever the number of samples. In torchdata's ``StatefulDataLoader`` it goes on, after
    a restart, behind the last batch that training got, with any number of ranks and the same number of workers: no
    sample of an epoch is lost or comes twice. A plain DataLoader with workers draws ahead of training; a state that
    is saved then skips what was drawn, and a warning says so.

    Each iteration is one epoch, and the next one the next epoch. After a loop that was left early, say which epoch is
    meant with `set_epoch`.

    Parameters
    ----------
    data : dataset or int
        What is sampled, or how many there are.
    seed : int
        Of the orders, 64 bits. 0 by default.
    rank, world_size : int, optional
        By default those of torch.distributed if it has begun, else of torchrun's ``RANK`` and ``WORLD_SIZE``, else 0
        of 1.
    uneven : {"exact", "drop", "pad"}
        What becomes of samples that can't be dealt evenly: the first ranks get one more; nobody gets them in this
        epoch; or all ranks get equally many, the last ones samples of the epoch's beginning again.
    shuffle : bool
        False: in the dataset's order.

    Attributes
    ----------
    epoch : int
        Of the next iteration.

    Raises
    ------
    UsageError
        If there is no sample, or an option is not understood.
    """

    def __init__(
        self,
        data: Sized | int,
        *,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = "exact",
        shuffle: bool = True,
    ) -> None:
        if not isinstance(data, (int, Sized)):
            raise UsageError(
                f"data is a dataset with a length, or a number of samples, not {type(data).__name__} (an "
                "ObjectIterableDataset has an order of its own)"
            )
        n = data if isinstance(data, int) else len(data)
        if n < 1:
            raise UsageError("there is nothing to sample: the dataset is empty")
        if not isinstance(seed, SupportsIndex) or not 0 <= (seed := int(seed)) < 1 << 64:
            raise UsageError(f"seed={seed!r}: give a number of 64 bits, 0 or more")
        rank, world_size = placed(rank, world_size)
        self._share = Share(n, rank, world_size, uneven)
        self._order = Order(n, seed, "permutation" if shuffle else "sequential")
        self._digest = str(getattr(data, "digest", ""))
        #: where the next iteration begins: epoch, and the position from which this rank's share is dealt
        self._epoch, self._base = 0, 0
        self._latest: weakref.ref[_Positions] | None = None
        self._warned = False

    @property
    def epoch(self) -> int:
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch, from its beginning; of the one it would go on with anyway, from there."""
        if not isinstance(epoch, SupportsIndex) or (epoch := int(epoch)) < 0:
            raise UsageError(f"epoch {epoch!r}: epochs are numbers that count from 0")
        if epoch != self._epoch:
            self._epoch, self._base = epoch, 0
            self._latest = None

    def __len__(self) -> int:
        """Samples of this rank in the next iteration: those of an epoch, or what is left of one that goes on."""
        return len(self._share.positions(self._base))

    def __iter__(self) -> _Positions:
        # Loaders call this several times before the first draw, and once more to load a state: it must change nothing.
        return _Positions(self)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: plain integers and strings. A ``StatefulDataLoader``'s own state has it."""
        latest = None if self._latest is None else self._latest()
        if latest is None:
            return self._state(self._epoch, self._base)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if latest.fed_ahead and not caller.startswith("torchdata.") and not self._warned:
            self._warned = True
            warnings.warn(
                "the DataLoader has drawn samples ahead of training for its workers, and this state counts them as "
                "trained: use torchdata's StatefulDataLoader, and save the state_dict() of the loader",
                stacklevel=2,
            )
        return latest.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """The next iteration goes on from there.

        Parameters
        ----------
        state
            What `state_dict` gave: of any rank, if all were saved after the same number of full batches; or of all of
            them in the order of ranks, which are then compared. The number of ranks may have been another one.

        Raises
        ------
        UsageError
            If it is of other samples, another seed, order or `uneven`, or the ranks' states disagree.
        """
        self._epoch, self._base = self._checked(state)
        self._latest = None

    def _state(self, epoch: int, position: int) -> dict[str, Any]:
        return self._now(epoch, position).as_dict()

    def _now(self, epoch: int, position: int) -> State:
        return State(
            seed=self._order.seed,
            epoch=epoch,
            position=position,
            n=self._order.n,
            catalog=self._digest,
            order=self._order.kind,
            uneven=self._share.uneven,
        )

    def _checked(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[int, int]:
        if isinstance(state, Mapping):
            saved = State.from_dict(state)
        elif not isinstance(state, Sequence) or not state or isinstance(state, str):
            raise UsageError(f"{state!r} is no state: give what state_dict() gave, or a list of all ranks'")
        else:
            saved = State.agree([State.from_dict(one) for one in state])
        saved.check(self._now(0, 0))
        return saved.epoch, saved.position

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}  # an iterator stays in its process


class _Positions(Iterator[int]):
    """One iteration. Its position is its own: a sampler may have several under way."""

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler
        self._begin(sampler._epoch, sampler._base)

    def _begin(self, epoch: int, base: int) -> None:
        self._epoch, self._base, self._done = epoch, base, 0
        self._positions = self._sampler._share.positions(base)
        self._ready: list[int] = []  # of the order, last first
        self._ended = False
        #: whether a loader that has workers draws from it, which it does ahead of what it delivers; None: not known yet
        self.fed_ahead: bool | None = None

    def __next__(self) -> int:
        if self.fed_ahead is None:
            self.fed_ahead = _feeds_workers()
            self._sampler._latest = weakref.ref(self)
        if not self._ready:
            self._ready = self._computed()
        self._done += 1
        return self._ready.pop()

    def _computed(self) -> list[int]:
        positions = self._positions[self._done : self._done + _CHUNK]
        if not positions:
            # Loaders ask again after the end, once for each batch that they prefetch: the epoch advances once.
            if not self._ended:
                self._ended = True
                sampler = self._sampler
                if sampler._epoch == self._epoch:
                    sampler._epoch, sampler._base = self._epoch + 1, 0
            raise StopIteration
        indices = self._sampler._order.indices(self._epoch, positions.start, positions.step, len(positions))
        found: list[int] = indices.tolist()
        found.reverse()
        return found

    def state_dict(self) -> dict[str, Any]:
        # Whoever asks may still be in the loop, at the epoch's last batch: so it is the end of this epoch and not the
        # beginning of the next, and a loop over epochs that goes on there counts as it did.
        share = self._sampler._share
        position = share.n if self._ended else share.position_after(self._base, self._done)
        return self._sampler._state(self._epoch, position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        sampler = self._sampler
        epoch, position = sampler._checked(state)
        self._begin(epoch, position)
        sampler._epoch, sampler._base = epoch, position
        if position == sampler._share.n:
            # This one has nothing to give. A loader that had been at its end replaces it without asking it.
            sampler._epoch, sampler._base = epoch + 1, 0


def _feeds_workers() -> bool:
    """Whether a DataLoader with workers is drawing now: it does so ahead of the batches that it delivers."""
    frame = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame.f_code.co_name == "_try_put_index":
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
