"""Tables of pages say what the commands print from the stored results."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PAGES = {
    "tomography": "tomography",
    "learned_priors": "learned_priors",
    "reference_posteriors": "trust",
}
"""Studies and their pages."""

_NUMBER = r"(?<![\w.])-?\d*\.?\d+(?:e-\d+)?%?"


def figures(text: str) -> set[str]:
    """Numbers, and those with a standard error as one."""
    return set(re.findall(rf"{_NUMBER}(?: ± [\d.]+)?", text))


@pytest.mark.parametrize("study", PAGES)
def test_a_page_has_the_figures_that_the_command_prints(study, capsys, monkeypatch):
    def never(*job: str) -> int:
        raise AssertionError(f"--table ran {job}")

    command = importlib.import_module(f"benchmarks.{study}.__main__")
    monkeypatch.setattr("benchmarks.study.run_module", never)
    if hasattr(command, "run_module"):
        monkeypatch.setattr(command, "run_module", never)
    main = command.main if hasattr(command, "main") else command.STUDY.main
    main(["--table"])
    printed = capsys.readouterr().out
    known = figures(printed) | set(re.findall(_NUMBER, printed))
    page = (ROOT / "docs" / f"{PAGES[study]}.md").read_text(encoding="utf-8")
    section = page.split("\n## Measured\n")[1].split("\n## ")[0]
    table = re.findall(r"^\|.*\|$", section, re.MULTILINE)
    rows = [line.strip("|").split(" | ")[1:] for line in table[2:]]
    assert len(rows) > 4
    for row in rows:
        assert figures(" | ".join(row)) <= known, row
