"""The place where a run's files lie: directories, or prefixes of object stores. What a run does is the same on both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from mlstor.checkpoint.layout import step_dir
from mlstor.errors import UsageError
from mlstor.storage.store import scheme_of

if TYPE_CHECKING:
    from mlstor.checkpoint.layout import ShardFile
    from mlstor.checkpoint.options import Options
    from mlstor.checkpoint.phase import Carrier, Chain, Outcome
    from mlstor.checkpoint.preflight import Need, Preflight
    from mlstor.checkpoint.profiles import Profile
    from mlstor.checkpoint.rundir import Manifest
    from mlstor.checkpoint.session import Session
    from mlstor.checkpoint.targets import Sharing
    from mlstor.host import Host
    from mlstor.operations import Damage
    from mlstor.results import record
    from mlstor.results.phase import Cached, PhaseReport
    from mlstor.results.stream_workload import StoreUsed
    from mlstor.settings import Settings
    from mlstor.world import World

Op = Literal["write", "read"]


class Placed(NamedTuple):
    """A file of a run: in which target, its name there (``<run id>/<model>/<checkpoint>/<file>``), and where that is:
    a path, or a URL.
    """

    file: ShardFile
    target: str
    name: str
    path: str


class Site(ABC):
    """Where the files of a run lie. Targets are as `target` gives them.

    Parameters
    ----------
    settings, profile
        What holds for the run.
    """

    def __init__(self, options: Options, settings: Settings, profile: Profile) -> None:
        self.options, self.settings, self.profile = options, settings, profile

    # -- before the first byte --

    @abstractmethod
    def target(self, *, rank: int, local_rank: int, hostname: str) -> str:
        """The target of a rank; see `targets.chosen`."""

    @abstractmethod
    def path(self, target: str, name: str) -> str:
        """Where a file of a target is."""

    @abstractmethod
    def sharing(self, world: World, targets: Sequence[str], run_id: str) -> Sharing:
        """Whether hosts see one another's files; every process calls this with the targets that it uses."""

    @abstractmethod
    def check(self, needs: Sequence[Need], host: Host, memory_need_bytes: int) -> Preflight:
        """Refuse what can't be done; see `preflight.check`."""

    @abstractmethod
    def process_nbytes(self, nranks: int, largest_nbytes: int, run_nranks: int, own_nbytes: int) -> int:
        """Memory of one process of `nranks` logical ranks out of `run_nranks`, with files of up to `largest_nbytes` and
        of `own_nbytes` together.
        """

    @abstractmethod
    def load(self, target: str, run_id: str) -> Manifest | None:
        """See `rundir.load`."""

    @abstractmethod
    def claim(self, target: str, manifest: Manifest) -> Manifest:
        """See `rundir.claim`."""

    @abstractmethod
    def save(self, target: str, manifest: Manifest) -> None:
        """See `rundir.save`."""

    @abstractmethod
    def sizes(self, files: Sequence[Placed]) -> list[int | None]:
        """Bytes of each file, None where there is none."""

    # -- a phase --

    @abstractmethod
    def carrier(self, session: Session, op: Op, checkpoint: int) -> Carrier:
        """What carries out the operations of a phase; it may be that of an earlier one."""

    @abstractmethod
    def chain(self, session: Session, op: Op, rank: int, checkpoint: int, files: Sequence[Placed]) -> Chain:
        """The operations on the files that a rank writes or reads."""

    @abstractmethod
    def make_directories(self, session: Session, checkpoint: int) -> None:
        """What the files of a checkpoint need before they are written; it belongs to the phase."""

    @abstractmethod
    def before_read(self, session: Session, checkpoint: int) -> None:
        """See to it that what is read comes from the storage, as far as the user wants it."""

    @abstractmethod
    def cached(self, session: Session, report: PhaseReport, first_read: bool) -> Cached:
        """Whether a cache of this client may have answered for the storage."""

    @abstractmethod
    def damage(self, session: Session, checkpoint: int, outcome: Outcome, limit: int) -> list[Damage]:
        """Damaged places of what was read, at most `limit`; outside the clock."""

    # -- for the record --

    @abstractmethod
    def target_records(self, session: Session, found: Preflight) -> list[record.Target]:
        """This host's targets."""

    @abstractmethod
    def stores(self, targets: Sequence[str]) -> list[StoreUsed]:
        """The object stores among the targets of a run, and what they say of themselves."""

    @abstractmethod
    def workload_facts(self, session: Session, targets: Sequence[record.Target]) -> dict[str, object]:
        """Those fields of `record.Workload` that say how files are written."""

    @abstractmethod
    def settings_record(self, targets: Sequence[record.Target]) -> dict[str, record.Setting]:
        """The settings that hold here, without those that the profile fixes."""

    # -- after --

    @abstractmethod
    def remove_checkpoint(self, manifest: Manifest, target: str, checkpoint: int) -> tuple[int, list[str]]:
        """See `rundir.remove_checkpoint`."""

    @abstractmethod
    def remove(self, manifest: Manifest, target: str) -> tuple[int, list[str]]:
        """See `rundir.remove`."""

    @abstractmethod
    def end_phases(self) -> None:
        """All phases have ended: nothing is carried out any more."""

    @abstractmethod
    def cancel(self) -> None:
        """The run ends here: nothing more is begun."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; what was begun and can't be completed is undone.

        Raises
        ------
        OSError
            If something was left behind.
        """


def name_of(run_id: str, model: str, checkpoint: int, file: str) -> str:
    """A file's name in a target."""
    return f"{run_id}/{model}/{step_dir(checkpoint)}/{file}"


def scheme_of_all(paths: Sequence[str]) -> str:
    """The one kind of place that a run's PATHs are.

    Raises
    ------
    UsageError
        If they are of several kinds, or of one that is unknown.
    """
    schemes = {scheme_of(path) for path in paths}
    if len(schemes) > 1:
        raise UsageError(f"PATHs are of different kinds ({', '.join(sorted(schemes))}): give one kind")
    return schemes.pop()


def of(options: Options, settings: Settings, profile: Profile) -> Site:
    """The site of a run.

    Raises
    ------
    UsageError
        If the PATHs are of several kinds, or an option is for another kind.
    """
    directories = scheme_of_all(options.paths) == "file"
    if options.via is not None:
        from mlstor.checkpoint.via_site import ViaDirectories, ViaObjects

        return (ViaDirectories if directories else ViaObjects)(options, settings, profile)
    if directories:
        from mlstor.checkpoint.directories import Directories

        return Directories(options, settings, profile)
    from mlstor.checkpoint.objects import Objects

    return Objects(options, settings, profile)
