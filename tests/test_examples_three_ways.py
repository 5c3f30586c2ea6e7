"""examples/three_ways.py on a real S3 server: the ways train alike, and each reads what it says."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import s3_support

pytest.importorskip("torch")
pytest.importorskip("s3torchconnector")
import torch
from servers.weed import Weed, weed

__all__ = ["weed"]
EXAMPLE = Path(__file__).parents[1] / "examples" / "three_ways.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("three_ways", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "three_ways", module)
    s3_support.forget_aws(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def test_three_ways_through_one_bucket_train_alike(
    example: ModuleType, weed: Weed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"s3://{s3_support.make_bucket(weed)}/cifar"
    command = [url, "--endpoint", weed.endpoint, "--anonymous", "--samples", "90", "--batch", "16", "--workers", "0"]
    ways = example.main([*command, "--scratch", str(tmp_path)])
    assert [way.name for way in ways] == ["staged", "streamed", "s3torchconnector"]
    assert {way.batches for way in ways} == {6}
    assert len({way.last_loss for way in ways}) == 1  # the same images in the same order
    assert all(0 < way.first_batch_s < way.total_s for way in ways)
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[2:]] == [way.name for way in ways]
    assert not list(tmp_path.iterdir())
    ways_again = example.main([*command, "--scratch", str(tmp_path)])  # what is there is not written again
    assert ways_again[0].last_loss == ways[0].last_loss
    with pytest.raises(SystemExit, match="holds 90 objects, not 91"):
        example.main([*command[:4], "--samples", "91"])
