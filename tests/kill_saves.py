"""Saves in children that are killed at random moments; after each, the directory must still hold what was promised.

Run by test_torch_kill.py: ``python kill_saves.py DIRECTORY KILLS SEED``. Prints what it saw as one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mlstor import Engine
from mlstor.operations import is_leftover
from mlstor.torch.checkpoint_directory import CheckpointDirectory

#: One tensor whose CRC is computed while it is written, one that is packed with its header.
SIZES = {"large": 300_000, "small": 100}


def state(step: int) -> dict[str, Any]:
    return {"step": step, **{name: torch.full((size,), float(step)) for name, size in SIZES.items()}}


def save_until_killed(path: str, first: int, kill: int, report: int) -> None:
    """In the child: tells each step that was promised to be durable."""
    background = kill % 2 == 1
    # A killed process's ring takes the kernel tens of milliseconds to take down: not for every kill.
    backend = "auto" if kill % 8 < 2 else "threads"
    with Engine(workers=1, depth=2, block_bytes=256 << 10, backend=backend) as engine:
        directory = CheckpointDirectory(path, keep=2, engine=engine)
        os.write(report, struct.pack("<q", -1))
        for step in range(first, first + 10_000):
            if background:
                directory.save_async(step, state(step)).result()
            else:
                directory.save(step, state(step))
            os.write(report, struct.pack("<q", step))


def killed(path: str, first: int, kill: int, delay_s: float) -> int:
    """Kills a child `delay_s` after it began to save; the last step that it reported, or -1."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            save_until_killed(path, first, kill, write)
        finally:
            os._exit(3)
    os.close(write)
    with os.fdopen(read, "rb") as reports:
        promised = reports.read(8)
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
        promised += reports.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == -signal.SIGKILL, f"the child ended by itself with {status}"
    return max((step for (step,) in struct.iter_unpack("<q", promised)), default=-1)


def check(path: str, promised: int) -> int:
    """The latest checkpoint loads, is a state that was saved, and not older than what was promised."""
    latest = CheckpointDirectory(path).latest()
    if latest is None:
        assert promised < 0, f"step {promised} was durable, and nothing is found"
        return -1
    found = latest.load()
    assert latest.step >= promised, f"step {promised} was durable, and {latest.step} is the latest"
    assert found["step"] == latest.step
    for name, size in SIZES.items():
        assert torch.equal(found[name], torch.full((size,), float(latest.step))), f"{name} of step {latest.step}"
    return latest.step


def main() -> None:
    path, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    rng = random.Random(seed)
    steps, amidst, most_names = -1, 0, 0
    for kill in range(kills):
        promised = killed(path, steps + 1, kill, rng.uniform(0, 0.04))
        left = os.listdir(path)
        whole = {Path(name).stem for name in left if name.endswith(".json")}
        amidst += any(is_leftover(name) or (name.endswith(".pt") and Path(name).stem not in whole) for name in left)
        most_names = max(most_names, len(left))
        steps = check(path, max(steps, promised))
    print(json.dumps({"steps": steps, "amidst": amidst, "most_names": most_names}))


if __name__ == "__main__":
    main()
