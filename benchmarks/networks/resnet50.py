"""What a pass of the E-step costs at ImageNet's size, on random images.

``python -m benchmarks.networks.resnet50 --batch 8 --samples 4`` measures products of
phi^T phi with several samples, phi the whitened tangent features of a ResNet-50 with
25.6 million weights and 1,000 outputs: Jacobian-vector products, the Hessian of the
categorical likelihood, vector-Jacobian products. The cost is stated in forward passes
per example and sample; published code needs about five.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.json_file import write_json
from benchmarks.networks.resnet import resnet50
from benchmarks.uci.memory import peak_rss_mb
from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.likelihoods import Categorical
from sgdgp.networks.priors import DiagonalPrior
from sgdgp.networks.stream import stream_of
from sgdgp.tangent import Tangent

MEASURED = Path(__file__).parent / "measured" / "resnet50.json"

LARGEST_PEAK_MB = 12_000
MOST_FORWARDS = 5.0
"""Targets: peak memory, and forward passes per example and sample."""


def measure(
    batch: int,
    samples: int,
    *,
    size: int = 224,
    classes: int = 1000,
    repeats: int = 2,
    device: str = "cpu",
    memory_budget: int | None = None,
) -> dict[str, Any]:
    """Time and memory of a forward pass, a product and a noise pass on one batch.

    Args:
        batch: Images.
        samples: Columns of the product.
        size: Height and width of an image.
        classes: Outputs.
        repeats: Times that each is measured; the fastest counts, so give at least two.
        device: Where.
        memory_budget: Bytes for temporaries. Default: half of what is free.
    """
    where = torch.device(device)
    network = resnet50(classes=classes).to(where)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator).to(where)
    y = torch.randint(classes, (batch,), generator=generator)
    tangent = Tangent(network, memory_budget=memory_budget)
    data = TangentData(tangent, stream_of([(x, y)], where))
    forward = _fastest(lambda: tangent.outputs(x), max(3, repeats), where)
    rows = torch.randn(samples, tangent.num_weights, generator=generator).to(where)
    scale = 1 / math.sqrt(tangent.num_weights)
    prior = DiagonalPrior(tangent.num_weights, torch.ones(1, device=where))
    system = WeightSystem(data, prior, Categorical(), tangent.outputs(x))
    before = peak_rss_mb()
    v = rows.mul_(scale).mT
    product = _fastest(lambda: system.product(v), repeats, where)
    noise = _fastest(lambda: system.noise(range(samples), 0), repeats, where)
    result = {
        "weights": tangent.num_weights,
        "batch": batch,
        "samples": samples,
        "size": size,
        "classes": classes,
        "device": _words(where),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rss_before_mb": before,
        "peak_rss_mb": peak_rss_mb(),
        "peak_cuda_mb": (
            torch.cuda.max_memory_allocated(where) / 1e6
            if where.type == "cuda"
            else None
        ),
    }
    # Processor time where there is one: other work on the machine stretches it less.
    clock = 0 if where.type == "cuda" else 1
    for name, times in (("forward", forward), ("product", product), ("noise", noise)):
        result[f"{name}_seconds_per_example"] = times[0] / batch
        result[f"{name}_processor_seconds_per_example"] = times[1] / batch
    for name, times in (("product", product), ("noise", noise)):
        ratio = times[clock] / forward[clock] / samples
        result[f"{name}_forwards_per_sample"] = ratio
    result["first_product_processor_seconds_per_example"] = product[2] / batch
    result["examples_per_second"] = batch / product[0]
    return result


def in_words(result: dict[str, Any]) -> str:
    """A result for people."""
    peak, ratio = result["peak_rss_mb"], result["product_forwards_per_sample"]
    on_cpu = result["device"].startswith("CPU")
    seconds = "processor_seconds" if on_cpu else "seconds"
    lines = [
        f"ResNet-50, {result['weights']:,} weights, batch {result['batch']}, "
        f"{result['samples']} samples, {result['size']} x {result['size']}, "
        f"{result['device']}, {result['threads']} threads",
        f"forward   {result[f'forward_{seconds}_per_example']:.3f} s per example",
        f"product   {result[f'product_{seconds}_per_example']:.3f} s per example, "
        f"{ratio:.2f} forward passes per example and sample "
        f"({_verdict(ratio <= MOST_FORWARDS)} {MOST_FORWARDS:g})",
        f"noise     {result[f'noise_{seconds}_per_example']:.3f} s per example, "
        f"{result['noise_forwards_per_sample']:.2f} forward passes",
        f"peak      {peak / 1000:.2f} GB "
        f"({_verdict(peak <= LARGEST_PEAK_MB)} {LARGEST_PEAK_MB / 1000:g})",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=MEASURED)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = measure(
        options.batch,
        options.samples,
        size=options.size,
        classes=options.classes,
        repeats=options.repeats,
        device=options.device,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    print(in_words(result))


def _fastest(
    work: Callable[[], object], repeats: int, device: torch.device
) -> tuple[float, float, float]:
    """Wall and processor seconds of the fastest run, processor seconds of the first.

    The first product of a network also learns how its layers are differentiated.
    """
    walls, processors = [], []
    for _ in range(repeats):
        _wait(device)
        wall, processor = time.perf_counter(), time.process_time()
        work()
        _wait(device)
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return min(walls), min(processors), processors[0]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}"


def _verdict(met: bool) -> str:
    return "target met:" if met else "target missed:"


if __name__ == "__main__":
    main()
