"""What residuals mean for predictions, against dense algebra in float64."""

from __future__ import annotations

import math

import pytest
import torch
from gpytorch.kernels import MaternKernel

from sgdgp.operators import DenseOperator
from sgdgp.solvers import CG, Auto, Stage
from sgdgp.solvers.prediction_error import ACCEPTED, prediction_errors, rounding_error

N, SAMPLES = 400, 64


@pytest.fixture
def data(generator):
    """Points, test points, noise, right-hand sides, noise draws and the factor of H."""

    def made(noise):
        x = torch.rand(N, 2, generator=generator, dtype=torch.float64)
        xs = torch.rand(2000, 2, generator=generator, dtype=torch.float64)
        kernel = MaternKernel(1.5).double()
        kernel.lengthscale = 0.7
        k = kernel(x).to_dense().detach()
        h = k + noise * torch.eye(N).double()
        normal = torch.randn(N, 2 * SAMPLES, generator=generator).double()
        draws = noise**0.5 * normal[:, :SAMPLES]
        prior = torch.linalg.cholesky(k + 1e-10 * torch.eye(N)) @ normal[:, SAMPLES:]
        y = torch.sin(5 * x).sum(1, keepdim=True) + noise**0.5 * torch.randn(
            N, 1, generator=generator, dtype=torch.float64
        )
        cross = kernel(xs, x).to_dense().detach()
        variance = 1 - (cross * torch.linalg.solve(h, cross.mT).mT).sum(1)
        rhs = torch.cat([y, prior + draws], 1)
        noise_draws = torch.cat([torch.zeros(N, 1).double(), draws], 1)
        return (
            DenseOperator(kernel, x),
            torch.full((N,), noise).double(),
            rhs,
            noise_draws,
            cross,
            h,
            variance,
        )

    return made


@pytest.mark.parametrize("noise", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_the_estimate_is_the_error_of_the_mean_up_to_a_factor(data, noise, tolerance):
    operator, variances, rhs, draws, cross, h, variance = data(noise)
    found = CG(tolerance=tolerance, preconditioner=None).solve(operator, variances, rhs)
    estimate = float(prediction_errors(variances, rhs, draws, found)[0])
    off = cross @ (found.weights[:, :1] - torch.linalg.solve(h, rhs[:, :1]))
    z = off[:, 0] / variance.clamp_min(1e-12).sqrt()
    assert estimate / 10 < float(z.square().mean().sqrt()) < 3 * estimate
    left = rhs[:, 0] - h @ found.weights[:, 0]
    bound = float(left.norm()) / noise**0.5
    assert float(z.abs().max()) <= bound * (1 + 1e-4)


def test_directions_of_the_posterior_come_from_the_samples(data):
    operator, variances, rhs, draws, _, h, _ = data(1e-3)
    found = CG(tolerance=1e-8).solve(operator, variances, rhs)
    truth = float(torch.linalg.solve(h, h - 1e-3 * torch.eye(N)).trace())
    with_samples = prediction_errors(variances, rhs, draws, found)[0]
    alone = prediction_errors(variances, rhs, torch.zeros_like(draws), found)[0]
    directions = N * float(alone / with_samples) ** 2
    assert directions == pytest.approx(truth, rel=0.05)


def test_means_go_on_until_predictions_are_right_and_samples_do_not(data):
    operator, variances, rhs, draws, *_ = data(1e-6)
    solver = Auto(tolerance=1e-2, stages=(Stage(CG()),), recycle=64)
    plain = solver.solve(operator, variances, rhs)
    assert float(prediction_errors(variances, rhs, draws, plain)[0]) > ACCEPTED
    seen = []
    found = solver.solve(
        operator,
        variances,
        rhs,
        noise_draws=draws,
        callback=lambda progress: seen.append(progress.weights().shape),
    )
    assert float(prediction_errors(variances, rhs, draws, found)[0]) <= ACCEPTED
    assert torch.equal(found.weights[:, 1:], plain.weights[:, 1:])
    assert set(seen) == {rhs.shape}
    assert found.passes > plain.passes
    true = rhs - operator.matmul(found.weights) - variances[:, None] * found.weights
    torch.testing.assert_close(true.norm(dim=0) / rhs.norm(dim=0), found.residuals)
    torch.testing.assert_close(found.recycled.residual, true, rtol=1e-6, atol=1e-9)


def test_rounding_of_targets_counts_in_deviations_of_the_noise():
    noise, targets = torch.full((5,), 1e-4), torch.full((5,), 1e4)
    assert rounding_error(noise, targets) == pytest.approx(
        torch.finfo(torch.float32).eps * 1e4 / 1e-2, rel=1e-5
    )
    assert math.isclose(rounding_error(noise, 0 * targets), 0.0)
