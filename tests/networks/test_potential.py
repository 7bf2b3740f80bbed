"""The potential is the negative log posterior of a network's weights, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from sgdgp.networks import (
    Bernoulli,
    Categorical,
    Gaussian,
    Isotropic,
    LearnedPrior,
    Likelihood,
    Potential,
    linearise,
)

SIZES = {"Gaussian": 2, "Categorical": 3, "Bernoulli": 2}
LIKELIHOODS: dict[str, Likelihood] = {
    "Gaussian": Gaussian(noise=(0.3, 0.7)),
    "Categorical": Categorical(),
    "Bernoulli": Bernoulli(),
}


def problem(kind: str, n: int = 11) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network in float64, inputs and targets."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, SIZES[kind]))
    network.double().eval()
    x = torch.randn(n, 3).double()
    y = {
        "Gaussian": torch.randn(n, 2).double(),
        "Categorical": torch.randint(3, (n,)),
        "Bernoulli": torch.randint(2, (n, 2)),
    }[kind]
    return network, x, y


def loader(x: Tensor, y: Tensor, batch: int = 4) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def by_hand(network: nn.Module, kind: str, x: Tensor, y: Tensor) -> Callable:
    """The same by torch's own functions, of one row."""
    names = dict(network.named_parameters())

    def potential(row: Tensor) -> Tensor:
        parts = row.split([p.numel() for p in names.values()])
        tensors = {
            n: part.view(p.shape)
            for (n, p), part in zip(names.items(), parts, strict=True)
        }
        f = functional_call(network, tensors, (x,))
        if kind == "Gaussian":
            deviation = torch.tensor([0.3, 0.7], dtype=torch.float64).sqrt()
            loss = -Normal(f, deviation).log_prob(y).sum()
        elif kind == "Categorical":
            loss = functional.cross_entropy(f, y, reduction="sum")
        else:
            loss = functional.binary_cross_entropy_with_logits(
                f, y.double(), reduction="sum"
            )
        return loss + 0.5 * 2.5 * row.square().sum()

    return potential


@pytest.mark.parametrize("kind", LIKELIHOODS)
class TestTruth:
    def test_values_and_gradients_are_those_of_torchs_own_losses(self, kind):
        network, x, y = problem(kind)
        found = Potential.from_network(
            network, LIKELIHOODS[kind], loader(x, y), precision=2.5
        )
        rows = found.theta + torch.randn(5, found.num_weights).double()
        truth = by_hand(network, kind, x, y)
        values = torch.stack([truth(row) for row in rows])
        slopes = torch.stack([torch.func.grad(truth)(row) for row in rows])
        got, gradient = found.value_and_gradient(rows)
        torch.testing.assert_close(found(rows), values, rtol=1e-12, atol=0)
        torch.testing.assert_close(got, values, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, slopes, rtol=1e-10, atol=1e-12)

    def test_batches_and_memory_change_nothing(self, kind):
        network, x, y = problem(kind)
        rows = torch.randn(5, 31 - 5 * (SIZES[kind] == 2)).double()
        found = []
        for batch, budget in ((11, None), (3, None), (4, 2000)):
            each = Potential.from_network(
                network,
                LIKELIHOODS[kind],
                list(loader(x, y, batch)),
                memory_budget=budget,
            )
            found.append(each.value_and_gradient(rows))
        for values, slopes in found[1:]:
            torch.testing.assert_close(values, found[0][0], rtol=1e-12, atol=0)
            torch.testing.assert_close(slopes, found[0][1], rtol=1e-10, atol=1e-12)

    def test_it_is_that_of_a_posterior(self, kind):
        network, x, y = problem(kind)
        data = loader(x, y)
        posterior = linearise(network, LIKELIHOODS[kind], prior=Isotropic()).fit(
            data, steps=0, precision=2.5, progress=False
        )
        found = Potential.of(posterior)
        plain = Potential.from_network(network, LIKELIHOODS[kind], data, precision=2.5)
        rows = torch.randn(2, found.num_weights).double()
        torch.testing.assert_close(found(rows), plain(rows))
        assert torch.equal(found.theta, posterior.tangent.theta[:, 0])


def test_a_learned_prior_is_about_its_own_mean():
    network, x, y = problem("Categorical")
    data = loader(x, y)
    prior = LearnedPrior.from_data(network, Categorical(), data, strength=0.0)
    posterior = linearise(network, Categorical(), prior=prior).fit(
        data, steps=0, precision=2.0, progress=False
    )
    found = Potential.of(posterior)
    theta = found.theta[None]
    alone = functional.cross_entropy(network(x), y, reduction="sum")
    torch.testing.assert_close(found(theta)[0], alone.detach())


def test_networks_say_what_they_say_alone():
    network, x, y = problem("Categorical")
    found = Potential.from_network(network, Categorical(), loader(x, y))
    rows = torch.stack([found.theta, torch.zeros_like(found.theta)])
    outputs = found.outputs(rows, x)
    torch.testing.assert_close(outputs[0], network(x).detach())
    assert not outputs[1].any()


class Summed(nn.Module):
    """A recurrent network, which torch.func cannot batch over its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(2, 3, batch_first=True)
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(x)[0][:, -1])


def test_layers_that_torch_cannot_batch_are_taken_one_by_one():
    torch.manual_seed(0)
    network, x, y = Summed().double().eval(), torch.randn(6, 4, 2).double(), None
    y = torch.randn(6, 1).double()
    found = Potential.from_network(network, Gaussian(noise=0.5), loader(x, y))
    rows = found.theta + torch.tensor([[0.0], [0.1]])
    outputs = found.outputs(rows, x)
    torch.testing.assert_close(outputs[0], network(x).detach())
    _, slopes = found.value_and_gradient(rows)
    step = 1e-5 * torch.nn.functional.normalize(slopes, dim=1)
    change = (found(rows + step) - found(rows - step)) / 2e-5
    torch.testing.assert_close(change, slopes.norm(dim=1), rtol=1e-6, atol=0)


class TestRefusals:
    def test_a_mean_is_no_likelihood(self):
        network, x, y = problem("Categorical")
        with pytest.raises(ValueError, match="likelihood: expected a loss that sums"):
            Potential.from_network(network, nn.CrossEntropyLoss(), loader(x, y))

    def test_a_sum_is_one(self):
        network, x, y = problem("Categorical")
        loss = nn.CrossEntropyLoss(reduction="sum")
        own = Potential.from_network(network, loss, loader(x, y))
        known = Potential.from_network(network, Categorical(), loader(x, y))
        rows = torch.randn(3, own.num_weights).double()
        for a, b in zip(
            own.value_and_gradient(rows), known.value_and_gradient(rows), strict=True
        ):
            torch.testing.assert_close(a, b)

    def test_a_loss_of_each_example_is_none(self):
        network, x, y = problem("Categorical")
        loss = nn.CrossEntropyLoss(reduction="none")
        with pytest.raises(ValueError, match=r"likelihood: .* one finite number"):
            Potential.from_network(network, loss, loader(x, y))

    def test_unknown_noise(self):
        network, x, y = problem("Gaussian")
        with pytest.raises(ValueError, match="noise: it is learned from data"):
            Potential.from_network(network, Gaussian(), loader(x, y))

    def test_other_targets(self):
        network, x, y = problem("Gaussian")
        with pytest.raises(TypeError, match="y: Categorical expects class indices"):
            Potential.from_network(network, Categorical(), loader(x, y))

    def test_rows_of_other_weights(self):
        network, x, y = problem("Categorical")
        found = Potential.from_network(network, Categorical(), loader(x, y))
        with pytest.raises(ValueError, match=r"weights: expected rows \(k, 31\)"):
            found(torch.zeros(2, 30).double())
        with pytest.raises(ValueError, match=r"weights: expected torch\.float64"):
            found(torch.zeros(2, 31))

    def test_targets_of_later_batches(self):
        network, x, y = problem("Bernoulli")
        found = Potential.from_network(
            network, Bernoulli(), loader(x, y.index_fill(0, torch.tensor(9), 3))
        )
        with pytest.raises(ValueError, match="y: Bernoulli expects labels 0 and 1"):
            found(found.theta[None])

    def test_a_network_that_goes_on_to_be_trained(self):
        network, x, y = problem("Categorical")
        network.append(nn.Dropout()).eval()
        found = Potential.from_network(network, Categorical(), loader(x, y))
        found(found.theta[None])
        network.train()
        with pytest.raises(ValueError, match="is in training mode"):
            found(found.theta[None])
        network.eval()
        found = Potential.from_network(
            network, Categorical(), loader(x, y), weights="2.*"
        )
        found(found.theta[None])
        with torch.no_grad():
            network[0].weight.add_(1.0)
        with pytest.raises(RuntimeError, match=r"'0\.weight' .* has changed"):
            found.value_and_gradient(found.theta[None])

    def test_what_is_no_potential_of_these_weights(self):
        network, x, y = problem("Categorical")
        data = loader(x, y)
        with pytest.raises(TypeError, match=r"prior: .* found Isotropic; settings"):
            Potential.from_network(network, Categorical(), data, prior=Isotropic())
        with pytest.raises(TypeError, match=r"likelihood: .* found <class"):
            Potential.from_network(network, Categorical, data)
        found = Potential.from_network(network, Categorical(), data)
        with pytest.raises(ValueError, match=r"mean: expected shape \(31,\)"):
            replace(found, mean=torch.ones(1).double())
        fitted = [(x, network(x).detach())]
        with pytest.raises(ValueError, match="likelihood: expected a loss that sums"):
            Potential.from_network(network, nn.MSELoss(), fitted)
