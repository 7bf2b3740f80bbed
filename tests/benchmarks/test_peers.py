"""The race of products: it says what it measured, and holds it to what was asked."""

import json

import pytest

from benchmarks.peers.__main__ import main

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
