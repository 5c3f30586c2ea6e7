"""Settings: which source wins, how values are read, what a mistake is told, and that the docs agree."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
from pathlib import Path

import pytest

from mlstor.errors import UsageError
from mlstor.settings import Settings, declared, environment_name
from mlstor.units import parse_size

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that MLSTOR_PROFILE names; a test fills it."""
    path = tmp_path / "profile.yaml"
    monkeypatch.setenv("MLSTOR_PROFILE", str(path))
    return path


def test_without_any_source_all_values_are_defaults():
    settings = Settings.resolve()
    assert settings == Settings()
    assert {entry["source"] for entry in settings.describe().values()} == {"default"}


def test_argument_beats_environment_beats_profile_beats_default(profile, monkeypatch):
    profile.write_text("depth: 3\nworkers: 3\nbackend: threads\n")
    monkeypatch.setenv("MLSTOR_DEPTH", "2")
    monkeypatch.setenv("MLSTOR_WORKERS", "2")
    settings = Settings.resolve(depth=1)
    assert (settings.depth, settings.workers, settings.backend, settings.direct) == (1, 2, "threads", "auto")
    assert settings.source("depth") == "argument"
    assert settings.source("workers") == "environment MLSTOR_WORKERS"
    assert settings.source("backend") == f"profile {profile}"
    assert settings.source("direct") == "default"


def test_an_argument_of_none_and_an_empty_variable_count_as_not_given(monkeypatch):
    monkeypatch.setenv("MLSTOR_DEPTH", "")
    assert Settings.resolve(depth=None).source("depth") == "default"


def test_sizes_are_read_with_their_units(monkeypatch):
    monkeypatch.setenv("MLSTOR_BLOCK_BYTES", "16MiB")
    assert Settings.resolve().block_bytes == 16 << 20
    assert Settings.resolve(block_bytes=8192).block_bytes == 8192


def test_a_bare_off_in_yaml_is_the_word_off(profile):
    profile.write_text("direct: off\n")
    assert Settings.resolve().direct == "off"


def test_the_longest_target_prefix_wins_by_whole_components(profile):
    profile.write_text(
        "block_bytes: 1MiB\n"
        "targets:\n"
        "  /mnt/lustre: {block_bytes: 16MiB, direct: require}\n"
        "  /mnt/lustre/fast/: {block_bytes: 8MiB}\n"
        "  s3://bucket/a: {block_bytes: 32MiB}\n"
    )
    settings = Settings.resolve()
    assert settings.for_target("/mnt/lustre/x").block_bytes == 16 << 20
    assert settings.for_target("/mnt/lustre/x").source("block_bytes") == f"profile {profile} for /mnt/lustre"
    assert settings.for_target(b"/mnt/lustre").direct == "require"
    assert settings.for_target(Path("/mnt/lustre/fast/x")).block_bytes == 8 << 20
    assert settings.for_target("/mnt/lustre/fast/x").direct == "auto"
    assert settings.for_target("/mnt/lustre2").block_bytes == 1 << 20
    assert settings.for_target("/mnt/lustre/../other").block_bytes == 1 << 20
    assert settings.slot_nbytes() == 32 << 20
    assert settings.for_target("s3://bucket/a/b").block_bytes == 32 << 20
    assert settings.for_target("s3://bucket/ab").block_bytes == 1 << 20


def test_the_root_is_a_prefix_of_every_path(profile):
    profile.write_text("targets:\n  /: {block_bytes: 64KiB}\n")
    assert Settings.resolve().for_target("/any/where").block_bytes == 64 << 10


def test_a_target_does_not_override_what_was_said_for_this_run(profile, monkeypatch):
    profile.write_text("targets:\n  /mnt: {block_bytes: 8MiB, direct: require}\n")
    monkeypatch.setenv("MLSTOR_BLOCK_BYTES", "1MiB")
    settings = Settings.resolve().for_target("/mnt/x")
    assert (settings.block_bytes, settings.direct) == (1 << 20, "require")
    assert Settings.resolve(direct="off").for_target("/mnt/x").direct == "off"


def test_the_profile_is_found_under_xdg_config_home(tmp_path, monkeypatch):
    (tmp_path / "mlstor").mkdir()
    (tmp_path / "mlstor" / "profile.yaml").write_text("depth: 5\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert Settings.resolve().depth == 5


def test_settings_cannot_be_changed_and_survive_pickling(profile):
    profile.write_text("targets:\n  /mnt: {direct: off}\n")
    settings = pickle.loads(pickle.dumps(Settings.resolve(workers=3)))
    assert (settings.workers, settings.source("workers")) == (3, "argument")
    assert settings.for_target("/mnt").direct == "off"
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.depth = 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"depth": -1}, "depth=-1 is not accepted: depth takes a whole number from 0 to 1024"),
        ({"depth": "many"}, "depth=many"),
        ({"depth": 2.5}, "depth=2.5"),
        ({"depth": True}, "depth=True"),
        ({"block_bytes": 4097}, "a multiple of 4096 bytes"),
        ({"block_bytes": "2GiB"}, "at most 1.00 GiB"),
        ({"block_bytes": "4 parsecs"}, "such as 4MiB"),
        ({"backend": "libaio"}, "backend takes auto, io_uring or threads"),
        ({"depht": 3}, "did you mean 'depth'?"),
        ({"colour": 3}, "known are backend, direct"),
    ],
)
def test_a_bad_argument_names_itself_and_what_is_accepted(arguments, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        Settings.resolve(**arguments)


def test_a_bad_variable_is_named_with_its_value(monkeypatch):
    monkeypatch.setenv("MLSTOR_BACKEND", "aio")
    with pytest.raises(UsageError, match=r"MLSTOR_BACKEND=aio is not accepted: backend takes auto"):
        Settings.resolve()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("depth: x\n", "depth: x is not accepted"),
        ("depth:\n", "depth: None is not accepted"),
        ("register: on\n", "register takes auto or off"),
        ("depht: 3\n", "'depht' can't be set here; did you mean 'depth'?"),
        ("- depth\n", "must map names to values"),
        ("depth: [\n", "is not YAML"),
        ("targets: 3\n", "targets must map names to values"),
        ("targets: {/mnt: {workers: 3}}\n", "'workers' can't be set here; known are direct, block"),
        ("targets: {/mnt: {direct: x}}\n", "/mnt: direct: x is not accepted"),
    ],
)
def test_a_bad_profile_is_named_with_the_place(profile, text, said):
    profile.write_text(text)
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        Settings.resolve()
    assert str(profile) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_profile_that_was_asked_for_must_exist(profile):
    with pytest.raises(UsageError, match=r"MLSTOR_PROFILE names .* does not exist"):
        Settings.resolve()


def test_a_profile_that_is_not_text_is_a_usage_error(profile):
    profile.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="can't be read"):
        Settings.resolve()


def test_workers_0_means_two_but_not_more_than_the_allowed_cores():
    allowed = os.sched_getaffinity(0)
    assert Settings.resolve(workers=5).worker_count() == 5
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert Settings.resolve().worker_count() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert Settings.resolve().worker_count() == min(2, len(allowed))


def _documented() -> dict[str, str]:
    """Sections of docs/settings.md by the variable that heads them."""
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    parts = re.split(r"^## `(MLSTOR_\w+)`.*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_setting_is_documented_and_nothing_else_is():
    assert set(_documented()) == {environment_name(setting) for setting in declared()} | {"MLSTOR_PROFILE"}


@pytest.mark.parametrize("setting", list(declared()), ids=lambda setting: setting.name)
def test_the_documented_default_and_name_are_the_declared_ones(setting):
    section = _documented()[environment_name(setting)]
    assert f"`{setting.name}`" in section
    default = re.search(r"Default: `([^`]+)`", section)[1]
    if isinstance(setting.default, int):
        assert parse_size(default.replace(" ", "")) == setting.default
    else:
        assert default == (setting.default or "none")


def test_the_declared_defaults_are_values_that_are_accepted():
    for setting in declared():
        if setting.default is not None:
            resolved = Settings.resolve(**{setting.name: setting.default})
            assert getattr(resolved, setting.name) == setting.default


def test_no_other_module_reads_the_environment_for_settings():
    reading = re.compile(r"(environ|getenv)[^\n]*MLSTOR_")
    package = ROOT / "src" / "mlstor"
    files = [path for suffix in ("py", "pyx", "c", "h") for path in package.rglob(f"*.{suffix}")]
    assert len(files) > 5
    guilty = [path.name for path in files if reading.search(path.read_text(encoding="utf-8"))]
    assert [name for name in guilty if name not in ("settings.py", "_io.c")] == []
