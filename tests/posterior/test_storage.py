"""save and load: the same bits in a new process, and no file that is not sound."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from inspect import unwrap
from pathlib import Path

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from safetensors.torch import load_file, save_file

import sgdgp
from sgdgp.core.errors import StorageError, warn_user
from sgdgp.core.files import read_file, write_file
from sgdgp.posterior import load
from sgdgp.posterior.storage import KIND
from sgdgp.solvers.two_level import TwoLevel
from tests.models import GP, gp, toy_data
from tests.posterior.stored_posteriors import BUILD, data_for, predictions
from tests.stored import stored

ROOT = Path(__file__).parents[2]
SETTINGS = {"num_samples": 3, "num_features": 64, "seed": 4}
X = toy_data(5, seed=1)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every kind of model, what the posteriors said, and a new process."""
    place = tmp_path_factory.mktemp("posteriors")
    for name, build in BUILD.items():
        posterior = sgdgp.condition(build(), *data_for(name), **SETTINGS)
        posterior.save(place / f"{name}.posterior")
        save_file(predictions(posterior, name), place / f"{name}.before")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "tests.posterior.loads_in_a_new_process", str(place)],
        check=True,
        cwd=ROOT,
        env=environment,
    )
    return place


@pytest.fixture
def path(tmp_path):
    return tmp_path / "posterior"


def saved(path, model=None, **settings):
    posterior = sgdgp.condition(model or gp(), **{**SETTINGS, **settings})
    posterior.save(path)
    return posterior


@pytest.mark.parametrize("name", BUILD)
def test_a_new_process_says_the_same_bit_by_bit(folder, name):
    before = load_file(folder / f"{name}.before")
    again = load_file(folder / f"{name}.again")
    assert set(before) == set(again) != set()
    for key, value in before.items():
        assert torch.equal(again[key], value), key


def test_everything_about_the_solve_comes_back(path):
    solver = sgdgp.CG(tolerance=1e-4)
    posterior = saved(path, gp(n=60), solver=solver)
    again = load(path, gp(n=60))
    for item in fields(posterior.solution):
        before = getattr(posterior.solution, item.name)
        after = getattr(again.solution, item.name)
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after)
        elif item.name not in ("settings", "recycled"):
            assert before == after
    # Several times as large as all the rest, and only there to save passes.
    assert again.solution.recycled is None
    assert again.num_samples == 3
    assert again.timings == posterior.timings
    assert again.problem.solver == solver
    assert again.problem.settings == posterior.problem.settings


def test_a_loaded_posterior_can_be_saved_again(path, tmp_path):
    posterior = saved(path)
    again = load(path, gp())
    again.save(tmp_path / "second")
    second = load(tmp_path / "second", gp())
    x = toy_data(5, seed=1)[0]
    assert torch.equal(second.samples(x), posterior.samples(x))


def test_an_updated_posterior_can_be_saved(path):
    x, y = toy_data(5, seed=7)
    posterior = sgdgp.condition(gp(n=80), solver=sgdgp.SDD(), **SETTINGS).update(x, y)
    posterior.save(path)
    again = load(path, gp(n=80))
    assert torch.equal(again.samples(x), posterior.samples(x))
    assert torch.equal(again.update(x, y).mean(x), posterior.update(x, y).mean(x))


def test_without_samples_and_with_a_suffix_of_any_kind(tmp_path):
    path = tmp_path / "my model.v2.bin"
    posterior = saved(str(path), num_samples=0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["my model.v2.bin"]
    x = toy_data(5, seed=1)[0]
    again = load(str(path), gp())
    assert torch.equal(again.mean(x), posterior.mean(x))
    assert torch.equal(again.draw(2)(x), posterior.draw(2)(x))


def test_the_given_model_is_copied_and_its_values_do_not_matter(path):
    posterior = saved(path)
    model = gp(n=7).float()
    model.kernel.lengthscale = 3.0
    before = copy.deepcopy(model.state_dict())
    x = toy_data(5, seed=1)[0]
    assert torch.equal(load(path, model).mean(x), posterior.mean(x))
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert model.training
    assert model.train_inputs[0].shape == (7, 2)


def test_a_model_without_data_will_do(path):
    posterior = saved(path)
    x = toy_data(5, seed=1)[0]
    again = load(path, GP(None, None, RBFKernel()))
    assert torch.equal(again.samples(x), posterior.samples(x))


SOLVERS = [
    sgdgp.SDD(tolerance=1e-3, block_size=20, momentum=0.9),
    sgdgp.CG(preconditioner=None),
    sgdgp.CG(preconditioner=sgdgp.solvers.PivotedCholesky(rank=30)),
    sgdgp.CG(preconditioner=TwoLevel(low_rank=sgdgp.solvers.Nystrom(), neighbours=7)),
    sgdgp.Cholesky(),
    sgdgp.AlternatingProjections(),
    sgdgp.ADASAP(),
    sgdgp.SGD(),
    sgdgp.solvers.auto.Auto(tolerance=1e-5, memory_budget=10**7),
    sgdgp.solvers.auto.Auto(stages=(sgdgp.solvers.auto.Stage(sgdgp.CG(), 20.0),)),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_settings_of_every_solver_come_back(solver):
    assert stored(solver) == solver


@dataclass(frozen=True)
class Mine(sgdgp.CG):
    """A user's solver."""


def test_a_users_solver_is_replaced_with_a_warning_or_given_again(path):
    posterior = saved(path, solver=Mine(tolerance=1e-8))
    with pytest.warns(UserWarning, match=r"Mine\(tolerance=1e-08.*Pass solver="):
        again = load(path, gp())
    assert again.problem.solver.name == "auto"
    x = toy_data(5, seed=1)[0]
    assert torch.equal(again.mean(x), posterior.mean(x))
    assert load(path, gp(), solver=Mine()).problem.solver == Mine()
    assert load(path, gp(), solver="sdd").problem.solver == sgdgp.SDD()


class Nameless(sgdgp.Solver):
    """A user's solver that says the least."""

    def solve(self, *args, **settings):
        return sgdgp.CG().solve(*args, **settings)


def test_a_solver_without_a_name_is_called_by_its_class(path):
    assert Nameless().name == "nameless"
    assert not hasattr(Nameless(), "title")
    saved(path, solver=Nameless())
    with pytest.warns(UserWarning, match=r"solved by Nameless\(\), which"):
        load(path, gp())


def test_warnings_are_of_the_users_line():
    with pytest.warns(UserWarning, match="word") as seen:
        exec(
            "warn_user('word')", {"__name__": "sgdgp.x", "warn_user": unwrap(warn_user)}
        )
    assert seen[0].filename == __file__


def test_warnings_of_functions_without_gradients_are_of_the_users_line():
    within = {"__name__": "sgdgp.x", "warn_user": unwrap(warn_user)}
    exec("def decorated(): warn_user('word')", within)
    with pytest.warns(UserWarning, match="word") as seen:
        torch.no_grad()(within["decorated"])()
    assert seen[0].filename == __file__


class OtherForward(GP):
    def forward(self, x):
        return super().forward(2.0 * x)


OtherForward.__qualname__ = "GP"

OTHERS = {
    "module kernel is RBFKernel.*, expected ScaleKernel": lambda: gp(RBFKernel()),
    "kernel.base_kernel is MaternKernel.*nu=2.5, expected.*nu=1.5": lambda: gp(
        ScaleKernel(MaternKernel(nu=2.5))
    ),
    r"kernel.base_kernel.raw_lengthscale is \(1, 2\), expected \(1, 1\)": lambda: gp(
        ScaleKernel(MaternKernel(nu=1.5, ard_num_dims=2))
    ),
    "module extra is only here": lambda: gp(
        ScaleKernel(MaternKernel(nu=1.5)), extra=torch.nn.Linear(2, 2)
    ),
    "kernel gives other values|kernel's inputs gives other": lambda: OtherForward(
        *toy_data(30), ScaleKernel(MaternKernel(nu=1.5))
    ).double(),
}


@pytest.mark.parametrize("message", OTHERS)
def test_another_model_is_refused_by_name_of_what_differs(path, message):
    saved(path, gp(ScaleKernel(MaternKernel(nu=1.5))))
    with pytest.raises(StorageError, match=message):
        load(path, OTHERS[message]())


def test_the_model_is_given_by_position_or_by_name(path):
    mean = saved(path).mean(X)
    assert torch.equal(sgdgp.load(path, model=gp()).mean(X), mean)
    assert torch.equal(sgdgp.load(path, gp()).mean(X), mean)
    with pytest.raises(TypeError, match="model"):
        sgdgp.load(path)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(StorageError, match=r"cannot read .*: it is a directory"):
        sgdgp.load(tmp_path, gp())


def test_arguments_of_another_kind_are_refused(path):
    with pytest.raises(TypeError, match=r"path: .*None"):
        load(None, gp())
    with pytest.raises(TypeError, match=r"model: .*ExactGP for .*, found RBFKernel"):
        load(path, RBFKernel())
    with pytest.raises(TypeError, match=r"solver: .*found 3"):
        load(path, gp(), solver=3)


def test_a_setting_that_is_no_solver_is_refused(path):
    saved(path)
    tensors, state = read_file(path, KIND)
    parts = state["parts"]["list"][0]["dict"]
    parts["solver"] = state["kind"]
    write_file(path, KIND, tensors, state)
    with pytest.raises(StorageError, match="expected a solver, found 'single'"):
        load(path, gp())
    state["kind"], parts["solver"] = "magic", None
    write_file(path, KIND, tensors, state)
    with (
        pytest.warns(UserWarning, match="Pass solver="),
        pytest.raises(StorageError, match="unknown kind 'magic'"),
    ):
        load(path, gp())


def test_inputs_that_are_not_the_models_are_refused(path):
    saved(path)
    tensors, state = read_file(path, KIND)
    tensors["systems.0.inputs"] += 1.0
    write_file(path, KIND, tensors, state)
    with pytest.raises(StorageError, match="kernel's inputs gives other values"):
        load(path, gp())
