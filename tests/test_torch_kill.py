"""SIGKILL at random moments of 200 saves: the latest checkpoint always loads, and is not older than was promised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

KILLS = 200


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, if there is one: a kill is not a power failure, and more saves are done between two."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as path:
        yield Path(path)


def test_two_hundred_kills_never_cost_a_checkpoint(quick: Path) -> None:
    script = Path(__file__).with_name("kill_saves.py")
    done = subprocess.run(
        [sys.executable, str(script), str(quick), str(KILLS), "20"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    # The moments were those of saves: many a kill left something half done, and what was left did not pile up.
    assert seen["steps"] > 5
    assert seen["amidst"] > 5
    assert seen["most_names"] <= 12
