"""A run before its first byte: who does what, where it lies, and whether it can be done. Every process makes one.

Each step that can fail for a user's mistake ends with `World.agree`, so that a run of any size says it once.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

from mlstor.agreement import agreed, together
from mlstor.checkpoint import preflight, rundir, site, targets
from mlstor.checkpoint.deal import deal, parse_ranks
from mlstor.checkpoint.models import Transformer
from mlstor.checkpoint.options import Options
from mlstor.checkpoint.plan import span
from mlstor.checkpoint.profiles import PROFILES
from mlstor.checkpoint.rundir import Manifest
from mlstor.checkpoint.site import Placed, Site
from mlstor.errors import MlstorError, UsageError
from mlstor.host import Host, describe
from mlstor.runlog import check_results_dir
from mlstor.settings import Settings
from mlstor.world import World

T = TypeVar("T")


class Session:
    """What a run is, as one of its processes sees it.

    Attributes
    ----------
    run_id, results_id : str
        Names of the run's directory on the targets, and of its record's.
    ranks, my_ranks : list of int
        Logical ranks of the run, and of this process.
    manifest : Manifest
        The claim on the files, or of a read-only run the claim that it reads by; set by `begin`.
    claimed : bool
        Whether targets may hold a manifest of this run.
    claims : list of str
        Targets whose manifest this process keeps.
    site : Site
        Where the files lie, and what carries them there.
    notes : list of str
        What is still to be said of a phase.
    """

    def __init__(self, world: World, options: Options, command: list[str]) -> None:
        self.world, self.options, self.command = world, options, command
        self.profile = PROFILES[options.profile]
        self.settings = self.agreed(
            lambda: Settings.resolve(
                block_bytes=options.block_bytes,
                depth=options.depth,
                workers=options.workers,
                backend=options.backend,
                direct=options.direct,
                results_dir=options.results_dir,
            )
        )
        self.layout = self.agreed(lambda: options.layout(world.size))
        self.only = self.agreed(
            lambda: None if options.only_ranks is None else parse_ranks(options.only_ranks, self.layout.nranks)
        )
        self.dealt = deal(self.layout.nranks, world.size, options.deal, self.only)
        self.my_ranks = self.dealt[world.rank]
        self.ranks = sorted(rank for ranks in self.dealt for rank in ranks)
        self.verify = self.profile.verify if options.verify is None else options.verify
        self.pause_s = self.profile.pause_s if options.pause_s is None else options.pause_s
        self.run_id = options.run_id or together(world, _new_run_id)
        self.host: Host = describe()
        check_results_dir(world, self.settings.results_dir)
        self.notes: list[str] = []
        self.claimed = False
        self.manifest: Manifest
        self.site: Site = self.agreed(lambda: site.of(options, self.settings, self.profile))
        try:
            self._prepare()
        except BaseException:
            self.site.close()
            raise

    def _prepare(self) -> None:
        """Find out whether it can be done, and who does what."""
        world, options = self.world, self.options
        mine = self.agreed(lambda: sorted({self.target_of(rank) for rank in self.my_ranks}) or self._idle_target())
        self.sharing = self.site.sharing(world, mine, self.run_id)
        targets.check_rank_shift(world, self.sharing, options.rank_shift)
        self.preflight = self._preflight()
        self.claims = self._claims()
        self.results_id = together(world, self._free_results_id)

    def begin(self) -> None:
        """Claim the run's directories, or find the run that is to be read; from here on an interrupted run leaves
        something behind.
        """
        self.manifest = self._claim() if self.options.writes else self._find()

    def agreed(self, step: Callable[[], T], took_part: bool = True) -> T:
        """The result of a step that every process takes, see `agreement.agreed`."""
        return agreed(self.world, step, took_part)

    # -- where files lie --

    @cached_property
    def _place(self) -> dict[int, tuple[int, int]]:
        """For each logical rank its process, and its place among the logical ranks of that process's host."""
        process_of = {rank: process for process, ranks in enumerate(self.dealt) for rank in ranks}
        count: dict[int, int] = {}
        place: dict[int, tuple[int, int]] = {}
        for rank in self.ranks:  # in this order, so that another number of processes finds the same places
            host = self.world.host_of_rank[process_of[rank]]
            place[rank] = (process_of[rank], count.get(host, 0))
            count[host] = count.get(host, 0) + 1
        return place

    def target_of(self, rank: int) -> str:
        """The target of a logical rank: a directory, or an object store's URL."""
        process, local_rank = self._place[rank]
        hostname = self.world.hosts[self.world.host_of_rank[process]]
        return self.site.target(rank=rank, local_rank=local_rank, hostname=hostname)

    @property
    def meaning(self) -> str:
        """What the number of ranks means, and which of them run."""
        if self.only is None:
            return self.layout.meaning
        return f"{'rank' if len(self.ranks) == 1 else 'ranks'} {span(self.ranks)} of {self.layout.meaning}"

    def _idle_target(self) -> list[str]:
        """The target of a process without ranks: that of its place, so that its host looks for tokens too."""
        world = self.world
        return [self.site.target(rank=world.rank, local_rank=world.local_rank, hostname=world.hostname)]

    def source_rank(self, rank: int) -> int:
        """The logical rank whose files `rank` reads."""
        index = (self.ranks.index(rank) + self.options.rank_shift) % len(self.ranks)
        return self.ranks[index]

    def files(self, rank: int, checkpoint: int) -> list[Placed]:
        """A logical rank's files of one checkpoint, in write order, and where they are."""
        target, model = self.target_of(rank), self.layout.shape.name
        names = [(file, site.name_of(self.run_id, model, checkpoint, file.name)) for file in self.layout.files(rank)]
        return [Placed(file, target, name, self.site.path(target, name)) for file, name in names]

    @cached_property
    def largest_nbytes(self) -> int:
        """The largest file of this process's ranks, bytes."""
        return max((file.nbytes for rank in self.my_ranks for file in self.layout.files(rank)), default=0)

    def nbytes_of_host(self, host: int) -> int:
        """Bytes of one checkpoint on a host."""
        return sum(
            self.layout.rank_nbytes(rank)
            for process, ranks in enumerate(self.dealt)
            if self.world.host_of_rank[process] == host
            for rank in ranks
        )

    # -- can it be done --

    def _preflight(self) -> preflight.Preflight | None:
        """The first process of each host looks; None for the others."""
        world = self.world
        own_nbytes = sum(map(self.layout.rank_nbytes, self.my_ranks))
        process = self.site.process_nbytes(len(self.my_ranks), self.largest_nbytes, len(self.ranks), own_nbytes)

        def look() -> preflight.Preflight | None:
            if world.local_rank != 0:
                return None
            return self.site.check(self._needs(), self.host, world.local_size * process)

        return self.agreed(look, world.local_rank == 0)

    def _needs(self) -> list[preflight.Need]:
        """What goes into each directory that this host uses, and into those of other hosts that lie beside it."""
        writes = self.options.writes or 0
        mine = self.sharing.targets_by_host[self.world.host_index]
        needs = {path: preflight.Need(path, 0, 0) for path in mine}
        if not writes:
            return list(needs.values())
        shared = self.sharing.kind == "shared" or self.options.sharing == "shared"
        ranks_of: dict[str, list[int]] = {path: [] for path in mine}
        for process, ranks in enumerate(self.dealt):
            if shared or self.world.host_of_rank[process] == self.world.host_index:
                for rank in ranks:
                    ranks_of.setdefault(self.target_of(rank), []).append(rank)
        devices = {_device(path): path for path in mine}
        devices.pop(None, None)
        for path, ranks in ranks_of.items():
            # Other hosts' directories count where they are on a file system of this host's own.
            at = path if path in needs else devices.get(_device(path))
            if at is not None:
                # beside the files: a directory per checkpoint, the run's and the model's, and the manifest
                nbytes = writes * sum(map(self.layout.rank_nbytes, ranks))
                nfiles = writes * (sum(map(self.layout.rank_nfiles, ranks)) + 1) + 3
                needs[at] = preflight.Need(at, needs[at].nbytes + nbytes, needs[at].files + nfiles)
        return list(needs.values())

    # -- whose files these are --

    def _claims(self) -> list[str]:
        """Targets whose manifest this process keeps: the first process of the first host that has them."""
        if self.world.local_rank != 0:
            return []
        by_host = self.sharing.targets_by_host
        mine = by_host[self.world.host_index]
        if self.sharing.kind == "per-node":
            return list(mine)
        earlier = {path for host in range(self.world.host_index) for path in by_host[host]}
        return [path for path in mine if path not in earlier]

    def _claim(self) -> rundir.Manifest:
        key = int(together(self.world, lambda: str(rundir.new_key())))
        options, shape = self.options, self.layout.shape
        wanted = rundir.Manifest(
            format=rundir.FORMAT,
            run_id=self.run_id,
            run_key=key,
            model=shape.name,
            shape=shape if options.workload is not None and isinstance(shape, Transformer) else None,
            ranks=self.layout.nranks,
            scale=str(self.layout.scale),
            compressibility=options.compressibility,
            only_ranks=None if self.only is None else tuple(self.only),
            targets=tuple(options.paths),
            written=options.writes or 0,
        )

        def claim() -> rundir.Manifest:
            claimed = [self.site.claim(target, wanted) for target in self.claims]
            return max(claimed, key=lambda manifest: manifest.written, default=wanted)

        self.claimed = True
        try:
            return self.agreed(claim, bool(self.claims))
        except MlstorError:
            self.claimed = False
            raise

    def _find(self) -> rundir.Manifest:
        """The manifest of the run to be read, and all of this process's files, or a sentence on what is missing."""
        sources = [self.target_of(self.source_rank(rank)) for rank in self.my_ranks]
        paths = sorted(set(sources)) or self._idle_target()
        manifests = self.agreed(lambda: [self._load(path) for path in paths])
        # Each target holds a manifest of its own; a run that ended badly may have left them unlike.
        keys, complete = {found.run_key for found in manifests}, {found.complete for found in manifests}
        said = self.world.allgather(json.dumps([sorted(keys), sorted(complete)]).encode())
        for text in said:
            theirs = json.loads(text)
            keys |= set(theirs[0])
            complete |= {tuple(numbers) for numbers in theirs[1]}
        common = sorted(set.intersection(*map(set, complete)))

        def find() -> rundir.Manifest:
            if len(keys) > 1 or not common:
                raise UsageError(
                    f"run {self.run_id} has no checkpoint that is complete in all of {', '.join(self.options.paths)}: "
                    "it was interrupted; write it again"
                )
            manifest = replace(manifests[0], complete=tuple(common))
            self._find_files(manifest)
            return manifest

        return self.agreed(find)

    def _load(self, path: str) -> rundir.Manifest:
        manifest = self.site.load(path, self.run_id)
        if manifest is None:
            raise UsageError(
                f"{self.world.hostname} has no run {self.run_id} in {path}: name the --run-id and PATH of a "
                "run that was written with --reads 0 or --keep, on these hosts"
            )
        if not manifest.complete:
            raise UsageError(
                f"run {self.run_id} in {path} has no complete checkpoint: it was interrupted; write it again"
            )
        asked = (self.layout.shape.name, self.layout.nranks, str(self.layout.scale))
        if asked != (manifest.model, manifest.ranks, manifest.scale):
            raise UsageError(
                f"run {self.run_id} in {path} was written with --model {manifest.model} --ranks {manifest.ranks} "
                f"--scale {manifest.scale}: say the same to read it"
            )
        absent = set(self.ranks) - set(manifest.only_ranks or self.ranks)
        if absent:
            raise UsageError(
                f"run {self.run_id} in {path} was written with --only-ranks: there are no files of rank {min(absent)}; "
                "say the same to read it"
            )
        return manifest

    def _find_files(self, manifest: rundir.Manifest) -> None:
        files = [
            placed
            for rank in self.my_ranks
            for checkpoint in manifest.complete
            for placed in self.files(self.source_rank(rank), checkpoint)
        ]
        for placed, nbytes in zip(files, self.site.sizes(files), strict=True):
            if nbytes is None:
                raise UsageError(
                    f"{self.world.hostname} lacks {placed.path} of run {self.run_id}: was it removed, or written by "
                    "another host, per node? Start the ranks on the hosts that wrote, or use a shared PATH"
                )
            if nbytes != placed.file.nbytes:
                raise UsageError(
                    f"{placed.path} has {nbytes} bytes on {self.world.hostname}, but {placed.file.nbytes} were "
                    "written: it is damaged or was written over"
                )

    def _free_results_id(self) -> str:
        """The run id, or with the time where a record or journal of it exists, or where another run is read."""
        taken = os.path.join(self.settings.results_dir, self.run_id)
        if self.options.writes and not os.path.exists(taken):
            return self.run_id
        return f"{self.run_id}-{_new_run_id()}"


def _device(path: str) -> int | None:
    """The device of a directory's file system, None where there is no such directory on this host."""
    try:
        return os.stat(path).st_dev
    except OSError:  # another host's, or refused with its reason by the checks of this host's own
        return None


def _new_run_id() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
