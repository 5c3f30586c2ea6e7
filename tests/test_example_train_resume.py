"""examples/train_resume.py: killed twice, it ends with the weights of a training that was not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("torchdata")

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_resume.py"


def start(directory: Path, *options: str) -> subprocess.Popen[bytes]:
    """Into a file: workers of a killed trainer live for some seconds, and would hold a pipe open."""
    with directory.with_suffix(".out").open("wb") as out, directory.with_suffix(".err").open("wb") as err:
        return subprocess.Popen([sys.executable, str(EXAMPLE), str(directory), *options], stdout=out, stderr=err)


def finish(process: subprocess.Popen[bytes], directory: Path, code: int = 0) -> str:
    status = process.wait(timeout=120)
    assert status == code, directory.with_suffix(".err").read_text()
    return directory.with_suffix(".out").read_text()


def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(whole)
    # The first kill is amidst an epoch, which has 25 steps, the second at the end of one.
    finish(start(killed, "--die-at", "37"), killed, -signal.SIGKILL)
    wanted = finish(uninterrupted, whole)
    finish(start(killed, "--die-at", "50"), killed, -signal.SIGKILL)
    resumed, digest = finish(start(killed), killed).split("\n", 1)
    assert resumed in ("resumed after step 45", "resumed after step 50")
    assert digest == wanted
