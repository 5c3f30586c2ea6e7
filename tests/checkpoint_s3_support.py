"""What the tests of checkpoints on S3 share: a bench whose runs go to a bucket of a test server."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launchers
import pytest
from checkpoint_support import MODEL, MODULE, Bench, Ran, Underway
from s3_support import listed, make_bucket, open_bucket
from servers.weed import Weed

#: Of llama3-8b: optimizer files of 23 MB, which go in parts.
PARTED = "1/512"


class OnS3(Bench):
    """A bench whose runs go to a bucket of a test server."""

    def __init__(self, directory: Path, server: Weed, name: str = "") -> None:
        super().__init__(directory)
        self.server = server
        self.bucket = name or make_bucket(server)
        self.url = f"s3://{self.bucket}/ckpt"
        self.reach: tuple[str, ...] = ("--endpoint", server.endpoint)
        if not server.identities:
            self.reach += ("-o", "anonymous=yes")

    def __call__(self, *options: object, **how: Any) -> Ran:
        ran = self.run(*options, *self.reach, self.url, **how)
        assert ran.code == 0, ran.err
        return ran

    def refused(self, *options: object) -> str:
        ran = self.run(*options, *self.reach, self.url)
        assert ran.code == 2, (ran.code, ran.out, ran.err)
        return ran.sentence

    def clean(self, run_id: str, *words: str) -> Ran:
        return self.command("clean", run_id, *words)

    @property
    def store(self) -> Any:
        return open_bucket(self.server, self.bucket, prefix="ckpt/")

    @property
    def objects(self) -> dict[str, int]:
        store = self.store
        try:
            return listed(store)
        finally:
            store.close()

    def key(self, run_id: str, name: str, checkpoint: int = 1) -> str:
        return f"{run_id}/{MODEL}/global_epoch1_step{checkpoint}/{name}"

    def change(self, key: str, change: Callable[[bytearray], object]) -> None:
        """Write an object over with a changed copy of itself."""
        store = self.store
        try:
            data = bytearray(store.read(key))
            change(data)
            store.write(key, bytes(data))
        finally:
            store.close()

    def put(self, key: str, data: bytes) -> None:
        store = self.store
        try:
            store.write(key, data)
        finally:
            store.close()

    def slow(self) -> Underway:
        """A run of gigabytes that go in parts: it is far from its end when the first of them are there."""
        words = self.arguments("--run-id", "one", "--depth", 2, "--workers", 1, *self.reach, self.url, scale="1/8")
        return Underway(self, launchers.Running([sys.executable, *MODULE, *words], self.directory))

    def disturbed(self, signum: signal.Signals) -> Ran:
        """A run that gets a signal while it writes parts."""
        under_way = self.slow()
        under_way.wait_for_phase(0)
        under_way.wait_for(lambda: bool(self.unfinished()))
        under_way.send(signum)
        return under_way.wait(60)

    def unfinished(self) -> list[str]:
        store = self.store
        try:
            return [upload.key for upload in store.unfinished_uploads()]
        finally:
            store.close()


@pytest.fixture
def s3(weed: Weed, tmp_path: Path) -> OnS3:
    return OnS3(tmp_path, weed)
