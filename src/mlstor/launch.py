"""Which launcher started this process, as far as its environment shows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mlstor.errors import UsageError


@dataclass(frozen=True)
class Launcher:
    """An MPI launcher.

    Attributes
    ----------
    name : str
        For messages and the record: ``"Open MPI mpirun"``, ``"MPICH mpiexec"``, ``"Slurm srun"``, ...
    family : str
        ``"open-mpi"``, ``"pmi"`` (MPICH, Intel MPI, PALS), ``"slurm"`` or ``"pmix"``.
    rank, size : int or None
        What it told this process; PMIx tells no size.
    widen : str or None
        The option that lets a rank use all cores of its host, if this launcher has one.
    """

    name: str
    family: str
    rank: int
    size: int | None
    widen: str | None

    @property
    def started(self) -> str:
        """``"Open MPI mpirun started 8 ranks"``, for messages."""
        return f"{self.name} started {'this rank' if self.size is None else f'{self.size} ranks'}"


def detect(environ: Mapping[str, str] | None = None) -> Launcher | None:
    """The launcher that `environ` (default: this process's) tells of, None if started by hand.

    The innermost comes first: ranks of an mpirun that runs inside a Slurm job inherit Slurm's variables too,
    and those then describe mpirun's daemons.

    Raises
    ------
    UsageError
        If a launcher's variable is not a number.
    """
    env = os.environ if environ is None else environ
    if "OMPI_COMM_WORLD_SIZE" in env:
        return Launcher(
            "Open MPI mpirun",
            "open-mpi",
            _number(env, "OMPI_COMM_WORLD_RANK"),
            _number(env, "OMPI_COMM_WORLD_SIZE"),
            "--bind-to none",
        )
    slurm_step = "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env
    if "PMI_SIZE" in env and ("MPI_LOCALRANKID" in env or not slurm_step):
        hydra = "MPI_LOCALRANKID" in env  # both MPICH's and Intel's Hydra set it, srun --mpi=pmi2 doesn't
        return Launcher(
            "MPICH mpiexec (Hydra)" if hydra else "a PMI launcher",
            "pmi",
            _number(env, "PMI_RANK"),
            _number(env, "PMI_SIZE"),
            "-bind-to none" if hydra else None,
        )
    if slurm_step:
        return Launcher(
            "Slurm srun",
            "slurm",
            _number(env, "SLURM_PROCID"),
            _number(env, "SLURM_STEP_NUM_TASKS"),
            "--cpu-bind=none",
        )
    if "PMIX_RANK" in env:
        return Launcher("a PMIx launcher", "pmix", _number(env, "PMIX_RANK"), None, None)
    return None


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    if not text.isdigit():
        raise UsageError(f"the launcher's variable {name} is {text!r}, not a number; unset it or start with mpirun")
    return int(text)
