"""The example scripts run, on few and small images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from examples.image_folder import DEVIATION, MEAN, ImageFolder
from examples.imagenet import main
from sgdgp.networks import load


@pytest.fixture
def folder(tmp_path):
    """Two classes of striped images in different shapes."""
    for part, count in (("train", 3), ("val", 4)):
        for label, name in enumerate(("ape", "bee")):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.zeros((40 + 8 * i, 60, 3), dtype=np.uint8)
                pixels[..., label] = 51 * (i + 1)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path


def test_images_are_cut_to_size_and_normalised(folder):
    data = ImageFolder(folder / "train", size=32)
    assert (len(data), data.classes) == (6, ["ape", "bee"])
    image, label = data[4]
    assert image.shape == (3, 32, 32)
    assert int(label) == 1
    # The second image of the second class is green of 102 / 255.
    colour = torch.tensor([0.0, 0.4, 0.0])
    expected = (colour - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    torch.testing.assert_close(image.mean((1, 2)), expected, atol=1e-5, rtol=1e-5)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImageFolder(tmp_path / "missing")
    (tmp_path / "ape").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        ImageFolder(tmp_path)
    (tmp_path / "ape" / "1.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read image .*1\.png"):
        ImageFolder(tmp_path)[0]


QUICK = (
    "--classes 4 --size 32 --batch 8 --samples 2 --final-samples 3 "
    "--uncertain fc.* --precision 1e5 --steps "
)


def test_imagenet_runs_on_random_images(tmp_path, capsys):
    path = tmp_path / "posterior.safetensors"
    posterior = main(f"--random 8 --save {path} {QUICK} 1".split())
    said = capsys.readouterr().out
    assert "8 training, 8 calibration and 8 test images; 1 processes" in said
    assert "Recommended" in said
    assert said.splitlines()[-1].startswith("posterior")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert posterior.predict(x).shape == (2, 4)
    same = load(path, posterior.tangent.network)
    assert torch.equal(same.predict(x), posterior.predict(x))


def test_imagenet_runs_on_a_folder_with_trained_weights(folder, tmp_path, capsys):
    from benchmarks.networks.resnet import resnet50

    weights = tmp_path / "weights.pth"
    torch.save(resnet50(classes=4).state_dict(), weights)
    main(f"{folder} --weights {weights} --limit 5 {QUICK} 0".split())
    said = capsys.readouterr().out
    assert "5 training, 4 calibration and 4 test images" in said
    assert "precision [100000.0], effective dimension not learned of 8196" in said


@pytest.mark.filterwarnings("ignore:Learning has not settled")
def test_what_imagenet_taught_is_a_prior_in_a_file(tmp_path, capsys):
    path = tmp_path / "prior.safetensors"
    prior = main(f"--random 8 --learn {path} {QUICK} 0".split())
    assert "LearnedPrior(8196 weights in 2 tensors, from 8 examples)" in (
        capsys.readouterr().out
    )
    posterior = main(f"--random 8 --prior {path} {QUICK} 1".split())
    torch.testing.assert_close(posterior.settings.mean, prior.mean)


def test_imagenet_says_what_is_missing(folder):
    with pytest.raises(SystemExit, match="give the folder"):
        main([])
    with pytest.raises(SystemExit, match="give --weights"):
        main([str(folder)])
