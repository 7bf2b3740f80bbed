"""The functions of a model where BoTorch asks for Matheron paths."""

from __future__ import annotations

import pytest
import torch
from botorch.models.deterministic import MatheronPathModel
from botorch.sampling.pathwise import draw_matheron_paths
from botorch.utils.sampling import optimize_posterior_samples

from tests.botorch import problems
from tests.botorch.problems import SAMPLES, inputs, pathwise

X = inputs(5, 7, 3)


@pytest.mark.parametrize("make", [problems.single, problems.batched])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_shapes_are_those_of_botorchs_own_paths(make, shape):
    definition = make()
    shape = torch.Size(shape)
    ours = MatheronPathModel(pathwise(definition), sample_shape=shape)
    theirs = MatheronPathModel(definition, sample_shape=shape)
    # Points for all functions, batches of points, points of each function.
    for x in (
        X[0],
        X[:, None, None],
        inputs(5, 1, *shape),
        inputs(5, 1, 4, *shape),
    ):
        assert ours(x).shape == theirs(x).shape
        assert ours.posterior(x).mean.shape == theirs.posterior(x).mean.shape


@pytest.mark.parametrize("make", [problems.single, problems.batched, problems.listed])
def test_paths_are_the_models_functions(make):
    model = pathwise(make())
    path = MatheronPathModel(model, sample_shape=torch.Size([3]))
    values = model.posterior(X).values
    torch.testing.assert_close(path(X[0]), values[:3, 0])
    torch.testing.assert_close(path(X.unsqueeze(1)), values[:3].transpose(0, 1))
    # Function i at its own points.
    torch.testing.assert_close(path(X), values[range(3), range(3)])
    repeated = X.unsqueeze(0).expand(2, 3, 5, 2)
    torch.testing.assert_close(path(repeated)[1], values[range(3), range(3)])


def test_outputs_may_have_points_of_their_own():
    model = pathwise(problems.batched())
    path = draw_matheron_paths(model, torch.Size([3]))
    values = path(X[:2].unsqueeze(0).expand(3, 2, 5, 2))
    each = model.posterior(X).values[:3]
    torch.testing.assert_close(values[:, 0], each[:, 0, :, 0])
    torch.testing.assert_close(values[:, 1], each[:, 1, :, 1])


def test_consecutive_draws_take_the_next_functions():
    model = pathwise(problems.single())
    values = model.posterior(X[0]).values.squeeze(-1)
    for start in (0, 5, 10):
        path = draw_matheron_paths(model, torch.Size([5]))
        torch.testing.assert_close(path(X[0]), values[start : start + 5])
    path = draw_matheron_paths(model, torch.Size([SAMPLES - 15 + 1]))
    torch.testing.assert_close(path(X[0])[-1], values[0])


def test_more_functions_than_there_are_are_drawn_anew():
    model = pathwise(problems.batched(), num_samples=4, num_features=64)
    first, second = (
        draw_matheron_paths(model, torch.Size([300]))(X[0]) for _ in range(2)
    )
    assert first.shape == (300, 2, 5)
    assert len(torch.cat([first, second]).flatten(1).unique(dim=0)) == 600
    exact = problems.batched().posterior(X[0])
    error = (first.mean(0).mT - exact.mean) / exact.variance.sqrt()
    assert error.abs().max() < 5 / 300**0.5


def test_values_pass_through_transforms_that_are_not_affine():
    model = pathwise(problems.single(log=True))
    path = MatheronPathModel(model, sample_shape=torch.Size([3]))
    values = model.posterior(X).values
    torch.testing.assert_close(path(X[0]), values[:3, 0])
    torch.testing.assert_close(path(X), values[range(3), range(3)])


def test_maxima_of_paths_are_found_by_botorch():
    model = pathwise(problems.single())
    path = MatheronPathModel(model, sample_shape=torch.Size([3]))
    bounds = torch.tensor([[0.0, 0.0], [4.0, 4.0]], dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, best = optimize_posterior_samples(
            path, bounds, raw_samples=256, num_restarts=4
        )
    grid = torch.cartesian_prod(*[torch.linspace(0, 4, 41, dtype=torch.float64)] * 2)
    torch.testing.assert_close(
        best.flatten(), path(grid).amax((1, 2)), rtol=5e-3, atol=5e-3
    )


def test_a_batch_that_fits_no_function_is_refused():
    path = draw_matheron_paths(pathwise(problems.single()), torch.Size([3]))
    with pytest.raises((ValueError, RuntimeError), match=r"broadcast|size"):
        path(inputs(5, 1, 2))
