"""The settings of the study: which images, how many, which network, how trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with momentum, one cycle of the learning rate.

    Attributes:
        epochs: Passes over the training images.
        batch: Images of a step.
        learning_rate: Its peak.
        weight_decay: Of all weights.
        shift: Pixels by which a batch is moved at most; with any, images are mirrored
            at random too.
    """

    epochs: int
    batch: int = 100
    learning_rate: float = 0.2
    weight_decay: float = 5e-4
    shift: int = 0


@dataclass(frozen=True)
class Setting:
    """One block of rows of the table.

    Attributes:
        name: What the command line calls it.
        title: What the table calls it.
        source: File of images, "mnist_10k" or "cifar10_part".
        train: Training images.
        calibration: Calibration images.
        test: Test images; of cifar10_part, those of its own test set.
        recipe: How the network is trained.
        network: "resnet" or "mlp".
        stem: Kernel size and stride of the residual network's first layer.
        widths: Channels of its blocks, or hidden units of the perceptron.
        strides: Strides of its blocks.
        wrong_labels: Fraction of all labels replaced by another class.
        pool: Side of the squares of pixels that are averaged first.
        prior: Of sgdgp's weights, "g" or "isotropic".
    """

    name: str
    title: str
    source: str
    train: int
    calibration: int
    test: int
    recipe: Recipe
    network: str = "resnet"
    stem: tuple[int, int] = (5, 2)
    widths: tuple[int, ...] = (8, 16, 24)
    strides: tuple[int, ...] = (2, 1, 2)
    wrong_labels: float = 0.0
    pool: int = 1
    prior: str = "g"


def _digits(
    name: str, title: str, train: int, epochs: int, wrong_labels: float = 0.0
) -> Setting:
    batch = 50 if train > 1000 else 25
    recipe = Recipe(epochs, batch, learning_rate=0.1, weight_decay=1e-4)
    return Setting(
        name,
        title,
        "mnist_10k",
        train,
        1000,
        2000,
        recipe,
        wrong_labels=wrong_labels,
    )


SETTINGS = {
    setting.name: setting
    for setting in (
        _digits("mnist", "MNIST, 7,000 images", 7000, 20),
        _digits("noise", "MNIST, 20 % wrong labels", 7000, 20, wrong_labels=0.2),
        _digits("small", "MNIST, 500 images", 500, 30),
        Setting(
            "cifar",
            "CIFAR-10, 4,085 images",
            "cifar10_part",
            4085,
            1000,
            1017,
            Recipe(epochs=24, batch=50, learning_rate=0.1, shift=3),
            stem=(3, 2),
            widths=(16, 32),
            strides=(2, 2),
        ),
        Setting(
            "mlp",
            "MNIST at 7 x 7 pixels, 500 images, perceptron",
            "mnist_10k",
            500,
            1000,
            2000,
            Recipe(epochs=60, batch=25, learning_rate=0.05),
            network="mlp",
            widths=(32,),
            pool=4,
            prior="isotropic",
        ),
    )
}
