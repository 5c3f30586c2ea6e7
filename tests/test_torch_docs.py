"""The examples of the documentation about PyTorch run as they stand (those of docs/async.md in test_torch_async.py)."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import s3_support
from servers.weed import OWNER, Weed, weed

pytest.importorskip("torch")

__all__ = ["weed"]

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRELUDE = """
import torch
torch.set_num_threads(1)
model = torch.nn.Linear(1024, 1024)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 1024)).sum().backward()
optimizer.step()
"""


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "docs/torch.md"])
def test_examples_run_as_they_stand(name: str, tmp_path: pathlib.Path) -> None:
    of_torch = [block for block in blocks(name) if name != "README.md" or "mlstor.torch" in block]
    assert of_torch
    code = PRELUDE + "\n".join(of_torch).replace("/mnt/nvme", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ckpt.pt").exists()


def test_the_examples_of_distributed_checkpoints_run_as_they_stand(tmp_path: pathlib.Path) -> None:
    code = (
        PRELUDE
        + 'state = {"model": model.state_dict(), "optim": optimizer.state_dict()}\n'
        + "\n".join(blocks("docs/dcp.md")).replace("/mnt/ckpt", str(tmp_path))
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step3", "step6"]
    assert all((entry / ".metadata").exists() for entry in tmp_path.iterdir())


def test_the_examples_of_datasets_run_as_they_stand(weed: Weed, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torchdata")
    with s3_support.bucket(weed) as store:
        for number in range(150):
            store.write(f"train/{number:03d}", number.to_bytes(2, "little") * 50)
        name = store.url.rstrip("/")
        code = "import torch\nstate = {}\n" + "\n".join(blocks("docs/datasets.md"))
        code = code.replace("s3://bucket", name).replace("http://store:9000", weed.endpoint)
        code = code.replace("/shared", str(tmp_path)) + "\nassert len(dataset) == 150 and len(batch) == 150 % 64\n"
        done = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120, env=reaching(weed)
        )
        assert done.returncode == 0, done.stderr


def reaching(server: Weed) -> dict[str, str]:
    """The environment of a user whose variables say all that a URL does not."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": OWNER.access_key,
        "AWS_SECRET_ACCESS_KEY": OWNER.secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


FIRST = """
import sys, warnings
from itertools import islice
import torch
torch.set_num_threads(1)
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "torch.distributed is disabled")
warnings.filterwarnings("ignore", "This DataLoader will create")
warnings.filterwarnings("ignore", "'set_vital' is deprecated")
warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
import torch.distributed.checkpoint as dcp
from torchdata.stateful_dataloader import StatefulDataLoader
from mlstor.torch import EpochSampler, ObjectDataset, StorageReader, StorageWriter, load, save

def decode(sample):
    return sample.index

def check(found):
    assert found["step"] == 3 and torch.equal(found["w"], state["w"])

bucket, scratch = sys.argv[1:]
state = {"w": torch.arange(3e6), "step": 3}
for place in (f"{scratch}/ckpt.pt", f"{bucket}/run0/ckpt.pt"):
    save(state, place)
    check(load(place))
check(torch.load(f"{scratch}/ckpt.pt"))
dcp.save(state, storage_writer=StorageWriter(f"{scratch}/step3"))
into = {"w": torch.zeros(3_000_000), "step": 0}
dcp.load(into, storage_reader=dcp.FileSystemReader(f"{scratch}/step3"))
check(into)
dcp.async_save(state, storage_writer=StorageWriter(f"{bucket}/run1/step3")).result()
into = {"w": torch.zeros(3_000_000), "step": 0}
dcp.load(into, storage_reader=StorageReader(f"{bucket}/run1/step3"))
check(into)

def begin():
    ds = ObjectDataset(f"{bucket}/train", transform=decode)
    return StatefulDataLoader(ds, sampler=EpochSampler(ds, seed=7), batch_size=64, num_workers=4)

loader = begin()
seen = [index for batch in islice(loader, 2) for index in batch.tolist()]
save({"data": loader.state_dict()}, f"{bucket}/run1/data.pt")
del loader
loader = begin()
loader.load_state_dict(load(f"{bucket}/run1/data.pt", weights_only=False)["data"])
seen += [index for batch in loader for index in batch.tolist()]
assert len(seen) == 300 and sorted(seen) == list(range(300)), len(seen)
assert seen != sorted(seen)
"""


def test_a_user_s_first_lines_run_on_a_directory_and_a_bucket(weed: Weed, tmp_path: pathlib.Path) -> None:
    """Save, load, distributed checkpoints, and a shuffled data set that goes on exactly, by URLs alone."""
    pytest.importorskip("torchdata")
    with s3_support.bucket(weed) as store:
        for number in range(300):
            store.write(f"train/{number:03d}", number.to_bytes(2, "little"))
        done = subprocess.run(
            [sys.executable, "-c", FIRST, store.url.rstrip("/"), str(tmp_path)],
            check=False, capture_output=True, text=True, timeout=120, env=reaching(weed),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
