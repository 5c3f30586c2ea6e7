"""The ladder: io_uring refused or switched off, registration refused, no direct I/O. It works, and says why."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from engine_support import finish, python, small_engine

from mlstor._io import Engine, build_info, probe
from mlstor.settings import Settings

SECCOMP = (sys.executable, str(Path(__file__).with_name("seccomp.py")))
NOBODY = 65534

ROUND_TRIP = """
    import os, sys
    from mlstor._io import Engine, Pattern, probe
    from mlstor.operations import Extent
    engine = Engine()
    wrote = engine.write_file(sys.argv[1], [Extent(0, 9 << 20, Pattern(1))])
    read = engine.read_file(sys.argv[1], Pattern(1))
    assert read.damaged_blocks == 0 and read.nbytes == 9 << 20
    print(engine.backend, wrote.backend, read.backend, wrote.direct, sep="|")
    print(engine.granted)
    print(probe())
"""


@pytest.fixture
def ring() -> None:
    if not probe()["io_uring"]:
        pytest.skip("io_uring is refused here")


@pytest.mark.parametrize(("refusal", "text"), [("EPERM", "not permitted"), ("ENOSYS", "not implemented")])
def test_io_uring_refused_by_seccomp(tmp_path: Path, refusal: str, text: str) -> None:
    out = finish(python(ROUND_TRIP, tmp_path / "file", before=(*SECCOMP, refusal))).splitlines()
    direct = "yes" if small_direct(tmp_path) else "no"
    assert out[0] == f"threads|threads|threads|{direct}"
    assert text in out[1]
    assert "'io_uring': False" in out[2]
    if build_info()["liburing"]:
        assert out[1].startswith("io_uring refused: ")


def small_direct(directory: Path) -> bool:
    with small_engine("threads") as engine:
        return engine.write_file(directory / "probe", bytes(1 << 20)).direct == "yes"


def test_io_uring_demanded_and_refused(tmp_path: Path) -> None:
    code = """
        from mlstor._io import Engine
        try:
            Engine(backend="io_uring")
        except OSError as error:
            print(error)
    """
    out = finish(python(code, before=(*SECCOMP, "EPERM")))
    assert "the engine did not start (io_uring" in out
    assert "mlstor doctor" in out


def test_threads_by_the_environment(tmp_path: Path) -> None:
    out = finish(python(ROUND_TRIP, tmp_path / "file", env={"MLSTOR_BACKEND": "threads"})).splitlines()
    assert out[0].startswith("threads|threads|threads|")
    assert out[1] == "threads were asked for"


@pytest.mark.usefixtures("ring")
def test_an_ordinary_user_with_8_mib_of_memlock_keeps_the_ring(tmp_path: Path) -> None:
    """The pool is larger than what may be pinned: registration is dropped, nothing else."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:  # pytest's directories are closed to others
        if parent.stat().st_uid == os.geteuid() and parent != Path("/") and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    become = f"""
    import os, resource
    import mlstor._io  # while the interpreter's files may be read
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
    os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
    """
    process = python(become + ROUND_TRIP, tmp_path / "file", env={"XDG_CONFIG_HOME": "/nonexistent"})
    out = finish(process).splitlines()
    assert out[0].startswith("io_uring|io_uring|io_uring|")
    assert "buffers not registered: Cannot allocate memory" in out[1]


@pytest.mark.usefixtures("ring")
def test_registration_is_granted_where_it_may_be_or_switched_off() -> None:
    with Engine(backend="io_uring", workers=1, depth=1, block_bytes=4096, register="off") as engine:
        assert engine.granted.startswith("ring flags 0x")
        assert engine.granted.endswith("buffers not registered: off")
    with Engine(backend="io_uring", workers=1, depth=1, block_bytes=4096, register="auto") as engine:
        assert "registered" in engine.granted
        assert (engine.backend, engine.workers) == ("io_uring", 1)


@pytest.mark.usefixtures("ring")
def test_buffered_files_never_go_through_the_ring(tmp_path: Path) -> None:
    with small_engine("io_uring") as engine:
        wrote = engine.write_file(tmp_path / "file", bytes(1 << 20), direct="off")
        read = engine.read_file(tmp_path / "file", direct="off")
    assert (wrote.backend, wrote.direct, read.backend, read.direct) == ("threads", "no", "threads", "no")


def test_what_was_built_and_what_is_granted() -> None:
    built, found = build_info(), probe()
    assert set(built) == {"liburing", "isal", "crc32", "crc32c", "pattern"}
    assert found["io_uring"] is (found["errno"] == 0 and built["liburing"] is not None)
    assert ("refused" in found["registration"] or found["registration"] == "granted") is found["io_uring"]


def test_settings_that_hold_for_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tmp_path / "profile.yaml"
    (tmp_path / "slow").mkdir()
    profile.write_text(f"targets:\n  {tmp_path}/slow:\n    direct: 'off'\n    block_bytes: 4096\n")
    monkeypatch.setenv("MLSTOR_PROFILE", str(profile))
    with Engine(Settings.resolve(backend="threads", workers=1, depth=1)) as engine:
        before = engine.counters().writes
        assert engine.write_file(tmp_path / "slow" / "file", bytes(8 * 4096)).reason == "direct I/O was switched off"
        assert engine.counters().writes - before == 8
        assert "switched off" not in engine.write_file(tmp_path / "file", bytes(8 * 4096)).reason
