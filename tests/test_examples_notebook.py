"""examples/checkpoint.ipynb runs as it stands, in one process, and its interrupt button ends a load under way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

import nbclient
import nbformat
import torch
from jupyter_client import manager

NOTEBOOK = Path(__file__).parents[1] / "examples" / "checkpoint.ipynb"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of jupyter's own event loops
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def test_the_notebook_runs_as_it_stands(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # what is committed says nothing of a machine
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    said = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "torch.load reads it" in said
    assert "is not what was written" in said


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    running, client = manager.start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    yield running, client
    client.stop_channels()
    running.shutdown_kernel(now=True)


def test_the_interrupt_button_ends_a_load_at_once(kernel: tuple[Any, Any], tmp_path: Path) -> None:
    running, client = kernel
    torch.save({"weights": torch.zeros(8 << 20)}, tmp_path / "checkpoint.pt")

    def ask(code: str) -> str:
        asked: str = client.execute(code)
        return asked

    def answer(asked: str, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            message = client.get_shell_msg(timeout=max(0.1, deadline - time.monotonic()))
            if message["parent_header"].get("msg_id") == asked:
                content: dict[str, Any] = message["content"]
                return content

    assert answer(ask("from mlstor.torch import load; load('checkpoint.pt')"), 60)["status"] == "ok"
    loading = ask("open('begun', 'w').close()\nwhile True: load('checkpoint.pt')")
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)  # some loads
    start = time.monotonic()
    running.interrupt_kernel()
    ended = answer(loading, 30)
    assert ended["status"] == "error"
    assert ended["ename"] == "KeyboardInterrupt"
    assert time.monotonic() - start < 30
    # and the kernel goes on
    assert answer(ask("load('checkpoint.pt')['weights'].sum().item() == 0.0 or 1 / 0"), 30)["status"] == "ok"
