"""Kronecker factors of the curvature against dense ones, and those of curvlinops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sgdgp.networks import Categorical, Gaussian
from sgdgp.networks.curvature import TangentData
from sgdgp.networks.kronecker_curvature import kronecker_curvature
from sgdgp.networks.likelihoods import Likelihood
from sgdgp.networks.priors import KroneckerPrior, precision_sum
from sgdgp.networks.priors.diagonal import DiagonalPrior
from sgdgp.networks.stream import stream_of
from sgdgp.tangent import Tangent


class Words(nn.Module):
    """An embedding with padding, a layer norm over words, a linear layer on all."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 3, padding_idx=0)
        self.norm = nn.LayerNorm(3)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.words(x.long())).tanh().mean(1))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 2, groups=2, bias=False),
        nn.GroupNorm(3, 6),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def _sequence() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, padding="same", padding_mode="circular"),
        nn.RMSNorm(5),
        nn.Linear(5, 4),
        nn.Flatten(),
        nn.Linear(12, 2),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


NETWORKS = {
    "mlp": (_mlp, (4,)),
    "convolutions": (_cnn, (2, 5, 5)),
    "sequence": (_sequence, (2, 5)),
    "words": (Words, (7,)),
}


def problem(name: str, examples: int, batch: int = 4):
    """Tangent data, and inputs."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    network = build().double().eval()
    for p in network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(examples, *shape, dtype=torch.float64)
    if name == "words":
        x = torch.randint(0, 6, (examples, *shape))
    y = torch.zeros(examples, dtype=torch.long)
    pairs = list(zip(x.split(batch), y.split(batch), strict=True))
    tangent = Tangent(network)
    return TangentData(tangent, stream_of(pairs, tangent.device)), x


def curvature_of(
    data: TangentData, x: Tensor, likelihood: Likelihood
) -> tuple[KroneckerPrior, Tensor]:
    """The factors, and J^T H J itself."""
    outputs = data.network_outputs
    jacobian = data.tangent.at(x).jacobian()
    hessian = likelihood.hessian(outputs, jacobian)
    matrix = torch.einsum("bci,bcj->ij", jacobian, hessian)
    return kronecker_curvature(data, likelihood, outputs), matrix


def blocks_of(prior: KroneckerPrior, tangent: Tangent) -> dict[str, Tensor]:
    eye = torch.eye(prior.num_weights, dtype=torch.float64).mT
    whole = prior.matmul(eye)
    return {name: whole[s, s] for name, s in tangent.slices.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_of_vectors_are_exact(name):
    data, x = problem(name, 9)
    found, matrix = curvature_of(data, x, Categorical())
    for own, block in blocks_of(found, data.tangent).items():
        s = data.tangent.slices[own]
        shape = dict(zip(data.tangent.names, data.tangent.shapes, strict=True))[own]
        if len(shape) == 1:
            torch.testing.assert_close(block, matrix[s, s], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "sequence"])
def test_blocks_of_one_example_at_one_position_are_exact(name):
    data, x = problem(name, 1)
    found, matrix = curvature_of(data, x, Categorical())
    blocks = blocks_of(found, data.tangent)
    last = list(data.tangent.names)[-2]
    for own in blocks if name == "mlp" else [last]:
        s = data.tangent.slices[own]
        torch.testing.assert_close(blocks[own], matrix[s, s], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_factors_do_not_depend_on_batches_and_are_definite(name):
    data, x = problem(name, 10, batch=10)
    other, _ = problem(name, 10, batch=3)
    one, _ = curvature_of(data, x, Gaussian(noise=0.5))
    two, _ = curvature_of(other, x, Gaussian(noise=0.5))
    for a, b in zip(one.blocks, two.blocks, strict=True):
        for left, right in zip(a.terms[0], b.terms[0], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)
            matrix = torch.diag(left) if left.ndim == 1 else left
            assert float(torch.linalg.eigvalsh(matrix)[0]) >= -1e-12 * matrix.norm()


def test_random_sums_of_columns_have_the_moments_of_all():
    data, x = problem("mlp", 3)
    many = [(x.repeat(500, 1), torch.zeros(1500, dtype=torch.long))]
    data = TangentData(data.tangent, stream_of(many, data.tangent.device))
    every = kronecker_curvature(data, Categorical(), data.network_outputs)
    for seed in (0, 1):
        some = kronecker_curvature(
            data, Categorical(), data.network_outputs, columns=2, seed=seed
        )
        for one, other in zip(every.blocks, some.blocks, strict=True):
            (left, right), (sampled, same) = one.terms[0], other.terms[0]
            torch.testing.assert_close(right, same)
            assert 1e-6 < float((left - sampled).norm() / left.norm()) < 0.06


def test_a_small_memory_budget_changes_nothing():
    data, _ = problem("convolutions", 7)
    batches = list(data.stream)
    pairs = [(batch.x, batch.y) for batch in batches]
    tangent = Tangent(data.tangent.network, memory_budget=1)
    small = TangentData(tangent, stream_of(pairs, tangent.device))
    one, other = (
        kronecker_curvature(d, Gaussian(noise=1.0), d.network_outputs)
        for d in (data, small)
    )
    for a, b in zip(one.blocks, other.blocks, strict=True):
        torch.testing.assert_close(a.terms[0], b.terms[0])


def test_a_source_task_is_a_prior_with_an_identity():
    data, x = problem("convolutions", 6)
    found, _ = curvature_of(data, x, Categorical())
    isotropic = DiagonalPrior(found.num_weights, torch.tensor([0.3]).double())
    prior = precision_sum(isotropic, found)
    assert all(len(block.terms) == 1 and block.is_exact for block in prior.blocks)
    w = torch.randn(2, found.num_weights, dtype=torch.float64).mT
    torch.testing.assert_close(prior.matmul(prior.solve(w)), w)
    torch.testing.assert_close(prior.matmul(w) - 0.3 * w, found.matmul(w))


def test_outputs_without_a_target_have_no_curvature():
    data, x = problem("mlp", 8)
    likelihood = Categorical(ignore_index=-100)
    y = torch.zeros(8, 1, dtype=torch.long)
    y[3:] = -100
    pairs = [(x, y)]
    stream = stream_of(pairs, data.tangent.device)
    masked = TangentData(data.tangent, stream, likelihood)
    found = kronecker_curvature(masked, likelihood, masked.network_outputs)
    few = TangentData(data.tangent, stream_of([(x[:3], y[:3])], data.tangent.device))
    truth = kronecker_curvature(few, Categorical(), few.network_outputs)
    for a, b in zip(found.blocks, truth.blocks, strict=True):
        torch.testing.assert_close(a.terms[0], b.terms[0])


def test_positions_may_be_rows():
    torch.manual_seed(0)
    layer = nn.Linear(3, 4).double()

    class Rows(nn.Module):
        def __init__(self, flat):
            super().__init__()
            self.layer, self.flat = layer, flat

        def forward(self, x):
            if not self.flat:
                return self.layer(x).tanh().sum(1)
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]).tanh().sum(1)

    x = torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(1)).double()
    y = torch.zeros(5, dtype=torch.long)
    blocks = []
    for flat in (False, True):
        tangent = Tangent(Rows(flat).eval())
        data = TangentData(tangent, stream_of([(x, y)], tangent.device))
        found = kronecker_curvature(data, Categorical(), data.network_outputs)
        blocks.append(found.blocks)
    for one, other in zip(*blocks, strict=True):
        torch.testing.assert_close(one.terms[0], other.terms[0])


def test_networks_are_as_before():
    data, x = problem("convolutions", 6)
    before = data.tangent.network(x)
    curvature_of(data, x, Categorical())
    assert torch.equal(before, data.tangent.network(x))
    assert not any(m._forward_hooks for m in data.tangent.network.modules())
    assert all(p.grad is None for p in data.tangent.network.parameters())


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.LSTM(3, 2), "weight_ih_l0.* belongs to a LSTM"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight"),
    ],
)
def test_parameters_without_factors_are_refused(network, words):
    tangent = Tangent(network.double().eval(), output=lambda out: out[0])
    data = TangentData(tangent, stream_of([(torch.zeros(1), torch.zeros(1))], "cpu"))
    with pytest.raises(ValueError, match=words):
        kronecker_curvature(data, Gaussian(noise=1.0), torch.zeros(1, 1))


def test_tied_parameters_are_refused():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double().eval()
    network[1].weight = network[0].weight
    data = TangentData(
        Tangent(network), stream_of([(torch.zeros(1, 3), torch.zeros(1))], "cpu")
    )
    with pytest.raises(ValueError, match="shared by several layers"):
        kronecker_curvature(data, Gaussian(noise=1.0), torch.zeros(1, 3))


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_factors_are_those_of_curvlinops(name):
    curvlinops = pytest.importorskip("curvlinops")
    data, x = problem("mlp", 9)
    if name == "convolutions":
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36, 3),
        )
        x = torch.randn(9, 2, 5, 5).double()
        tangent = Tangent(network.double().eval())
        pairs = [(x, torch.zeros(9, dtype=torch.long))]
        data = TangentData(tangent, stream_of(pairs, tangent.device))
    found, _ = curvature_of(data, x, Categorical())
    network = data.tangent.network
    theirs = curvlinops.KFACLinearOperator(
        network,
        nn.CrossEntropyLoss(reduction="sum"),
        list(network.parameters()),
        [(x, torch.zeros(9, dtype=torch.long))],
        fisher_type="type-2",
        kfac_approx="expand",
        check_deterministic=False,
    )
    eye = torch.eye(found.num_weights, dtype=torch.float64)
    torch.testing.assert_close(
        theirs @ eye, found.matmul(eye.mT), rtol=1e-8, atol=1e-10
    )
