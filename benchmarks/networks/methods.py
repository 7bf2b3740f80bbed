"""The methods of the study by the names of the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import nn

from benchmarks.networks.data import Task
from benchmarks.networks.exact import fit_exact
from benchmarks.networks.laplace_baselines import fit_kfac, fit_last_layer
from benchmarks.networks.ours import fit_ours
from benchmarks.networks.plain import fit_ensemble, fit_network
from benchmarks.networks.prediction import Fitted
from benchmarks.networks.train import MEMBERS, trained

Method: TypeAlias = Callable[[Task, nn.Module, int], Fitted]
"""From a task, its trained network and a number of samples to predictions."""


def _network(task: Task, network: nn.Module, num_samples: int) -> Fitted:
    return fit_network(network, task.calibration)


def _ensemble(task: Task, network: nn.Module, num_samples: int) -> Fitted:
    more = [trained(task, member) for member in range(1, MEMBERS)]
    return fit_ensemble([network, *more])


def _last_layer(task: Task, network: nn.Module, num_samples: int) -> Fitted:
    return fit_last_layer(task, network, num_samples=num_samples, seed=task.seed)


def _kfac(task: Task, network: nn.Module, num_samples: int) -> Fitted:
    return fit_kfac(task, network, num_samples=num_samples, seed=task.seed)


def _ours(task: Task, network: nn.Module, num_samples: int) -> Fitted:
    return fit_ours(task, network, num_samples=num_samples, seed=task.seed)


def _exact(task: Task, network: nn.Module, num_samples: int) -> Fitted:
    return fit_exact(task, network, num_samples=num_samples, seed=task.seed)


METHODS: dict[str, Method] = {
    "network": _network,
    "ensemble": _ensemble,
    "last-layer": _last_layer,
    "kfac": _kfac,
    "sgdgp": _ours,
    "exact": _exact,
}

NEEDS_LAPLACE = ("last-layer", "kfac")


def methods_for(setting: str, wanted: list[str]) -> list[str]:
    """Those of the wanted methods that a setting has; "exact" only fits a perceptron.

    Raises:
        ValueError: A method is unknown.
    """
    for name in wanted:
        if name not in METHODS:
            raise ValueError(
                f"methods: found {name!r}, expected some of {', '.join(METHODS)}"
            )
    return [name for name in wanted if name != "exact" or setting == "mlp"]
