"""A hundred fits in one process."""

import gc
from pathlib import Path

import pytest
import torch

import sgdgp
from sgdgp.training import PathwiseProbes, fit
from tests.training.problems import rbf_model

SOLVES = {"probes": PathwiseProbes(4, num_features=32), "solver": "cg"}


def fit_number(i):
    model = rbf_model(100)
    fit(model, steps=1, **(SOLVES if i % 2 else {}))
    if i % 8 == 0:
        posterior = sgdgp.condition(model, num_samples=2, num_features=32)
        posterior.mean(model.train_inputs[0][:3])


def live_tensors():
    # By type: some modules warn when they are asked for their class.
    return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]


def count_of_live_tensors():
    gc.collect()
    return len(live_tensors())


def resident_bytes():
    """From the kernel; 4 KiB pages."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def test_a_hundred_fits_do_not_grow_the_process():
    for i in range(20):
        fit_number(i)
    tensors, resident = count_of_live_tensors(), resident_bytes()
    for i in range(20, 100):
        fit_number(i)
    assert count_of_live_tensors() <= tensors
    # One matrix of each fit, kept, would be 6.4 MB.
    assert resident_bytes() - resident < 4e6


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("settings", [{}, SOLVES], ids=["exact", "solves"])
def test_nothing_as_long_as_the_data_waits_for_the_garbage_collector(settings, steps):
    model = rbf_model(150)
    gc.collect()
    gc.disable()
    try:
        before = {id(tensor) for tensor in live_tensors()}
        fit(model, steps=steps, **settings)
        left = [tensor for tensor in live_tensors() if id(tensor) not in before]
    finally:
        gc.enable()
    assert all(tensor.untyped_storage().nbytes() < 150 * 8 for tensor in left)
