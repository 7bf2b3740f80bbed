"""Gradient steps of many functions at once."""

from __future__ import annotations

import torch

from sgdgp.bayesopt.ascent import ascend, value_and_slope

BOX = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
RATES = torch.full((2,), 0.2).double()


class Waves:
    """f_i(x) = cos(5 x_1 + i) + cos(5 x_2) - |x|^2, with a count of evaluations."""

    def __init__(self, count):
        self.num_functions = count
        self.evaluated = []

    def __call__(self, x):
        return self.each(x.expand(self.num_functions, -1, -1))

    def each(self, x):
        self.evaluated.append(x.shape[1])
        shift = torch.arange(self.num_functions).to(x).unsqueeze(1)
        waves = torch.cos(5 * x[..., 0] + shift) + torch.cos(5 * x[..., 1])
        return waves - x.square().sum(-1)


def starts(functions, count):
    generator = torch.Generator().manual_seed(0)
    shape = (functions.num_functions, count, 2)
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1


def test_the_highest_of_several_maxima_is_found():
    functions = Waves(3)
    found = ascend(functions, starts(functions, 30), BOX, RATES, steps=60)
    line = torch.linspace(-1, 1, 2001).double()
    shift = torch.arange(3).double().unsqueeze(1)
    best = (torch.cos(5 * line + shift) - line.square()).amax(1) + 1
    torch.testing.assert_close(found.values, best, rtol=0, atol=1e-3)


def test_the_gradient_vanishes_at_what_is_found():
    functions = Waves(3)
    found = ascend(functions, starts(functions, 5), BOX, RATES, steps=200)
    _, slope = value_and_slope(functions, found.x.unsqueeze(1))
    assert slope.abs().max() < 1e-3


def test_points_are_given_up_on_the_way():
    functions = Waves(2)
    ascend(functions, starts(functions, 30), BOX, RATES, steps=60)
    assert functions.evaluated[:7] == [30] * 7
    assert functions.evaluated[16:31] == [3] * 15
    assert functions.evaluated[31:] == [1] * 30
    assert len(functions.evaluated) == 61


def test_without_steps_the_best_start_is_returned():
    functions = Waves(2)
    x = starts(functions, 9)
    found = ascend(functions, x, BOX, RATES, steps=0)
    assert torch.equal(found.values, functions.each(x).amax(1))
    assert torch.equal(found.values, found.start_values)
    assert torch.equal(functions.each(found.x.unsqueeze(1))[:, 0], found.values)


def test_a_start_at_a_maximum_stays_there():
    functions = Waves(1)
    x = torch.zeros(1, 1, 2).double()
    found = ascend(functions, x, BOX, RATES, steps=10)
    assert torch.equal(found.x, x[:, 0])
