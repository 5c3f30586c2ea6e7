"""Started by test_targets.py under mpirun: are the given PATHs shared? Rank 0 prints the answer."""

from __future__ import annotations

import argparse
import json
import sys

from mlstor.checkpoint import targets
from mlstor.errors import MlstorError
from mlstor.world import connect


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--asserted", choices=("shared", "per-node"))
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--rank-shift", type=int, default=0)
    args = parser.parse_args()
    try:
        with connect() as world:
            mine = targets.resolve(args.paths, rank=world.rank, local_rank=world.local_rank, hostname=world.hostname)
            sharing = targets.discover(
                world, [mine], "run-1", asserted=args.asserted, read_only=args.read_only, look_for_s=0.5
            )
            targets.check_rank_shift(world, sharing, args.rank_shift)
            if world.rank == 0:
                sys.stdout.write(
                    json.dumps({"kind": sharing.kind, "targets": sharing.targets_by_host, "hosts": world.hosts})
                )
            return 0
    except MlstorError as error:
        sys.stderr.write(f"told: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
