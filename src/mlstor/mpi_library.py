"""The MPI library of this process: mpi4py is imported and MPI initialised here, and nowhere else."""

from __future__ import annotations

import time
import warnings
from types import ModuleType
from typing import NoReturn

from mlstor.errors import MlstorError, UsageError, WorldError
from mlstor.launch import Launcher

# Rank 0 speaks first, where it has found the same; most launchers end the other ranks while they wait.
_RANK_0_FIRST_S = 0.5

# Inside Open MPI's mpirun, MPI_Init of these ends the process, with a message about PMIx.
_UNABLE_UNDER_OPEN_MPI = ("MPICH", "Intel MPI", "MVAPICH", "MVAPICH2")


def start(launcher: Launcher) -> ModuleType:
    """Import mpi4py, make sure that its library belongs to `launcher`, and initialise MPI.

    Returns
    -------
    module
        ``mpi4py.MPI``, at thread level "funneled": the engine's threads never call MPI. The caller finalises.

    Raises
    ------
    UsageError
        If mpi4py is not installed.
    WorldError
        If mpi4py finds no MPI library, or one that doesn't know the launcher, so that each rank would be
        alone.
    """
    mpi = _import(launcher)
    if launcher.family == "open-mpi" and mpi.get_vendor()[0] in _UNABLE_UNDER_OPEN_MPI:
        _refuse_mismatch(launcher, mpi)
    with warnings.catch_warnings():
        # mpi4py suspects a mismatch by the environment alone; what follows makes sure and says it in one
        # sentence.
        warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
        mpi.Init_thread(mpi.THREAD_FUNNELED)
    # PMIx tells no size; there a rank other than 0 shows that there are several.
    several = launcher.rank > 0 if launcher.size is None else launcher.size > 1
    if several and mpi.COMM_WORLD.size == 1:
        mpi.Finalize()
        _refuse_mismatch(launcher, mpi)
    return mpi


def name(mpi: ModuleType) -> str:
    """Name and version of the library, as ``"Open MPI 5.0.11"``."""
    vendor, version = mpi.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"


def _import(launcher: Launcher) -> ModuleType:
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # only once it is clear that library and launcher belong together
        mpi4py.rc.finalize = False  # after a failure of one rank MPI_Finalize would wait for ever
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        if error.name != "mpi4py":
            raise
        _refuse(
            launcher,
            UsageError(f"{launcher.started}, but mpi4py is not installed: pip install 'mlstor[mpi]'"),
        )
    except (ImportError, RuntimeError) as error:  # mpi4py's wheels look for libmpi when they are imported
        reason = "; ".join(str(error).splitlines())
        _refuse(
            launcher,
            WorldError(
                f"{launcher.started}, but mpi4py can't load an MPI library ({reason}): put the launcher's "
                f"libmpi on "
                "LD_LIBRARY_PATH, or pip install 'mlstor[mpi-wheel]' for a single machine"
            ),
        )
    return MPI


def _refuse_mismatch(launcher: Launcher, mpi: ModuleType) -> NoReturn:
    library = name(mpi)
    _refuse(
        launcher,
        WorldError(
            f"{launcher.started}, but mpi4py uses {library}, which does not know that launcher: each rank "
            f"would run "
            f"alone; use the mpirun of {library}, or install mpi4py for the launcher's MPI "
            "(python -m mpi4py --mpi-library shows what it loads)"
        ),
    )


def _refuse(launcher: Launcher, error: MlstorError) -> NoReturn:
    # Every rank may have found this, or only one, and they can't talk: so each raises.
    if launcher.rank != 0:
        time.sleep(_RANK_0_FIRST_S)
    raise error
