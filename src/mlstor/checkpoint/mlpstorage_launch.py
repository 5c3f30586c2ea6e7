"""How mlpstorage v2.0 and v3.0 start their processes: hosts, slots and the words of mpirun.

Source: mlcommons/storage ``mlpstorage/benchmarks/dlio.py`` (v2.0) and ``mlpstorage_py/utils.py`` (v3.0.26).
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from mlstor.errors import UsageError


def spread_hosts(arguments: Sequence[str], nprocs: int) -> list[tuple[str, int]]:
    """(host, slots) of ``--hosts``; without slots the processes are spread evenly, the first get more."""
    words = [word for argument in arguments for word in argument.split(",") if word]
    names = [word.partition(":")[0] for word in words]
    slots = [word.partition(":")[2] for word in words]
    if not words or not all(names):
        raise UsageError("--hosts names no host; write it as --hosts h1 h2 or --hosts h1:8,h2:8")
    if not any(slots):
        if nprocs < len(words):
            raise UsageError(
                f"--num-processes {nprocs} is less than one for each of {len(words)} hosts; name fewer hosts"
            )
        each, rest = divmod(nprocs, len(words))
        return [(name, each + (i < rest)) for i, name in enumerate(names)]
    if not all(slot.isdecimal() and int(slot) > 0 for slot in slots):
        raise UsageError(f"--hosts {' '.join(words)}: give every host its slots, as h1:8 h2:8, or none of them")
    total = sum(map(int, slots))
    if total < nprocs:
        raise UsageError(f"--hosts has {total} slots for {nprocs} processes; raise the slots or lower --num-processes")
    return list(zip(names, map(int, slots), strict=True))


def launcher(given: argparse.Namespace, hosts: list[tuple[str, int]], v3: bool) -> list[str]:
    """Words that start the processes.

    v2.0 fills the hosts in turn, v3.0 goes round them, and v3.0's mpiexec is that of HPE's PALS.
    """
    try:
        extra = [word for text in given.mpi_params or [] for word in shlex.split(text)]
    except ValueError as error:
        raise UsageError(f"--mpi-params {' '.join(given.mpi_params)}: {error}") from None
    set_by_user = {word.lstrip("-").partition("=")[0] for word in extra if word.startswith("-")}
    names = list(dict.fromkeys(name for name, _ in hosts))
    nprocs = given.num_processes
    if v3 and given.mpi_bin == "mpiexec":
        words = [
            "mpiexec",
            "-n",
            str(nprocs),
            "--ppn",
            str(-(-nprocs // len(names))),
            "--hosts",
            ",".join(names),
        ]
        return words + ([] if "cpu-bind" in set_by_user else ["--cpu-bind", "none"]) + extra
    words = [given.mpi_bin, "-n", str(nprocs), "-host", ",".join(f"{name}:{slots}" for name, slots in hosts)]
    if v3:
        several = len(names) > 1
        if "bind-to" not in set_by_user:
            words += ["--bind-to", "none"]
        if "map-by" not in set_by_user:
            words += ["--map-by", "node" if several else "socket"]
        if not several and given.mpi_btl != "auto":
            words += ["--mca", "btl", f"{given.mpi_btl},self"]
    words += ["--oversubscribe"] if given.oversubscribe else []
    words += ["--allow-run-as-root"] if given.allow_run_as_root else []
    return words + extra
