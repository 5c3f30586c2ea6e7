"""The life of engines and requests: signals, threads, waits, buffers, close, and what a killed write leaves."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
from engine_support import BACKENDS, BLOCK, finish, leftovers, memory, noise, python, small_engine

from mlstor._io import TIMINGS, Engine, Pattern
from mlstor.operations import Extent, Late, ReadFile, Step, WriteFile
from mlstor.settings import Settings

MIB = 1 << 20


class Gate:
    """Holds an operation under way: its late callback waits until the gate is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, digests: object) -> bytes:
        self.reached.set()
        assert self.open.wait(60)
        return b"late"

    def write(self, path: Path, nbytes: int = BLOCK, data: object = None) -> WriteFile:
        body = Extent(4, nbytes, bytes(nbytes) if data is None else data)
        return WriteFile(path, [Extent(0, 4, Late(self)), body], Step.RENAME)


# ---- waiting ----


def test_wait_and_reap_keep_their_timeouts(engine: Engine, tmp_path: Path) -> None:
    gate = Gate()
    (request,) = engine.submit([gate.write(tmp_path / "file")])
    assert gate.reached.wait(60)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not done after 0\.05 s"):
        request.wait(0.05)
    with pytest.raises(TimeoutError):
        request.wait(0)
    assert engine.reap(1, timeout_s=0.05) == []
    assert engine.drain(0.05) is False
    assert not request.done
    with pytest.raises(RuntimeError, match="not done yet"):
        request.result()
    assert 0.15 <= time.monotonic() - began < 30
    gate.open.set()
    assert request.wait(60).nbytes == BLOCK + 4
    assert request.done
    assert request.result() == request.wait()
    assert engine.drain()


def test_reap_gives_at_least_as_many_as_asked(engine: Engine, tmp_path: Path) -> None:
    requests = engine.submit([WriteFile(tmp_path / str(i), [Extent(0, 1, b"x")], Step(0)) for i in range(300)])
    assert engine.drain(30)
    done = engine.reap(200, timeout_s=0)  # all are done: nothing is in flight any more
    assert set(done) == set(requests)
    assert engine.reap(1) == []
    requests = engine.submit([WriteFile(tmp_path / str(i), [Extent(0, 1, b"x")], Step(0)) for i in range(300)])
    done = engine.reap(150, timeout_s=30)
    assert len(done) >= 150
    while len(done) < 300:
        done += engine.reap(1, timeout_s=30)
    assert set(done) == set(requests)


def test_a_request_is_returned_once_by_wait_or_by_reap(engine: Engine, tmp_path: Path) -> None:
    first, second, third = engine.submit([WriteFile(tmp_path / n, [Extent(0, 1, b"x")], Step(0)) for n in "abc"])
    assert engine.drain(30)
    second.wait()
    assert set(engine.reap(2, timeout_s=30)) == {first, third}  # in the order that they ended
    assert engine.reap() == []


def test_several_threads_submit_wait_and_reap(engine: Engine, tmp_path: Path) -> None:
    failures: list[BaseException] = []
    reaped: list[object] = []

    def work(number: int) -> None:
        try:
            for round_ in range(15):
                path, content = tmp_path / f"{number}-{round_}", noise(3 * BLOCK // 2 + number, round_)
                if number % 2:
                    engine.write_file(path, content, Step.RENAME)
                else:
                    (request,) = engine.submit([WriteFile(path, [Extent(0, len(content), content)], Step.RENAME)])
                    reaped.extend(engine.reap(1, timeout_s=30))
                    request.wait(60)
                into = bytearray(len(content))
                engine.read_file(path, into)
                assert into == content
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert engine.drain(0)


# ---- buffers ----


def test_a_buffer_is_held_until_done_and_then_released(engine: Engine, tmp_path: Path) -> None:
    gate, buffer = Gate(), bytearray(BLOCK)
    (request,) = engine.submit([gate.write(tmp_path / "file", BLOCK, buffer)])
    assert gate.reached.wait(60)
    with pytest.raises(BufferError):
        buffer.append(0)
    gate.open.set()
    request.wait(60)
    buffer.append(0)
    again = bytearray(BLOCK)
    engine.submit([ReadFile(tmp_path / "file", [Extent(0, BLOCK, again)])])
    assert engine.drain(30)
    again.append(0)  # without wait or reap: drain is enough
    engine.reap()


def test_what_the_caller_drops_stays_until_done(engine: Engine, tmp_path: Path) -> None:
    gate = Gate()
    buffer = memory(4 * BLOCK)
    buffer[:] = content = noise(4 * BLOCK)
    engine.submit([gate.write(tmp_path / "file", 4 * BLOCK, buffer)])
    assert gate.reached.wait(60)
    del buffer
    gc.collect()
    gate.open.set()
    assert engine.drain(30)
    assert (tmp_path / "file").read_bytes() == b"late" + content
    engine.reap()


# ---- cancel and close ----


def test_a_cancelled_write_leaves_the_former_file(engine: Engine, tmp_path: Path) -> None:
    path, gate = tmp_path / "file", Gate()
    path.write_bytes(b"former")
    (request,) = engine.submit([gate.write(path, 20 * BLOCK)])
    assert gate.reached.wait(60)
    request.cancel()
    gate.open.set()
    with pytest.raises(OSError) as caught:
        request.wait(60)
    assert caught.value.errno == errno.ECANCELED
    assert path.read_bytes() == b"former"
    assert not leftovers(tmp_path)
    request.cancel()  # of a done one: nothing
    engine.cancel()


def test_close_with_work_under_way(tmp_path: Path) -> None:
    for backend in BACKENDS:
        engine = small_engine(backend)
        pattern = Pattern(1)
        requests = engine.submit([WriteFile(tmp_path / str(i), [Extent(0, 8 * MIB, pattern)]) for i in range(20)])
        engine.close()
        engine.close()
        assert all(request.done for request in requests)
        outcomes = []
        for request in requests:
            try:
                outcomes.append(request.wait().nbytes)
            except OSError as error:
                outcomes.append(error.errno)
            request.cancel()
        assert set(outcomes) <= {8 * MIB, errno.ECANCELED}
        assert outcomes[-1] == errno.ECANCELED
        assert not leftovers(tmp_path)
        for act in (engine.counters, engine.drain, engine.reap, engine.histograms, engine.cancel):
            with pytest.raises(ValueError, match="closed"):
                act()
        with pytest.raises(ValueError, match="closed"):
            engine.submit([])


def test_close_while_another_thread_waits(tmp_path: Path) -> None:
    for backend in BACKENDS:
        engine = small_engine(backend)
        outcome: list[object] = []

        def wait(engine: Engine = engine, outcome: list[object] = outcome) -> None:
            try:
                outcome.append(engine.write_file(tmp_path / "file", [Extent(0, 64 * MIB, Pattern(1))]))
            except (OSError, ValueError) as error:
                outcome.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        while not engine.counters().writes:
            time.sleep(0.001)
        engine.close()
        thread.join(60)
        assert len(outcome) == 1


def test_many_engines_come_and_go(tmp_path: Path) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()  # engines of other tests
    before = threads(), descriptors()
    for i in range(24):
        engine = small_engine(BACKENDS[i % 2])
        engine.write_file(tmp_path / "file", noise(1000), Step(0), direct="off" if i % 3 else None)
        if i % 2:
            engine.close()
        reference = weakref.ref(engine)
        del engine
        gc.collect()
        assert reference() is None
    # fewer is possible: a thread or descriptor of an earlier test may have ended meanwhile
    assert threads() <= before[0]
    assert descriptors() <= before[1]


def test_engines_that_can_not_be() -> None:
    with pytest.raises(TypeError, match="not both"):
        Engine(Settings(), workers=1)
    with pytest.raises(OSError, match="the engine did not start") as caught:
        _too_large()
    assert caught.value.errno in (errno.ENOMEM, errno.EAGAIN)


def _too_large() -> Engine:
    """An engine whose pool does not fit in the address space that is left."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 256 * MIB, limits[1]))
    try:
        return Engine(backend="threads", workers=1, depth=1, block_bytes=1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_counters_and_histograms_add_up(tmp_path: Path) -> None:
    with small_engine("threads") as engine:
        engine.write_file(tmp_path / "file", noise(4 * BLOCK + 1))
        engine.read_file(tmp_path / "file")
        counters, histograms = engine.counters(), engine.histograms()
    assert counters.written_bytes in (4 * BLOCK, 4 * BLOCK + 1)  # a direct file's last byte goes beside
    assert counters.read_bytes == 4 * BLOCK + 1
    assert set(histograms) == set(TIMINGS)
    assert histograms["write"].count == counters.writes
    assert histograms["read"].count == counters.reads == 5
    assert histograms["sync"].count == counters.syncs == 2  # file and directory
    assert (histograms["open"].count, histograms["commit"].count) == (2, 1)
    for histogram in histograms.values():
        assert sum(histogram.buckets.values()) == histogram.count
        assert histogram.min_ns <= histogram.sum_ns / histogram.count <= histogram.max_ns


# ---- signals ----

INTERRUPTED = """
    import os, sys, time
    from mlstor._io import Engine, Pattern
    from mlstor.operations import Extent, ReadFile, WriteFile, Step
    path, how, backend = sys.argv[1:]
    engine = Engine(backend="auto" if backend == "io_uring" else backend, workers=1, depth=2, block_bytes=1 << 20)
    extents = [Extent(0, 20 << 30, Pattern(1))]
    buffer = bytearray(1 << 20)
    with open(path, "wb") as file:
        file.truncate(20 << 30)
    print("begin", flush=True)
    try:
        if how == "write_file":
            engine.write_file(path + "-new", extents, Step.RENAME)
        elif how == "read_file":
            engine.read_file(path)
        else:
            engine.submit([ReadFile(path, [Extent(0, 1 << 20, buffer), Extent(1 << 20, 19 << 30)])])
            engine.reap(1) if how == "reap" else engine.drain()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    began = time.monotonic()
    if how == "drain":
        engine.cancel()
    print(engine.drain(20), time.monotonic() - began < 20, engine.reap(0) is not None)
    buffer.append(0)
    print(os.path.exists(path + "-new"))
"""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["write_file", "read_file", "reap", "drain"])
def test_ctrl_c_ends_a_wait_at_once(tmp_path: Path, how: str, backend: str) -> None:
    process = python(INTERRUPTED, tmp_path / "file", how, backend)
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.stdout.readline() == "interrupted\n"
    assert time.monotonic() - began < 30  # a second on a machine with nothing else to do
    rest = process.stdout.read()
    assert finish(process) == ""
    assert rest.splitlines() == ["True True True", "False"]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_kill_in_the_middle_leaves_the_former_file_and_a_recognisable_leftover(tmp_path: Path, backend: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"former")
    code = """
        import sys
        from mlstor._io import Engine, Pattern
        from mlstor.operations import Extent
        engine = Engine(backend="auto" if sys.argv[2] == "io_uring" else "threads", workers=1, depth=2)
        engine.write_file(sys.argv[1], [Extent(0, 10 << 30, Pattern(1))])
    """
    process = python(code, path, backend)
    deadline = time.monotonic() + 60
    while not leftovers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert path.read_bytes() == b"former"
    (leftover,) = leftovers(tmp_path)
    assert leftover.startswith(".file.")
    assert sorted(os.listdir(tmp_path)) == sorted(["file", leftover])
    (tmp_path / leftover).unlink()
