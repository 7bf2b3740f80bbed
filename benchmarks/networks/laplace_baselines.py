"""Laplace approximations of laplace-torch: of the last layer, and KFAC of all weights.

laplace-torch fits the curvature and the marginal likelihood. Its predictions are
formed here in the eigenbasis of its curvature, since it would compute Jacobians anew
for each prior precision, and each example's through the whole batch.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from benchmarks.networks.data import Task
from benchmarks.networks.eigenbasis import Eigenbasis, EigenPredictor, at_edge
from benchmarks.networks.prediction import Fitted

INSTALL = (
    "pip install --no-deps laplace-torch==0.3 asdfghjkl==0.1a4 "
    "backpack-for-pytorch==1.7.1 curvlinops-for-pytorch==3.0.1 einconv==0.1.0 "
    "einops==0.8.2 lightning-utilities==0.15.3 opt_einsum==3.4.0 torchmetrics==1.9.0 "
    "unfoldNd==0.2.3"
)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class MissingLaplaceError(ImportError):
    """laplace-torch is not installed."""


def import_laplace() -> ModuleType:
    """The package laplace-torch.

    Raises:
        MissingLaplaceError: It is not installed.
    """
    try:
        import laplace
    except ImportError as error:
        raise MissingLaplaceError(
            f"the Laplace baselines need laplace-torch ({error}): {INSTALL}"
        ) from error
    module: ModuleType = laplace
    return module


def fit_last_layer(
    task: Task, network: nn.Module, *, num_samples: int, seed: int
) -> Fitted:
    """Full covariance of the last layer."""
    with _quietly():
        fitted = import_laplace().Laplace(
            copy.deepcopy(network),
            "classification",
            subset_of_weights="last_layer",
            hessian_structure="full",
        )
        fitted.fit(task.train.loader())
        _maximise_evidence(fitted)
    eigenvalues, vectors = torch.linalg.eigh(fitted.H.double())
    vectors = vectors.float()

    def rotated(x: Tensor) -> tuple[Tensor, Tensor]:
        jacobian, f = fitted.backend.last_layer_jacobians(x)
        return f, jacobian @ vectors

    posterior = Eigenbasis(rotated, eigenvalues.clamp_min(0.0).float())
    return _fitted("last layer", posterior, fitted, task, num_samples, seed)


def fit_kfac(task: Task, network: nn.Module, *, num_samples: int, seed: int) -> Fitted:
    """Kronecker factors of all weights but those of normalisation layers.

    laplace-torch has no factors for normalisation layers.
    """
    network = without_norms(network)
    with _quietly():
        fitted = import_laplace().Laplace(
            network,
            "classification",
            subset_of_weights="all",
            hessian_structure="kron",
        )
        fitted.fit(task.train.loader())
        _maximise_evidence(fitted)
    jacobian_of = example_jacobians(network)
    values, factors = fitted.H.eigenvalues, fitted.H.eigenvectors

    def rotated(x: Tensor) -> tuple[Tensor, Tensor]:
        f, jacobian = jacobian_of(x)
        return f, rotate_blocks(jacobian, factors)

    flat = [v[0] if len(v) == 1 else torch.outer(*v).flatten() for v in values]
    posterior = Eigenbasis(rotated, torch.cat(flat).clamp_min(0.0))
    return _fitted("KFAC", posterior, fitted, task, num_samples, seed)


def _maximise_evidence(fitted: Any) -> None:
    fitted.optimize_prior_precision(
        pred_type="glm", method="marglik", prior_structure="scalar"
    )


def _fitted(
    name: str,
    posterior: Eigenbasis,
    laplace: Any,
    task: Task,
    num_samples: int,
    seed: int,
) -> Fitted:
    evidence = float(laplace.prior_precision)
    chosen = posterior.calibrated_precision(task.calibration)
    precisions = {f"{name}, evidence": evidence, f"{name}, calibrated": chosen}
    about: dict[str, dict[str, Any]] = {
        variant: {"precision": value, "weights": len(posterior.eigenvalues)}
        for variant, value in precisions.items()
    }
    about[f"{name}, calibrated"]["edge"] = at_edge(chosen)
    predictor = EigenPredictor(posterior, precisions, num_samples, seed)
    return Fitted(predictor, about, batch=50)


def without_norms(network: nn.Module) -> nn.Module:
    """A copy whose normalisation layers ask for no gradient."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, _NORMS):
            module.requires_grad_(False)
    return network


def example_jacobians(
    network: nn.Module,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Outputs (b, C) and Jacobians (b, C, P) in the weights that ask for gradients."""
    held = {n: p.detach() for n, p in network.named_parameters()}
    buffers = dict(network.named_buffers())
    names = [n for n, p in network.named_parameters() if p.requires_grad]
    weights = {n: held.pop(n) for n in names}

    def one(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        values = {**held, **buffers, **weights}
        f = functional_call(network, values, (x.unsqueeze(0),)).squeeze(0)
        return f, f

    each = vmap(jacrev(one, has_aux=True), in_dims=(None, 0))

    def jacobians(x: Tensor) -> tuple[Tensor, Tensor]:
        parts, f = each(weights, x)
        return f.detach(), torch.cat([parts[n].flatten(2) for n in names], dim=2)

    return jacobians


def rotate_blocks(
    jacobian: Float[Tensor, "b C P"], factors: list[list[Tensor]]
) -> Float[Tensor, "b C P"]:
    """J Q with Q block diagonal, each block a matrix or the product of two."""
    sizes = [torch.tensor([len(q) for q in block]).prod().item() for block in factors]
    parts = []
    for part, block in zip(
        jacobian.split([int(size) for size in sizes], dim=2), factors, strict=True
    ):
        if len(block) == 1:
            parts.append(part @ block[0])
            continue
        left, right = block
        matrix = part.unflatten(2, (len(left), len(right)))
        parts.append((left.mT @ (matrix @ right)).flatten(2))
    return torch.cat(parts, dim=2)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without laplace-torch's general advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
