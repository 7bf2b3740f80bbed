"""Sources, targets and the table of the learned priors' study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.checks import SHORT
from benchmarks.json_file import write_json
from benchmarks.learned_priors.__main__ import main
from benchmarks.learned_priors.digits import few
from benchmarks.learned_priors.regression import shifted
from benchmarks.learned_priors.run import Job
from benchmarks.learned_priors.table import checks
from benchmarks.learned_priors.training import anchor_of, fine_tuned
from benchmarks.networks.data import Images


@pytest.fixture
def airfoil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set of the user's own, a third of it twice."""
    folder = tmp_path / "uci" / "airfoil"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 3))
    table = np.column_stack([x, x.sum(1)])
    table = np.concatenate([table, table[:30]])
    np.savetxt(folder / "data.csv.gz", table, delimiter=",")
    mask = np.arange(120)[:, None] % 10 == np.arange(10)
    np.savetxt(folder / "test_mask.csv.gz", mask, fmt="%d", delimiter=",")
    monkeypatch.setenv("SGDGP_DATA", str(tmp_path))
    return tmp_path


def test_source_and_target_of_any_set_have_no_input_in_common(airfoil):
    source, target = shifted("airfoil", 0)
    assert len(source[0]) == 27
    assert len(target[0]) == 63
    both = torch.cat([source[0], target[0]])
    assert len(both.unique(dim=0)) == 90
    torch.testing.assert_close(source[0].mean(0), torch.zeros(3), atol=1e-5, rtol=0)


def test_few_are_as_many_of_each_class_and_skipped_ones_are_others():
    images = Images(torch.arange(12.0).view(12, 1, 1, 1), torch.arange(12) % 3)
    assert few(images, 2, 3).y.tolist() == [0, 0, 1, 1, 2, 2]
    first, second = (set(few(images, 2, 3, k).x.flatten().tolist()) for k in (0, 2))
    assert not first & second


def test_consolidation_holds_what_mattered_and_fine_tuning_does_not():
    torch.manual_seed(0)
    network = nn.Linear(2, 2)
    x = torch.randn(40, 2) * torch.tensor([3.0, 0.0])
    anchor = anchor_of(network, x)
    assert float(anchor.importance[[0, 2]].min()) > 1.0
    assert float(anchor.importance[[1, 3]].max()) == 0.0
    target = torch.randn(30, 2)
    y = (target[:, 0] + target[:, 1] > 0).long()
    free, _ = fine_tuned(network, target, y, seed=0)
    held, _ = fine_tuned(network, target, y, seed=0, anchor=anchor, strengths=(100.0,))
    moved = [
        (n.weight - network.weight).detach().abs()[:, 0].max() for n in (free, held)
    ]
    assert float(moved[1]) < 0.1 * float(moved[0])


def _regression(gain: float, bound: float) -> list[dict[str, object]]:
    common = {"evidence": 0.0, "test_risk": 0.1, "mcallester": 0.9, "chance": 1.0}
    return [
        {"seed": seed, "n": n, "method": method, "nll": nll, "bound": b, **common}
        for seed in (0, 1)
        for n in (50, 100)
        for method, nll, b in (
            ("learned", 0.5 - gain, 0.3),
            ("strength 1", 0.5 - gain, 0.3),
            ("isotropic", 0.5, 0.3 + bound),
        )
    ]


def test_thresholds_are_those_of_the_set_and_violations_are_counted():
    good = checks({"regression": {"energy": _regression(0.4, 0.05)}})
    assert all(check.holds for check in good)
    poor = checks({"regression": {"energy": _regression(0.2, 0.01)}})
    assert [c.holds for c in poor] == [False, False, False, True, True]
    other = checks({"regression": {"wine": _regression(0.2, -0.25)}})
    assert [c.holds for c in other] == [True, True, False, False, True]


def test_the_command_says_by_its_status_whether_figures_fall_short(tmp_path, capsys):
    for gain, status in ((0.4, 0), (0.1, SHORT)):
        path = tmp_path / "regression-energy.json"
        write_json(path, {"records": _regression(gain, 0.05)})
        asked = ["--rows", "regression", "--sets", "energy", "--seeds", "0", "1"]
        assert main([*asked, "--table", "--results", str(tmp_path)]) == status
        assert ("falls short" in capsys.readouterr().out) == bool(status)
    job = Job("regression", "energy", (0, 1, 2))
    assert job.missing(tmp_path).seeds == (2,)
