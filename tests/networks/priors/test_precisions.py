"""What holds for every precision, and for sums of them, against dense float64."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from gpytorch.means import ZeroMean
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sgdgp
from sgdgp.networks import Gaussian, linearise
from sgdgp.networks.priors import (
    DiagonalPrior,
    KroneckerPrior,
    KroneckerSum,
    MatrixRoot,
    blocks,
    precision_sum,
)
from sgdgp.tangent import Tangent
from tests.models import GP
from tests.networks.dense import columns
from tests.networks.priors.family import stored
from tests.networks.priors.members import (
    CLOSED,
    MEMBERS,
    NUM_WEIGHTS,
    SHAPES,
    dense,
    factor,
    terms,
)

EVERY = pytest.mark.parametrize("name", MEMBERS)
EYE = torch.eye(NUM_WEIGHTS, dtype=torch.float64).mT


def near(found: Tensor, truth: Tensor, tolerance: float = 1e-8) -> None:
    """Frobenius norms of the difference and of the truth."""
    assert float((found - truth).norm()) <= tolerance * float(truth.norm())


@pytest.fixture
def small(request, monkeypatch) -> int:
    """Up to how many weights a sum is a dense matrix; with 0 all are long ones."""
    monkeypatch.setattr(blocks, "EXACT_WEIGHTS", request.param)
    return request.param


def on_both_paths(test):
    return pytest.mark.parametrize(
        "small", [512, 0], ids=["dense sums", "long sums"], indirect=True
    )(test)


@EVERY
@on_both_paths
def test_products_solves_and_roots_are_those_of_the_dense_matrix(name, small):
    prior, precision = MEMBERS[name]()
    covariance = torch.linalg.inv(precision)
    w = columns(NUM_WEIGHTS, 3)
    near(prior.matmul(w), precision @ w)
    near(prior.solve(w), covariance @ w)
    near(prior.covariance(w), covariance @ w)
    root = prior.root(EYE)
    near(root @ root.mT, covariance)
    near(prior.root_adjoint(w), root.mT @ w)
    near(prior.root(prior.whiten(w)), w)
    for found in (prior.matmul(w), prior.solve(w), prior.root(w), prior.whiten(w)):
        assert found.mT.is_contiguous()


@EVERY
@on_both_paths
def test_determinants_traces_and_variances_are_exact_or_know_their_errors(name, small):
    prior, precision = MEMBERS[name]()
    covariance = torch.linalg.inv(precision)
    is_exact = bool(small) or name in CLOSED
    found = prior.logdet()
    truth = float(torch.linalg.slogdet(precision)[1])
    assert abs(found.value - truth) <= 1e-8 * abs(truth) + 5 * found.standard_error
    assert (found.standard_error == 0) is is_exact
    variances = prior.marginal_variance()
    if is_exact:
        near(variances, covariance.diagonal())
    else:
        near(variances, covariance.diagonal(), 0.2)


@EVERY
@on_both_paths
def test_traces_of_every_pair(name, small):
    prior, precision = MEMBERS[name]()
    covariance = torch.linalg.inv(precision)
    for other, member in MEMBERS.items():
        second, matrix = member()
        both_blocks = not (prior.is_diagonal or second.is_diagonal)
        if both_blocks and prior.shapes != second.shapes:
            with pytest.raises(ValueError, match="expected blocks of shapes"):
                prior.trace_solve(second)
            continue
        truth = float((covariance * matrix).sum())
        found = prior.trace_solve(second)
        error = abs(found.value - truth)
        assert error <= 1e-8 * truth + 5 * found.standard_error, other
        if small or name in CLOSED:
            assert found.standard_error == 0, other


@EVERY
def test_samples_have_the_covariance(name):
    prior, precision = MEMBERS[name]()
    drawn = prior.sample(4000, torch.Generator().manual_seed(0))
    again = prior.sample(4000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    whitened = torch.linalg.cholesky(precision).mT @ drawn
    moments = whitened @ whitened.mT / 4000
    assert float((moments - EYE).abs().max()) < 0.12


@EVERY
def test_a_stored_precision_comes_back(name):
    prior, _ = MEMBERS[name]()
    w = columns(NUM_WEIGHTS, 2)
    same = stored(prior)
    assert type(same) is type(prior)
    assert torch.equal(same.matmul(w), prior.matmul(w))
    assert torch.equal(same.root(w), prior.root(w))


@EVERY
def test_precisions_scale_it_and_fold_into_its_blocks(name):
    prior, precision = MEMBERS[name]()
    w = columns(NUM_WEIGHTS, 2)
    scaled = prior.with_precisions(3.0 * prior.precisions)
    near(scaled.matmul(w), 3.0 * precision @ w)
    near(scaled.solve(w), torch.linalg.solve(precision, w) / 3.0)
    shift = scaled.logdet().value - prior.logdet().value
    assert shift == pytest.approx(NUM_WEIGHTS * math.log(3.0), rel=1e-9)
    folded = scaled.folded()
    assert folded.precisions.tolist() == [1.0] * prior.num_groups
    near(folded.matmul(w), scaled.matmul(w))
    near(folded.covariance(w), scaled.covariance(w))


@pytest.mark.parametrize("name", [m for m in MEMBERS if m != "full"])
@pytest.mark.parametrize("other", ["diagonal", "Kronecker and identity"])
def test_precisions_add_up(name, other):
    (prior, precision), (second, matrix) = MEMBERS[name](), MEMBERS[other]()
    if name == "root with inner factors":
        with pytest.raises(ValueError, match="no precision of few terms"):
            precision_sum(prior, second)
        return
    total = precision_sum(second, prior)
    w = columns(NUM_WEIGHTS, 2)
    near(total.matmul(w), (precision + matrix) @ w)
    near(total.solve(w), torch.linalg.solve(precision + matrix, w))
    near(total.covariance(w), torch.linalg.solve(precision + matrix, w))


def test_an_identity_beside_one_product_stays_in_closed_form(monkeypatch):
    monkeypatch.setattr(blocks, "EXACT_WEIGHTS", 0)
    isotropic, _ = MEMBERS["isotropic"]()
    kronecker, _ = MEMBERS["Kronecker product"]()
    total = precision_sum(kronecker, isotropic)
    assert all(block.is_exact for block in total.blocks)
    assert all(len(block.terms) == 1 for block in total.blocks)


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 5),
    shape=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    delta=st.sampled_from([0.0, 1e-6, 0.1, 10.0]),
    spread=st.sampled_from([0, 3]),
    small=st.sampled_from([0, 512]),
)
@settings(max_examples=60)
def test_random_sums_agree_with_dense_ones(seed, count, shape, delta, spread, small):
    g = torch.Generator().manual_seed(seed)
    pairs = [
        (a, 10.0 ** (spread * float(torch.randn((), generator=g))) * b)
        for a, b in terms(shape, count, g)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "EXACT_WEIGHTS", small)
        block = KroneckerSum(pairs, delta)
        precision = dense(pairs, delta)
        covariance = torch.linalg.inv(precision)
        eye = torch.eye(len(precision), dtype=torch.float64)
        x = eye.view(-1, *shape)
        near(block.matmul(x).flatten(1), precision)
        near(block.solve(x).flatten(1), covariance)
        root = block.apply(x).flatten(1).mT
        near(root @ root.mT, covariance)
        found = block.logdet()
        truth = float(torch.linalg.slogdet(precision)[1])
        allowed = 1e-8 * max(1.0, abs(truth)) + 6 * found.standard_error
        assert abs(found.value - truth) <= allowed


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e8])
@pytest.mark.parametrize("small", [512, 0], ids=["dense", "iterative"])
@pytest.mark.parametrize(
    ("count", "identity"),
    [(1, True), (2, False), (2, True), (3, False), (5, True)],
)
def test_solves_agree_with_dense_ones_at_large_condition_numbers(
    count, identity, condition, small, monkeypatch
):
    """Residuals to 1e-8 of b; solutions to rounding times the condition number."""
    monkeypatch.setattr(blocks, "EXACT_WEIGHTS", small)
    g = torch.Generator().manual_seed(3)
    # Bases that all share, so that the condition numbers multiply.
    basis = [
        torch.linalg.qr(torch.randn(n, n, generator=g).double())[0] for n in (9, 7)
    ]
    pairs = []
    for k in range(count):
        own = []
        for q in basis:
            values = torch.logspace(0, -math.log10(condition) / 2, len(q)).double()
            values = values * (0.5 + torch.rand(len(q), generator=g).double())
            own.append((q * values) @ q.mT)
        pairs.append((own[0] + own[0].mT, 2.0**k * (own[1] + own[1].mT)))
    delta = 1.0 / condition if identity else 0.0
    precision = dense(pairs, delta)
    kappa = float(torch.linalg.cond(precision))
    assert kappa > 0.02 * condition
    block = KroneckerSum(pairs, delta)
    b = torch.randn(4, 9, 7, generator=g, dtype=torch.float64)
    x = block.solve(b).flatten(1).mT
    rhs = b.flatten(1).mT
    near(precision @ x, rhs, 1e-8)
    near(x, torch.linalg.solve(precision, rhs), max(1e-10, 1e-15 * kappa))
    near(block.apply(block.adjoint(b)).flatten(1).mT, x, max(1e-10, 1e-14 * kappa))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_compression_is_that_of_the_power_iteration_and_keeps_the_identity(count):
    g = torch.Generator().manual_seed(count)
    for shape, delta in [((8, 6), 1.0), ((5, 9), 1e-3), ((1, 6), 0.5)]:
        pairs = terms(shape, count, g, 1e4)
        found = KroneckerSum(pairs, delta).compressed()
        ((left, right),) = found.terms
        assert float(found.diagonal) == delta
        truth = dense(pairs)
        a, b = _by_power_iteration(pairs)
        near(torch.kron(left, right), torch.kron(a, b), 1e-6)
        # Stationary: no better factor for the other one as it is.
        error = (truth - torch.kron(left, right)).norm()
        for _ in range(20):
            other = right + 1e-3 * factor(shape[1], g)
            assert (truth - torch.kron(left, other)).norm() >= error
        eigenvalues = torch.linalg.eigvalsh(dense(found.terms, delta))
        assert float(eigenvalues[0]) >= delta * (1 - 1e-9) - 1e-14
        assert float(torch.linalg.eigvalsh(left)[0]) >= -1e-12 * float(left.norm())


def test_compression_with_the_identity_in_it_would_lose_the_identity():
    g = torch.Generator().manual_seed(0)
    pairs = terms((8, 6), 1, g, 1e4)
    eyes = (torch.eye(8).double(), torch.eye(6).double())
    ((left, right),) = (
        KroneckerSum([(1e3 * pairs[0][0], pairs[0][1]), eyes]).compressed().terms
    )
    assert float(torch.linalg.eigvalsh(torch.kron(left, right))[0]) < 0.5


def test_compression_takes_inputs_that_are_always_zero():
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        pairs = terms((6, 12), 3, g, 1e2)
        silent = torch.ones(12).double()
        silent[:5] = 0.0
        pairs = [(left, silent[:, None] * right * silent) for left, right in pairs]
        ((_, right),) = KroneckerSum(pairs, 1.0).compressed().terms
        near(right, silent[:, None] * right * silent, 1e-12)


def test_compressed_priors_and_their_groups():
    prior, _ = MEMBERS["three products"]()
    found = prior.compressed()
    assert all(len(block.terms) == 1 for block in found.blocks)
    assert torch.equal(found.precisions, prior.precisions)


@pytest.mark.parametrize("rank", [5, 40])
def test_a_prior_carried_with_its_mean_gives_the_joint_posterior(rank):
    """Source then target is source and target together; without the mean it is not."""
    g = torch.Generator().manual_seed(rank)
    alpha, noise = 0.4, 0.3
    x, x2 = (
        torch.randn(n, NUM_WEIGHTS, generator=g, dtype=torch.float64)
        for n in (rank, 12)
    )
    truth = torch.randn(NUM_WEIGHTS, 1, generator=g, dtype=torch.float64)
    y, y2 = x @ truth, x2 @ truth
    isotropic = DiagonalPrior(NUM_WEIGHTS, torch.tensor([alpha], dtype=torch.float64))
    source = precision_sum(isotropic, _full_curvature(x, noise))
    mean = source.solve(x.mT @ y / noise)
    target = precision_sum(source, _full_curvature(x2, noise))
    posterior_mean = target.solve(source.matmul(mean) + x2.mT @ y2 / noise)

    both, targets = torch.cat([x, x2]), torch.cat([y, y2])
    joint = both.mT @ both / noise + alpha * EYE
    near(target.matmul(EYE), joint)
    near(target.solve(EYE), torch.linalg.inv(joint))
    near(posterior_mean, torch.linalg.solve(joint, both.mT @ targets / noise))
    forgetful = target.solve(x2.mT @ y2 / noise)
    assert float((forgetful - posterior_mean).norm()) > 0.1 * float(
        posterior_mean.norm()
    )

    # And the same as a Gaussian process on the tangent kernel.
    network = nn.Linear(NUM_WEIGHTS, 1, bias=False).double().eval()
    kernel = sgdgp.kernels.NeuralTangentKernel(network, prior=source)
    model = GP(x2, (y2 - x2 @ mean)[:, 0], kernel, mean=ZeroMean()).double()
    model.likelihood.noise = noise
    posterior = sgdgp.condition(model, solver=sgdgp.Cholesky(), progress=False)
    points = torch.randn(6, NUM_WEIGHTS, generator=g, dtype=torch.float64)
    near(
        posterior.mean(points) + (points @ mean)[:, 0], (points @ posterior_mean)[:, 0]
    )


def _full_curvature(x: Tensor, noise: float) -> KroneckerPrior:
    one = torch.ones(1, dtype=torch.float64)
    block = KroneckerSum([(one, x.mT @ x / noise)])
    return KroneckerPrior(NUM_WEIGHTS, one, blocks=[block])


@EVERY
def test_every_precision_drives_tangent_kernels_and_linearised_networks(name):
    prior, precision = MEMBERS[name]()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double().eval()
    x = torch.randn(12, 4, dtype=torch.float64)
    y = torch.randn(12, 2, dtype=torch.float64)
    points = torch.randn(3, 4, dtype=torch.float64)
    tangent = Tangent(network)
    assert [math.prod(shape) for shape in tangent.shapes] == [
        math.prod(s) for s in SHAPES
    ]
    jacobian = tangent.at(x).jacobian().flatten(0, 1)
    ahead = tangent.at(points).jacobian().flatten(0, 1)
    covariance = torch.linalg.inv(precision)
    gram = jacobian @ covariance @ jacobian.mT
    cross = ahead @ covariance @ jacobian.mT
    noise = 0.2
    weights = torch.linalg.solve(gram + noise * torch.eye(24).double(), y.flatten())

    kernel = sgdgp.kernels.NeuralTangentKernel(network, prior=prior)
    near(kernel(x).to_dense(), gram)

    fitted = linearise(network, Gaussian(noise=noise), prior, mean="linear").fit(
        [(x, y)],
        steps=0,
        precision=1.0,
        final_samples=2,
        solver="cholesky",
        progress=False,
    )
    near(fitted.linear_mean(points).flatten(), cross @ weights)


def test_precisions_of_other_networks_are_refused():
    prior, _ = MEMBERS["isotropic"]()
    network = nn.Linear(3, 2).double().eval()
    task = linearise(network, Gaussian(noise=1.0), prior)
    with pytest.raises(
        ValueError, match=f"one of 8 weights, found one of {NUM_WEIGHTS}"
    ):
        task.fit([(torch.zeros(2, 3).double(), torch.zeros(2, 2).double())])
    half = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).eval()
    task = linearise(half, Gaussian(noise=1.0), prior)
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        task.fit([(torch.zeros(2, 4), torch.zeros(2, 2))])


@pytest.mark.parametrize(
    ("pairs", "diagonal", "words"),
    [
        ([], 0.0, "at least one"),
        ([(torch.eye(3), torch.eye(2))], -0.1, "no negative precision"),
        ([(torch.eye(3), torch.eye(2))], math.nan, "finite"),
        ([(torch.eye(3), torch.eye(2))], torch.ones(2, 3), r"expected shape \(\) or"),
        ([(torch.eye(3), torch.eye(2)), (torch.eye(2), torch.eye(2))], 0.0, "found"),
        ([(torch.ones(3, 3).triu(), torch.eye(2))], 0.0, "symmetric"),
        ([(-torch.eye(3), torch.eye(2))], 0.0, "semi-definite factors, found -1"),
        ([(torch.eye(3) * math.inf, torch.eye(2))], 0.0, "finite"),
    ],
)
def test_what_is_no_sum_of_precisions_is_refused_at_once(pairs, diagonal, words):
    with pytest.raises(ValueError, match=words):
        KroneckerSum(pairs, diagonal)


@pytest.mark.parametrize("small", [512, 0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_singular_precisions_are_refused(count, small, monkeypatch):
    monkeypatch.setattr(blocks, "EXACT_WEIGHTS", small)
    g = torch.Generator().manual_seed(0)
    null = factor(6, g, rank=4)
    pairs = [(null, factor(5, g)) for _ in range(count)]
    x = torch.randn(2, 6, 5, generator=g, dtype=torch.float64)
    with pytest.raises(ValueError, match="singular"):
        KroneckerSum(pairs).solve(x)
    with pytest.raises(ValueError, match="singular"):
        KroneckerSum(pairs).apply(x)
    assert bool(torch.isfinite(KroneckerSum(pairs, 1e-3).solve(x)).all())


def test_indefinite_precisions_are_refused():
    g = torch.Generator().manual_seed(0)
    bad = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double()
    x = torch.ones(1, 2, 5).double()
    good = factor(5, g)
    for pairs in ([(bad, good)], [(bad, good)] * 2, [(bad, good)] * 3):
        with pytest.raises(ValueError, match=r"singular|semi-definite|negative"):
            KroneckerSum(pairs, 0.0).apply(x)


def test_groups_that_split_a_block_are_refused():
    prior, _ = MEMBERS["Kronecker product"]()
    with pytest.raises(ValueError, match="split the block"):
        KroneckerPrior(
            NUM_WEIGHTS,
            torch.ones(2).double(),
            [slice(0, 3), slice(3, NUM_WEIGHTS)],
            blocks=prior.blocks,
        )


def test_float32_sums_stay_definite():
    """Factors that float32 has summed up have eigenvalues of either sign near zero."""
    g = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(3):
        a, b = (torch.randn(n, 3, generator=g) for n in (20, 30))
        pairs.append((a @ a.mT, b @ b.mT))
    for count in (1, 3):
        block = KroneckerSum(pairs[:count], 0.5)
        x = torch.randn(2, 20, 30, generator=g)
        found = block.solve(x).flatten(1).double()
        wide = [(a.double(), b.double()) for a, b in pairs[:count]]
        near(
            found.mT,
            torch.linalg.solve(dense(wide, 0.5), x.flatten(1).double().mT),
            1e-3,
        )
        assert bool(torch.isfinite(block.apply(x)).all())
        assert float(block.variances().min()) > 0


def test_a_constant_diagonal_beside_terms_is_a_number():
    ((left, right),) = terms((20, 30), 1, torch.Generator().manual_seed(0))
    constant = torch.full((20, 30), 0.37).double()
    block = KroneckerSum([(left, right)], constant)
    assert block.diagonal.shape == ()
    assert block.diagonal.untyped_storage().nbytes() == 8
    assert block.is_exact
    alone = KroneckerSum((), constant)
    assert alone.logdet().value == pytest.approx(600 * math.log(0.37))
    assert alone.shape == alone.scaled(2.0).shape == (20, 30)


def test_equal_variances_are_cut_into_blocks_without_a_matrix():
    prior = DiagonalPrior(26, torch.tensor([0.37]))
    ((one, alpha), (other, _)) = prior.pieces_of([(4, 5), (2, 3)])
    assert one.inner is other.inner is None
    assert one.shape == (4, 5)
    near(one.variances() / alpha, torch.full((4, 5), 1 / 0.37), 1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_pickles_have_nothing_that_can_be_computed(count):
    pairs = terms((20, 30), count, torch.Generator().manual_seed(0))
    block = KroneckerSum([(a.float(), b.float()) for a, b in pairs], 0.5)
    before = len(pickle.dumps(block))
    value, x = block.logdet().value, torch.ones(1, 20, 30)
    solved = block.solve(x)
    assert ("_wide" in vars(block)) == (not block.is_exact)
    assert len(pickle.dumps(block)) == before
    there = pickle.loads(pickle.dumps(block))
    assert there.logdet().value == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(there.solve(x), solved)


def test_multiples_share_eigenvectors(monkeypatch):
    eigh, seen = torch.linalg.eigh, []

    def counted(side):
        seen.append(len(side))
        return eigh(side)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    ((left, right),) = terms((20, 30), 1, torch.Generator().manual_seed(0))
    x = columns(600, 2).mT.view(2, 20, 30)
    for strength in (1.0, 0.1, 10.0):
        block = KroneckerSum([(left, right)]).scaled(strength).scaled(2.0)
        block = block.plus(KroneckerSum((), torch.full((20, 30), 0.5).double()))
        truth = 2.0 * strength * torch.kron(left, right) + 0.5 * torch.eye(600)
        near(
            block.apply(block.adjoint(x)).flatten(1).mT,
            torch.linalg.solve(truth, x.flatten(1).mT),
        )
    assert seen == [20, 30]


def test_a_root_without_full_rank_has_an_infinite_determinant():
    root = MatrixRoot(torch.diag(torch.arange(3.0)).double(), torch.eye(2).double())
    assert root.logdet().value == math.inf


def _by_power_iteration(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    right = torch.eye(len(pairs[0][1]), dtype=torch.float64)
    for _ in range(200):
        left = sum((right * b).sum() * a for a, b in pairs)
        left = left / left.norm()
        right = sum((left * a).sum() * b for a, b in pairs)
        size = right.norm()
        right = right / size
    return size * left, right


def test_a_term_may_be_diagonal_beside_a_full_one():
    one = torch.ones(1, dtype=torch.float64)
    own = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    full = torch.ones(3, 3, dtype=torch.float64) + 2 * torch.eye(3).double()
    for pairs in ([(own, one), (full, one)], [(one, full), (one, own)]):
        block = KroneckerSum(pairs)
        dense = torch.diag(own) + full
        torch.testing.assert_close(
            block.variances().flatten(), torch.linalg.inv(dense).diagonal()
        )
        assert math.isclose(block.logdet().value, float(dense.logdet()))


def test_a_term_without_effect_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(30, 30, generator=generator).double() for _ in range(4)]
    a, b, c, d = (factor @ factor.mT for factor in factors)
    zero = torch.zeros(30, 30).double()
    pairs = [(a, b), (zero, c), (d, zero)]
    silent, plain = KroneckerSum(pairs, 1.0), KroneckerSum([(a, b)], 1.0)
    assert silent.is_exact
    assert math.isclose(silent.logdet().value, plain.logdet().value, rel_tol=1e-12)
    torch.testing.assert_close(silent.variances(), plain.variances())
