"""Transfers of S3: large objects in parts, and refusals explained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlstor.storage.parts import PartedTransfers
from mlstor.storage.s3_client import S3Client, S3Uploads
from mlstor.storage.s3_errors import explained

if TYPE_CHECKING:
    from mlstor._http import HttpEngine
    from mlstor.storage.credentials import Signer
    from mlstor.storage.transfers import Failure


class S3Transfers(PartedTransfers):
    """On an engine of their own, which is signed by `signer` as long as they are open.

    Parameters
    ----------
    client
        Begins and ends multipart uploads, on another engine: what is cancelled here must not cancel their abortion.
    payload_bytes
        As the engine was made with.
    explain
        A refusal's message in `failures` is a sentence that says what to try, not the server's own words.
    """

    def __init__(
        self,
        engine: HttpEngine,
        client: S3Client,
        signer: Signer | None,
        *,
        part_bytes: int,
        threshold_bytes: int,
        payload_bytes: int,
        split_reads: bool = True,
        explain: bool = True,
    ) -> None:
        super().__init__(
            engine,
            S3Uploads(client),
            part_bytes=part_bytes,
            threshold_bytes=threshold_bytes,
            window=2 * engine.workers * engine.in_flight,
            payload_bytes=payload_bytes,
            split_reads=split_reads,
            checksum=client.crc32c,
        )
        self._engine = engine
        self._client = client
        self._signer = signer
        self._explain = explain
        if signer:
            signer.attach(engine, 0)

    def failures(self) -> list[Failure]:
        """See `Transfers.failures`."""
        found, asker = super().failures(), self._client.asker()
        return [explained(failure, asker) for failure in found] if self._explain else found

    def close(self) -> None:
        """See `PartedTransfers.close`."""
        if self._signer:
            self._signer.detach(self._engine)
        super().close()
