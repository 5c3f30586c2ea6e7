"""The place of a run's files under ``--via``: the same directories and prefixes, names, manifests and removal."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mlstor import _io
from mlstor.checkpoint import honesty
from mlstor.checkpoint.directories import Directories
from mlstor.checkpoint.honesty import Evicted
from mlstor.checkpoint.objects import Objects
from mlstor.checkpoint.phase import Chain
from mlstor.checkpoint.site import Op, Placed, Site
from mlstor.checkpoint.via import Route, route_of, version_of
from mlstor.checkpoint.via_carrier import Carried, ViaCarrier, ViaJob, specs_of
from mlstor.results.phase import PathTaken
from mlstor.storage.store import scheme_of

if TYPE_CHECKING:
    from mlstor.checkpoint.options import Options
    from mlstor.checkpoint.phase import Outcome
    from mlstor.checkpoint.profiles import Profile
    from mlstor.checkpoint.session import Session
    from mlstor.operations import Damage
    from mlstor.results import record
    from mlstor.settings import Settings

# torch itself and its libraries; measured at 250 MiB
_TORCH_NBYTES = 256 << 20
#: A process holds its ranks' states, and a way may make another copy of them: safetensors' save and s3torchconnector's
#: load do.
_COPIES = 2


def memory_nbytes(own_nbytes: int) -> int:
    """Memory of a process whose ranks have so many bytes."""
    return _TORCH_NBYTES + _COPIES * own_nbytes


class _Via(Site):
    """What both places have in common."""

    def __init__(self, options: Options, settings: Settings, profile: Profile) -> None:
        super().__init__(options, settings, profile)
        assert options.via is not None
        self._route: Route = route_of(options.via, options.paths[0], options.store_options)
        self._phase: ViaCarrier | None = None
        self._route.prepare(options.paths[0])

    def process_nbytes(self, nranks: int, largest_nbytes: int, run_nranks: int, own_nbytes: int) -> int:
        return memory_nbytes(own_nbytes)

    def carrier(self, session: Session, op: Op, checkpoint: int) -> Any:
        self._end()
        taken = PathTaken(backend=version_of(self._route), direct="unverified", fs_type=self._fs_type(session))
        self._phase = ViaCarrier(self._route, op, taken)
        return self._phase

    @abstractmethod
    def _fs_type(self, session: Session) -> str:
        """Of what this process reads and writes, as the record has it."""

    def chain(self, session: Session, op: Op, rank: int, checkpoint: int, files: Sequence[Placed]) -> Chain:
        jobs = []
        for placed in files:
            compared = op == "write" or session.verify
            pattern = honesty.pattern(session.manifest, checkpoint, placed.file.file_id) if compared else None
            specs = specs_of(session.layout, placed.file.rank, placed.file.index)
            jobs.append(ViaJob(placed.path, placed.file.nbytes, specs, pattern, op))
        return Chain(rank, len(files), [jobs])

    def damage(self, session: Session, checkpoint: int, outcome: Outcome, limit: int) -> list[Damage]:
        assert isinstance(outcome, Carried)
        return outcome.damage[:limit]

    def workload_facts(self, session: Session, targets: Sequence[record.Target]) -> dict[str, object]:
        return {
            "via": self._route.name,
            "via_version": version_of(self._route),
            "steps": list(self._route.steps),
            "direct": "auto" if self._route.name == "mlstor" else "off",
            "backend": "auto",
            "block_bytes": 0,
            "depth": 1,
            "workers": 1,
        }

    def end_phases(self) -> None:
        self._end()  # the engines and transfers of a run without --via were never made

    def cancel(self) -> None:
        if self._phase is not None:
            self._phase.cancel()

    def _end(self) -> None:
        phase, self._phase = self._phase, None
        if phase is not None:
            phase.close()


class ViaDirectories(_Via, Directories):
    """Directories; a way may make a directory of what is a file in the layout."""

    def _fs_type(self, session: Session) -> str:
        target = next((session.target_of(rank) for rank in session.my_ranks), None)
        return "" if target is None else _io.alignment(target)["fs_type"]

    def before_read(self, session: Session, checkpoint: int) -> None:
        self._evicted = None
        if not self.options.evict:
            return
        resident = looked_at = 0
        for rank in session.my_ranks:
            for placed in session.files(session.source_rank(rank), checkpoint):
                for path in _files(placed.path):
                    _io.evict(path)
                    found, nbytes = _io.resident(path)
                    resident += found
                    looked_at += nbytes
        self._evicted = Evicted(resident, looked_at)


class ViaObjects(_Via, Objects):
    """Object stores."""

    def _fs_type(self, session: Session) -> str:
        return scheme_of(self.options.paths[0])


def _files(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
        return
    for name in sorted(os.listdir(path)):
        yield os.path.join(path, name)
