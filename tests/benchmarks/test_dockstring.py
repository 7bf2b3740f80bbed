"""DOCKSTRING is read as the papers read it, and a made-up one runs offline."""

from __future__ import annotations

import builtins
import io
import json
import urllib.error
import urllib.request

import pytest
import torch

from benchmarks.dockstring import __main__ as command
from benchmarks.dockstring import files
from benchmarks.dockstring.data import read_dockstring
from benchmarks.dockstring.exact import exact_prediction
from benchmarks.dockstring.fingerprints import fingerprints
from benchmarks.dockstring.generated import (
    generated_counts,
    generated_scores,
    generated_smiles,
)
from benchmarks.dockstring.model import build_model, values_of
from benchmarks.dockstring.run import Problem, Settings, r_squared, run
from benchmarks.dockstring.targets import TARGETS, target_named
from benchmarks.uci.download import DamagedFileError, DataUnavailableError, checksum

MD5_OF_SOME_TEXT = "552e21cd4cd9918678e3c1a0df491bc3"

ROWS = [
    ("A", "CCO", "-5.5", "-7.25", "train"),
    ("B", "c1ccccc1", "12.0", "", "test"),
    ("C", "CC(=O)N", "", "-6.0", "train"),
    ("D", "CCN(CC)CC", "-4.0", "-5.0", "test"),
    ("E", "Clc1ccccc1", "-6.5", "-8.0", "train"),
    ("F", "O=C(O)c1ccccc1", "-7.5", "-7.0", "test"),
]


@pytest.fixture
def folder(tmp_path):
    """A DOCKSTRING of six molecules, the split in another order."""
    dataset = ["inchikey\tsmiles\tESR2\tPARP1", *("\t".join(r[:4]) for r in ROWS)]
    split = ["smiles\tinchikey\tsplit"]
    split += ["\t".join((r[1], r[0], r[4])) for r in reversed(ROWS)]
    (tmp_path / files.DATASET).write_text("\n".join(dataset) + "\n")
    (tmp_path / files.SPLIT).write_text("\n".join(split) + "\n")
    return tmp_path


def read(folder, target="PARP1"):
    return read_dockstring(folder / files.DATASET, folder / files.SPLIT, target)


def test_molecules_are_split_scores_clipped_and_gaps_left_out(folder):
    train, test = read(folder, "ESR2")
    assert train.smiles == ("CCO", "Clc1ccccc1")
    assert train.y.tolist() == [-5.5, -6.5]
    assert test.smiles == ("c1ccccc1", "CCN(CC)CC", "O=C(O)c1ccccc1")
    assert test.y.tolist() == [5.0, -4.0, -7.5]
    train, test = read(folder)
    assert train.smiles == ("CCO", "CC(=O)N", "Clc1ccccc1")
    assert test.y.tolist() == [-5.0, -7.0]


def test_some_molecules_keep_their_scores(folder):
    train, _ = read(folder)
    some = train.some(2, seed=1)
    pairs = dict(zip(train.smiles, train.y.tolist(), strict=True))
    assert len(some.smiles) == 2
    assert [pairs[one] for one in some.smiles] == some.y.tolist()
    assert train.some(2, seed=1).smiles == some.smiles
    assert train.some(None, seed=1) is train
    assert train.some(99, seed=1) is train


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (files.DATASET, "smiles", "SMILES", "no column 'smiles'"),
        (files.DATASET, "-7.25", "much", "line 2: found the score 'much'"),
        (files.DATASET, "-7.25", "inf", "line 2: the score is infinite"),
        (files.DATASET, "-8.0", "-8.0\t1", "line 6: found 5 columns, expected 4"),
        (files.SPLIT, "\ttrain", "\tvalid", "line 3: found 'valid'"),
        (files.SPLIT, "\tA\t", "\tZ\t", "line 2: A is not in"),
        (files.SPLIT, "\ttest", "\ttrain", "no test molecule has a PARP1 score"),
    ],
)
def test_files_that_are_damaged_are_refused(folder, file, old, new, message):
    path = folder / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DamagedFileError, match=message):
        read(folder)


def test_missing_files_are_named_with_what_to_do(folder, monkeypatch):
    (folder / files.SPLIT).unlink()
    with pytest.raises(DataUnavailableError, match=r"^cluster_split.*--download"):
        files.locate(folder)
    monkeypatch.setenv("SGDGP_DATA", str(folder / "none"))
    monkeypatch.setenv("SGDGP_CACHE", str(folder / "cache"))
    with pytest.raises(DataUnavailableError, match="cache/dockstring"):
        files.locate()


def test_a_download_without_internet_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(url, **kwargs):
        raise urllib.error.URLError("offline")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(DataUnavailableError, match=r"(?s)offline.*--generated"):
        files.locate(tmp_path / "new", download=True)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_download_is_the_published_file_or_refused(tmp_path, monkeypatch):
    content = b"some text"
    monkeypatch.setattr(
        files, "CHECKSUMS", dict.fromkeys(files.CHECKSUMS, f"md5:{MD5_OF_SOME_TEXT}")
    )

    class Response(io.BytesIO):
        headers: dict = {}  # noqa: RUF012

    monkeypatch.setattr(
        urllib.request, "urlopen", lambda url, **kwargs: Response(content)
    )
    paths = files.locate(tmp_path, download=True)
    assert [path.read_bytes() for path in paths] == [b"some text"] * 2
    assert files.locate(tmp_path) == paths
    paths[1].unlink()
    content = b"some tex"
    with pytest.raises(DataUnavailableError, match=f"expected md5:{MD5_OF_SOME_TEXT}"):
        files.locate(tmp_path, download=True)
    assert not paths[1].exists()
    paths[1].write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"cluster_split.*expected md5"):
        files.locate(tmp_path)


def test_fingerprints_count_fragments_modulo_bins():
    chem = pytest.importorskip("rdkit.Chem")
    from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator

    smiles = [row[1] for row in ROWS] + ["[2H][2H]"]
    found = fingerprints(smiles, bins=64)
    generator = GetMorganGenerator(radius=1)
    for text, row in zip(smiles, found, strict=True):
        expected = torch.zeros(64, dtype=torch.int16)
        sparse = generator.GetSparseCountFingerprint(chem.MolFromSmiles(text))
        for identifier, count in sparse.GetNonzeroElements().items():
            expected[identifier % 64] += count
        assert torch.equal(row, expected)
    assert int(found[1].sum()) == 12  # benzene: six atoms, six neighbourhoods
    assert sorted(found[1][found[1] > 0].tolist()) == [6, 6]
    assert int(fingerprints([""])[0].sum()) == 0


def test_a_molecule_that_cannot_be_read_is_named():
    pytest.importorskip("rdkit")
    with pytest.raises(ValueError, match="'C1CC', number 1"):
        fingerprints(["CC", "C1CC"])


@pytest.fixture
def without_rdkit(monkeypatch):
    original = builtins.__import__

    def refuse(name, *arguments, **settings):
        if name.startswith("rdkit"):
            raise ImportError("none")
        return original(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_without_rdkit_only_counts_are_generated(without_rdkit, capsys):
    with pytest.raises(ImportError, match=r"sgdgp\[molecules\].*--counts"):
        fingerprints(["CC"])
    assert command.main(["--generated", "10"]) == 2
    assert "sgdgp[molecules]" in capsys.readouterr().err
    arguments = ["--generated", "30", "--counts", "--bins", "32", "--features", "64"]
    assert command.main(arguments) == 0
    assert "30 molecules conditioned" in capsys.readouterr().out


def test_generated_molecules_are_different_and_valid():
    pytest.importorskip("rdkit")
    smiles = generated_smiles(300, 0)
    assert len(set(smiles)) == 300
    assert smiles[:100] == generated_smiles(100, 0)
    assert smiles != generated_smiles(300, 1)
    counts = fingerprints(smiles)  # raises where one is not valid
    assert 10 < float((counts > 0).sum(1).double().mean()) < 60


def test_generated_counts_are_sparse_and_the_same_for_a_seed():
    torch.manual_seed(1)
    counts = generated_counts(200, 256, 0)
    torch.manual_seed(2)
    assert torch.equal(counts, generated_counts(200, 256, 0))
    assert not torch.equal(counts, generated_counts(200, 256, 1))
    assert int(counts.min()) == 0
    assert int(counts.max()) > 3
    assert 5 < float((counts > 0).sum(1).double().mean()) < 30


def test_generated_scores_have_the_targets_mean_and_variance():
    target = TARGETS["ESR2"]
    counts = torch.eye(400)  # molecules with nothing in common
    y = generated_scores(counts, target, 0)
    variance = target.amplitude + target.noise
    assert abs(float(y.mean()) - target.mean) < 4 * (variance / 400) ** 0.5
    assert abs(float(y.var()) / variance - 1) < 4 * (2 / 400) ** 0.5
    assert float(y.max()) <= 5.0


def test_hyperparameters_are_those_of_the_papers():
    found = {t.name: (t.mean, t.amplitude, t.noise) for t in TARGETS.values()}
    assert found == {
        "ESR2": (-6.73, 0.706, 0.261),
        "F2": (-6.14, 0.356, 0.0899),
        "KIT": (-6.39, 0.679, 0.112),
        "PARP1": (-6.95, 0.56, 0.0238),
        "PGR": (-7.08, 0.63, 0.332),
    }
    assert target_named("parp1") is TARGETS["PARP1"]
    with pytest.raises(ValueError, match="'EGFR', expected one of ESR2, F2"):
        target_named("EGFR")
    x = torch.eye(3, dtype=torch.float64)
    values = values_of(build_model(x, x.sum(1), TARGETS["KIT"]))
    assert values["mean"] == pytest.approx(-6.39, abs=1e-12)
    assert values["amplitude"] == pytest.approx(0.679, abs=1e-12)
    assert values["noise"] == pytest.approx(0.112, abs=1e-12)


def test_r_squared_is_that_of_sklearn_and_counts_biases(generator):
    metrics = pytest.importorskip("sklearn.metrics")
    y = torch.randn(50, generator=generator)
    mean = 0.5 * y + 0.3
    expected = metrics.r2_score(y.double().numpy(), mean.double().numpy())
    assert r_squared(mean, y) == pytest.approx(expected, abs=1e-12)
    assert r_squared(y + 10, y) < 0
    with pytest.raises(ValueError, match="two different scores"):
        r_squared(y[:1], y[:1])


def test_a_run_is_exact_regression_and_its_intervals_hold():
    target = TARGETS["PARP1"]
    counts = generated_counts(400, 64, 0).double()
    y = generated_scores(counts, target, 0)
    problem = Problem(target, counts[:300], y[:300], counts[300:], y[300:])
    found = run(problem, Settings(num_features=4096, exact=True))
    assert found["exact"]["largest_difference_of_means"] < 0.05
    assert found["r2"] == pytest.approx(found["exact"]["r2"], abs=0.01)
    # Variances of so few rows carry no sampling error.
    assert abs(found["exact"]["mean_ratio_of_variances"] - 1) < 1e-3
    assert found["exact"]["spread_of_ratio_of_variances"] < 1e-3
    # The level of the intervals is 95 %; of 100, two standard errors are 4.4 %.
    assert 0.88 < found["coverage"] <= 1
    assert found["reason"] == "converged"


def test_the_exact_posterior_is_that_of_gpytorch():
    target = TARGETS["KIT"]
    counts = generated_counts(60, 32, 1).double()
    y = generated_scores(counts, target, 1)
    model = build_model(counts[:50], y[:50], target)
    mean, variance = exact_prediction(model, counts[:50], y[:50], counts[50:])
    truth = model.eval()(counts[50:])
    torch.testing.assert_close(mean, truth.mean.detach())
    torch.testing.assert_close(variance, truth.variance.detach())


def test_the_command_reads_a_folder_and_writes_its_figures(folder, capsys, monkeypatch):
    pytest.importorskip("rdkit")
    sums = {name: checksum(folder / name, "md5") for name in files.CHECKSUMS}
    monkeypatch.setattr(files, "CHECKSUMS", sums)
    results = folder / "figures" / "six.json"
    arguments = ["--folder", str(folder), "--targets", "esr2", "PARP1", "--fit"]
    arguments += ["--features", "64", "--samples", "4", "--results", str(results)]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "ESR2: R2" in out
    assert "3 molecules conditioned" in out
    written = json.loads(results.read_text())
    assert [one["num_test"] for one in written["results"]] == [3, 2]
    assert written["results"][1]["hyperparameters"]["noise"] != 0.0238


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "EGFR", "--generated", "9"], "target: found 'EGFR'"),
        (["--generated", "1"], "generated: expected at least 2"),
        (["--generated", "9", "--samples", "1"], "samples: expected at least 2"),
        (["--generated", "9", "--solver", "magic", "--counts"], "solver"),
        (["--folder", "/nowhere"], "--generated 10000"),
    ],
)
def test_what_makes_no_sense_ends_with_one_line(arguments, message, capsys):
    pytest.importorskip("rdkit")
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
