"""Mean field is the closed form where there is one; an ensemble is of optima."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sgdgp.networks import Categorical, Gaussian, Potential
from sgdgp.networks.priors import DiagonalPrior
from sgdgp.networks.sampling import ensemble, mean_field

N, NOISE, PRECISION = 60, 0.5, 2.0


@functools.cache
def regression() -> tuple[Tensor, Tensor]:
    """Correlated inputs, so that weights are correlated."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    x[:, 1] += x[:, 0]
    y = x @ x.new_tensor([[1.0], [-2], [0.5]]) + NOISE**0.5 * torch.randn(
        N, 1, generator=generator, dtype=torch.float64
    )
    return x, y


def linear_potential(batch: int = N, prior: str = "precision") -> Potential:
    """Of a linear network, whose posterior is Gaussian."""
    torch.manual_seed(0)
    network = nn.Linear(3, 1).double().eval()
    loader = DataLoader(TensorDataset(*regression()), batch_size=batch)
    if prior == "precision":
        settings: dict = {"precision": PRECISION}
    else:
        scales = torch.tensor([0.5, 1, 2, 1], dtype=torch.float64)
        one = torch.ones(1, dtype=torch.float64)
        settings = {"prior": DiagonalPrior(4, one, scales=scales)}
    return Potential.from_network(network, Gaussian(NOISE), loader, **settings)


def closed_form(potential: Potential) -> tuple[Tensor, Tensor]:
    """Mean and precision of the exact posterior."""
    x, y = regression()
    features = torch.cat([x, torch.ones(N, 1, dtype=x.dtype)], 1)
    prior = potential.prior.matmul(torch.eye(4, dtype=x.dtype).mT)
    precision = features.mT @ features / NOISE + prior
    mean = torch.linalg.solve(precision, features.mT @ y / NOISE)[:, 0]
    return mean, precision


@pytest.mark.parametrize("prior", ["precision", "scales"])
def test_mean_field_of_a_linear_model_is_the_closed_form(prior: str):
    potential = linear_potential(prior=prior)
    mean, precision = closed_form(potential)
    found = mean_field(potential, steps=150, learning_rate=0.15, samples=16)
    expected = precision.diagonal().rsqrt()
    assert float(((found.mean - mean) / expected).abs().max()) < 0.05
    torch.testing.assert_close(found.standard_deviation, expected, rtol=0.05, atol=0.0)
    assert found.deviations == "conditional"
    assert found.warnings == ()
    # The marginal ones are larger, by what inputs have in common.
    marginal = precision.inverse().diagonal().sqrt()
    assert float((marginal / found.standard_deviation).max()) > 1.3


def test_batches_lead_to_the_same_gaussian():
    potential = linear_potential(batch=20)
    mean, precision = closed_form(potential)
    found = mean_field(potential, steps=150, learning_rate=0.15, samples=16)
    expected = precision.diagonal().rsqrt()
    assert float(((found.mean - mean) / expected).abs().max()) < 0.1
    torch.testing.assert_close(found.standard_deviation, expected, rtol=0.1, atol=0.0)


def test_a_batch_stands_for_all_data():
    potential = linear_potential(batch=20)
    rows = torch.randn(3, 4, dtype=torch.float64)
    whole = potential.value_and_gradient(rows)
    x, y = regression()
    uneven = [(x[:50], y[:50]), (x[50:59], y[50:59]), (x[59:], y[59:])]
    other = Potential.from_network(
        potential.tangent.network, Gaussian(NOISE), uneven, precision=PRECISION
    )
    for each in (potential, other):
        parts = [each.value_and_gradient(rows, batch) for batch in each.stream]
        assert len(parts) == 3
        for i in range(2):
            mean = torch.stack([part[i] for part in parts]).mean(0)
            torch.testing.assert_close(mean, whole[i])


def test_a_fit_that_has_not_converged_says_so():
    potential = linear_potential()
    assert "has not converged" in str(mean_field(potential, steps=5))
    steps: list[int] = []

    def callback(step: int, loss: float) -> bool:
        steps.append(step)
        return step == 3

    found = mean_field(potential, steps=50, callback=callback)
    assert steps == [1, 2, 3]
    assert "Stopped after 3 of 50 steps." in found.warnings


def test_divergence_is_an_error():
    with pytest.raises(FloatingPointError, match=r"diverged at step .* learning_rate"):
        mean_field(linear_potential(), learning_rate=1e9, steps=50)


def classes(batch: int = N) -> Potential:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=generator)
    y = x[:, :3].argmax(1)
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    loader = DataLoader(TensorDataset(x, y), batch_size=batch)
    return Potential.from_network(network, Categorical(), loader, precision=0.1)


def test_an_ensemble_is_optima_from_starts_of_their_own():
    potential = classes()
    found = ensemble(potential, 4, steps=60, learning_rate=0.15)
    torch.manual_seed(5)
    assert found.weights.shape == (4, 1, potential.num_weights)
    assert found.energies is not None
    # Far below a network with no weights, and each by itself.
    nothing = float(potential(torch.zeros(1, potential.num_weights)))
    assert float(found.energies.max()) < 0.6 * nothing
    assert float(torch.pdist(found.flat).min()) > 1.0
    again = ensemble(potential, 4, steps=60, learning_rate=0.15)
    assert torch.equal(again.weights, found.weights)
    assert found.warnings == ("Members of an ensemble: optima, not draws.",)


def test_members_that_are_no_optima_are_reported():
    for settings in ({"steps": 3}, {"steps": 20, "learning_rate": 1e3}):
        found = ensemble(classes(), 2, **settings)
        assert "2 of 2 members are no optima" in str(found)


def test_members_do_not_feel_each_other():
    potential = classes()
    start = torch.randn(3, potential.num_weights)
    found = ensemble(potential, 3, start=start, steps=20).flat
    for i in range(3):
        alone = ensemble(potential, 1, start=start[i : i + 1], steps=20).flat[0]
        torch.testing.assert_close(found[i], alone, rtol=1e-4, atol=1e-5)


def test_bad_input_is_refused():
    potential = linear_potential()
    with pytest.raises(ValueError, match=r"start: expected a tensor of shape \(4,\)"):
        mean_field(potential, start=torch.zeros(3))
    with pytest.raises(ValueError, match="start: expected finite values"):
        mean_field(potential, start=torch.full((4,), torch.nan))
    for trained in (mean_field, ensemble):
        with pytest.raises(
            TypeError, match=r"found Linear; Potential\.of\(posterior\)"
        ):
            trained(potential.tangent.network)
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        mean_field(potential, steps=0)
    with pytest.raises(ValueError, match="start: expected 5 rows"):
        ensemble(potential, 5, start=torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="callback"):
        ensemble(potential, callback=3)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    network = nn.Sequential(Scale(), nn.Linear(4, 3)).eval()
    data = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    with pytest.raises(
        ValueError, match=r"layer '0' \(Scale\) has no reset_parameters"
    ):
        ensemble(Potential.from_network(network, Categorical(), data))
