"""Which views to measure next, by what a Gaussian posterior of the image expects.

With a root F (r, d) of the covariance of images, C = F^T F, such as samples, candidate
views A_a (p, d) are seen as G_a = A_a F^T (p, r): all that a criterion needs. A view
that is chosen is taken as measured for the choice of the next: the covariance of images
does not depend on what will be seen, and

    F <- (I + G_b^T G_b / s^2)^(-1/2) F

is a root of the conditional one, which changes G_a at the cost of a product with the
singular vectors of G_b. No matrix of candidates by candidates is formed (Barbano et
al., "Bayesian experimental design for computed tomography with the linearised deep
image prior", 2022, whose views are chosen one by one).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.slices import slices, tile_size

Criterion: TypeAlias = Literal["eig", "diagonal", "variance"]
"""What a view is worth."""

_JITTERS = (1e-12, 1e-9, 1e-6)
"""Added to variances, by their mean; the first that is enough."""


def check_choice(k: Any, num_views: int, criterion: Any) -> None:
    """Refuse what cannot be chosen, before long work.

    Raises:
        TypeError: ``k`` is no number of views.
        ValueError: There are fewer views, or no such criterion.
    """
    check_count("k", k, 1)
    if k > num_views:
        raise ValueError(f"k: expected at most the {num_views} candidates, found {k}")
    if criterion not in get_args(Criterion):
        raise ValueError(
            f"criterion: expected one of {get_args(Criterion)}, found {criterion!r}"
        )


def chosen_views(
    seen: Float[Tensor, "r v p"], noise: float, k: int, criterion: Criterion = "eig"
) -> Int[Tensor, " k"]:
    """The best views one after the other, each given those before it.

    Args:
        seen: The root F of the covariance of images, as every view sees it.
            Overwritten: it ends as that of the covariance when all but the last of the
            views are measured.
        noise: Standard deviation s of the noise.
        k: How many.
        criterion: What a view is worth; the same as ``ImagePosterior.next_views``.

    Returns:
        Numbers of the views, the best one first.
    """
    found: list[int] = []
    flat = seen.flatten(1)
    for _ in range(k):
        each = flat.unflatten(1, seen.shape[1:])
        values = _values(each, noise, criterion)
        values[found] = -torch.inf
        found.append(int(values.argmax()))
        if len(found) < k:
            _measure(flat, each[:, found[-1]], noise)
    return torch.tensor(found, device="cpu")


def _values(
    seen: Float[Tensor, "r v p"], noise: float, criterion: Criterion
) -> Float[Tensor, " v"]:
    """The criterion of every view, in float64."""
    r, count, p = seen.shape
    side = min(r, p)
    parts = []
    for some in slices(count, max(1, tile_size(seen.device) // max(r * p, side**2))):
        view = seen[:, some].transpose(0, 1).double() / noise
        if criterion != "eig":
            ratio = view.square().sum(1)  # of variances to the noise's
            if criterion == "diagonal":
                ratio = 0.5 * ratio.log1p()
            parts.append(ratio.sum(1))
            continue
        gram = view @ view.mT if r == side else view.mT @ view
        gram.diagonal(dim1=1, dim2=2).add_(1.0)
        root = torch.linalg.cholesky(gram)
        parts.append(root.diagonal(dim1=1, dim2=2).log().sum(1))
    return torch.cat(parts)


def _measure(
    seen: Float[Tensor, "r m"], view: Float[Tensor, "r p"], noise: float
) -> None:
    """Take one view as measured: make F, as it is seen, a root of what is left."""
    # (I + G^T G / s^2)^(-1/2) = I - U (I - (I + S^2 / s^2)^(-1/2)) U^T, G^T = U S V^T.
    u, size, _ = torch.linalg.svd(view, full_matrices=False)
    scaled = u * (1 - noise / torch.hypot(size, size.new_tensor(noise)))
    for some in slices(seen.shape[1], max(1, tile_size(seen.device) // len(seen))):
        seen[:, some] -= scaled @ (u.mT @ seen[:, some])


def root_of(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """F with F^T F = C, up to rounding."""
    size = covariance.diagonal().mean()
    for jitter in _JITTERS:
        shifted = covariance.clone()
        shifted.diagonal().add_(jitter * size)
        root, info = torch.linalg.cholesky_ex(shifted)
        if not int(info):
            return root.mT
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp_min(0.0).sqrt()[:, None] * vectors.mT
