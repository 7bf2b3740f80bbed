"""Inputs side by side in one matrix, and targets with gaps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgdgp.gpytorch_adapter import InputLayout, layout_of, observed_rows, prior_of
from tests.models import gp, hadamard_gp

DTYPES = st.sampled_from([torch.float64, torch.int64, torch.int32])


@given(
    st.lists(st.tuples(st.integers(1, 4), DTYPES), min_size=2, max_size=4),
    st.integers(1, 5),
)
def test_splitting_undoes_joining(parts, n):
    generator = torch.Generator().manual_seed(n)
    inputs = tuple(
        torch.randint(-9, 9, (n, width), generator=generator).to(dtype)
        for width, dtype in parts
    )
    layout = InputLayout.of(inputs)
    joined = layout.join(inputs)
    assert joined.is_floating_point()
    assert layout.join(joined) is joined
    for one, other in zip(layout.split(joined), inputs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_one_input_passes_through():
    x = torch.randn(4, 2)
    layout = InputLayout.of(x)
    assert layout.join(x) is x
    assert layout.join((x,)) is x
    assert layout.split(x)[0] is x


def test_vectors_are_columns():
    x, i = torch.randn(4, 2), torch.arange(4)
    layout = InputLayout.of((x, i))
    assert layout.widths == (2, 1)
    assert torch.equal(layout.split(layout.join((x, i)))[1], i.unsqueeze(1))


def test_the_layout_is_that_of_the_models_data():
    model = hadamard_gp()
    assert layout_of(model).widths == (2, 1)
    assert layout_of(model).dtypes == (torch.float64, torch.int64)
    assert layout_of(gp()).widths == (2,)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((torch.zeros(4, 2),), ValueError, "2 input tensors with 2, 1 columns.* 1 "),
        ((torch.zeros(4, 1), torch.zeros(4, 1)), ValueError, "found 2 with 1, 1"),
        ((torch.zeros(4, 2), torch.zeros(3, 1)), ValueError, "same length"),
        ((torch.zeros(4, 2), [0, 1]), TypeError, "tuple of tensors"),
        ((), ValueError, "found none"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, error, message):
    layout = InputLayout.of((torch.zeros(4, 2), torch.zeros(4, 1)))
    with pytest.raises(error, match=message):
        layout.join(inputs)


def test_gradients_reach_the_points_of_a_model_of_two_inputs():
    model = hadamard_gp()
    x, i = model.train_inputs
    prior = prior_of(model, (x, i))
    points = x.clone().requires_grad_()
    joined = prior.joined((points, i))
    _, inputs = prior.evaluate(joined)
    prior.kernel(inputs, inputs.detach()[:3]).to_dense().sum().backward()
    own = x.clone().requires_grad_()
    model.eval()
    covar = model.covar_module(own, x[:3]) * model.task_covar_module(i, i[:3])
    covar.to_dense().sum().backward()
    torch.testing.assert_close(points.grad, own.grad)


@pytest.mark.parametrize(
    ("y", "tasks", "message"),
    [
        (torch.full((4, 2), math.nan), 1, "NaN in every row"),
        (torch.full((4, 2), math.nan), 2, "NaN in every row"),
        (torch.full((4,), math.nan), 1, "NaN in every row"),
        (torch.tensor([[1.0, math.nan], [2.0, math.nan]]), 1, "only NaN in column 1"),
    ],
)
def test_nothing_observed_is_refused(y, tasks, message):
    with pytest.raises(ValueError, match=message):
        observed_rows(y, tasks)


def test_a_task_without_observations_is_fine():
    (seen,) = observed_rows(torch.tensor([[1.0, math.nan], [2.0, math.nan]]), 2)
    assert seen.rows.tolist() == [0, 2]
