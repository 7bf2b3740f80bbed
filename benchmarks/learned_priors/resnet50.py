"""What a ResNet-50's learned prior costs: its factors, its file, its products.

``python -m benchmarks.learned_priors.resnet50 --random 8 --batch 8`` learns it from one
batch of random images by the command that users have (``examples.imagenet --learn``),
loads the file, and takes a product with the precision, a sample and a solve. All other
arguments are the example's: ``/data/imagenet --weights resnet50-0676ba61.pth --limit
1024`` does the same with images and weights of one's own.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from benchmarks.json_file import write_json
from benchmarks.networks.resnet import resnet50
from benchmarks.uci.memory import peak_rss_mb
from examples.imagenet import main as imagenet
from sgdgp.networks import LearnedPrior
from sgdgp.networks.curvature import largest_eigenvalue
from sgdgp.networks.kronecker_curvature import MOST_COLUMNS
from sgdgp.networks.learned_prior import STRENGTHS
from sgdgp.networks.priors import KroneckerSum
from sgdgp.tangent import Tangent

MEASURED = Path(__file__).parent / "measured" / "resnet50.json"

LARGEST_PEAK_MB = 12_000
"""Target."""

Value = TypeVar("Value")


class Stages:
    """Seconds of each stage, and the process's peak memory after it."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def __call__(self, name: str, work: Callable[[], Value]) -> Value:
        """Do the work."""
        wall, processor = time.perf_counter(), time.process_time()
        value = work()
        self.found[name] = {
            "seconds": time.perf_counter() - wall,
            "processor_seconds": time.process_time() - processor,
            "peak_rss_mb": peak_rss_mb(),
        }
        return value


def measure(path: Path, arguments: Sequence[str], classes: int) -> dict[str, Any]:
    """Learn a prior into a file, and use it.

    Args:
        path: The file.
        arguments: Of ``examples.imagenet``, without ``--learn``.
        classes: Outputs of the network.
    """
    stage = Stages()
    given = [*arguments, "--classes", str(classes), "--learn", str(path)]
    stage("learn", lambda: imagenet(given))
    loaded = stage("load", lambda: LearnedPrior.load(path))
    # The curvature counts as much as the identity, on average.
    prior = loaded.candidates()[STRENGTHS.index(1.0)]
    tangent = Tangent(resnet50(classes=classes), weights=loaded.names)
    precision = stage("build", lambda: prior.build(tangent, lambda count: iter(())))
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, tangent.num_weights, generator=generator).mT
    stage("product", lambda: precision.matmul(w))
    stage("first sample", lambda: precision.sample(1, generator))
    sample = stage("sample", lambda: precision.sample(1, generator))
    solved = stage("solve", lambda: precision.solve(w))
    residual = (precision.matmul(solved) - w).norm() / w.norm()
    # From below; the smallest eigenvalue is one.
    largest = largest_eigenvalue(precision.matmul, w, steps=10)
    sides = [
        side
        for block in loaded.curvature.blocks
        if isinstance(block, KroneckerSum)
        for term in block.terms
        for side in term
    ]
    return {
        "arguments": list(arguments),
        "weights": tangent.num_weights,
        "tensors": len(tangent.names),
        "examples": loaded.num_examples,
        "classes": classes,
        "passes_back": min(classes, MOST_COLUMNS),
        "longest_full_side": max(len(side) for side in sides if side.ndim == 2),
        "diagonal_sides": [len(s) for s in sides if s.ndim == 1 and len(s) > 1],
        "file_mb": path.stat().st_size / 1e6,
        "solve_relative_residual": float(residual),
        "condition_number": largest,
        "sample_is_finite": bool(torch.isfinite(sample).all()),
        "stages": stage.found,
        "peak_rss_mb": peak_rss_mb(),
        "device": f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def in_words(result: dict[str, Any]) -> str:
    """A result for people."""
    peak = result["peak_rss_mb"]
    met = "met" if peak <= LARGEST_PEAK_MB else "missed"
    stages = (
        f"{name:12} {found['processor_seconds']:7.1f} s of processor, "
        f"{found['seconds']:.1f} s in all, peak {found['peak_rss_mb'] / 1e3:.2f} GB"
        for name, found in result["stages"].items()
    )
    lines = [
        f"ResNet-50, {result['weights']:,} weights, {result['examples']} examples, "
        f"{result['passes_back']} passes back for {result['classes']} outputs, "
        f"{result['device']}, {result['threads']} threads",
        *stages,
        f"file         {result['file_mb']:.0f} MB",
        f"peak         {peak / 1e3:.2f} GB (target {met}: {LARGEST_PEAK_MB / 1e3:g})",
        f"residual     {result['solve_relative_residual']:.1e} of the solve, at "
        f"condition number {result['condition_number']:.1e} in float32",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=MEASURED)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="where the prior's file stays")
    options, rest = parser.parse_known_args(arguments)
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        path = options.keep or Path(folder) / "prior.safetensors"
        result = measure(path, rest, options.classes)
    write_json(options.out, result)
    print(in_words(result))


if __name__ == "__main__":
    main()
