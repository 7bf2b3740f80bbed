"""What holds for every prior that is estimated from probes of the curvature."""

from __future__ import annotations

import math

import pytest
import torch

from sgdgp.networks import GPrior, Isotropic, Kronecker
from sgdgp.networks.priors import base
from tests.networks.priors.family import (
    PROBED,
    Curvature,
    dense_root,
)


@pytest.mark.parametrize("setting", PROBED, ids=str)
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
        c.rows[0] @ dense_root(setting.build(tangent, c.probes))
        for c in (curvature, scaled)
    ]
    torch.testing.assert_close(features[0], features[1], rtol=1e-9, atol=1e-9)
    isotropic = [
        c.rows[0] @ dense_root(Isotropic().build(tangent, c.probes))
        for c in (curvature, scaled)
    ]
    assert not torch.allclose(isotropic[0], isotropic[1], rtol=0.1)


@pytest.mark.parametrize("setting", PROBED, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-15])
def test_a_tensor_that_does_not_act_keeps_a_moderate_variance(setting, size, tangent):
    curvature = Curvature.random(tangent.num_weights)
    s = tangent.slices["kernel.weight"]
    curvature.rows[..., s] *= size
    root = dense_root(setting.build(tangent, curvature.probes))
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


def test_probes_of_a_large_network_are_fewer(monkeypatch, tangent):

    monkeypatch.setattr(base, "PROBE_MEMORY", 3 * 8 * tangent.num_weights)
    curvature = Curvature.random(tangent.num_weights)
    GPrior().build(tangent, curvature.probes)
    assert curvature.asked == [3]
