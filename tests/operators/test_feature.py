"""An operator of exact features is the kernel matrix, and counts what it evaluates."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from gpytorch.kernels import (
    ConstantKernel,
    LinearKernel,
    PolynomialKernel,
    RBFKernel,
    ScaleKernel,
)
from torch import nn

from sgdgp.features import FeatureMap
from sgdgp.features.tasks import PairFeatures
from sgdgp.kernels import NeuralTangentKernel
from sgdgp.operators import (
    DenseOperator,
    FeatureOperator,
    choose_operator,
    operator_by_name,
)
from sgdgp.operators.choose import FEW_FEATURES, FILL_UP_TO
from sgdgp.solvers.system import as_system
from tests.operators.matrix_truth import is_the_cross_matrix, is_the_matrix

D = 3


class OutputFeatures(FeatureMap):
    """Two outputs (sin(A x), x B) per input; counts the points that it evaluates."""

    exact = True
    num_features = 4

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(5)
        self.a = torch.randn(D, 4, generator=generator, dtype=torch.float64).to(dtype)
        self.b = torch.randn(D, 4, generator=generator, dtype=torch.float64).to(dtype)
        self.evaluated = 0

    def features(self, x):
        self.evaluated += len(x)
        return torch.stack([(x @ self.a).sin(), x @ self.b], 1).flatten(0, 1)

    def forward(self, x, w):
        return self.features(x) @ w

    def adjoint(self, x, v):
        return self.features(x).mT @ v


def network(outputs, dtype=torch.float64):
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, outputs))
    return layers.to(dtype).eval()


def points(n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype)


KERNELS = {
    "linear": LinearKernel,
    "sum": lambda: LinearKernel() + ConstantKernel(),
    "quadratic": lambda: ScaleKernel(PolynomialKernel(power=2)),
    "active": lambda: LinearKernel(active_dims=(2, 0)),
    "network": lambda: ScaleKernel(NeuralTangentKernel(network(1))),
    "two_outputs": lambda: NeuralTangentKernel(network(2)),
}


@pytest.mark.parametrize("budget", [2**10, 2**30])
@pytest.mark.parametrize("name", KERNELS)
@hypothesis.given(
    n=st.integers(1, 12),
    m=st.integers(1, 5),
    k=st.integers(1, 3),
    rows=st.lists(st.integers(0, 10**6), min_size=1, max_size=7),
    columns=st.lists(st.integers(0, 10**6), min_size=1, max_size=30),
    cuts=st.tuples(st.integers(0, 24), st.integers(0, 24)),
)
@hypothesis.settings(max_examples=3, phases=[hypothesis.Phase.generate])
def test_the_operator_is_the_kernel_matrix(name, budget, n, m, k, rows, columns, cuts):
    kernel, x, x_new = KERNELS[name]().double(), points(n), points(m, 1)
    operator = FeatureOperator(kernel, x, memory_budget=budget)
    with torch.no_grad():
        truth, truth_new = kernel(x).to_dense(), kernel(x_new, x).to_dense()

    def agree(found, wanted):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)

    is_the_matrix(operator, truth, k, rows, columns, cuts, agree)
    is_the_cross_matrix(operator.cross(x_new), truth_new, k, columns, agree)
    i = torch.tensor(rows) % len(truth)
    agree(operator.small_blocks(i.unsqueeze(0)), truth[i][:, i].unsqueeze(0))


def test_vectors_move_with_their_images():
    operator = FeatureOperator.of_map(OutputFeatures(), points(6), outputs=2)
    dense = operator.block(slice(0, 12), slice(0, 12))
    generator = torch.Generator().manual_seed(0)
    v, g = (torch.randn(12, 3, generator=generator).double() for _ in range(2))
    tracked = operator.tracked(v)
    zero = operator.tracked(torch.zeros_like(v))
    for rows in (slice(3, 7), torch.tensor([11, 0, 5])):
        move = operator.move(rows, g[rows])
        tracked.move(move, -0.5)
        zero.move(move, 2.0)
        v[rows] -= 0.5 * g[rows]
    difference = tracked.clone()
    difference.set_to_difference(tracked, zero, 0.3)
    tracked.add(zero, 0.7)
    tracked.scale(1.5)
    truth = 1.5 * (v + 0.7 * zero.values)
    torch.testing.assert_close(tracked.values, truth)
    some = tracked.columns(torch.tensor([True, False, True]))
    for rows in (slice(1, 4), torch.tensor([2, 9])):
        torch.testing.assert_close(
            operator.rows_of_product(rows, tracked), dense[rows] @ truth
        )
        torch.testing.assert_close(
            operator.rows_of_product(rows, some), dense[rows] @ truth[:, ::2]
        )
        torch.testing.assert_close(
            operator.rows_of_product(rows, difference),
            dense[rows] @ (v - 0.3 * zero.values),
        )


def test_a_product_evaluates_every_point_twice_and_a_block_only_itself():
    features = OutputFeatures()
    operator = FeatureOperator.of_map(features, points(20), outputs=2)
    v = torch.ones(40, 2, dtype=torch.float64)
    features.evaluated = 0
    operator.matmul(v)
    assert features.evaluated == 40
    tracked = operator.tracked(torch.zeros_like(v))
    assert features.evaluated == 40
    tracked.move(operator.move(slice(4, 10), v[4:10]))
    operator.rows_of_product(slice(4, 10), tracked)
    assert features.evaluated == 46


def test_predictions_with_the_same_weights_sweep_over_the_data_once():
    features = OutputFeatures()
    operator = FeatureOperator.of_map(features, points(20), outputs=2)
    v = torch.ones(40, 3, dtype=torch.float64)
    features.evaluated = 0
    first = operator.cross(points(2, 1)).matmul(v[:, :2])
    again = operator.cross(points(2, 1)).matmul(v[:, :2])
    assert torch.equal(first, again)
    assert features.evaluated == 20 + 2 + 2
    v[0] += 1.0
    changed = operator.cross(points(2, 1)).matmul(v[:, :2])
    assert not torch.equal(first, changed)


@pytest.mark.parametrize("outputs", [1, 2])
def test_random_orders_keep_the_outputs_of_a_point_together(outputs, generator):
    features = OutputFeatures() if outputs == 2 else PairFeatures(OutputFeatures(), 2)
    x = points(7)
    if outputs == 1:
        task = torch.arange(2).double().repeat(7).unsqueeze(1)
        x = torch.cat([x.repeat_interleave(2, 0), task], 1)[:-1]  # one is missing
    operator = FeatureOperator.of_map(features, x, outputs=outputs)
    order = operator.random_order(generator)
    assert sorted(order.tolist()) == list(range(operator.shape[0]))
    assert order.tolist() != sorted(order.tolist())
    assert len((order // 2).unique_consecutive()) == 7
    permuted = operator.permuted(order[::2] // 2 if outputs == 2 else order)
    truth = operator.block(slice(0, len(order)), slice(0, len(order)))
    v = torch.ones(len(order), 1, dtype=torch.float64)
    torch.testing.assert_close(permuted.matmul(v), truth[order][:, order] @ v)


def test_rows_of_a_point_are_not_torn_apart():
    operator = FeatureOperator.of_map(OutputFeatures(), points(3), outputs=2)
    system = as_system(operator, 1.0, torch.ones(6, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="the 2 rows of each point beside each other"):
        system.permuted(torch.tensor([0, 2, 1, 3, 4, 5]))


def test_pairs_evaluate_adjacent_rows_of_a_point_once():
    base = OutputFeatures()
    features = PairFeatures(base, 2)
    x = points(5)
    task = torch.tensor([0.0, 1.0]).double().repeat(5).unsqueeze(1)
    pairs = torch.cat([x.repeat_interleave(2, 0), task], 1)[torch.tensor([1, 2, 3, 9])]
    truth = base.features(x)[torch.tensor([1, 2, 3, 9])]
    w, v = torch.randn(4, 2).double(), torch.randn(4, 2).double()
    base.evaluated = 0
    torch.testing.assert_close(features.forward(pairs, w), truth @ w)
    torch.testing.assert_close(features.adjoint(pairs, v), truth.mT @ v)
    assert base.evaluated == 3 + 3
    pairs.requires_grad_()
    (gradient,) = torch.autograd.grad(features.forward(pairs, w)[1].sum(), pairs)
    assert bool(gradient[1].any())
    assert not bool(gradient[[0, 2, 3]].any())
    with pytest.raises(ValueError, match=r"outputs from 0 to 1 .* found 0 to 2"):
        features.features(torch.tensor([[0.1, 0.1, 0.1, t] for t in (0.0, 2.0)]))


@pytest.mark.parametrize("name", ["linear", "network"])
def test_the_quadratic_form_has_the_gradient_of_the_kernels_parameters(name):
    kernel, x = ScaleKernel(KERNELS[name]()).double(), points(6)
    operator = FeatureOperator(kernel, x)
    a, b = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    form = operator.quadratic_form(a, b)
    dense = (a * (kernel(x).to_dense() @ b)).sum()
    torch.testing.assert_close(form, dense)
    (found,) = torch.autograd.grad(form, kernel.raw_outputscale)
    (truth,) = torch.autograd.grad(dense, kernel.raw_outputscale)
    torch.testing.assert_close(found, truth)


def test_another_dtype_is_the_kernels_own_where_it_has_one():
    x = points(5, dtype=torch.float32)
    wide = FeatureOperator(LinearKernel(), x).to(torch.float64)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(
        wide.diagonal(), LinearKernel().double()(x.double()).to_dense().diagonal()
    )
    # A network stays in its precision; its features take part in wider products.
    kernel = NeuralTangentKernel(network(2, torch.float32))
    operator = FeatureOperator(kernel, x)
    wide = operator.to(torch.float64)
    assert wide.matmul(torch.ones(10, 1).double()).dtype == torch.float64
    everything = slice(0, 10)
    torch.testing.assert_close(
        wide.block(everything, everything).float(),
        operator.block(everything, everything),
    )
    assert float(torch.linalg.eigvalsh(wide.block(everything, everything))[0]) > -1e-12


def test_kernels_without_exact_features_are_refused():
    with pytest.raises(ValueError, match="RBFKernel has no exact feature map"):
        FeatureOperator(RBFKernel(), points(4))
    with pytest.raises(ValueError, match=r"torch.float32 .*network's weights"):
        FeatureOperator(NeuralTangentKernel(network(1, torch.float32)), points(4))


@pytest.mark.parametrize(
    ("kernel", "n", "name"),
    [
        (LinearKernel(), FILL_UP_TO, "dense"),
        (LinearKernel(), FILL_UP_TO + 1, "features"),
        (RBFKernel(), FILL_UP_TO + 1, "dense"),
        (LinearKernel() + RBFKernel(), FILL_UP_TO + 1, "dense"),
        (PolynomialKernel(power=9), FILL_UP_TO + 1, "dense"),
        (NeuralTangentKernel(network(1, torch.float32)), FILL_UP_TO, "dense"),
        (NeuralTangentKernel(network(1, torch.float32)), FILL_UP_TO + 1, "features"),
        (NeuralTangentKernel(network(2, torch.float32)), FILL_UP_TO, "features"),
    ],
)
def test_features_are_chosen_where_they_are_less_work(kernel, n, name):
    x = torch.zeros(n, D)
    assert choose_operator(kernel, x, memory_budget=2**30).name == name


def test_features_are_chosen_where_a_network_has_no_room_for_its_kernel():
    x = torch.zeros(100, D)
    kernel = NeuralTangentKernel(network(1, torch.float32))
    chosen = choose_operator(kernel, x, memory_budget=100 * 100 * 4 - 1)
    assert chosen.name == "features"
    dense = choose_operator(kernel, x, memory_budget=100 * 100 * 4)
    assert isinstance(dense, DenseOperator)
    assert dense.streaming().name == "features"
    assert FEW_FEATURES > 1


def test_it_can_be_asked_for_by_name():
    operator = operator_by_name("features", LinearKernel(), torch.zeros(5, 2))
    assert isinstance(operator, FeatureOperator)
