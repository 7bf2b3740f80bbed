"""Two processes, one of which leads: the same answers, and an end when one ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpytorch.kernels import MaternKernel, PiecewisePolynomialKernel, PolynomialKernel
from torch import Tensor

import sgdgp
from sgdgp.operators import ShardedOperator
from tests.operators import sharded_program

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the program leaves what it found."""
    place = tmp_path_factory.mktemp("sharded")
    subprocess.run(
        [sys.executable, "-m", "tests.operators.sharded_program", str(place)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    return place


@pytest.fixture(scope="module")
def ends(folder) -> dict[str, list[int]]:
    """How the processes ended."""
    return json.loads((folder / "ends.json").read_text())


def test_the_answers_of_two_processes_are_those_of_one(folder, ends):
    """Products, gradients, every solver, prior draws, variances, and a fit."""
    alone = torch.load(folder / "alone.pt")
    together = torch.load(folder / "two.pt")["answers"]
    assert ends["two"] == [0, 0]
    assert together.keys() == alone.keys()
    errors = {name: error(together[name], alone[name]) for name in alone}
    assert {name: e for name, e in errors.items() if not e <= 1e-5} == {}


def error(found: Tensor, expected: Tensor) -> float:
    """Relative difference."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def test_what_goes_wrong_is_told_and_all_go_on(folder):
    assert torch.load(folder / "two.pt")["faults"] == [
        "ProcessesError: process 1: ValueError: no rows here",
        "ProcessesError: process 1: ValueError: invalid literal for int() with base "
        "10: 'no number'",
        "KeyboardInterrupt: by the user",
        "KeyboardInterrupt: ",
        "[[1.0, 1.0]]",
        "after an argument that cannot be sent: True",
    ]


def test_what_was_not_kept_is_sent_again(folder):
    found = torch.load(folder / "two.pt")["kept late"]
    assert found == ["process 1: MemoryError: no room just now", "tensor([3.])"]


def test_tensors_of_all_types_travel(folder):
    found = torch.load(folder / "two.pt")["carried"]
    assert len(found) == 10
    assert all(found.values()), found


def test_a_process_that_is_killed_ends_the_other(folder, ends):
    assert ends["killed"] == [1, -9]
    assert (
        (folder / "killed.0").read_text().startswith("another process of 2 has ended")
    )


def test_one_process_goes_on_where_two_were_killed(folder):
    undisturbed = sharded_program.solve(None)
    told = []
    resumed = sharded_program.solve(folder / "solve", told.append)
    assert told[0].passes > 2  # those of the two are accounted for
    assert error(resumed, undisturbed) < 1e-5


def test_alone_it_is_the_operator_behind_it(generator):
    model, x, _ = sharded_program.problem()
    operator = ShardedOperator(model.covar_module, x)
    v = torch.randn(len(x), 2, generator=generator).to(x)
    assert torch.equal(operator.matmul(v), operator.local.matmul(v))
    assert sgdgp.distribute(lambda: 7) == 7


@pytest.mark.parametrize(
    "kernel", [PolynomialKernel(2), PiecewisePolynomialKernel(q=1), MaternKernel(1.5)]
)
def test_hyperparameters_are_those_at_construction(kernel, generator):
    kernel, x = kernel.double(), torch.randn(20, 2, generator=generator).double()
    operator = ShardedOperator(kernel, x)
    v = torch.randn(20, 2, generator=generator).double()
    before, form = operator.matmul(v), operator.quadratic_form(v, v)
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.add_(1.0)
    assert torch.equal(operator.matmul(v), before)
    assert operator.quadratic_form(v, v) != form  # of the parameters as they are now


def test_features_of_networks_are_not_shared(generator):
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    kernel = sgdgp.kernels.NeuralTangentKernel(network)
    with pytest.raises(ValueError, match="exact features"):
        ShardedOperator(kernel, torch.randn(5, 2, generator=generator))
