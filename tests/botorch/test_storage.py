"""Models in files."""

from __future__ import annotations

import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.models.transforms import Log, Normalize, Standardize

from sgdgp import SDD
from sgdgp.botorch import PathwiseModel
from sgdgp.core.errors import StorageError
from tests.botorch import problems
from tests.botorch.problems import inputs, pathwise, targets

X = inputs(5, 7, 3)
MAKERS = {
    "single": problems.single,
    "batched": problems.batched,
    "listed": problems.listed,
    "correlated": problems.correlated,
    "logarithm": lambda: problems.single(log=True),
}


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_loaded_model_has_the_same_functions(name, tmp_path):
    definition = MAKERS[name]()
    with torch.no_grad():
        for parameter in definition.parameters():
            parameter.add_(0.01)
    model = pathwise(definition, seed=3)
    model.posterior(X).rsample(torch.Size([5]))
    model.save(tmp_path / "model")
    loaded = PathwiseModel.load(tmp_path / "model", MAKERS[name]())
    torch.testing.assert_close(loaded.posterior(X).values, model.posterior(X).values)
    torch.testing.assert_close(
        loaded.posterior(X).rsample(), model.posterior(X).rsample()
    )
    # Nothing was solved again, and nothing else is left behind.
    solution = model.posteriors[0].solution
    assert loaded.posteriors[0].solution.seconds == solution.seconds
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_loaded_model_goes_on_as_the_saved_one_would(tmp_path):
    model = pathwise(problems.batched())
    model = model.condition_on_observations(inputs(3, 5), targets(inputs(3, 5), 2))
    model.save(tmp_path / "model")
    loaded = PathwiseModel.load(tmp_path / "model", problems.batched())
    new = inputs(2, 6)
    grown = [
        m.condition_on_observations(new, targets(new, 2)).posterior(X).values
        for m in (model, loaded)
    ]
    torch.testing.assert_close(*grown)
    with torch.no_grad():
        for m in (model, loaded):
            m.definition.covar_module.raw_lengthscale += 0.1
    torch.testing.assert_close(loaded.posterior(X).mean, model.posterior(X).mean)


def test_transforms_of_the_model_and_its_outputs_come_back(tmp_path):
    x, y = inputs(20), targets(inputs(20), 2)
    definition = SingleTaskGP(
        torch.rand(3, 2, dtype=torch.float64),
        torch.randn(3, 1, dtype=torch.float64),
        outcome_transform=None,
    )
    for make in (Log, lambda: Standardize(2)):
        model = pathwise(
            definition,
            train_X=x,
            train_Y=y,
            outcome_transform=make(),
            input_transform=Normalize(2),
            solver=SDD(),
        ).subset_output([1])
        model.save(tmp_path / "model")
        loaded = PathwiseModel.load(
            tmp_path / "model",
            definition,
            outcome_transform=make(),
            input_transform=Normalize(2),
        )
        assert loaded.num_outputs == 1
        assert loaded.settings == model.settings
        torch.testing.assert_close(loaded.posterior(X).mean, model.posterior(X).mean)


def test_the_definition_that_was_given_stays_as_it_is(tmp_path):
    definition = problems.single()
    with torch.no_grad():
        definition.covar_module.raw_lengthscale += 0.3
    pathwise(definition).save(tmp_path / "model")
    other = problems.single()
    before = other.covar_module.raw_lengthscale.clone()
    loaded = PathwiseModel.load(tmp_path / "model", other)
    assert torch.equal(other.covar_module.raw_lengthscale, before)
    assert not torch.equal(loaded.definition.covar_module.raw_lengthscale, before)


def test_what_does_not_fit_is_named(tmp_path):
    place = tmp_path / "model"
    model = pathwise(problems.single())
    model.save(place)
    with pytest.raises(StorageError, match="does not fit"):
        PathwiseModel.load(place, problems.batched())
    with pytest.raises(StorageError, match="does not fit"):
        PathwiseModel.load(place, problems.single(log=True))
