"""Views are chosen as by dense covariances, each given those before it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sgdgp.networks import GPrior, Isotropic
from sgdgp.tomography import (
    ImagePosterior,
    Measurement,
    ParallelBeam,
    UNet,
    linearise,
    reconstruct,
)
from sgdgp.tomography.design import Criterion, chosen_views, root_of

CRITERIA: tuple[Criterion, ...] = ("eig", "diagonal", "variance")
SIZE = 6
SIGMA = 0.05


def given(covariance: Tensor, view: Tensor, noise: float) -> Tensor:
    """C of images when a view (p, d) is measured."""
    cross = view @ covariance
    data = cross @ view.mT + noise**2 * torch.eye(len(view)).double()
    return covariance - cross.mT @ torch.linalg.solve(data, cross)


def worth(
    covariance: Tensor, views: Tensor, noise: float, criterion: Criterion
) -> Tensor:
    """The criterion of views (v, p, d), from matrices."""
    ratio = views @ covariance @ views.mT / noise**2
    if criterion == "eig":
        return torch.logdet(ratio + torch.eye(len(ratio[0])).double()) / 2
    each = ratio.diagonal(dim1=1, dim2=2)
    return (each.log1p() / 2 if criterion == "diagonal" else noise**2 * each).sum(1)


def by_hand(
    covariance: Tensor, views: Tensor, noise: float, k: int, criterion: Criterion
) -> list[int]:
    """The greedy choice."""
    found: list[int] = []
    for _ in range(k):
        values = worth(covariance, views, noise, criterion)
        values[found] = -torch.inf
        found.append(int(values.argmax()))
        covariance = given(covariance, views[found[-1]], noise)
    return found


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("rank", "size"), [(20, 4), (3, 4), (20, 1)])
def test_choices_are_those_of_dense_covariances(criterion, rank, size) -> None:
    generator = torch.Generator().manual_seed(rank + size)
    root = torch.randn(rank, 20, generator=generator).double()
    root *= torch.linspace(0.1, 2, 20)
    views = torch.randn(9, size, 20, generator=generator).double()
    covariance = root.mT @ root
    expected = by_hand(covariance, views, 0.3, 4, criterion)
    seen = torch.einsum("rd,vpd->rvp", root, views)
    assert chosen_views(seen, 0.3, 4, criterion).tolist() == expected
    for view in expected[:3]:
        covariance = given(covariance, views[view], 0.3)
    flat = views.flatten(0, 1)
    left = seen.flatten(1).mT @ seen.flatten(1)
    torch.testing.assert_close(left, flat @ covariance @ flat.mT)


def test_the_root_of_a_singular_covariance() -> None:
    half = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    for covariance in (half @ half.mT, torch.zeros(5, 5).double()):
        root = root_of(covariance)
        torch.testing.assert_close(root.mT @ root, covariance, rtol=1e-8, atol=1e-10)


@pytest.fixture(scope="module")
def network() -> UNet:
    torch.manual_seed(0)
    return UNet(channels=(4, 4), skips=(0, 2)).double().eval()


@pytest.fixture(scope="module")
def z() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)


def fitted(network: UNet, z: Tensor, angles: list[float], **kinds) -> ImagePosterior:
    geometry = ParallelBeam(SIZE, angles, dtype=torch.float64)
    data = geometry.simulate(network(z)[0, 0].detach())
    model = linearise(network, z, geometry, data, Isotropic(), noise=SIGMA)
    return model.fit(steps=0, precision=0.1, **kinds)


@pytest.fixture(scope="module")
def posterior(network, z) -> ImagePosterior:
    return fitted(network, z, [0.0, 70.0])


CANDIDATES = [20.0, 45.0, 0.0, 70.0, 95.0, 120.0, 160.0]


def test_the_second_angle_is_chosen_as_if_the_first_were_measured(
    posterior, network, z
) -> None:
    first, second = posterior.next_angles(CANDIDATES, 2).tolist()
    assert not {first, second} & {0.0, 70.0}  # those are measured
    later = fitted(network, z, [0.0, 70.0, first])
    others = [angle for angle in CANDIDATES if angle != first]
    assert later.next_angles(others, 1).tolist() == [second]
    geometry = posterior.measurement.at(CANDIDATES)
    assert posterior.next_angles(geometry, 2).tolist() == [first, second]


def test_next_angles_are_equidistant_ones_by_default(posterior) -> None:
    found = posterior.next_angles()
    assert len(set(found.tolist())) == 5
    assert all(angle % 1 == 0 and 0 <= angle < 180 for angle in found.tolist())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_rows_of_a_matrix_are_views_of_one_number(posterior, criterion) -> None:
    """Sensors: the pixels themselves, and pairs of them as views."""
    pixels = torch.eye(SIZE**2, dtype=torch.float64)
    expected = by_hand(posterior.covariance(), pixels[:, None], SIGMA, 4, criterion)
    assert posterior.next_views(pixels, 4, criterion).tolist() == expected
    pairs = Measurement.of(pixels, view_shape=(2, 1))
    views = pixels.reshape(-1, 2, SIZE**2)
    expected = by_hand(posterior.covariance(), views, SIGMA, 3, criterion)
    assert posterior.next_views(pairs, 3, criterion).tolist() == expected


def test_many_samples_choose_as_the_covariance_does(network, z, posterior) -> None:
    sampled = fitted(network, z, [0.0, 70.0], exact=False, final_samples=256)
    every = posterior.measurement.at(CANDIDATES)
    rows = every(torch.eye(SIZE**2).double().reshape(-1, SIZE, SIZE))
    views = rows.permute(1, 2, 0)
    for criterion in CRITERIA:
        values = worth(posterior.covariance(), views, SIGMA, criterion)
        found = int(sampled.next_views(every, 1, criterion))
        assert float(values[found]) > 0.8 * float(values.max())


def test_few_samples_are_said_to_tell_little(network, z) -> None:
    sampled = fitted(network, z, [0.0, 70.0], exact=False, final_samples=8)
    with pytest.warns(UserWarning, match="8 samples .* 18 numbers .*final_samples=72"):
        assert len(sampled.next_angles(CANDIDATES, 2)) == 2


def test_what_cannot_be_chosen_is_refused(posterior) -> None:
    with pytest.raises(ValueError, match=r"k: expected at most the 7 .* found 8"):
        posterior.next_angles(CANDIDATES, 8)
    with pytest.raises(ValueError, match=r"criterion: .*'eig'.* found 'best'"):
        posterior.next_angles(CANDIDATES, 2, "best")
    with pytest.raises(ValueError, match=r"candidates: .*\(6, 6\), found \(5, 5\)"):
        posterior.next_angles(ParallelBeam(5, 4))
    plain = ImagePosterior(posterior.weights, Measurement.of(torch.eye(SIZE**2)), True)
    with pytest.raises(TypeError, match="next_views takes any"):
        plain.next_angles()


def test_a_user_goes_on_with_what_was_fitted(network, z) -> None:
    """Angles are added, and network, prior and noise are fitted on."""
    geometry = ParallelBeam(SIZE, [0.0, 70.0])
    truth = network(z)[0, 0].detach().float()
    data = geometry.simulate(truth)
    options = {"early_stopping": False, "progress": False}
    prior = GPrior(probes=256)
    kinds = {"steps": 0, "final_samples": 2, "progress": False}
    dip = reconstruct(
        data, geometry, copy.deepcopy(network).float(), iterations=10, **options
    )
    posterior = dip.linearise(prior, noise=SIGMA).fit(precision=10.0, **kinds)
    angles = posterior.next_angles(k=2)
    more = geometry.at(torch.cat([geometry.angles, angles]))
    data = torch.cat([data, geometry.at(angles).simulate(truth, seed=1)])
    later = reconstruct(
        data, more, dip.network, input=dip.input, iterations=10, **options
    )
    precision = float(posterior.weights.precisions[0])
    again = later.linearise(prior, noise=posterior.noise).fit(
        precision=precision, **kinds
    )
    assert again.next_angles(k=1)[0] not in angles
