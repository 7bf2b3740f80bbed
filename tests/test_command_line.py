"""``sgdgp fit``, ``predict`` and ``info``, and all that may be wrong with a table."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtri

import sgdgp
from sgdgp.command_line import main
from sgdgp.sklearn import SGDGPRegressor

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "command_line.md"
NAMES = ["length", "width"]


class Said(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def sgdgp_(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], Said]:
    """Runs a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(words: str) -> Said:
        try:
            code = main(shlex.split(words))
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Said(code, captured.out, captured.err)

    return run


def table(n: int = 40, seed: int = 0) -> pd.DataFrame:
    random = np.random.RandomState(seed)
    x = random.rand(n, 2)
    y = 3 * np.sin(5 * x[:, 0]) + x[:, 1] + 0.1 * random.randn(n)
    return pd.DataFrame({"length": x[:, 0], "width": x[:, 1], "y": y})


def fitted(sgdgp_: Any, **settings: Any) -> pd.DataFrame:
    """Writes data.csv and model; gives the data."""
    data = table()
    data.to_csv("data.csv", index=False)
    words = " ".join(f"--{name} {value}" for name, value in settings.items())
    found = sgdgp_(f"fit data.csv --target y --save model --steps 5 {words}")
    assert found.code == 0, found.err
    return data


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
def test_predictions_are_those_of_the_regressor(sgdgp_: Any, ending: str):
    data = fitted(sgdgp_, seed=3)
    model = SGDGPRegressor(random_state=3, steps=5).fit(data[NAMES], data["y"])
    new = table(7, seed=1)
    # In another order, and with a column that nobody asked for.
    other = new[["width", "length"]].assign(note="words")
    if ending == "parquet":
        other.to_parquet("new.parquet")
    else:
        other.to_csv(f"new.{ending}", index=False)
    found = sgdgp_(
        f"predict model new.{ending} --out found.{ending} --quantiles .05 .5 0.95"
    )
    assert (found.code, found.out) == (0, "")
    assert "ignored columns 'note'" in found.err
    read = pd.read_parquet if ending == "parquet" else pd.read_csv
    written = read(f"found.{ending}")
    mean, std = model.predict(new[NAMES], return_std=True, observation_noise=True)
    assert list(written) == ["mean", "std", "q0.05", "q0.5", "q0.95"]
    np.testing.assert_allclose(written["mean"], mean, rtol=1e-9)
    np.testing.assert_allclose(written["std"], std, rtol=1e-9)
    np.testing.assert_allclose(written["q0.5"], mean, rtol=1e-9)
    np.testing.assert_allclose(written["q0.95"], mean + std * ndtri(0.95), rtol=1e-9)


def test_a_target_in_the_new_table_is_scored_where_it_is_known(sgdgp_: Any):
    fitted(sgdgp_)
    new = table(30, seed=1)
    new.loc[[4, 7], "y"] = np.nan
    new.to_csv("new.csv", index=False)
    found = sgdgp_("predict model new.csv --out found.csv")
    scores = dict(line.split(None, 1) for line in found.out.splitlines())
    assert scores.keys() == {"rows", "RMSE", "NLL", "coverage"}
    assert scores["rows"] == "28"
    written = pd.read_csv("found.csv")
    assert len(written) == 30
    rmse = np.sqrt((written["mean"] - new["y"]).pow(2).mean())
    assert float(scores["RMSE"]) == pytest.approx(rmse, rel=1e-3)
    new.assign(y=np.nan).to_csv("new.csv", index=False)
    assert sgdgp_("predict model new.csv --out found.csv").out == ""


def test_info_tells_what_the_model_is_and_python_reads_it(sgdgp_: Any):
    fitted(sgdgp_, kernel="'linear + rbf'", drop="width")
    found = sgdgp_("info model")
    model = sgdgp.load("model")
    assert found.code == 0
    for words in ("target     y:", "rows       40", "columns    1", "linear + rbf"):
        assert words in found.out
    assert f"{model.noise_**0.5:.4g}" in found.out
    assert model.feature_names_in_.tolist() == ["length"]
    fitted(sgdgp_)
    assert "  width  " in sgdgp_("info model").out


BAD = {
    "missing target": (
        lambda d: d.rename(columns={"y": "z"}),
        "there is no column 'y'; the first line has 'length', 'width', 'z'",
    ),
    "text": (
        lambda d: d.astype(object).mask(np.outer(d.index == 6, [1, 1, 1]) > 0, "seven"),
        "column 'length', row 7: expected a number, found 'seven'\n"
        "data.csv: column 'width', row 7",
    ),
    "nothing": (
        lambda d: d.assign(width=d["width"].where(d.index != 2)),
        "column 'width', row 3: expected a finite number, found nothing (in 1 of 40",
    ),
    "infinite": (
        lambda d: d.assign(width=np.inf),
        "column 'width', row 1: expected a finite number, found inf (in 40 of 40 rows)",
    ),
    "no target in a row": (
        lambda d: d.assign(y=d["y"].where(d.index < 30)),
        "column 'y', row 31: expected a finite number, found nothing",
    ),
    "constant": (lambda d: d.assign(y=2.0), "column 'y' is 2 in every row"),
    "no rows": (lambda d: d[:0], "there are no rows below the names"),
    "no inputs": (lambda d: d[["y"]], "no column is left to predict 'y' from"),
    "no header": (
        lambda d: d.rename(columns=dict(zip(d, "123", strict=True))),
        "there is no column 'y'; the first line has '1', '2', '3'",
    ),
    "many": (
        lambda d: d.assign(**{f"c{i}": "x" for i in range(9)}),
        "4 more columns; --drop leaves columns out",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_refused_before_work(sgdgp_: Any, case: str):
    change, words = BAD[case]
    change(table()).to_csv("data.csv", index=False)
    found = sgdgp_("fit data.csv --target y --save model")
    assert (found.code, found.out) == (2, "")
    assert words in found.err
    assert "learning" not in found.err
    assert not Path("model").exists()


def test_bad_files_are_refused_in_a_line(sgdgp_: Any):
    Path("empty.csv").touch()
    Path("ragged.csv").write_text("length,y\n1,2,3\n4,5,6\n")
    Path("data.parquet").write_bytes(b"PAR2")
    Path("binary.csv").write_bytes(bytes(range(256)))
    table().to_csv("data.csv", index=False)
    data = table().assign(when=pd.Timestamp("2026-11-28"), z=1j)
    data.drop(columns="z").to_parquet("times.parquet")
    for words, message in (
        ("fit empty.csv --target y --save model", "the file is empty"),
        ("fit ragged.csv --target y --save model", "cannot be read as CSV"),
        ("fit binary.csv --target y --save model", "cannot be read as CSV"),
        ("fit data.parquet --target y --save model", "cannot be read as Parquet"),
        ("fit data.txt --target y --save model", "ends in .csv or .parquet"),
        ("fit none.csv --target y --save model", "there is no such file"),
        ("fit times.parquet --target y --save model", "'when' holds datetime64"),
        ("fit data.csv --target y --save nowhere/m", "--save: expected an existing"),
        ("fit data.csv --target y --save data.csv", "written over the input"),
        ("fit data.csv --target y --save m --drop z", "there is no column 'z'"),
        ("fit data.csv --target y --save m --kernel cubic", "found 'cubic'"),
        ("fit data.csv --target y --save m --solver lu", "lu"),
        ("fit data.csv --target y --save m --steps x", "x"),
        ("fit data.csv --save m", "--target"),
        ("predict none data.csv --out a.csv", "cannot read none"),
        ("predict data.csv data.csv --out a.csv", "not a regressor of sgdgp"),
        ("predict none data.csv --out a.txt", "ends in .csv or .parquet"),
        ("predict none data.csv --out data.csv", "written over the input"),
        ("predict none data.csv --out a.csv --quantiles 5", "between 0 and 1"),
        ("info none", "cannot read none"),
        ("learn", "learn"),
    ):
        found = sgdgp_(words)
        assert found.code == 2, words
        assert message in found.out + found.err, words


def test_new_tables_that_do_not_fit_are_refused(sgdgp_: Any):
    fitted(sgdgp_)
    new = table(5, seed=1)
    for change, words in (
        (lambda d: d[["y"]], "there is no column 'length', 'width'"),
        (lambda d: d.assign(width="wide"), "'width', row 1: expected a number, found"),
        (lambda d: d.assign(y="far"), "column 'y', row 1: expected a number, found"),
        (lambda d: d.assign(length=np.nan), "expected a finite number, found nothing"),
    ):
        change(new).to_csv("new.csv", index=False)
        found = sgdgp_("predict model new.csv --out found.csv")
        assert (found.code, found.out) == (2, "")
        assert words in found.err
        assert not Path("found.csv").exists()


def test_models_that_are_not_of_one_table_are_refused(sgdgp_: Any):
    data = table()
    model = SGDGPRegressor(steps=1, num_samples=2)
    for X, y in (
        (data[NAMES].to_numpy(), data["y"]),
        (data[NAMES], data[["y", "length"]]),
    ):
        model.fit(X, y).save("model")
        found = sgdgp_("info model")
        assert found.code == 2
        assert "read by sgdgp.load in Python" in found.err


def test_an_interrupted_command_says_so(sgdgp_: Any, monkeypatch: Any):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SGDGPRegressor, "fit", interrupt)
    table().to_csv("data.csv", index=False)
    found = sgdgp_("fit data.csv --target y --save model")
    assert (found.code, found.err.splitlines()[-1]) == (130, "sgdgp: interrupted")
    assert not Path("model").exists()


def test_warnings_are_lines(sgdgp_: Any):
    data = table()
    data.to_csv("data.csv", index=False)
    found = sgdgp_("fit data.csv --target y --save m --steps 2 --solver sgd")
    assert found.code == 0
    assert re.search(r"^sgdgp: warning: ", found.err, re.MULTILINE)


def test_the_module_is_the_command_and_names_its_extra(monkeypatch: Any):
    monkeypatch.setattr(sys, "argv", ["sgdgp", "info", "none"])
    with pytest.raises(SystemExit, match=r"^2$"):
        runpy.run_module("sgdgp", run_name="__main__")
    monkeypatch.delitem(sys.modules, "sgdgp.command_line")
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(SystemExit, match=r"^sgdgp: .*pip install 'sgdgp\[cli\]'$"):
        runpy.run_module("sgdgp", run_name="__main__")


def test_the_session_of_the_page_is_true(sgdgp_: Any):
    folder = Path(os.environ.get("SGDGP_DATA", "nowhere"), "uci", "yacht")
    if not folder.is_dir():
        pytest.skip("needs the UCI data")
    data = pd.read_csv(folder / "data.csv.gz", header=None)
    text = PAGE.read_text()
    (header,) = re.findall(r"^([a-z_,]+)$", text, re.MULTILINE)
    data.columns = header.split(",")
    test = pd.read_csv(folder / "test_mask.csv.gz", header=None)[0] == 1
    data[~test].to_csv("yacht.csv", index=False)
    data[test].to_csv("new.csv", index=False)
    found = Said(0, "", "")
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            words, _, shown = command.partition("\n")
            if words.startswith("pip "):
                continue
            if words.startswith("sgdgp "):
                found = sgdgp_(words.removeprefix("sgdgp "))
                said = found.err + found.out
            elif words == "echo $?":
                said = f"{found.code}\n"
            else:
                shell = subprocess.run(
                    ["sh", "-c", words], capture_output=True, text=True, check=True
                )
                said = shell.stdout
            number = r"-?\d+\.?\d*(?:e-?\d+)?"
            assert re.sub(number, "#", said) == re.sub(number, "#", shown), words
            pairs = [[float(s) for s in re.findall(number, t)] for t in (said, shown)]
            np.testing.assert_allclose(*pairs, rtol=0.1, atol=0.02)
