"""ResNet-50: its published names and shapes, pre-trained weights, the measurement."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.networks.resnet import NUM_PARAMETERS, ResNet50, load_weights, resnet50
from benchmarks.networks.resnet50 import in_words, main

# A sample of torchvision's state dict, which has 320 entries of these names.
PUBLISHED = {
    "conv1.weight": (64, 3, 7, 7),
    "bn1.running_var": (64,),
    "layer1.0.conv1.weight": (64, 64, 1, 1),
    "layer1.0.conv2.weight": (64, 64, 3, 3),
    "layer1.0.downsample.0.weight": (256, 64, 1, 1),
    "layer1.0.downsample.1.bias": (256,),
    "layer1.2.bn3.weight": (256,),
    "layer2.0.conv1.weight": (128, 256, 1, 1),
    "layer2.3.conv3.weight": (512, 128, 1, 1),
    "layer3.0.downsample.0.weight": (1024, 512, 1, 1),
    "layer3.5.conv2.weight": (256, 256, 3, 3),
    "layer4.0.conv2.weight": (512, 512, 3, 3),
    "layer4.2.conv3.weight": (2048, 512, 1, 1),
    "layer4.2.bn3.num_batches_tracked": (),
    "fc.weight": (1000, 2048),
    "fc.bias": (1000,),
}


@pytest.fixture(scope="module")
def network() -> ResNet50:
    return resnet50()


def test_it_has_the_published_parameters(network):
    found = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert {name: found.get(name) for name in PUBLISHED} == PUBLISHED
    assert len(found) == 320
    assert len(list(network.parameters())) == 161
    assert sum(p.numel() for p in network.parameters()) == NUM_PARAMETERS
    assert not network.training


def test_a_stage_halves_the_image_in_its_3_by_3_convolution(network):
    block = network.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("wrapped", ["plain", "prefixed", "nested", "safetensors"])
def test_published_weights_are_loaded(wrapped, tmp_path):
    source, target = resnet50(classes=3, seed=1), resnet50(classes=3, seed=2)
    state = {
        name: value
        for name, value in source.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    path = tmp_path / f"weights.{'safetensors' if wrapped == 'safetensors' else 'pth'}"
    if wrapped == "safetensors":
        save_file(state, path)
    elif wrapped == "plain":
        torch.save(state, path)
    else:
        state = {f"module.{name}": value for name, value in state.items()}
        torch.save(state if wrapped == "prefixed" else {"state_dict": state}, path)
    load_weights(target, path)
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name])


def test_weights_that_do_not_fit_are_refused_by_name(network, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"download\.pytorch\.org"):
        load_weights(network, tmp_path / "missing.pth")
    path = tmp_path / "weights.pth"
    state = dict(network.state_dict())
    state["fc.weight"] = torch.zeros(10, 2048)
    state["extra"] = state.pop("conv1.weight")
    torch.save(state, path)
    words = (
        r"missing conv1\.weight; unknown extra; of another shape fc\.weight "
        r"\(10, 2048\) for \(1000, 2048\)"
    )
    with pytest.raises(ValueError, match=words):
        load_weights(network, path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="holds no state dict"):
        load_weights(network, path)
    torch.save(network.fc, path)
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        load_weights(network, path)


def test_a_pass_is_measured_and_stored(tmp_path, capsys):
    out = tmp_path / "resnet50.json"
    threads = torch.get_num_threads()
    try:
        main(
            "--batch 2 --samples 2 --size 32 --classes 5 --repeats 1 "
            f"--out {out}".split()
        )
    finally:
        torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert found["weights"] == NUM_PARAMETERS - 995 * 2049
    assert found["peak_rss_mb"] < 12_000
    seconds = "processor_seconds_per_example"
    ratio = found[f"product_{seconds}"] / found[f"forward_{seconds}"]
    assert found["product_forwards_per_sample"] == pytest.approx(ratio / 2)
    assert in_words(found) in capsys.readouterr().out
