import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize

from sgdgp.training.model_state import put_state, state_of
from tests.training.problems import assert_same, data, rbf_model
from tests.training.test_marginal_likelihood import deep


def test_a_state_is_a_copy_of_parameters_and_buffers():
    model = deep(torch.nn.BatchNorm1d(2)).double().train()
    before = state_of(model)
    assert {"network.3.running_mean", "mean_module.raw_constant"} <= before.keys()
    model(model.train_inputs[0])  # moves the running mean
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    after = state_of(model)
    for name in ("network.3.running_mean", "mean_module.raw_constant"):
        assert not torch.equal(before[name], after[name])
    put_state(model, before)
    assert_same(state_of(model), before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_data_of_a_botorch_model_are_not_rounded_by_it(mode):
    x, y = data(40, 2)
    model = SingleTaskGP(
        4.0 + 3.0 * x,
        9.0 + 5.0 * y.unsqueeze(1),
        input_transform=Normalize(2),
        outcome_transform=Standardize(1),
    ).train(mode)
    inputs, targets = model.train_inputs[0].clone(), model.train_targets.clone()
    put_state(model, state_of(model))
    assert torch.equal(model.train_inputs[0], inputs)
    assert torch.equal(model.train_targets, targets)


def test_another_models_state_is_refused():
    state = state_of(rbf_model())
    state["covar_module.other"] = state.pop("covar_module.raw_outputscale")
    with pytest.raises(RuntimeError, match="raw_outputscale"):
        put_state(rbf_model(), state)
