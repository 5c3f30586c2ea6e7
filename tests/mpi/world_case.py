"""Started by test_world.py under mpirun: one behaviour of a world, named by the first argument."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

from mlstor.errors import MlstorError, UsageError
from mlstor.signals import Interrupts
from mlstor.world import World, connect


def say(text: str) -> None:
    sys.stdout.write(text + "\n")  # one write: lines of several ranks don't mix
    sys.stdout.flush()


def facts(world: World) -> None:
    gathered = world.gather(b"g%d" % world.rank)
    everywhere = world.allgather(b"a%d" % world.rank)
    told = world.bcast(b"from %d" % world.rank)
    say(
        json.dumps(
            {
                "rank": world.rank,
                "size": world.size,
                "local": [world.local_rank, world.local_size],
                "host": [world.host_index, world.nhosts, world.hostname],
                "gather": gathered and [text.decode() for text in gathered],
                "allgather": [text.decode() for text in everywhere],
                "bcast": told.decode(),
                "launcher": world.launcher,
                "library": world.mpi_library,
            }
        )
    )


def wait(world: World) -> None:
    world.barrier("warm up")
    before = resource.getrusage(resource.RUSAGE_SELF)
    if world.rank == 0:
        time.sleep(3)
    world.barrier("measure")
    after = resource.getrusage(resource.RUSAGE_SELF)
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    say(f"rank={world.rank} cpu_ms={int(used_s * 1000)}")


def fail(world: World) -> None:
    if world.rank == 1:
        os.open("/nonexistent/directory/file", os.O_RDONLY)
    world.barrier("never")


def bug(world: World) -> None:
    if world.rank == 1:
        json.loads("{}")["no such key"]
    world.barrier("never")


def disagree(world: World) -> None:
    world.agree(UsageError("the drive is full") if world.rank == 1 else None)
    say("reached")


def leader_fails(world: World) -> None:
    world.agree(UsageError("no such drive") if world.rank == 0 else None, took_part=world.rank == 0)
    say("reached")


def all_fail(world: World) -> None:
    world.agree(UsageError("no such model"))
    say("reached")


def hang(world: World) -> None:
    world.barrier("warm up")
    say(f"rank={world.rank} pid={os.getpid()}")
    if world.rank == 0:
        time.sleep(60)
    world.barrier("never")
    say("reached")


def hang_all(world: World) -> None:
    world.barrier("warm up")
    say(f"rank={world.rank} pid={os.getpid()}")
    try:
        if world.rank != world.size - 1:
            world.barrier("never")
        time.sleep(60)
    finally:
        # To a file: an mpirun that is being stopped forwards no more output.
        Path(os.environ["CASE_DIRECTORY"], f"saved-{world.rank}").touch()


def main() -> int:
    case, *expected = sys.argv[1:]
    nodes, ranks = (int(text) if text != "-" else None for text in (expected or ["-", "-"]))
    try:
        with Interrupts(), connect(nodes, ranks) as world:
            globals()[case](world)
            return 0
    except MlstorError as error:
        sys.stderr.write(f"told: {error}\n")
        return error.exit_code
    except KeyboardInterrupt as error:
        return int(getattr(error, "exit_code", 130))


if __name__ == "__main__":
    sys.exit(main())
