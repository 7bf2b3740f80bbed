"""The U-Net: its form, its derivatives in every mode, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vmap

from sgdgp.core.codec import decode, encode
from sgdgp.tangent import Tangent
from sgdgp.tomography.unet import UNet

SMALL = {"channels": (4, 6, 4), "skips": (0, 2, 2)}
CASES = [
    ({}, (7, 10)),
    ({"norm": 2, "sigmoid": False}, (8, 5)),
    ({"dimensions": 3, "channels": (2, 2), "skips": (0, 2)}, (3, 5, 4)),
    ({"dimensions": 3, "norm": 1, "channels": (2, 2), "skips": (0, 0)}, (4, 3, 5)),
]


def network(**settings: object) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(**{**SMALL, **settings}).double().eval()


def an_input(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 1, *size, generator=generator, dtype=torch.float64)


def test_the_default_is_the_published_network():
    found = UNet()
    assert sum(p.numel() for p in found.parameters()) == 76_905
    blocks = {name for name, p in found.named_children()}
    assert blocks == {"down", "skip", "up", "out"}
    assert [*found.skip] == [*found.up] == ["1", "2"]
    assert len(found.down) == 3


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (13, 13), (16, 9)])
def test_images_of_any_size_keep_it(size: tuple[int, int]):
    found = network(in_channels=2, out_channels=3)
    image = an_input(*size).expand(4, 2, *size)
    assert found(image).shape == (4, 3, *size)


def test_scales_halve_the_size_and_skips_pass_them_by():
    found = network()
    seen = {}
    for name, module in found.named_modules():
        module.register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out.shape[1:]})
        )
    found(an_input(11, 8))
    assert [seen[f"down.{s}"] for s in range(3)] == [(4, 11, 8), (6, 6, 4), (4, 3, 2)]
    assert [seen[f"skip.{s}"] for s in (1, 2)] == [(2, 11, 8), (2, 6, 4)]
    assert [seen[f"up.{s}"] for s in (1, 2)] == [(4, 11, 8), (6, 6, 4)]


@pytest.mark.parametrize(("settings", "size"), CASES)
def test_the_tangent_model_has_its_jacobian(settings: dict, size: tuple[int, ...]):
    found, z = network(**settings), an_input(*size)
    weights = {n: p.detach() for n, p in found.named_parameters()}

    def image(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(found, weights, z).flatten()

    blocks = jacrev(image)(weights)
    dense = torch.cat([blocks[n].flatten(1) for n in weights], 1)
    batch = Tangent(found).at(z)
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(dense.shape[1], 3, generator=generator, dtype=dense.dtype)
    u = torch.randn(1, len(dense), 2, generator=generator, dtype=dense.dtype)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(batch.jacobian()[0], dense, **close)
    torch.testing.assert_close(batch.jvp(w)[0], dense @ w, **close)
    torch.testing.assert_close(batch.vjp(u), dense.mT @ u[0], **close)


def test_forward_mode_in_vmap_and_reverse_mode_twice():
    found, z = network(), an_input(5, 6)
    weights = {n: p.detach() for n, p in found.named_parameters()}

    def image(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(found, weights, z)

    directions = {n: torch.stack([w.sin(), w.cos()]) for n, w in weights.items()}
    pushed = vmap(lambda d: jvp(image, (weights,), (d,))[1])(directions)
    # Reverse mode twice is forward mode: d/du <J^T u, d> = J d.
    live = {n: w.clone().requires_grad_() for n, w in weights.items()}
    u = torch.ones_like(z, requires_grad=True)
    pulled = torch.autograd.grad(image(live), list(live.values()), u, create_graph=True)
    for i in range(2):
        inner = sum(
            (g * d[i]).sum() for g, d in zip(pulled, directions.values(), strict=True)
        )
        (twice,) = torch.autograd.grad(inner, u, retain_graph=True)
        torch.testing.assert_close(pushed[i], twice)


def test_limits_are_those_of_the_sigmoid_or_the_images_of_0_and_1():
    z = 40 * an_input(6, 6)
    inside, scaled = network(), network(limits=(-2.0, 6.0))
    torch.testing.assert_close(scaled(z), 8 * inside(z) - 2)
    free, scaled = network(sigmoid=False), network(sigmoid=False, limits=(-2.0, 6.0))
    torch.testing.assert_close(scaled(z), 8 * free(z) - 2)
    torch.testing.assert_close(inside(z), free(z).sigmoid())


def test_dropout_is_for_training():
    found, z = network(dropout=0.3), an_input(6, 6)
    assert torch.equal(found(z), network()(z))
    found.train()
    assert not torch.equal(found(z), found(z))


def test_a_stored_network_is_the_same():
    before = torch.get_rng_state()
    found, tensors = network(norm=2, limits=(0.0, 3.0)), {}
    again = decode(encode(found, "n", tensors), tensors, torch.device("cpu"))
    z = an_input(9, 4)
    assert torch.equal(again(z), found(z))
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dimensions": 1}, "dimensions: expected 2 or 3, found 1"),
        ({"channels": ()}, "skips: expected a number for each scale"),
        ({"skips": (0, 1)}, r"skips: .* found \(0, 1\) beside \(4, 6, 4\)"),
        ({"skips": (1, 1, 1)}, "skips: expected 0 first"),
        ({"channels": (4, 0, 4)}, "channels: expected at least 1, found 0"),
        ({"norm": 4}, "norm: 4 groups do not divide 6 channels"),
        ({"dropout": 1.0}, "dropout: expected a probability below 1, found 1.0"),
        ({"limits": (1.0, 0.0)}, "limits: expected two finite numbers"),
        ({"limits": (0.0, math.nan)}, "limits: expected two finite numbers"),
        ({"in_channels": 0}, "in_channels: expected at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, words: str):
    with pytest.raises(ValueError, match=words):
        network(**settings)


@pytest.mark.parametrize("name", ["channels", "skips", "limits"])
def test_one_number_is_no_sequence(name: str):
    with pytest.raises(TypeError, match=f"{name}: expected a sequence, found 32"):
        network(**{name: 32})


def test_images_of_other_channels_or_dimensions_are_refused():
    for wrong in (an_input(4, 4, 4), an_input(4, 4).expand(1, 2, 4, 4)):
        with pytest.raises(ValueError, match=r"expected images \(b, 1, n, n\)"):
            network()(wrong)
