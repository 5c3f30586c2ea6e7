"""A training loop that may be killed at any moment, and goes on as if nothing had happened.

    python examples/train_resume.py runs/demo                  # 60 steps; prints a digest of the final weights
    python examples/train_resume.py runs/killed --die-at 37    # SIGKILL after step 37 ...
    python examples/train_resume.py runs/killed                # ... the same digest

The directory may also be the URL of an object store. What a checkpoint needs: model, optimizer, the state of the data
loader (which samples this epoch has still to see), and that of the random numbers (dropout draws from them).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from mlstor.torch import CheckpointDirectory, EpochSampler

SAMPLES = 200
BATCH = 8


class Noise(torch.utils.data.Dataset[Any]):
    """Samples that depend on their index alone."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        numbers = torch.Generator().manual_seed(index)
        features = torch.randn(16, generator=numbers)
        return features, features.sum().sign()


def train(directory: str, steps: int, save_every: int, die_at: int, workers: int) -> str:
    """Train up to `steps`, from the latest checkpoint if there is one; the SHA-256 of the weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = Noise()
    loader = StatefulDataLoader(data, sampler=EpochSampler(data, seed=7), batch_size=BATCH, num_workers=workers)
    checkpoints = CheckpointDirectory(directory, keep=2)

    step, random_state = 0, None
    latest = checkpoints.latest()
    if latest is not None:
        saved = latest.load()
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        step, random_state = saved["step"], saved["random"]
        print(f"resumed after step {step}")

    saving = None
    while step < steps:
        batches = iter(loader)
        if random_state is not None:  # after the loader began: that draws a number
            torch.set_rng_state(random_state)
            random_state = None
        for features, wanted in batches:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(features).squeeze(1), wanted).backward()
            optimizer.step()
            step += 1
            if step % save_every == 0:
                if saving is not None:
                    saving.result()  # raises if the save before failed
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "loader": loader.state_dict(),
                    "random": torch.get_rng_state(),
                    "step": step,
                }
                saving = checkpoints.save_async(step, state)
            if step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == steps:
                break
    if saving is not None:
        saving.result()
    weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(weights).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="a training loop that may be killed")
    parser.add_argument("directory", help="where checkpoints go: a path or a URL")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--die-at", type=int, default=0, help="kill this process after that step")
    parser.add_argument("--workers", type=int, default=2, help="processes of the data loader")
    arguments = parser.parse_args()
    print(train(arguments.directory, arguments.steps, arguments.save_every, arguments.die_at, arguments.workers))


if __name__ == "__main__":
    main()
