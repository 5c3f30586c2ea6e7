"""Lightning trains, stops and goes on through `CheckpointIO`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from torch_support import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Lightning and its dependencies say of themselves at import
    lightning = pytest.importorskip("lightning.pytorch")

from mlstor.torch.lightning import CheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning: few workers, missing loggers, ...


class Model(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def train(path: Path, background: bool, epochs: int, resume: str | None = None) -> Any:
    lightning.seed_everything(1)
    model = Model()
    keeper = lightning.callbacks.ModelCheckpoint(path, filename="{epoch}", save_top_k=1, monitor=None)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        plugins=[CheckpointIO(background)],
        callbacks=[keeper],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader(torch.arange(32.0).reshape(8, 4) / 32, batch_size=4)
    trainer.fit(model, data, ckpt_path=resume)
    trainer.strategy.teardown()
    return model.state_dict()


@pytest.mark.parametrize("background", [False, True])
def test_a_trainer_saves_resumes_and_removes(tmp_path: Path, background: bool) -> None:
    whole = train(tmp_path / "whole", background, 4)
    train(tmp_path / "half", background, 2)
    assert [entry.name for entry in (tmp_path / "half").iterdir()] == ["epoch=1.ckpt"]
    assert torch.load(tmp_path / "half" / "epoch=1.ckpt")["epoch"] == 1
    resumed = train(tmp_path / "resumed", background, 4, resume=str(tmp_path / "half" / "epoch=1.ckpt"))
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_a_failed_background_save_keeps_the_old_file_and_is_raised(tmp_path: Path, tmpfs_mount: Any) -> None:
    mount = tmpfs_mount(4 << 20)
    io = CheckpointIO(background=True)
    io.save_checkpoint({"w": torch.ones(10)}, mount / "old.ckpt")
    io.save_checkpoint({"w": torch.ones(2 << 20)}, mount / "new.ckpt")
    io.remove_checkpoint(mount / "old.ckpt")
    with pytest.raises(OSError, match="No space"):
        io.teardown()
    assert (io.load_checkpoint(mount / "old.ckpt")["w"] == 1).all()
