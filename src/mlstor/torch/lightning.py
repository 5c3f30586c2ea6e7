"""Lightning's checkpoints through `save` and `load`: ``Trainer(plugins=[mlstor.torch.CheckpointIO()])``."""

from __future__ import annotations

import os
import threading
from typing import Any

import lightning.pytorch.plugins.io as lightning_io

from mlstor.blob.target import open_blob, open_directory
from mlstor.errors import UsageError
from mlstor.torch.loading import load
from mlstor.torch.saving import opening, save
from mlstor.torch.saving_async import AsyncSave, async_save


class CheckpointIO(lightning_io.CheckpointIO):
    """Durable, verified checkpoint files that Lightning, and `torch.load`, read without this plugin too.

    Parameters
    ----------
    background
        Save by `async_save`: training goes on once the state is copied; the trainer's end waits for the last save, and
        an old checkpoint is removed once the new one is durable. Default False.
    **arguments
        As those of `save`, or of `async_save`: `max_bandwidth`, `options`, ...
    """

    def __init__(self, background: bool = False, **arguments: Any) -> None:
        self._background = background
        self._arguments = arguments
        self._opened = {name: arguments.get(name) for name in ("engine", "store", "options")}
        self._last: AsyncSave | None = None
        #: set once what was to be removed after the last save is gone
        self._removals: list[threading.Event] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise UsageError("give CheckpointIO(options=...) instead of storage_options")
        path = os.fspath(path)
        if "://" not in path:
            open_directory(os.path.dirname(path) or ".").make()
        if not self._background:
            return save(checkpoint, path, **self._arguments)
        self.teardown()  # raises what became of the save before
        self._last = async_save(checkpoint, path, **self._arguments)
        return None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.teardown()
        state: dict[str, Any] = load(path, map_location, weights_only=weights_only, **self._opened)
        return state

    def remove_checkpoint(self, path: Any) -> None:
        how, over = self._opened, threading.Event()

        def remove(save: Any = None) -> None:
            try:
                if save is None or save.exception() is None:
                    open_blob(path, engine=how["engine"], **opening(how["store"], how["options"])).delete()
            finally:
                over.set()

        if self._last is None:
            remove()
        else:  # the old one stays until the new one is durable, or if that failed
            self._removals.append(over)
            self._last.add_done_callback(remove)

    def teardown(self) -> None:
        if self._last is not None:
            last, self._last = self._last, None
            removals, self._removals = self._removals, []
            last.exception()  # waits; what is called when it is done may end after that
            for over in removals:
                over.wait()
            last.result()
