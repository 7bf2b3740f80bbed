"""The Tanimoto kernel is a ratio of sums, in every form, and refuses what it cannot."""

from __future__ import annotations

import gpytorch
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel

import sgdgp
from sgdgp.features.fingerprints import NoInputGradientError
from sgdgp.kernels import TanimotoKernel
from sgdgp.kernels.tanimoto import TanimotoTile
from sgdgp.operators import TiledOperator, choose_operator, tile_kernel

DIM = 12


def fingerprints(n, seed=0, *, dim=DIM, whole=True, dtype=torch.float64):
    """Sparse counts, an empty fingerprint among them."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.rand(dim, generator=generator, dtype=torch.float64) * 2
    counts = torch.poisson(rate.expand(n, dim), generator=generator)
    if not whole:
        counts = counts * torch.rand(n, dim, generator=generator, dtype=torch.float64)
    counts[n // 2] = 0
    return counts.to(dtype)


def by_definition(x1, x2):
    """Entry by entry, in Python's numbers."""
    entries = []
    for a in x1.tolist():
        row = []
        for b in x2.tolist():
            least = sum(min(p, q) for p, q in zip(a, b, strict=True))
            most = sum(max(p, q) for p, q in zip(a, b, strict=True))
            row.append(least / most if most else 1.0)
        entries.append(row)
    return torch.tensor(entries, dtype=torch.float64)


def model_of(x, y, kernel=None):
    class Model(gpytorch.models.ExactGP):
        def __init__(self):
            likelihood = gpytorch.likelihoods.GaussianLikelihood()
            likelihood.noise = 0.1
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = kernel or ScaleKernel(TanimotoKernel())

        def forward(self, x):
            return MultivariateNormal(self.mean_module(x), self.covar_module(x))

    return Model().to(x)


@pytest.fixture(scope="module")
def conditioned():
    x = fingerprints(40)
    y = x.sum(1).sin()
    return sgdgp.condition(
        model_of(x, y), num_samples=4, num_features=64, progress=False
    )


@pytest.mark.parametrize("whole", [True, False])
def test_values_are_minima_over_maxima(whole):
    x1, x2 = fingerprints(7, whole=whole), fingerprints(9, seed=1, whole=whole)
    truth = by_definition(x1, x2)
    kernel = TanimotoKernel()
    torch.testing.assert_close(kernel(x1, x2).to_dense(), truth, rtol=0, atol=1e-15)
    low = kernel(x1.float(), x2.float()).to_dense()
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), truth, rtol=0, atol=1e-6)
    square = kernel(x1).to_dense()
    torch.testing.assert_close(square, by_definition(x1, x1), rtol=0, atol=1e-15)


def test_two_molecules_by_hand():
    x = torch.tensor([[2.0, 0.0, 1.0, 0.0], [1.0, 3.0, 1.0, 0.0]])
    assert float(TanimotoKernel()(x).to_dense()[0, 1]) == pytest.approx(2 / 6)


def test_an_empty_fingerprint_is_like_itself_and_like_no_other():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    expected = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    kernel = TanimotoKernel()
    assert torch.equal(kernel(x, x.clone()).to_dense(), expected)
    assert torch.equal(kernel(x[None], x[None]).to_dense()[0], expected)
    assert torch.equal(kernel(x, diag=True), torch.ones(3))


@hypothesis.given(
    n=st.integers(1, 30),
    m=st.integers(1, 10),
    seed=st.integers(0, 1000),
    whole=st.booleans(),
    budget=st.sampled_from([2**6, 2**12, 2**30]),
    rows=st.lists(st.integers(0, 10**6), min_size=1, max_size=9),
)
def test_tiles_are_the_kernel(n, m, seed, whole, budget, rows):
    x, x_new = fingerprints(n, seed, whole=whole), fingerprints(m, seed + 1)
    kernel = ScaleKernel(TanimotoKernel()).double()
    kernel.outputscale = 2.5
    operator = TiledOperator(kernel, x, memory_budget=budget)
    truth, crossed = 2.5 * by_definition(x, x), 2.5 * by_definition(x_new, x)
    index = torch.tensor(rows) % n
    for found, expected in (
        (operator.block(slice(0, n), slice(0, n)), truth),
        (operator.block(index, index), truth[index][:, index]),
        (operator.rows(index).to_dense(), truth[index]),
        (operator.matmul(torch.eye(n).double()), truth),
        (operator.cross(x_new).matmul(torch.eye(n).double()), crossed),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert torch.equal(operator.diagonal(), torch.full((n,), 2.5).double())


@hypothesis.given(seed=st.integers(0, 1000), whole=st.booleans())
def test_kernel_matrices_are_symmetric_and_not_indefinite(seed, whole):
    matrix = TanimotoKernel()(fingerprints(20, seed, whole=whole)).to_dense()
    torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=1e-15)
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-12
    torch.testing.assert_close(matrix.diagonal(), torch.ones(20).double())


def test_large_and_many_counts_are_exact():
    x = fingerprints(6) * 3_000_001.0  # codes and sums beyond what fits
    truth = by_definition(x, x)
    for scaled in (x, x / 7):
        found = TanimotoKernel()(scaled, scaled.clone()).to_dense()
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-14)
    wide = fingerprints(5, dim=3000)
    operator = TiledOperator(TanimotoKernel(), wide)
    found = operator.matmul(torch.eye(5).double())
    torch.testing.assert_close(found, by_definition(wide, wide), rtol=0, atol=1e-14)


def test_binary_counts_give_the_jaccard_index():
    x = (fingerprints(8) > 0).double()
    common = x @ x.mT
    either = x.sum(1)[:, None] + x.sum(1) - common
    expected = torch.where(either > 0, common / either, 1.0)
    torch.testing.assert_close(TanimotoKernel()(x).to_dense(), expected)


def test_batches_of_inputs_and_of_kernels():
    x1 = torch.stack([fingerprints(4, seed) for seed in range(3)])
    x2 = torch.stack([fingerprints(5, seed) for seed in range(3, 6)])
    found = TanimotoKernel()(x1, x2).to_dense()
    truth = torch.stack([by_definition(a, b) for a, b in zip(x1, x2, strict=True)])
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-14)
    shared = TanimotoKernel()(x1, x2[0]).to_dense()
    torch.testing.assert_close(shared[2], by_definition(x1[2], x2[0]))
    pairs = TanimotoKernel()(x1, x2[:, :4], diag=True)
    torch.testing.assert_close(pairs, truth[:, :, :4].diagonal(dim1=1, dim2=2))
    batch = ScaleKernel(
        TanimotoKernel(batch_shape=torch.Size([2])), batch_shape=torch.Size([2])
    ).double()
    batch.outputscale = torch.tensor([1.0, 3.0])
    both = batch(x1[0], x2[0]).to_dense()
    assert both.shape == (2, 4, 5)
    torch.testing.assert_close(both[1], 3 * truth[0])


def test_the_amplitude_reaches_kernel_operator_and_features():
    x = fingerprints(10)
    kernel = ScaleKernel(TanimotoKernel()).double()
    kernel.outputscale = 0.7
    truth = 0.7 * by_definition(x, x)
    torch.testing.assert_close(kernel(x).to_dense(), truth)
    torch.testing.assert_close(choose_operator(kernel, x).diagonal(), truth.diagonal())
    features = sgdgp.features.random_features(
        kernel,
        dim=DIM,
        num_features=64,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    ).features(x)
    torch.testing.assert_close(features.square().sum(1), truth.diagonal())


def test_active_dims_sums_and_products_keep_to_their_columns():
    counts = fingerprints(9)
    x = torch.cat(
        [torch.randn(9, 2, generator=torch.Generator().manual_seed(1)), counts], 1
    )
    x = x.double()
    molecules = tuple(range(2, 2 + DIM))
    tanimoto = TanimotoKernel(active_dims=molecules)
    other = RBFKernel(active_dims=(0, 1)).double()
    truth, smooth = by_definition(counts, counts), other(x).to_dense()
    eye = torch.eye(9).double()
    for kernel, expected in (
        (tanimoto, truth),
        (tanimoto + other, truth + smooth),
        (tanimoto * other, truth * smooth),
        (ScaleKernel(tanimoto) + ScaleKernel(other), None),
    ):
        found = TiledOperator(kernel.double(), x).matmul(eye)
        dense = kernel(x).to_dense() if expected is None else expected
        torch.testing.assert_close(found, dense.detach(), rtol=0, atol=1e-12)
    assert isinstance(tile_kernel(tanimoto), TanimotoTile)


def test_a_subclass_with_another_forward_is_another_kernel():
    class Squared(TanimotoKernel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) ** 2

    assert tile_kernel(Squared()) is None
    assert not sgdgp.features.has_features(Squared())


def test_the_gradient_of_the_amplitude_is_that_of_the_dense_kernel(generator):
    x = fingerprints(30)
    a, b = torch.randn(2, 30, 3, generator=generator, dtype=torch.float64)
    kernel = (ScaleKernel(TanimotoKernel()) + ScaleKernel(RBFKernel())).double()
    operator = TiledOperator(kernel, x, memory_budget=2**12)
    wanted = list(kernel.parameters())
    found = torch.autograd.grad(operator.quadratic_form(a, b), wanted)
    dense = (a * (kernel(x).to_dense() @ b)).sum()
    for one, other in zip(found, torch.autograd.grad(dense, wanted), strict=True):
        torch.testing.assert_close(one, other)


def test_learning_ends_where_the_exact_evidence_is_flat(generator):
    x = fingerprints(60)
    root = torch.linalg.cholesky(4 * by_definition(x, x) + 0.1 * torch.eye(60))
    y = root @ torch.randn(60, generator=generator, dtype=torch.float64)
    model = model_of(x, y)
    sgdgp.fit(model, progress=False)
    exact = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    with gpytorch.settings.fast_computations(False, False, False):
        loss = exact(model(x), y)
        slopes = torch.autograd.grad(loss, list(model.parameters()))
    assert model.covar_module.outputscale.item() > 1.5
    assert max(float(slope.abs().max()) for slope in slopes) < 0.02


def test_conditioning_is_exact_regression():
    x, x_new = fingerprints(80), fingerprints(30, seed=1)
    y = x.sum(1).sin() + 0.3 * x[:, 0]
    model = model_of(x, y)
    posterior = sgdgp.condition(
        model, num_samples=256, num_features=4096, progress=False
    )
    model.eval()
    with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
        exact = model(x_new)
        truth_mean, truth_variance = exact.mean, exact.variance
    torch.testing.assert_close(posterior.mean(x_new), truth_mean, rtol=0, atol=0.02)
    ratio = posterior.variance(x_new) / truth_variance
    # 256 samples give each variance a standard error of 9 %; 30 of them are correlated.
    assert float((ratio - 1).abs().max()) < 0.4
    assert float((ratio.mean() - 1).abs()) < 0.1


REFUSED = "no gradient with respect to its inputs"


def test_gradients_in_fingerprints_are_refused_by_the_kernel():
    kernel = ScaleKernel(TanimotoKernel())
    x, other = fingerprints(3).requires_grad_(), fingerprints(4)
    operator = TiledOperator(kernel.double(), x.detach())
    vectors = torch.ones(3, 1).double()
    for call in (
        lambda: kernel(x, other).to_dense(),
        lambda: kernel(other, x).to_dense(),
        lambda: kernel(x, diag=True),
        lambda: kernel(x[None], other[None]).to_dense(),
        lambda: operator.quadratic_form(vectors, vectors, x=x),
    ):
        with pytest.raises(NoInputGradientError, match=REFUSED):
            call()


def test_gradients_in_fingerprints_are_refused_by_the_posterior(conditioned):
    x = fingerprints(3).requires_grad_()
    own = fingerprints(4).unsqueeze(1).requires_grad_()
    for call in (
        lambda: conditioned.mean(x),
        lambda: conditioned.variance(x),
        lambda: conditioned.samples(x),
        lambda: conditioned.predict(x),
        lambda: conditioned.functions.each(own).sum().backward(),
    ):
        with pytest.raises(NoInputGradientError, match=REFUSED):
            call()
    with torch.no_grad():
        assert conditioned.mean(x.detach()).shape == (3,)
    assert conditioned.functions.each(own.detach()).shape == (4, 1)


def test_maximising_over_a_box_is_refused(conditioned):
    maximise = pytest.importorskip("sgdgp.bayesopt").maximise
    bounds = torch.stack([torch.zeros(DIM), torch.full((DIM,), 3.0)]).double()
    with pytest.raises(ValueError, match=REFUSED):
        maximise(conditioned, bounds, 16, rounds=1, steps=2)


def test_botorch_chooses_among_molecules():
    models = pytest.importorskip("botorch.models")
    from botorch.acquisition import LogExpectedImprovement
    from botorch.optim import optimize_acqf_discrete

    x = fingerprints(20)
    y = x.sum(1, keepdim=True)
    model = models.SingleTaskGP(
        x, y, covar_module=ScaleKernel(TanimotoKernel()), input_transform=None
    )
    choices = fingerprints(30, seed=3)
    acquisition = LogExpectedImprovement(model, best_f=y.max())
    chosen, _ = optimize_acqf_discrete(acquisition, q=1, choices=choices)
    values = acquisition(choices.unsqueeze(1))
    assert torch.equal(chosen[0], choices[values.argmax()])


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_counts_that_are_none_are_refused(value, conditioned):
    x = fingerprints(4)
    bad = x.clone()
    bad[2, 5] = value
    kernel = TanimotoKernel()
    for call in (
        lambda: kernel(bad, x).to_dense(),
        lambda: kernel(x, bad).to_dense(),
        lambda: kernel(bad[None], x[None]).to_dense(),
        lambda: kernel(bad, diag=True),
        lambda: TiledOperator(kernel, bad),
        lambda: TiledOperator(kernel, x).cross(bad),
    ):
        with pytest.raises(ValueError, match=r"1 others, the first at index .*2, 5\)"):
            call()
    with pytest.raises(ValueError, match="finite"):
        conditioned.mean(bad)


def test_arguments_that_make_no_sense_are_refused():
    x = fingerprints(4)
    with pytest.raises(ValueError, match="last_dim_is_batch"):
        TanimotoKernel().forward(x, x, last_dim_is_batch=True)
    with pytest.raises(TypeError):
        TanimotoKernel(outputscale=2.0)
    with pytest.raises(TypeError):
        TanimotoKernel(ard_num_dims=3)
