"""Jacobian products of networks equal those of the dense Jacobian."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from sgdgp.tangent import Tangent
from sgdgp.tangent import jacobian as module
from sgdgp.tangent.forward import RULES
from tests.networks.kinds import KINDS, inputs_of, network_of

EXAMPLES = 5


def normal(*shape, seed=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def dense_jacobian(network, x, names=None):
    """(b, C, D) by reverse mode, with all layers in their plain form."""
    parameters = {
        n: p.detach()
        for n, p in network.named_parameters()
        if names is None or n in names
    }

    def outputs(theta):
        return functional_call(network, theta, (x,)).flatten(1)

    with module.differentiable_layers(network):
        blocks = jacrev(outputs)(parameters)
    return torch.cat([block.flatten(2) for block in blocks.values()], dim=2)


@pytest.fixture(params=KINDS)
def problem(request):
    network, _ = network_of(request.param)
    x = inputs_of(request.param, EXAMPLES)
    return network, x, dense_jacobian(network, x)


def test_products_equal_those_of_the_dense_jacobian(problem):
    network, x, jacobian = problem
    tangent = Tangent(network)
    w = normal(3, tangent.num_weights).mT
    u = normal(EXAMPLES, 3, 4)
    for _ in range(2):  # the first batch is treated differently from later ones
        batch = tangent.at(x)
        assert torch.allclose(batch.jvp(w), jacobian @ w, rtol=0, atol=1e-10)
        expected = torch.einsum("bcd,bck->dk", jacobian, u)
        assert torch.allclose(batch.vjp(u), expected, rtol=0, atol=1e-10)
    assert tangent._obstacle is None
    assert torch.allclose(batch.outputs, network(x), rtol=0, atol=1e-10)
    assert torch.allclose(batch.jacobian(), jacobian, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"lstm"}))
def test_jacobians_of_all_examples_are_made_together(kind):
    network, _ = network_of(kind)
    x = inputs_of(kind, 3)
    found = Tangent(network).at(x)._jacobian_together()
    assert torch.allclose(found, dense_jacobian(network, x), rtol=0, atol=1e-10)


def test_products_are_adjoint_in_single_precision(problem):
    network, x, _ = problem
    tangent = Tangent(copy.deepcopy(network).float())
    w = normal(2, tangent.num_weights, dtype=torch.float32).mT
    batch = tangent.at(x.float())
    images = batch.jvp(w)
    u = normal(*images.shape, dtype=torch.float32)
    forward = torch.einsum("bck,bck->k", images, u)
    backward = torch.einsum("bck,bcj->kj", u, batch.jvp(w)).diagonal()
    assert torch.allclose(forward, backward)
    pulled = torch.stack([batch.vjp(u[..., k : k + 1])[:, 0] for k in range(2)], 1)
    size = images.norm() * u.norm()
    assert ((pulled * w).sum(0) - forward).abs().max() < 1e-5 * size


def test_the_reverse_derivative_of_the_reverse_mode_is_the_forward_one(problem):
    network, x, jacobian = problem
    tangent = Tangent(network)
    w = normal(2, tangent.num_weights).mT
    found = tangent.at(x)._reverse_twice(w)
    assert torch.allclose(found, jacobian @ w, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("budget", "elements"), [(1, 1), (10**9, 1), (1, 2**20)])
def test_chunks_of_directions_do_not_matter(monkeypatch, budget, elements):
    monkeypatch.setattr(module, "CPU_ELEMENTS", elements)
    network, _ = network_of("resnet")
    x = inputs_of("resnet", 3)
    jacobian = dense_jacobian(network, x)
    tangent = Tangent(network, memory_budget=budget)
    w, u = normal(5, tangent.num_weights).mT, normal(3, 3, 5)
    for _ in range(2):
        batch = tangent.at(x)
        assert torch.allclose(batch.jvp(w), jacobian @ w, rtol=0, atol=1e-10)
        expected = torch.einsum("bcd,bck->dk", jacobian, u)
        assert torch.allclose(batch.vjp(u), expected, rtol=0, atol=1e-10)


def test_adjoint_products_add_to_a_given_buffer():
    network, _ = network_of("cnn")
    x = inputs_of("cnn", 4)
    tangent = Tangent(network)
    u = normal(4, 3, 2)
    total = torch.ones(2, tangent.num_weights, dtype=torch.float64).mT
    batch = tangent.at(x)
    found = batch.vjp(u, out=total)
    assert found.data_ptr() == total.data_ptr()
    assert torch.allclose(total, 1 + batch.vjp(u))
    assert batch.vjp(u).mT.is_contiguous()


def test_products_are_differentiable_in_inputs_and_vectors():
    network, _ = network_of("mlp")
    tangent = Tangent(network)
    x = inputs_of("mlp", 2).requires_grad_()
    w = normal(2, tangent.num_weights).mT.requires_grad_()
    u = normal(2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: tangent.at(x).jvp(w), (x, w))
    assert torch.autograd.gradcheck(lambda x, u: tangent.at(x).vjp(u), (x, u))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_products_do_not_need_autograd(mode):
    network, _ = network_of("resnet")
    tangent = Tangent(network)
    w = normal(1, tangent.num_weights).mT.requires_grad_()
    expected = dense_jacobian(network, inputs_of("resnet", 2)) @ w
    with mode():
        batch = tangent.at(inputs_of("resnet", 2))
        images = batch.jvp(w)
        assert torch.allclose(images, expected)
        assert torch.allclose(batch.jacobian() @ w, expected)
        assert batch.vjp(images).shape == w.shape
    assert not images.requires_grad


def test_the_network_stays_as_it_was():
    network, _ = network_of("resnet")
    before = copy.deepcopy(network.state_dict())
    network[0].weight.requires_grad_(False)
    hooks = [len(m._forward_hooks) for m in network.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    tangent = Tangent(network, weights="all")
    batch = tangent.at(inputs_of("resnet", 3))
    batch.vjp(batch.jvp(normal(2, tangent.num_weights).mT))
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not network[0].weight.requires_grad
    assert all(p.grad is None for p in network.parameters())
    assert hooks == [len(m._forward_hooks) for m in network.modules()]
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_a_training_step_is_noticed():
    network, _ = network_of("mlp")
    tangent = Tangent(network)
    x = inputs_of("mlp", 2)
    tangent.outputs(x)
    with torch.no_grad():
        network[2].bias.add_(1)
    with pytest.raises(RuntimeError, match=r"'2\.bias' .* has changed"):
        tangent.at(x)
    with pytest.raises(RuntimeError, match="has changed"):
        pickle.dumps(tangent)


def test_a_pickle_is_of_another_network_with_the_same_values():
    network, _ = network_of("resnet")
    x = inputs_of("resnet", 2)
    tangent = Tangent(network)
    there = pickle.loads(pickle.dumps(tangent))
    assert torch.equal(there.outputs(x), tangent.outputs(x))
    with torch.no_grad():
        there.network[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="has changed"):
        there.outputs(x)
    tangent.outputs(x)


def test_training_mode_is_noticed_later_too():
    network, _ = network_of("cnn")
    tangent = Tangent(network)
    network.train()
    with pytest.raises(ValueError, match=r"layer '5' \(Dropout\).*network\.eval\(\)"):
        tangent.outputs(inputs_of("cnn", 2))


class Pair(nn.Module):
    """Takes two inputs and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, left, right):
        return {"logits": self.layer(left * right).reshape(-1, 2, 1), "other": left}


@pytest.mark.parametrize("form", ["tuple", "list", "dictionary"])
def test_a_batch_may_have_parts_and_outputs_any_shape(form):
    network = Pair().double().eval()
    left, right = normal(4, 3), normal(4, 3, seed=3)
    x = {
        "tuple": (left, right),
        "list": [left, right],
        "dictionary": {"left": left, "right": right},
    }[form]
    tangent = Tangent(network, output=lambda out: out["logits"])
    batch = tangent.at(x)
    assert batch.outputs.shape == (4, 2)
    w = normal(1, 8).mT
    weight, bias = w[:6, 0].reshape(2, 3), w[6:, 0]
    expected = (left * right) @ weight.mT + bias
    assert torch.allclose(batch.jvp(w)[..., 0], expected)
    assert torch.allclose(batch.jacobian() @ w, expected[..., None])


def test_tied_weights_are_counted_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 3)
            self.head = nn.Linear(3, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x)).sum(1)

    network = Tied().double().eval()
    x = torch.tensor([[0, 1], [2, 3], [3, 3]])
    tangent = Tangent(network)
    assert tangent.num_weights == 21
    w = normal(2, 21).mT
    step = 1e-6

    def moved(size):
        weight = network.embed.weight + size * w[:, 0].reshape(7, 3)
        return (weight[x] @ weight.mT).sum(1)

    slope = (moved(step) - moved(-step)) / (2 * step)
    batch = tangent.at(x)
    assert torch.allclose(batch.jvp(w)[..., 0], slope, atol=1e-8)
    u = normal(3, 7, 1)
    assert torch.allclose((batch.vjp(u) * w).sum(0), (batch.jvp(w) * u).sum((0, 1)))


class Decoder(nn.Module):
    """Layers of image-to-image networks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(1, 3, 2, 2)
        self.norms = nn.Sequential(
            nn.GroupNorm(3, 3), nn.InstanceNorm2d(3, affine=True)
        )
        self.last = nn.Conv2d(3, 1, 3, padding=1, padding_mode="reflect")

    def forward(self, x):
        h = nn.functional.interpolate(self.up(x), scale_factor=2, mode="bilinear")
        return self.last(self.norms(h))


class Tokens(nn.Module):
    """Layers of language models, fused attention among them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(5, 4), nn.Linear(4, 12)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.recurrent = nn.RMSNorm(4), nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        h = self.embed(x)
        heads = [a.unsqueeze(1) for a in self.mix(h).chunk(3, -1)]
        fused = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        h = self.norm(h + fused[:, 0])
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.recurrent(h)[0][:, -1].log_softmax(-1)


@pytest.mark.parametrize(
    ("network", "x"),
    [(Decoder(), normal(2, 1, 2, 2)), (Tokens(), torch.tensor([[0, 3, 1], [2, 2, 4]]))],
    ids=["decoder", "tokens"],
)
def test_other_layers_have_forward_rules(network, x):
    tangent = Tangent(network.double().eval())
    w = normal(2, tangent.num_weights).mT
    batch = tangent.at(x)
    assert torch.allclose(batch.jvp(w), batch.jacobian() @ w, rtol=0, atol=1e-10)
    assert tangent._obstacle is None


class Rounded(torch.autograd.Function):
    """A user's function of the old style: no rule for forward mode or torch.func."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Once(torch.autograd.Function):
    """A function whose gradient has no derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Applies(nn.Module):
    """Calls a function between two linear layers."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)
        self.function = function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


def changes_a_view(h):
    h = h.clone()
    h[:, :2].mul_(3)
    return h


@pytest.mark.parametrize("function", [Rounded.apply, changes_a_view])
def test_functions_without_a_forward_rule_go_through_the_reverse_mode(function):
    network = Applies(function).double().eval()
    x = normal(3, 4)
    tangent = Tangent(network)
    w = normal(2, tangent.num_weights).mT
    batch = tangent.at(x)
    assert torch.allclose(batch.jvp(w), batch.jacobian() @ w, atol=1e-10)
    assert tangent._obstacle is not None


def in_place_and_mixed(h):
    out = torch.zeros_like(h)
    out[:, :3] = torch.topk(h, 3)[0]
    out[:, 3:] = h[:, 3:]
    out *= 2
    out += h
    left, right = out.chunk(2, 1)
    with torch.no_grad():
        gate = (h > 0).double() + h
    joined = torch.cat([nn.functional.silu(left), (right + 0).sigmoid_()], 1)
    return joined * gate + h.detach().exp() * h


def test_assignments_and_constants_have_forward_rules():
    network = Applies(in_place_and_mixed).double().eval()
    x = normal(3, 4)
    tangent = Tangent(network)
    w = normal(2, tangent.num_weights).mT
    batch = tangent.at(x)
    assert torch.allclose(batch.jvp(w), batch.jacobian() @ w, atol=1e-10)
    assert tangent._obstacle is None


def test_a_wrong_forward_derivative_is_noticed(monkeypatch):
    def biases_only(of, func, input, weight, bias=None, *rest):
        return [t[:, None, :, None, None].expand(-1, 3, -1, 1, 1) for t in of(bias)]

    monkeypatch.setitem(RULES, torch.conv2d, biases_only)
    network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten()).double().eval()
    tangent = Tangent(network)
    w = normal(1, tangent.num_weights).mT
    batch = tangent.at(normal(3, 1, 2, 2))
    assert torch.allclose(batch.jvp(w), batch.jacobian() @ w, atol=1e-10)
    assert "differ" in tangent._obstacle


def test_a_layer_that_stands_in_the_way_is_named():
    network = Applies(Once.apply).double().eval()
    tangent = Tangent(network)
    w = normal(1, tangent.num_weights).mT
    with pytest.raises(
        NotImplementedError, match=r"OnceBackward.*layer 'second'.*differ"
    ):
        tangent.at(normal(3, 4)).jvp(w)


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (lambda out: {"logits": out}, TypeError, r"\['logits'\]; pass output="),
        (lambda out: out.sum(), ValueError, r"shape \(examples, \.\.\.\)"),
        (lambda out: out[:2], ValueError, "expected 4 examples"),
        (lambda out: out.float(), TypeError, "float64, found torch.float32"),
        (lambda out: out / 0, ValueError, "outputs: expected finite values"),
    ],
)
def test_unusable_outputs_are_refused(returned, error, words):
    network = nn.Linear(3, 2).double().eval()
    tangent = Tangent(network, output=returned)
    for use in (tangent.outputs, lambda x: tangent.at(x).outputs):
        with pytest.raises(error, match=words):
            use(normal(4, 3))


def test_wrong_shapes_of_vectors_are_refused():
    tangent = Tangent(nn.Linear(3, 2).double().eval())
    batch = tangent.at(normal(4, 3))
    with pytest.raises(ValueError, match="8"):
        batch.jvp(normal(7, 1))
    with pytest.raises(ValueError, match=r"u: expected shape \(4, 2, 'k'\)"):
        batch.vjp(normal(4, 3, 1))


# Networks with weights of their own


class Recurrent(nn.Module):
    """What torch cannot batch over weights."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(2, 2, batch_first=True), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


@pytest.mark.parametrize("is_recurrent", [True, False])
def test_many_networks_say_what_each_says(is_recurrent: bool):
    torch.manual_seed(0)
    kind = Recurrent if is_recurrent else lambda: nn.Sequential(nn.Linear(2, 3))
    network, other, x = (
        kind().double().eval(),
        kind().double().eval(),
        torch.randn(3, 2),
    )
    x = x.double().unsqueeze(1) if is_recurrent else x.double()
    tangent = Tangent(network)
    rows = torch.cat([tangent.theta, Tangent(other).theta], 1).mT
    for _ in range(2):
        outputs = tangent.outputs_of(rows, x)
        torch.testing.assert_close(outputs[0], network(x).detach())
        torch.testing.assert_close(outputs[1], other(x).detach())
    moved = tangent.moved(rows[1])
    assert torch.equal(moved.theta[:, 0], rows[1])
    torch.testing.assert_close(moved.outputs(x), outputs[1])
    assert tangent.moved(rows[0]) is tangent


def test_out_of_memory_is_no_reason_to_go_one_by_one():
    tangent, calls = Tangent(nn.Linear(2, 1).eval()), []

    def full(weights: dict[str, Tensor]) -> Tensor:
        calls.append(weights)
        raise torch.cuda.OutOfMemoryError("full")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        tangent.batched(full, tangent.theta.mT)
    assert len(calls) == 1


def test_errors_of_the_network_are_its_own():
    tangent = Tangent(nn.Linear(2, 1).eval())

    def broken(weights: dict[str, Tensor]) -> Tensor:
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        tangent.batched(broken, tangent.theta.mT)
    x = torch.ones(1, 2)
    assert tangent.outputs_of(tangent.theta.mT, x).shape == (1, 1, 1)
