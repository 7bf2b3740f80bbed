"""save and load: the same bits in a new process, and no file that is not sound."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sgdgp
from sgdgp.core.errors import StorageError
from sgdgp.core.files import _checksum
from sgdgp.posterior.solution_state import solver_from, solver_state
from sgdgp.posterior.storage import KIND, load
from sgdgp.solvers.refinement import Refined
from sgdgp.solvers.two_level import TwoLevel
from tests.models import GP, gp, toy_data
from tests.posterior.stored_posteriors import BUILD, data_for, predictions

ROOT = Path(__file__).parents[2]
SETTINGS = {"num_samples": 3, "num_features": 64, "seed": 4}


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
        elif item.name not in ("settings", "carried"):
            assert before == after
    # Several times as large as all the rest, and only there to save passes.
    assert again.solution.carried is None
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


def test_a_file_holds_no_code_and_no_names_of_modules(path):
    saved(path, gp(ScaleKernel(MaternKernel(nu=1.5))), solver=sgdgp.CG())
    content = path.read_bytes()
    for word in (b"tests.models", b"gpytorch.kernels", b"sgdgp.solvers", b"__main__"):
        assert word not in content
    assert pickle.PROTO + b"\x02" not in content[:64]


SOLVERS = [
    sgdgp.SDD(tolerance=1e-3, block_size=20, momentum=0.9),
    sgdgp.CG(preconditioner=None),
    sgdgp.CG(preconditioner=sgdgp.solvers.PivotedCholesky(rank=30)),
    sgdgp.CG(preconditioner=TwoLevel(low_rank=sgdgp.solvers.Nystrom(), neighbours=7)),
    sgdgp.Cholesky(),
    sgdgp.AlternatingProjections(),
    sgdgp.ADASAP(),
    sgdgp.SGD(),
    Refined(sgdgp.CG()),
    sgdgp.solvers.auto.Auto(tolerance=1e-5, memory_budget=10**7),
    sgdgp.solvers.auto.Auto(stages=(sgdgp.solvers.auto.Stage(sgdgp.CG(), 20.0),)),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_settings_of_every_solver_come_back(solver):
    assert solver_from(json.loads(json.dumps(solver_state(solver)))) == solver


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


class OtherForward(GP):
    def forward(self, x):
        return super().forward(2.0 * x)


OtherForward.__qualname__ = "GP"

OTHERS = {
    "module 'kernel' is RBFKernel.* was ScaleKernel": lambda: gp(RBFKernel()),
    "'kernel.base_kernel' is MaternKernel.*nu=2.5.*nu=1.5": lambda: gp(
        ScaleKernel(MaternKernel(nu=2.5))
    ),
    r"'kernel.base_kernel.raw_lengthscale' is \(1, 2\) here, was \(1, 1\)": lambda: gp(
        ScaleKernel(MaternKernel(nu=1.5, ard_num_dims=2))
    ),
    "module 'extra' is not in the file": lambda: gp(
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


def test_two_hundred_damaged_files_are_all_refused(path):
    """Cut off, flipped bits, overwritten and shifted stretches, anywhere."""
    saved(path, gp(n=20), num_features=8)
    whole, model = path.read_bytes(), gp(n=20)
    draw = random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for i in range(200):
        damaged = bytearray(whole)
        # Half of them in the header, which is a small part of the file.
        place = draw.randrange(header if i % 2 else len(whole))
        kind = i % 5
        if kind == 0:
            damaged = damaged[: draw.choice([place, len(whole) - 1, 0, 7, 8, 9])]
        elif kind == 1:
            damaged[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            damaged[place : place + 50] = draw.randbytes(50)
        elif kind == 3:
            damaged.insert(place, draw.randrange(256))
        else:
            del damaged[place]
        if damaged == whole:
            damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match="posterior"):
            load(path, model)
    path.write_bytes(whole)
    load(path, model)


def test_blanks_in_the_header_are_noticed_too(path):
    saved(path, gp(n=20))
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + size].rstrip(b" ")
    padded = header.replace(b'":', b'" :', 1) + b" " * 8
    padded += b" " * (-len(padded) % 8)
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + whole[8 + size :])
    with pytest.raises(StorageError, match="damaged: its header"):
        load(path, gp(n=20))


@pytest.mark.parametrize("content", [b"", b"no file of ours", b"PK\x03\x04" * 100])
def test_foreign_files_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(StorageError, match="is damaged, or not a posterior of sgdgp"):
        load(path, gp())


def test_other_safetensors_and_checkpoints_are_refused(path):
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(StorageError, match="is not a posterior of sgdgp"):
        load(path, gp())
    path.unlink()
    sgdgp.condition(gp(), checkpoint=path, **SETTINGS)
    with pytest.raises(StorageError, match="is not a posterior of sgdgp"):
        load(path, gp())


def test_a_missing_file_and_a_folder_are_refused(path, tmp_path):
    with pytest.raises(StorageError, match="cannot read"):
        load(path, gp())
    with pytest.raises(StorageError):
        load(tmp_path, gp())
    posterior = sgdgp.condition(gp(), num_samples=1)
    with pytest.raises(StorageError, match="expected a file, found directory"):
        posterior.save(tmp_path)
    with pytest.raises(StorageError, match="expected an existing directory"):
        posterior.save(tmp_path / "nowhere" / "posterior")
    with pytest.raises(TypeError, match=r"path: .*found 3"):
        posterior.save(3)
    with pytest.raises(TypeError, match=r"path: .*None"):
        load(None, gp())
    with pytest.raises(TypeError, match=r"model: .*ExactGP, found RBFKernel"):
        load(path, RBFKernel())
    with pytest.raises(TypeError, match=r"solver: .*found 3"):
        load(path, gp(), solver=3)


def rewritten(path, change):
    """The file with a changed state and a checksum that fits again."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors, state = load_file(path), json.loads(metadata["state"])
    change(tensors, state, metadata)
    metadata["state"] = json.dumps(state)
    metadata["checksum"] = _checksum(metadata["state"], tensors)
    save_file(tensors, path, metadata)


def test_a_newer_format_is_refused(path):
    saved(path)
    newer = str(KIND.version + 1)
    rewritten(path, lambda t, s, metadata: metadata.update({KIND.mark: newer}))
    with pytest.raises(StorageError, match=r"format 2, .* reads up to 1; use a newer"):
        load(path, gp())


CHANGES = {
    "no weights": lambda t, s, m: t.pop("part.0.solution.weights"),
    "weights of another shape": lambda t, s, m: t.update(
        {"part.0.solution.weights": torch.zeros(3)}
    ),
    "no parts": lambda t, s, m: s.pop("parts"),
    "an empty list of parts": lambda t, s, m: s.update(parts=[]),
    "parts that are a number": lambda t, s, m: s.update(parts=3),
    "an unknown kind": lambda t, s, m: s.update(kind="magic"),
    "an unknown solver": lambda t, s, m: s["parts"][0]["solver"].update(type="eval"),
    "an unknown setting": lambda t, s, m: s["parts"][0]["settings"].update(a=1),
    "unknown features": lambda t, s, m: s["parts"][0]["draws"]["groups"][0].update(
        map="os.system"
    ),
    "an unknown reason": lambda t, s, m: s["parts"][0]["solution"].update(reason="?"),
    "inputs that are not the model's": lambda t, s, m: t.update(
        {"part.0.inputs": t["part.0.inputs"] + 1.0}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_were_tampered_with_consistently_are_refused(path, change):
    saved(path)
    rewritten(path, CHANGES[change])
    with pytest.raises(StorageError):
        load(path, gp())


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    posterior = saved(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("sgdgp.core.files.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        posterior.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["posterior"]
