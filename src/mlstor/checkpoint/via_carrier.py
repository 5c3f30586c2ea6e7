"""States of a phase, carried out by `via`: one after the other in a thread, as a rank's own process would."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from mlstor.checkpoint.via import Route, Spec, State, empty
from mlstor.errors import CorruptionError, MlstorError
from mlstor.results import phase as report

if TYPE_CHECKING:
    from mlstor._io import Pattern
    from mlstor.checkpoint.layout import Layout
    from mlstor.checkpoint.phase import Chain, Outcome
    from mlstor.checkpoint.site import Op
    from mlstor.operations import Damage

_BLOCK_BYTES = 4096  # of the pattern's stamps
_DTYPES = {1: "uint8", 2: "bfloat16", 4: "float32", 8: "int64"}


def specs_of(layout: Layout, rank: int, index: int) -> dict[str, Spec]:
    """The tensors of a file: each begins with a block of the pattern of its own."""
    specs: dict[str, Spec] = {}
    offset = 0
    for number, (nelements, itemsize) in enumerate(layout.tensors(rank)[index]):
        specs[f"tensor{number:04d}"] = Spec(nelements, _DTYPES[itemsize], offset)
        offset += -(-nelements * itemsize // _BLOCK_BYTES) * _BLOCK_BYTES
    return specs


class ViaJob:
    """A file of a logical rank. A written one's state is made with it, outside the clock."""

    def __init__(self, path: str, nbytes: int, specs: Mapping[str, Spec], pattern: Pattern | None, op: Op) -> None:
        self.path, self.nbytes, self.specs, self.pattern = path, nbytes, specs, pattern
        self.state: State | None = None
        if op == "write":
            assert pattern is not None
            self.state = empty(specs)
            for name, spec in specs.items():
                pattern.fill(bytes_of(self.state[name]), spec.offset)


class Carried:
    """What became of it; see `phase.Outcome`. `loaded` is compared with the pattern when that is asked for first."""

    def __init__(self, job: ViaJob, start_ns: int, end_ns: int, loaded: State | None) -> None:
        self.path, self.nbytes = job.path, job.nbytes
        self.start_ns, self.end_ns = start_ns, end_ns
        self._job, self._loaded = job, loaded

    @cached_property
    def damage(self) -> list[Damage]:
        """Damaged places; their offsets are those of the pattern."""
        if self._loaded is None or self._job.pattern is None:
            return []
        import torch

        specs = self._job.specs
        if self._loaded.keys() != specs.keys():
            raise CorruptionError(f"{self.path}: there are other tensors in it than were written")
        found: list[Damage] = []
        for name, spec in specs.items():
            tensor = self._loaded[name]
            if tuple(tensor.shape) != (spec.nelements,) or tensor.dtype != getattr(torch, spec.dtype):
                raise CorruptionError(f"{self.path}: {name} has another shape or dtype than what was written")
            data = bytes_of(tensor)
            blocks = -(-len(data) // _BLOCK_BYTES)
            found += self._job.pattern.check(data, spec.offset, blocks)
        self._loaded = None
        return found

    @property
    def damaged_blocks(self) -> int:
        return len(self.damage)


class _Counted(NamedTuple):
    busy_ns: int
    wait_ns: int


class ViaCarrier:
    """See `phase.Carrier`.

    Parameters
    ----------
    route
        What saves and loads.
    op
        What is done in the phase.
    taken
        How the files are reached, for the record, and with what file system.
    """

    workers = 1

    def __init__(self, route: Route, op: Op, taken: report.PathTaken) -> None:
        self._route, self._op, self._taken = route, op, taken
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlstor-via")
        self._owner: dict[Future[Carried], Chain] = {}
        self._moved_nbytes = self._busy_ns = self._wait_ns = 0

    @property
    def outstanding(self) -> int:
        return len(self._owner)

    def begin(self) -> None:
        """There are no figures of an earlier phase: each has a carrier of its own."""

    def counters(self) -> _Counted:
        """Of the thread that calls the way: threads of its own are in the process's CPU time only."""
        return _Counted(self._busy_ns, self._wait_ns)

    def moved_nbytes(self) -> int:
        return self._moved_nbytes

    def submit(self, stage: Sequence[ViaJob], chain: Chain) -> int:
        for job in stage:
            self._owner[self._pool.submit(self._carry_out, job)] = chain
        return len(stage)

    def _carry_out(self, job: ViaJob) -> Carried:
        start_ns, cpu_ns = time.monotonic_ns(), time.thread_time_ns()
        loaded: State | None = None
        try:
            if job.state is not None:
                self._route.save(job.state, job.path)
            else:
                loaded = self._route.load(job.path, job.specs)
        except (OSError, MlstorError, MemoryError):
            raise
        except BaseException as error:  # DCP's is no Exception
            raise _as_os_error(error, self._route.name, job.path) from error
        end_ns, busy_ns = time.monotonic_ns(), time.thread_time_ns() - cpu_ns
        job.state = None
        self._busy_ns += busy_ns
        self._wait_ns += max(0, end_ns - start_ns - busy_ns)
        self._moved_nbytes += job.nbytes
        return Carried(job, start_ns, end_ns, loaded if job.pattern is not None else None)

    def reap(self, timeout_s: float) -> Iterator[tuple[Chain, Outcome]]:
        done, _ = wait(self._owner, timeout_s, FIRST_COMPLETED)
        for future in done:
            yield self._owner.pop(future), future.result()

    def cancel(self) -> None:
        """A state that is being saved or loaded can't be called back: its way has no means for that."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def figures(self, into: report.PhaseReport, outcomes: Sequence[Outcome]) -> None:
        paths = {outcome.path for outcome in outcomes}
        if paths:
            self._taken.nfiles, self._taken.nbytes = len(paths), sum(outcome.nbytes for outcome in outcomes)
            into.paths = [self._taken]

    def close(self) -> None:
        """End the thread, once the one state that it is at is done."""
        self._pool.shutdown(cancel_futures=True)


def _as_os_error(error: BaseException, way: str, path: str) -> OSError:
    """A failure that a way tells by an error of its own: torch.save's is a RuntimeError, DCP's holds those of ranks."""
    inner: BaseException = error
    for first, *_ in getattr(error, "failures", {}).values():
        inner = first
        break
    found: BaseException | None = inner
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    code = errno.EIO if found is None or found.errno is None else found.errno
    said = " ".join(str(inner).split())
    return OSError(code, f"--via {way} failed with {type(inner).__name__}: {said}", path)


def bytes_of(tensor: Any) -> Any:
    """A tensor's bytes, without a copy."""
    import torch

    return tensor.detach().view(torch.uint8).numpy()
