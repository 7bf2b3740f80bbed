"""How sure a pre-trained ResNet-50 is on ImageNet: posterior, calibration, scores.

From the root of the repository, with folders train/<class>/ and val/<class>/ of images
and torchvision's pre-trained weights:

    python -m examples.imagenet /data/imagenet --weights resnet50-0676ba61.pth
    torchrun --nproc-per-node 8 -m examples.imagenet /data/imagenet --weights ...

Half of the validation images calibrates, the other half scores. To see it run without
ImageNet or weights: ``python -m examples.imagenet --random 24 --size 64``.

``--learn FILE`` keeps what the network knows from the training images, its weights and
the curvature of its loss in them, as the prior of other tasks, which ``--prior FILE``
starts from.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import sgdgp
from benchmarks.networks.resnet import resnet50, torchvision_resnet50
from examples.image_folder import ImageFolder
from sgdgp.core.processes import Processes, local_device, process_group
from sgdgp.metrics import accuracy, expected_calibration_error, negative_log_likelihood
from sgdgp.networks import (
    Categorical,
    GPrior,
    LearnedPrior,
    LinearisedPosterior,
    WeightSGD,
)


def main(
    arguments: Sequence[str] | None = None,
) -> LinearisedPosterior | LearnedPrior:
    """The command line: a posterior, or with ``--learn`` a prior."""
    options = _parser().parse_args(arguments)
    with process_group() as processes:
        return run(options, processes)


def run(
    options: argparse.Namespace, processes: Processes
) -> LinearisedPosterior | LearnedPrior:
    """Fit, save, calibrate and score, or learn a prior; process 0 speaks."""

    def say(text: object) -> None:
        if processes.rank == 0:
            print(text, flush=True)

    train, calibration, test = _data(options)
    device = local_device()
    network = _network(options).to(device)
    say(
        f"{len(train)} training, {len(calibration)} calibration and {len(test)} test "
        f"images; {processes.size} processes, {device}"
    )
    weights = options.uncertain or None
    prior: GPrior | LearnedPrior = GPrior(probes=options.probes)
    if options.learn is not None:
        prior = LearnedPrior.from_data(
            network, Categorical(), _loader(train, options), weights=weights
        )
        if processes.rank == 0:
            prior.save(options.learn)
            megabytes = options.learn.stat().st_size / 1e6
            say(f"{prior}: {megabytes:.0f} MB in {options.learn}")
        return prior
    if options.prior is not None:
        prior = LearnedPrior.load(options.prior)
    posterior = sgdgp.networks.linearise(
        network, Categorical(), prior, weights=weights
    ).fit(
        _loader(train, options),
        num_samples=options.samples,
        final_samples=options.final_samples,
        steps=options.steps,
        precision=options.precision,
        solver=WeightSGD(max_passes=options.passes) if options.sgd else "auto",
        seed=options.seed,
        checkpoint=options.checkpoint,
        progress=None if processes.rank == 0 else False,
    )
    dimension = posterior.effective_dimension
    say(
        f"precision {posterior.precisions.tolist()}, effective dimension "
        f"{'not learned' if dimension is None else f'{dimension:.1f}'} of "
        f"{posterior.tangent.num_weights} weights, {posterior.passes:.0f} passes in "
        f"{posterior.seconds:.0f} s"
    )
    for warning in posterior.warnings:
        say(f"Warning: {warning}")
    comparison = posterior.calibrate(_loader(calibration, options))
    say(comparison)
    if options.save is not None and processes.rank == 0:
        posterior.save(options.save)
    for name, scores in score(posterior, test, options, processes).items():
        say(f"{name:10}" + "".join(f"  {k} {v:.4f}" for k, v in scores.items()))
    return posterior


def score(
    posterior: LinearisedPosterior,
    test: Dataset,
    options: argparse.Namespace,
    processes: Processes,
) -> dict[str, dict[str, float]]:
    """Scores of network and posterior; every process predicts its share."""
    length = len(test)  # type: ignore[arg-type]
    mine = processes.share(length)
    tables: dict[str, Tensor] = {}
    targets = torch.zeros(length, dtype=torch.long, device=posterior.tangent.device)
    at = mine.start
    for images, y in _loader(Subset(test, mine), options):
        x = images.to(posterior.tangent.device)
        found = {
            "network": posterior.network_outputs(x).softmax(1),
            "posterior": posterior.predict(x),
        }
        rows = slice(at, at + len(y))
        for name, probabilities in found.items():
            table = tables.setdefault(
                name, probabilities.new_zeros(length, probabilities.shape[1])
            )
            table[rows] = probabilities
        targets[rows] = y.to(targets)
        at += len(y)
    # What a process has not predicted is zero: the sum is everybody's.
    processes.sum_(targets)
    processes.sum_(*tables.values())
    return {
        name: {
            "nll": negative_log_likelihood(table, targets),
            "accuracy": accuracy(table, targets),
            "ece": expected_calibration_error(table, targets),
        }
        for name, table in tables.items()
    }


def _data(options: argparse.Namespace) -> tuple[Dataset, Dataset, Dataset]:
    """Training, calibration and test images."""
    if options.random is not None:
        return tuple(_noise(options, seed) for seed in range(3))  # type: ignore[return-value]
    if options.folder is None:
        raise SystemExit("give the folder that holds train/ and val/, or --random N")
    train: Dataset = ImageFolder(options.folder / "train", options.size)
    length = len(train)  # type: ignore[arg-type]
    if options.limit is not None and options.limit < length:
        generator = torch.Generator().manual_seed(options.seed)
        kept = torch.randperm(length, generator=generator)[: options.limit]
        train = Subset(train, sorted(kept.tolist()))
    held_out = ImageFolder(options.folder / "val", options.size)
    # Images lie class by class: every other one is a fair half.
    halves = (range(first, len(held_out), 2) for first in (0, 1))
    calibration, test = (Subset(held_out, half) for half in halves)
    return train, calibration, test


def _noise(options: argparse.Namespace, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    size = (options.random, 3, options.size, options.size)
    labels = torch.randint(options.classes, (options.random,), generator=generator)
    return TensorDataset(torch.randn(size, generator=generator), labels)


def _network(options: argparse.Namespace) -> nn.Module:
    if options.random is None and options.weights is None:
        raise SystemExit(
            "give --weights: the state dict of a trained network, such as torchvision's"
        )
    if options.torchvision:
        return torchvision_resnet50(options.weights)
    return resnet50(options.weights, classes=options.classes, seed=options.seed)


def _loader(data: Dataset, options: argparse.Namespace) -> DataLoader:
    return DataLoader(
        data,
        batch_size=options.batch,
        num_workers=options.workers,
        pin_memory=torch.cuda.is_available(),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, nargs="?", help="holds train/ and val/")
    add("--weights", type=Path, help="pre-trained weights (.pth or .safetensors)")
    add("--torchvision", action="store_true", help="torchvision's own definition")
    add("--random", type=int, metavar="N", help="N random images instead of a folder")
    add("--classes", type=int, default=1000)
    add("--size", type=int, default=224, help="pixels of an image's side")
    add("--limit", type=int, help="training images to use, drawn at random")
    add("--batch", type=int, default=32, help="images per batch and process")
    add("--workers", type=int, default=0, help="processes that read images")
    add(
        "--uncertain",
        nargs="*",
        default=[],
        help='patterns of the uncertain weights, such as "layer4.*"; default: all',
    )
    add("--probes", type=int, default=1, help="of the g-prior, per batch")
    add("--samples", type=int, default=6, help="that learn the precision")
    add("--final-samples", type=int, default=32, help="of the posterior")
    add("--steps", type=int, default=4, help="of expectation maximisation")
    add("--precision", type=float, help="to start from; with --steps 0, to keep")
    add("--sgd", action="store_true", help="primal SGD whatever the number of images")
    add("--passes", type=float, default=12.0, help="most passes of an SGD solve")
    add("--seed", type=int, default=0)
    add("--learn", type=Path, metavar="FILE", help="of the prior of other tasks")
    add("--prior", type=Path, metavar="FILE", help="learned from another task")
    add("--checkpoint", type=Path, help="file to go on from after an interruption")
    add("--save", type=Path, help="file of the posterior")
    return parser


if __name__ == "__main__":
    main()
