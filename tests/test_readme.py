"""What the README and the docs say can be typed in, and works."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNERS = {"bash", "cd", "cut", "echo", "git", "head", "sed", "sgdgp"}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    line: int
    text: str


def blocks(page: Path) -> list[Block]:
    """Fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in FENCE.finditer(text)
    ]


def commands(page: Path) -> list[str]:
    """Lines of a page's console blocks that a reader would type."""
    return [
        line.removeprefix("$ ")
        for block in blocks(page)
        if block.language == "console"
        for line in block.text.splitlines()
        if line.startswith("$ ")
    ]


PYTHON_PAGES = [p for p in PAGES if any(b.language == "python" for b in blocks(p))]
COMMANDS = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(
    page: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)  # some write files
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            # Empty lines in front make a traceback show the line of the page.
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(page), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "nan" not in printed


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_console_commands_exist(page: str, command: str):
    program, *arguments = shlex.split(command, comments=True)
    if program == "make":
        targets = re.findall(
            r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE
        )
        assert set(arguments) <= set(targets)
    elif program == "python":
        assert arguments[0] == "-m"
        assert importlib.util.find_spec(arguments[1]) is not None
    elif program == "pip":
        assert arguments[0] == "install"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = re.findall(r"\[([\w,]+)\]", command)
        extras = {extra for names in named for extra in names.split(",")}
        assert extras <= set(project["optional-dependencies"])
    else:
        assert program in RUNNERS


def test_console_commands_of_the_readme_were_found():
    typed = [shlex.split(command, comments=True) for _, command in COMMANDS]
    assert ["make", "demo"] in typed
    assert ["make", "test"] in typed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    missing = [link for link in local if not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_named_in_the_text_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:sgdgp|benchmarks|notebooks|\.ci)/[\w./]*)`", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []
