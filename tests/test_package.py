"""The package: what an import loads, the command and its exit codes, the build with and without libraries."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import mlstor
from mlstor import cli
from mlstor.errors import CorruptionError, MlstorError, UsageError, WorldError

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"numpy", "torch", "mpi4py", "rich", "msgspec", "yaml", "mlstor._io"}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = [sys.executable, "-m", "mlstor", *arguments]
    return subprocess.run(done, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "statement",
    [
        "import mlstor",
        "import mlstor.cli; mlstor.cli.main(['--help'])",
        "from mlstor import Settings; Settings.resolve()",
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_used(statement):
    done = python(f"import sys\n{statement}\nprint('loaded:', *sys.modules)")
    assert done.returncode == 0, done.stderr
    assert HEAVY & set(done.stdout.rsplit("loaded:", 1)[1].split()) == set()


def test_importing_mlstor_loads_nothing_but_itself():
    # This is what keeps it far below 60 ms; the time itself is not asserted, since machines differ.
    done = python(
        """
        import __future__, importlib, sys, typing
        before = set(sys.modules)
        import mlstor
        print(*(set(sys.modules) - before))
        """
    )
    assert done.stdout.split() == ["mlstor"]


def test_every_public_name_is_there():
    for name in mlstor.__all__:
        assert getattr(mlstor, name) is not None
    assert set(mlstor.__all__) <= set(dir(mlstor))


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Enigne'"):
        mlstor.Enigne  # noqa: B018


def test_the_version_is_the_installed_one():
    assert command("--version").stdout == f"mlstor {mlstor.__version__}\n"


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_explains_itself_without_loading_what_it_does_not_need(verb):
    done = python(
        """
        import sys
        from mlstor.cli import main
        try:
            main([sys.argv[1], "--help"])
        except SystemExit as stop:
            assert not stop.code
        print("loaded:", *sys.modules)
        """,
        verb,
    )
    assert done.returncode == 0, done.stderr
    text, loaded = done.stdout.rsplit("loaded:", 1)
    assert text.lower().startswith("usage:")
    assert {"torch", "mpi4py", "numpy"} & set(loaded.split()) == set()


def test_the_checkpoint_module_runs_by_name():
    done = subprocess.run(
        [sys.executable, "-m", "mlstor.checkpoint", "--help"],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say what to do"),
        (("chekpoint",), "did you mean `mlstor checkpoint`?"),
        (("xyzzy",), "it takes checkpoint, clean"),
    ],
)
def test_a_wrong_verb_is_one_line_and_exit_2(arguments, said):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.startswith("mlstor: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MlstorError("x"), 1),
        (UsageError("x"), 2),
        (CorruptionError("x"), 3),
        (WorldError("x"), 4),
        (OSError(28, "No space left on device", "/d/f"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_one_line_and_their_exit_code(error, code, capsys):
    def main(argv: list[str]) -> int:
        raise error

    assert cli.run(main, []) == code
    said = capsys.readouterr().err
    assert said.startswith("mlstor: ")
    assert said.count("\n") == 1


def test_the_file_of_an_os_error_is_named(capsys):
    cli.run(lambda argv: os.stat("/no/such/file").st_mode, [])
    assert "/no/such/file" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda argv: 1 // 0, [])


def test_a_real_ctrl_c_ends_with_130_and_no_traceback():
    code = """
        import sys, time
        from mlstor.cli import run
        def main(argv):
            print("ready", flush=True)
            time.sleep(60)
        sys.exit(run(main, []))
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=30)
    assert (child.returncode, said) == (130, "mlstor: interrupted\n")


def test_a_reader_that_goes_away_leaves_no_traceback():
    code = "import sys; from mlstor.cli import run; sys.exit(run(lambda a: print('x\\n' * 10**6), []))"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 1


@pytest.fixture(scope="module")
def build():
    """setup.py as a module: its functions, without a build."""
    spec = importlib.util.spec_from_file_location("mlstor_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"PKG_CONFIG": "/no/such/pkg-config"}, "pkg-config does not know"),
        ({"MLSTOR_WITHOUT": "liburing,isal"}, "MLSTOR_WITHOUT asks"),
    ],
)
def test_a_build_without_the_libraries_says_so_loudly(build, environment, why, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    extension = build.extension()
    said = capfd.readouterr().err
    assert extension.define_macros == []
    assert extension.extra_objects == []
    for library in ("liburing", "isal"):
        assert f"WITHOUT {library}: " in said
        assert f"apt-get install pkg-config {library.replace('isal', 'libisal')}-dev" in said
    assert why in said
    assert len(said.splitlines()) > 8


def test_a_static_archive_is_preferred_where_it_can_be_linked(build, tmp_path, monkeypatch):
    source, part, archive = tmp_path / "part.c", tmp_path / "part.o", tmp_path / "liburing.a"
    source.write_text("int value; int *part(void) { return &value; }\n")
    pkg_config = tmp_path / "pkg-config"
    answers = f"--modversion) echo 9.9;; --variable=libdir) echo {tmp_path};; --libs) echo -luring-shared;;"
    pkg_config.write_text(f'#!/bin/sh\ncase "$1" in {answers} esac\n')
    pkg_config.chmod(0o755)
    monkeypatch.setenv("PKG_CONFIG", str(pkg_config))
    for code, objects, link in (
        ("-fPIC", [str(archive)], []),
        ("-fno-pic", [], ["-luring-shared"]),
    ):
        archive.unlink(missing_ok=True)
        subprocess.run(["cc", code, "-c", "-o", part, source], check=True)
        subprocess.run(["ar", "rcs", archive, part], check=True)
        flags = build.Flags()
        build.add_library(flags, build.LIBRARIES[0], set())
        assert (flags.objects, flags.link) == (objects, link)
        assert ("MLS_LIBURING_VERSION", '"9.9"') in flags.macros
        assert ("MLS_HAVE_LIBURING", "1") in flags.macros


@pytest.mark.parametrize(("name", "value"), [("MLSTOR_WITHOUT", "libaio"), ("MLSTOR_SANITIZE", "leaks")])
def test_a_wrong_build_variable_stops_the_build(build, name, value, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name} takes .*not {value}"):
        build.extension()


def test_the_package_holds_what_a_user_of_it_needs():
    package = Path(mlstor.__file__).parent
    for name in ("py.typed", "_io.pyi", "_io.pxd", "results/schema.json"):
        assert (package / name).is_file(), name
