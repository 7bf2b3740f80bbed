"""The closed forms against brute force, and the command on a tiny data set."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.hyperparameters.variance import (
    Spread,
    derivatives,
    estimates,
    initial_values,
    main,
    table,
    variances,
)
from benchmarks.uci.data import Split


def symmetric(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return matrix + matrix.mT


@pytest.fixture
def factor():
    matrix = symmetric(0)
    identity = torch.eye(6, dtype=torch.float64)
    return torch.linalg.cholesky(matrix @ matrix + identity)


def test_closed_forms_are_the_variances_of_many_gaussian_probes(factor):
    a = symmetric(1)
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(6, 400_000, generator=generator, dtype=torch.float64)
    expected = variances(factor, a)
    for rhs, is_pathwise, variance in (
        (factor @ z, True, expected[0]),
        (z, False, expected[1]),
    ):
        drawn = (rhs, is_pathwise)
        singles = estimates(lambda _, drawn=drawn: drawn, factor, [a], 1)
        assert float(singles.var()) == pytest.approx(variance, rel=0.02)
        trace = float(torch.cholesky_solve(a, factor).trace())
        error = math.sqrt(variance / z.shape[1])
        assert abs(float(singles.mean()) - trace) < 4.0 * error
    assert expected[0] < 0.9 * expected[1]


def test_kinds_differ_only_where_the_derivative_does_not_commute_with_h(factor):
    h = factor @ factor.mT
    pathwise, standard = variances(factor, h + h @ h)
    assert pathwise == pytest.approx(standard, rel=1e-10)


def test_derivatives_are_those_of_the_covariance():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    split = Split("made up", 0, x, x[:, 0], x, x[:, 0])
    found = derivatives(split, initial_values(2))
    variance = math.log(2.0)
    torch.testing.assert_close(
        found["noise"], variance * torch.eye(20, dtype=torch.float64)
    )
    # Matern-3/2: k = s (1 + r) exp(-r), so dk / dlog l = s r^2 exp(-r).
    r = math.sqrt(3.0) * torch.cdist(x, x) / math.log(2.0)
    torch.testing.assert_close(
        found["outputscale"], variance * (1.0 + r) * (-r).exp(), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        found["lengthscales"], variance * r**2 * (-r).exp(), rtol=1e-6, atol=1e-6
    )


def test_a_cell_is_the_measured_error_and_the_closed_form():
    one = {8: 0.1, 32: 0.05, 128: 0.025}
    results = [
        Spread(300, "published", "noise", "pathwise", 1.0, one, one),
        Spread(300, "published", "noise", "one map", 1.0, {}, one),
    ]
    assert table(results).splitlines()[2] == (
        "| 300 | published | noise | 10 (10) | 5 (5) | 2.5 (2.5) | 2.5 |"
    )


def test_the_command_measures_what_the_closed_form_says(tiny, tmp_path, capsys):
    path = tmp_path / "measured" / "variance.json"
    arguments = ["--dataset", "tiny", "--n", "60", "--at", "published", "initial"]
    assert main([*arguments, "--replicates", "8", "--out", str(path)]) == 0
    assert "| 60 | published | noise |" in capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    assert len(results) == 2 * 3 * 3
    for result in results:
        if result["probes"] == "standard":
            # 128 means over eight probes each: their spread is known to a sixth.
            measured, closed = result["measured"]["8"], result["closed"]["8"]
            assert measured == pytest.approx(closed, rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "tiny", "--n", "1000"], "n: found 1000"),
        (["--dataset", "nowhere"], "dataset: found 'nowhere'"),
    ],
)
def test_what_cannot_be_measured_is_an_error_in_words(tiny, capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
