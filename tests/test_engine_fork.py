"""Forks while an engine runs: the child can't use it but makes its own and ends; the parent's bytes stay right."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_support import BACKENDS, BLOCK, finish, memory, noise, python, small_engine

from mlstor._io import Engine, default_engine
from mlstor.operations import Extent, ReadFile, Step

MIB = 1 << 20


def in_child(work: Callable[[], None], timeout_s: float = 60) -> None:
    """Runs `work` in a fork of this process; fails unless it ends well in time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what is tested
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    pytest.fail(f"the child did not end in {timeout_s} s")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_child_may_not_use_its_parents_engine(tmp_path: Path, backend: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(4 * BLOCK))
    with small_engine(backend) as engine:
        (request,) = engine.submit([ReadFile(path, [Extent(0, 4 * BLOCK, memory(4 * BLOCK))])])

        def work() -> None:
            acts = (
                lambda: engine.submit([]), engine.reap, engine.drain, engine.cancel, engine.close, engine.counters,
                lambda: engine.backend, lambda: engine.write_file(path, b"x"),
            )  # fmt: skip
            for act in acts:
                with pytest.raises(RuntimeError, match="before a fork"):
                    act()
            with small_engine("threads") as own:
                assert own.read_file(path, bytearray(4 * BLOCK)).nbytes == 4 * BLOCK

        in_child(work)
        assert request.wait(60).nbytes == 4 * BLOCK


def test_the_default_engine_is_one_per_process(tmp_path: Path) -> None:
    engine = default_engine()
    assert default_engine() is engine
    engine.write_file(tmp_path / "file", b"parent")

    def work() -> None:
        own = default_engine()
        assert own is not engine
        assert own is default_engine()
        own.write_file(tmp_path / "child", b"child", direct="off")
        own.close()

    in_child(work)
    assert (tmp_path / "child").read_bytes() == b"child"
    engine.write_file(tmp_path / "file", b"again")
    engine.close()


def test_a_closed_default_engine_is_made_anew(tmp_path: Path) -> None:
    default_engine().close()
    default_engine().write_file(tmp_path / "file", b"x")
    default_engine().close()


def _small_in_a_worker(connection: multiprocessing.connection.Connection) -> None:  # type: ignore[name-defined]
    engine = default_engine()
    connection.send((engine.settings.workers, engine.settings.depth, engine.settings.block_bytes))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_dataloader_worker_has_a_small_engine_and_ends(method: str) -> None:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=_small_in_a_worker, args=(theirs,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    assert ours.poll(60)
    assert ours.recv() == (1, 4, MIB)
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_forks_in_the_middle_of_direct_reads_lose_nothing(tmp_path: Path, backend: str) -> None:
    """Unless the fork waits for it, a transfer into user memory ends up in a page that only the child sees."""
    path, content = tmp_path / "file", noise(8 * MIB)
    path.write_bytes(content)
    with small_engine(backend, depth=8) as engine:
        engine.write_file(path, content)
        stop, failures = threading.Event(), []

        def read() -> None:
            while not stop.is_set():
                into = memory(8 * MIB)
                engine.read_file(path, into)
                if into != content:
                    failures.append("bytes differ")

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(15):
                in_child(lambda: None)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failures == []


def test_threads_that_fork_at_the_same_time(tmp_path: Path) -> None:
    with small_engine("threads") as engine:
        threads = [threading.Thread(target=lambda: [in_child(lambda: None) for _ in range(5)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.write_file(tmp_path / "file", noise(3 * BLOCK), Step(0))  # it goes on
        assert (tmp_path / "file").stat().st_size == 3 * BLOCK


def test_a_process_ends_with_work_under_way(tmp_path: Path) -> None:
    code = """
        import sys
        from mlstor._io import Engine, Pattern, default_engine
        from mlstor.operations import Extent, WriteFile
        made = [default_engine(), Engine(backend="threads", workers=1)]
        for i, engine in enumerate(made):
            engine.submit([WriteFile(f"{sys.argv[1]}/{i}-{j}", [Extent(0, 32 << 20, Pattern(1))]) for j in range(20)])
    """
    finish(python(code, tmp_path))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_an_engine_is_not_pickled() -> None:
    import pickle

    with small_engine("threads") as engine, pytest.raises(TypeError):
        pickle.dumps(engine)
    assert isinstance(engine, Engine)
