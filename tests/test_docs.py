"""The documentation is true: its Python runs, its command lines parse, its links and names exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlstor import cli, doctor, verify
from mlstor.aisloader import flags
from mlstor.checkpoint import clean, mlpstorage, options
from mlstor.copy import options as copy_options
from mlstor.results import table
from mlstor.stream import options as stream_options

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
names = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "docs/engine.md"])
def test_python_examples_run_as_they_stand(name, tmp_path):
    code = "state = bytearray(1 << 20)\n" if name == "README.md" else ""
    # those with torch run in test_torch_docs.py
    code += "\n".join(block for block in blocks(ROOT / name, "python") if "mlstor.torch" not in block)
    code = code.replace("/mnt/nvme", str(tmp_path))
    assert "import mlstor" in code
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "state.bin").exists()


def command_lines() -> list[tuple[str, list[str]]]:
    """(document, words from `mlstor` on) of every command line in a console block."""
    found = []
    for document in DOCUMENTS:
        for block in blocks(document, "console"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                module = next((word for word in words if re.fullmatch(r"mlstor\.(checkpoint|stream|copy)", word)), None)
                if module:
                    found.append((document.name, [module.partition(".")[2], *words[words.index(module) + 1 :]]))
                elif words[:1] == ["mlstor"]:
                    found.append((document.name, words[1:]))
    return found


@pytest.mark.parametrize(("document", "words"), command_lines(), ids=lambda value: str(value)[:60])
def test_command_lines_are_accepted(document, words):
    verb, *arguments = words
    assert verb in cli.VERBS, document
    if verb == "checkpoint":
        options.parse(arguments)
    elif verb == "mlpstorage":
        mlpstorage.translate(arguments, {})
    elif verb in ("stream", "copy"):
        {"stream": stream_options, "copy": copy_options}[verb].parse(arguments)
    elif verb == "aisloader":
        flags.parse(arguments)
    else:
        assert arguments, "a verb with nothing to do"
        assert {"doctor": doctor, "show": table, "clean": clean, "verify": verify}[verb].main


def test_there_are_command_lines_of_each_kind():
    documented = {words[0] for _, words in command_lines()}
    assert documented == set(cli.VERBS)


def test_every_option_of_the_checkpoint_is_described():
    text = (ROOT / "docs/checkpoint.md").read_text()
    for action in options.parser()._actions:
        for flag in action.option_strings:
            if flag.startswith("--") and flag != "--help":
                assert re.search(rf"`{flag}\b", text) or flag == "--live", flag  # only --no-live is of use


def test_options_in_the_checkpoint_guide_exist():
    known = {flag for action in options.parser()._actions for flag in action.option_strings}
    text = (ROOT / "docs/checkpoint.md").read_text().partition("## mlpstorage")[0]
    used = set(re.findall(r"`(--[a-z-]+)", text))
    assert used <= known


@names
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_the_index_lists_every_document():
    text = (ROOT / "docs/index.md").read_text()
    for document in ROOT.glob("docs/*.md"):
        if document.name != "index.md":
            assert f"]({document.name})" in text, document.name


def test_the_architecture_names_every_module_and_none_that_is_gone():
    text = (ROOT / "docs/architecture.md").read_text()
    package = ROOT / "src" / "mlstor"
    files = {
        path.name
        for pattern in ("*.py", "*.p*", "*/*.py", "csrc/*.c", "csrc/http/*.c")
        for path in package.glob(pattern)
        if path.name not in ("__init__.py", "__main__.py", "py.typed") and not path.name.startswith("__")
    }
    named = set(re.findall(r"\b(_?\w+\.(?:pyx|pxi|pxd|pyi|py|c))\b", text))
    assert files - named == set()
    assert named - files - {"setup.py", "__init__.py", "fio.py"} == set()


def test_the_makefile_has_the_targets_that_are_documented():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        quoted = "\n".join(re.findall(r"`([^`\n]+)`", document.read_text()))
        used = set(re.findall(r"\bmake ([a-z-]+)", quoted))
        used |= {word for block in blocks(document, "console") for word in re.findall(r"^make ([a-z-]+)$", block, re.M)}
        assert used <= targets, document


def test_documents_name_no_place_of_a_developers_machine():
    home = re.compile(r"/(?:home|root|Users)/\w+")
    for document in DOCUMENTS:
        assert not home.search(document.read_text()), document
