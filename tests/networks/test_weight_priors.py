"""Weight priors: roots against dense covariances, estimates against exact curvature."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sgdgp.core.codec import decode, encode
from sgdgp.networks.priors import probes as probe_moments
from sgdgp.networks.priors.base import DiagonalPrior, KroneckerPrior
from sgdgp.networks.priors.probes import LARGEST_FACTOR
from sgdgp.networks.priors.settings import GPrior, Isotropic, Kronecker, Layerwise
from sgdgp.tangent import Tangent

SETTINGS = [
    Isotropic(),
    Layerwise(),
    Layerwise("layers"),
    GPrior(probes=8),
    GPrior(probes=8, layerwise=True),
    Kronecker(probes=8),
    Kronecker(probes=8, layerwise="layers"),
]


class Network(nn.Module):
    """Linear, batch norm, convolution, linear: matrices, kernels and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.norm = nn.BatchNorm1d(8)
        self.kernel = nn.Conv1d(2, 3, 2)
        self.norm2 = nn.LayerNorm(9)
        self.last = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).tanh()
        x = self.kernel(x.reshape(-1, 2, 4)).flatten(1)
        return self.last(self.norm2(x))


@pytest.fixture
def tangent() -> Tangent:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tangent(Network().double().eval())


class Curvature:
    """Whitened Jacobian rows (batches, rows, D) and their probes."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.asked: list[int] = []

    @classmethod
    def random(cls, num_weights: int, batches: int = 3, rows: int = 5) -> Curvature:
        g = torch.Generator().manual_seed(1)
        scale = torch.logspace(-1, 1, num_weights, dtype=torch.float64)
        return cls(
            torch.randn(batches, rows, num_weights, generator=g, dtype=torch.float64)
            * scale[torch.randperm(num_weights, generator=g)]
        )

    @property
    def matrix(self) -> Tensor:
        flat = self.rows.flatten(0, 1)
        return flat.mT @ flat

    def probes(self, count: int) -> Iterator[Tensor]:
        self.asked.append(count)
        g = torch.Generator().manual_seed(2)
        for rows in self.rows:
            signs = torch.randn(count, rows.shape[0], generator=g).sign().to(rows)
            yield (signs @ rows).mT


def _no_probes(count: int) -> Iterator[Tensor]:
    raise AssertionError("no probes are needed")


def _built(setting, tangent: Tangent, seed: int = 3):
    prior = setting.build(tangent, Curvature.random(tangent.num_weights).probes)
    g = torch.Generator().manual_seed(seed)
    precisions = torch.rand(prior.num_groups, generator=g, dtype=torch.float64) + 0.1
    return prior, prior.with_precisions(precisions)


def _dense(prior) -> Tensor:
    return prior.root(torch.eye(prior.num_weights, dtype=torch.float64).mT)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_adjoint_and_covariance_agree_with_the_dense_root(setting, tangent):
    _, prior = _built(setting, tangent)
    root = _dense(prior)
    z = torch.randn(4, prior.num_weights, dtype=torch.float64).mT
    for found, truth in [
        (prior.root(z), root @ z),
        (prior.root_adjoint(z), root.mT @ z),
        (prior.covariance(z), root @ (root.mT @ z)),
    ]:
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10 * truth.max())
        assert found.mT.is_contiguous()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_precisions_scale_the_covariance_group_by_group(setting, tangent):
    unit, prior = _built(setting, tangent)
    scale = torch.empty(prior.num_weights, dtype=torch.float64)
    for s, g in zip(prior.groups, prior.group_of, strict=True):
        scale[s] = prior.precisions[g] ** -0.5
    torch.testing.assert_close(_dense(prior), scale[:, None] * _dense(unit))
    assert unit.precisions.tolist() == [1.0] * unit.num_groups


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_groups_partition_the_weights(setting, tangent):
    prior, _ = _built(setting, tangent)
    covered = [i for s in prior.groups for i in range(s.start, s.stop)]
    assert covered == list(range(tangent.num_weights))
    assert sum(prior.group_sizes) == tangent.num_weights


@given(st.integers(0, 2**31), st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_group_sums_are_inner_products_group_by_group(seed, columns):
    tangent = Tangent(Network().double().eval())
    prior = Layerwise("layers").build(tangent, _no_probes)
    g = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(columns, prior.num_weights, generator=g).double().mT
        for _ in range(2)
    )
    sums = prior.group_sums(a, b)
    torch.testing.assert_close(sums.sum(0), (a * b).sum(0))
    last = tangent.slices["last.weight"].start
    torch.testing.assert_close(sums[-1], (a[last:] * b[last:]).sum(0))


def test_layers_tie_biases_to_weights_and_all_norms_together(tangent):
    prior = Layerwise("layers").build(tangent, _no_probes)
    label = {}
    for s, g in zip(prior.groups, prior.group_of, strict=True):
        for name, own in tangent.slices.items():
            if s.start <= own.start < s.stop:
                label[name] = g
    assert label["first.weight"] == label["first.bias"]
    assert label["norm.weight"] == label["norm.bias"] == label["norm2.weight"]
    assert label["first.weight"] != label["kernel.weight"] != label["norm.weight"]
    assert prior.num_groups == 4


def test_a_function_of_names_makes_the_groups(tangent):
    prior = Layerwise(lambda name: name.rpartition(".")[2]).build(tangent, _no_probes)
    assert prior.num_groups == 2
    biases = sum(
        s.stop - s.start for n, s in tangent.slices.items() if n.endswith("bias")
    )
    assert prior.group_sizes[1] == biases


def test_g_prior_estimates_the_diagonal_of_the_curvature(tangent):
    curvature = Curvature.random(tangent.num_weights)
    count = 64
    prior = GPrior(probes=count, floor=1e-12).build(tangent, curvature.probes)
    assert isinstance(prior, DiagonalPrior)
    assert curvature.asked == [count]
    exact = curvature.matrix.diagonal()
    # q = a^T e with signs e: Var q^2 = 2 |a|^4 - 2 sum a_i^4.
    squares = curvature.rows.square()
    variance = 2 * (squares.sum(1).square() - squares.square().sum(1)).sum(0) / count
    z = (prior.scales**-2 - exact) / variance.sqrt()
    assert float(z.abs().max()) < 5
    # 30 products of two signs of one batch make all errors: 1 with error 0.26.
    assert 0.2 < float(z.square().mean()) < 2.0


def test_kronecker_is_the_inverse_of_the_moments_of_its_probes(tangent):
    curvature = Curvature.random(tangent.num_weights, batches=12)
    setting = Kronecker(probes=16, floor=1e-9)
    prior = setting.build(tangent, curvature.probes)
    covariance = prior.covariance(torch.eye(prior.num_weights).double().mT)
    expected = torch.zeros_like(covariance)
    probes = list(curvature.probes(16))
    for name, shape in zip(tangent.names, tangent.shapes, strict=True):
        s = tangent.slices[name]
        if len(shape) == 1:
            square = sum(p[s].square().mean(1) for p in probes)
            expected[s, s] = torch.diag(1 / square)
            continue
        m = [p[s].mT.reshape(16, shape[0], -1) for p in probes]
        rows = sum((x @ x.mT).mean(0) for x in m)
        columns = sum((x.mT @ x).mean(0) for x in m)
        expected[s, s] = torch.linalg.inv(torch.kron(rows, columns) / rows.trace())
    torch.testing.assert_close(covariance, expected, rtol=1e-8, atol=1e-9)


def test_kronecker_recovers_a_curvature_that_is_a_kronecker_product():
    tangent = Tangent(nn.Linear(4, 3, bias=False).double())
    g = torch.Generator().manual_seed(5)
    left = torch.randn(3, 3, generator=g).double()
    right = torch.randn(4, 4, generator=g).double()
    # All signs of a full set of rows: every probe is left E right, E of signs.
    rows = torch.kron(left, right).mT[None].expand(400, -1, -1)
    prior = Kronecker(probes=4, floor=1e-9).build(tangent, Curvature(rows).probes)
    exact = torch.linalg.inv(400 * torch.kron(left @ left.mT, right @ right.mT))
    found = prior.covariance(torch.eye(12).double())
    # 1,600 probes of 12 signs: moments are known to some 3 %, inverses to some 10 %.
    error = torch.linalg.matrix_norm(found - exact) / torch.linalg.matrix_norm(exact)
    assert float(error) < 0.15


@pytest.mark.parametrize("setting", [GPrior(), Kronecker()], ids=str)
@pytest.mark.parametrize("name", ["first.weight", "kernel.weight", "norm.bias"])
def test_rescaling_a_parameter_leaves_the_whitened_jacobian_as_it_is(
    setting, name, tangent
):
    curvature = Curvature.random(tangent.num_weights)
    # Dead directions sit on the floor, which must move with the parameter too.
    curvature.rows[..., ::7] = 0
    scaled = Curvature(curvature.rows.clone())
    scaled.rows[..., tangent.slices[name]] /= 10
    features = [
        c.rows[0] @ _dense(setting.build(tangent, c.probes))
        for c in (curvature, scaled)
    ]
    torch.testing.assert_close(features[0], features[1], rtol=1e-9, atol=1e-9)
    isotropic = [
        c.rows[0] @ _dense(Isotropic().build(tangent, c.probes))
        for c in (curvature, scaled)
    ]
    assert not torch.allclose(isotropic[0], isotropic[1], rtol=0.1)


def test_entries_below_the_floor_are_lifted_to_it(tangent):
    curvature = Curvature.random(tangent.num_weights)
    s = tangent.slices["first.weight"]
    curvature.rows[..., s.start] = 0
    prior = GPrior(floor=0.01).build(tangent, curvature.probes)
    own = prior.scales[s] ** -2
    # The floor is of the median of those that are not zero.
    assert float(own[0]) == pytest.approx(0.01 * float(own[1:].median()))
    assert float(own.min()) >= 0.99 * float(own[0])


@pytest.mark.parametrize("setting", [GPrior(), Kronecker()], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-15])
def test_a_tensor_that_does_not_act_keeps_a_moderate_variance(setting, size, tangent):
    curvature = Curvature.random(tangent.num_weights)
    s = tangent.slices["kernel.weight"]
    curvature.rows[..., s] *= size
    root = _dense(setting.build(tangent, curvature.probes))
    scales = root.diagonal()
    others = torch.cat([scales[: s.start], scales[s.stop :]])
    assert float(scales[s].max()) < 100 * float(others.median())
    assert float((curvature.rows @ root)[..., s].abs().max()) < 1e-9


def test_probes_that_are_all_zero_are_refused(tangent):
    zero = Curvature(torch.zeros(1, 1, tangent.num_weights, dtype=torch.float64))
    for setting in (GPrior(), Kronecker()):
        with pytest.raises(ValueError, match="all probes of the curvature are zero"):
            setting.build(tangent, zero.probes)
        with pytest.raises(ValueError, match="finite"):
            setting.build(tangent, Curvature(zero.rows + math.nan).probes)


def test_given_factors_are_the_covariance_of_their_matrix(tangent):
    g = torch.Generator().manual_seed(6)
    rows, rows2 = (_covariance(8, g) for _ in range(2))
    columns, columns2 = (_covariance(3, g) for _ in range(2))
    s = tangent.slices["first.weight"]
    eye = torch.eye(tangent.num_weights).double().mT
    for factors, truth in [
        ((rows, columns), torch.kron(rows, columns)),
        (
            [(rows, columns), (rows2, columns2)],
            torch.kron(rows, columns) + torch.kron(rows2, columns2),
        ),
        # A first term without full rank.
        (
            [(torch.diag(torch.arange(8.0)).double(), columns), (rows2, columns2)],
            torch.kron(torch.diag(torch.arange(8.0)).double(), columns)
            + torch.kron(rows2, columns2),
        ),
    ]:
        prior = Kronecker(factors={"first.weight": factors}).build(tangent, _no_probes)
        expected = eye.clone()
        expected[s, s] = truth
        torch.testing.assert_close(
            prior.covariance(eye), expected, rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(_dense(prior).mT, prior.root_adjoint(eye))


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ({"first.wight": (torch.eye(8), torch.eye(3))}, "first.wight"),
        ({"first.bias": (torch.eye(8), torch.eye(1))}, "no matrix|none"),
        ({"first.weight": (torch.eye(3), torch.eye(8))}, "expected shapes"),
        ({"first.weight": (-torch.eye(8), torch.eye(3))}, "eigenvalue -1"),
        ({"first.weight": (torch.ones(8, 8).triu(), torch.eye(3))}, "symmetric"),
        ({"first.weight": [torch.eye(8)]}, "pairs"),
    ],
)
def test_factors_that_do_not_fit_are_refused(factors, words, tangent):
    with pytest.raises(ValueError, match=words):
        Kronecker(factors=factors).build(tangent, _no_probes)


def test_a_long_side_has_a_diagonal_factor(monkeypatch, tangent):
    monkeypatch.setattr(probe_moments, "LARGEST_FACTOR", 4)
    curvature = Curvature.random(tangent.num_weights)
    prior = Kronecker(probes=8).build(tangent, curvature.probes)
    assert isinstance(prior, KroneckerPrior)
    blocks = dict(zip(tangent.names, prior.blocks, strict=True))
    assert blocks["first.weight"].left.shape == (8,)
    assert blocks["first.weight"].right.shape == (3, 3)
    root = _dense(prior)
    z = torch.randn(2, prior.num_weights, dtype=torch.float64).mT
    torch.testing.assert_close(prior.root_adjoint(z), root.mT @ z)
    assert LARGEST_FACTOR == 4096


def _stored(prior):
    """A prior that has been in a file."""
    tensors = {}
    state = json.loads(json.dumps(encode(prior, "prior", tensors)))
    return decode(state, tensors, torch.device("cpu"))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_stored_prior_comes_back(setting, tangent):
    _, prior = _built(setting, tangent)
    same = _stored(prior)
    assert type(same) is type(prior)
    assert (same.groups, same.group_of) == (prior.groups, prior.group_of)
    assert torch.equal(_dense(same), _dense(prior))


def test_a_sum_of_two_terms_is_stored_too(tangent):
    pair = (torch.eye(8).double(), 2 * torch.eye(3).double())
    setting = Kronecker(factors={"first.weight": [pair, pair]})
    prior = setting.build(tangent, _no_probes)
    assert torch.equal(_dense(_stored(prior)), _dense(prior))


def test_precisions_that_do_not_fit_are_refused(tangent):
    prior = Layerwise().build(tangent, _no_probes)
    with pytest.raises(ValueError, match=r"expected shape \(10,\)"):
        prior.with_precisions(torch.ones(3))
    with pytest.raises(ValueError, match="positive finite"):
        prior.with_precisions(torch.zeros(10))
    with pytest.raises(ValueError, match="expected slices that partition"):
        DiagonalPrior(5, torch.ones(2), [slice(0, 2), slice(3, 5)])
    with pytest.raises(ValueError, match="end at 5"):
        DiagonalPrior(5, torch.ones(1), [slice(0, 4)])
    with pytest.raises(ValueError, match="rows"):
        prior.root(torch.ones(3, 2).double())


def test_settings_are_checked_at_once():
    with pytest.raises(ValueError, match="groups"):
        Layerwise("kernels")
    with pytest.raises(ValueError, match="floor"):
        GPrior(floor=0)
    with pytest.raises(ValueError, match="probes"):
        Kronecker(probes=0)


def test_probes_of_a_large_network_are_fewer(monkeypatch, tangent):
    from sgdgp.networks.priors import settings as weight_priors

    monkeypatch.setattr(weight_priors, "_PROBE_MEMORY", 3 * 8 * tangent.num_weights)
    curvature = Curvature.random(tangent.num_weights)
    GPrior().build(tangent, curvature.probes)
    assert curvature.asked == [3]


def _covariance(n: int, generator: torch.Generator) -> Tensor:
    a = torch.randn(n, n + 2, generator=generator).double()
    return a @ a.mT / n


def test_rewhitened_weights_are_the_same_weights():
    scales = torch.rand(6, dtype=torch.float64) + 0.5
    groups = (slice(0, 2), slice(2, 6))
    old, new = (
        DiagonalPrior(
            6, torch.tensor(p, dtype=torch.float64), groups=groups, scales=scales
        )
        for p in ([2.0, 3.0], [5.0, 0.7])
    )
    v = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(new.root(new.rewhiten(v, old)), old.root(v))
