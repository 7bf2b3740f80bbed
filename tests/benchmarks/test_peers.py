"""Races beside others: they say what they measured, and hold it to what was asked."""

import json

import pytest

from benchmarks.peers import solves
from benchmarks.peers.__main__ import main
from tests.benchmarks.fake_checkouts import fake_checkout

QUICK = ["--n", "300", "--dims", "2", "--columns", "3", "--kernels", "matern32"]


def test_rivals_agree_and_the_ratio_decides(tmp_path, capsys):
    file = tmp_path / "found.json"
    rivals = ["--rivals", "gpytorch", "sklearn", "--threads", "1"]
    assert main([*QUICK, *rivals, "--assert-ratio", "0", "--json", str(file)]) == 0
    assert main([*QUICK, *rivals, "--assert-ratio", "1e9"]) == 3
    assert "falls short" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert "benchmarks.peers --n 300" in found["command"]
    (row,) = found["rows"]
    assert {"sgdgp", "before", "gpytorch", "sklearn", "limit"} <= set(row)


@pytest.mark.parametrize("wrong", [["--kernels", "cosine"], ["--rivals", "nobody"]])
def test_what_nobody_knows_is_refused(wrong):
    with pytest.raises(SystemExit):
        main([*QUICK, *wrong])


SMALL = ["--n", "150", "--dim", "2", "--columns", "2", "--solvers", "cg"]


@pytest.mark.parametrize(
    ("code", "solver"),
    [("sgd-gp", "sdd-1"), ("iterative-gp", "cg"), ("rlaopt", "adasap")],
)
def test_a_published_code_solves_the_same_system(tmp_path, capsys, code, solver):
    checkout, file = fake_checkout(tmp_path, code), tmp_path / "found.json"
    command = [*SMALL, f"--{code}", str(checkout), "--published", f"{code}:{solver}"]
    assert solves.main([*command, "--json", str(file), "--assert-ratio", "0"]) == 0
    assert f"{code}:{solver}" in capsys.readouterr().out
    found = json.loads(file.read_text())
    theirs, own = found["rows"]
    assert (theirs["code"], own["code"]) == (code, "sgdgp")
    for row in (theirs, own):
        assert row["reached"]
        assert 0 < row["residual"] <= 1e-2
        assert row["ratio"] == pytest.approx(row["cpu_seconds"] / own["cpu_seconds"])


def test_a_code_that_fails_is_a_row_and_a_ratio_that_is_asked_is_held(tmp_path, capsys):
    checkout = fake_checkout(tmp_path, "iterative-gp")
    command = [*SMALL, "--iterative-gp", str(checkout), "--published"]
    assert solves.main([*command, "iterative-gp:ap", "--assert-ratio", "1e9"]) == 3
    assert "falls short" in capsys.readouterr().out
    with (checkout / "linear_solvers.py").open("a") as file:
        file.write("\ndef sgd_solver(*_, **__):\n    raise ValueError('no way')\n")
    assert solves.main([*command, "iterative-gp:sgd"]) == 0
    assert "ValueError: no way" in capsys.readouterr().out


def test_what_is_missing_is_said_in_a_line_that_names_the_argument(tmp_path, capsys):
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            solves.main([*SMALL, *arguments])
        return capsys.readouterr().err.splitlines()[-1]

    assert "--sgd-gp: " in said("--sgd-gp", str(tmp_path))
    checkout = fake_checkout(tmp_path, "sgd-gp")
    (checkout / "optax.py").write_text("import nothing_like_it")
    line = said("--sgd-gp", str(checkout), "--published", "sgd-gp:sdd-1")
    assert "--sgd-gp: " in line
    assert "nothing_like_it" in line
    assert "--rlaopt: " in said("--rlaopt", str(fake_checkout(tmp_path, "rlaopt")), "x")
    assert "--assert-ratio" in said("--assert-ratio", "1")
