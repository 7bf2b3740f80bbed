"""Old spellings of arguments work for one version, and say so."""

from __future__ import annotations

import importlib
import inspect

import pytest

import sgdgp
from sgdgp.core import errors
from sgdgp.core.deprecation import renamed, renamed_arguments


@renamed_arguments(every="checkpoint_every", optimiser="optimizer")
def solve(x: int, *, checkpoint_every: int = 60, optimizer: str = "adam") -> tuple:
    """Solve."""
    return x, checkpoint_every, optimizer


def test_new_names_pass_without_a_word(recwarn: pytest.WarningsRecorder):
    assert solve(1, checkpoint_every=5, optimizer="sgd") == (1, 5, "sgd")
    assert not recwarn.list


def test_old_names_pass_with_a_warning_each():
    with pytest.warns(DeprecationWarning, match="every is now called checkpoint_"):
        assert solve(1, every=5) == (1, 5, "adam")
    with pytest.warns(DeprecationWarning, match="is now called") as w:
        assert solve(1, every=5, optimiser="sgd") == (1, 5, "sgd")
    assert len(w) == 2


def test_both_names_at_once_are_refused():
    with pytest.raises(TypeError, match="expected checkpoint_every only"):
        solve(1, every=5, checkpoint_every=5)


def test_the_signature_is_that_of_the_new_names():
    assert list(inspect.signature(solve).parameters)[1] == "checkpoint_every"
    assert solve.__doc__ == "Solve."


def test_a_function_is_found_under_its_old_name():
    old = renamed("solved", solve)
    with pytest.warns(DeprecationWarning, match="solved is now called solve; the old"):
        assert old(1) == (1, 60, "adam")


FORMER_MODULES = {
    "sgdgp.networks.stored_values": "register_stored_class",
    "sgdgp.posterior.checkpoint_file": "CheckpointError",
    "sgdgp.networks.processes": "process_group",
    "sgdgp.networks.weight_priors": "Isotropic",
}


@pytest.mark.parametrize("how", ["import {0}", "from {0} import {1}", "{0}.{1}"])
@pytest.mark.parametrize("name", FORMER_MODULES)
def test_former_modules_are_found_in_every_way_with_a_warning(name, how):
    attribute = FORMER_MODULES[name]
    with pytest.warns(DeprecationWarning, match=f"{name} is now sgdgp"):
        exec(f"import sgdgp; {how.format(name, attribute)}; {name}.{attribute}")
    with pytest.raises(AttributeError):
        exec(f"import sgdgp; {name}.__all__")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_documented_modules_that_are_gone_can_still_be_imported():
    values = importlib.import_module("sgdgp.networks.stored_values")
    assert values.register_stored_class is sgdgp.register_stored_class
    file = importlib.import_module("sgdgp.posterior.checkpoint_file")
    assert file.CheckpointError is errors.CheckpointError
    processes = importlib.import_module("sgdgp.networks.processes")
    assert processes.process_group is sgdgp.networks.process_group
    priors = importlib.import_module("sgdgp.networks.weight_priors")
    assert priors.Isotropic is sgdgp.networks.Isotropic
