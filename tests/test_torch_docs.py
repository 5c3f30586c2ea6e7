"""The examples of docs/torch.md and of the README's part about PyTorch run as they stand."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("torch")

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRELUDE = """
import torch
torch.set_num_threads(1)
model = torch.nn.Linear(1024, 1024)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 1024)).sum().backward()
optimizer.step()
"""


@pytest.mark.parametrize("name", ["README.md", "docs/torch.md"])
def test_examples_run_as_they_stand(name: str, tmp_path: pathlib.Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
    of_torch = [block for block in blocks if name != "README.md" or "mlstor.torch" in block]
    assert of_torch
    code = PRELUDE + "\n".join(of_torch).replace("/mnt/nvme", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ckpt.pt").exists()
