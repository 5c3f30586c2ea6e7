"""mlstor doctor: the cause of a refusal, what it prints, and the truth of it on real kernels and mounts."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mlstor import doctor, host
from mlstor.errors import UsageError

SECCOMP = str(Path(__file__).with_name("seccomp.py"))

GRANTED = {
    "io_uring": True,
    "refusal": None,
    "errno": 0,
    "io_uring_disabled": 0,
    "ring_flags": ["COOP_TASKRUN", "SINGLE_ISSUER"],
    "features": 0x3FFF,
    "registration": "granted",
    "ring_fd_registered": True,
    "memlock_limit_bytes": 8 << 20,
}


def refused(error: int, **changes: object) -> dict[str, object]:
    return {**GRANTED, "io_uring": False, "errno": error, "ring_flags": [], "features": 0, **changes}


def run_doctor(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "mlstor", "doctor", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("error", "io_uring_disabled", "seccomp", "cause"),
    [
        (errno.ENOSYS, None, 0, "kernel"),
        (errno.ENOSYS, 0, 0, "kernel"),
        (errno.ENOSYS, None, 2, "seccomp"),
        (errno.ENOSYS, 2, 2, "seccomp"),
        (errno.EPERM, 0, 2, "seccomp"),
        (errno.EPERM, None, 2, "seccomp"),
        (errno.EACCES, 0, 2, "seccomp"),
        (errno.EPERM, 1, 0, "sysctl"),
        (errno.EPERM, 2, 2, "sysctl"),
        (errno.ENOMEM, 0, 0, "memory"),
        (errno.ENOMEM, 0, 2, "memory"),
        (errno.EPERM, 0, 0, "other"),
        (errno.EMFILE, 0, 2, "other"),
    ],
)
def test_each_refusal_has_its_cause(error, io_uring_disabled, seccomp, cause):
    assert doctor.refusal_cause(error, io_uring_disabled, seccomp) == cause
    assert cause in doctor.CAUSES


def test_the_seccomp_mode_is_read_from_the_status_of_a_process():
    assert doctor.seccomp_mode("Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n") == 2
    assert doctor.seccomp_mode("Name:\tSeccomp: 2\n") == 0


def test_a_build_without_liburing_is_the_cause_where_the_kernel_was_not_asked():
    assert doctor.kernel_findings(refused(0))["refusal"] == "build"


def test_nothing_is_refused_where_io_uring_is_granted():
    assert doctor.kernel_findings(GRANTED)["refusal"] is None


def report(**changes: object) -> dict[str, object]:
    return {
        "build": {"liburing": "2.3", "isal": None},
        "kernel": {**GRANTED, "refusal": None},
        "host": dataclasses.asdict(host.describe()),
        "settings": {"depth": {"value": 8, "source": "default"}},
        **changes,
    }


def test_the_text_names_flags_limits_and_what_a_missing_library_costs():
    text = "\n".join(doctor.lines(report()))
    assert "COOP_TASKRUN, SINGLE_ISSUER" in text
    assert "8.00 MiB" in text
    assert "libisal-dev" in text
    assert "depth  8  (default)" in text


@pytest.mark.parametrize("cause", list(doctor.CAUSES))
def test_the_text_of_a_refusal_names_cause_errno_and_remedy(cause):
    text = "\n".join(doctor.lines(report(kernel={**refused(errno.EPERM), "refusal": cause})))
    assert f"refused ({cause}): EPERM: {doctor.CAUSES[cause]}" in text
    assert "threads of pread and pwrite" in text


def test_the_device_of_a_loop_mount_is_named_with_its_image(loop_fs):
    text = run_doctor(str(loop_fs("xfs", options="noatime"))).stdout
    assert "loop on " in text
    assert "noatime" in text


def test_a_path_that_does_not_exist_is_told_in_one_line():
    done = run_doctor("/no/such/place")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mlstor: /no/such/place does not exist; ")
    assert done.stderr.count("\n") == 1
    with pytest.raises(UsageError):
        doctor.examine("/no/such/place")


def test_json_and_text_agree_on_what_was_built_in(tmp_path):
    found = json.loads(run_doctor("--json", str(tmp_path)).stdout)
    text = run_doctor(str(tmp_path)).stdout
    assert set(found) == {"build", "kernel", "host", "mount", "path", "settings"}
    for value in filter(None, (found["build"]["liburing"], found["build"]["isal"])):
        assert value in text
    assert found["path"]["fs_type"] in text


def test_the_probe_leaves_nothing_behind(tmp_path):
    assert run_doctor(str(tmp_path)).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_stands_for_its_directory(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"keep me")
    assert json.loads(run_doctor("--json", str(file)).stdout)["path"]["directory"] == str(tmp_path)
    assert file.read_bytes() == b"keep me"


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_a_seccomp_filter_is_recognised(error):
    done = run_doctor("--json", prefix=(sys.executable, SECCOMP, error))
    kernel = json.loads(done.stdout)["kernel"]
    assert kernel["io_uring"] is False
    if not kernel["io_uring_disabled"]:
        assert kernel["refusal"] == "seccomp"
        assert kernel["errno"] == getattr(errno, error)


def test_the_kind_of_file_system_and_its_mount_are_those_of_the_mount(each_fs, request):
    kind = request.node.callspec.params["each_fs"]
    done = run_doctor("--json", str(each_fs))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert kind in found["path"]["fs_type"]
    if kind in ("ext4", "xfs"):
        assert found["path"]["direct_write"] == "yes"
        assert found["path"]["direct_read"] == "yes"
    assert str(each_fs).startswith(found["mount"]["mount_point"] + "/")
    assert kind in found["mount"]["fs_type"]


def test_of_a_read_only_mount_the_rest_is_still_told(loop_fs):
    mountpoint = loop_fs("ext4")
    subprocess.run(["mount", "-o", "remount,ro", mountpoint], check=True)
    done = run_doctor(str(mountpoint))
    assert (done.returncode, done.stderr) == (0, "")
    assert "not known: Read-only file system" in done.stdout
    assert f"ext4 on {mountpoint}" in done.stdout


def test_tmpfs_is_said_to_be_memory(tmpfs_mount):
    text = run_doctor(str(tmpfs_mount(64 << 20))).stdout
    assert "O_DIRECT write      no: tmpfs is memory" in text
    assert "no block device" in text


def test_the_sysctl_and_the_limit_are_those_of_this_process():
    found = json.loads(run_doctor("--json", prefix=("prlimit", "--memlock=8388608", "--")).stdout)["kernel"]
    assert found["memlock_limit_bytes"] == 8 << 20
    sysctl = Path("/proc/sys/kernel/io_uring_disabled")
    assert found["io_uring_disabled"] == (int(sysctl.read_text()) if sysctl.exists() else None)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_an_ordinary_user_with_8_mib_of_memory_lock_gets_a_ring_and_is_told_of_the_limit():
    # Everything is imported before the change of user: nobody may not be allowed to read it.
    code = """
        import contextlib, io, os, resource
        from mlstor import doctor
        with contextlib.redirect_stdout(io.StringIO()):
            doctor.main([])
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        doctor.main([])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=False, capture_output=True, text=True, timeout=60,
        env={**os.environ, "XDG_CONFIG_HOME": "/nonexistent"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "memory lock limit         8.00 MiB" in done.stdout
    if doctor.limits()["io_uring_disabled"]:
        assert "refused (sysctl)" in done.stdout
    else:
        assert "io_uring                  granted" in done.stdout
        assert "64 MiB registered         refused: Cannot allocate memory; pages are then pinned" in done.stdout


def test_under_seccomp_the_text_says_so_and_names_the_remedy():
    text = run_doctor(prefix=(sys.executable, SECCOMP, "EPERM")).stdout
    assert "refused (seccomp): EPERM: a seccomp filter forbids it" in text
    assert "threads of pread and pwrite" in text
