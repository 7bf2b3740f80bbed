"""What a second process gains: ``python -m benchmarks.networks.data_parallel``.

Starts itself under torchrun with one and with two processes of one thread each, over
gloo, and compares seconds per pass over the data, the products themselves, and the
posteriors of a whole fit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.json_file import plain, write_json
from benchmarks.networks.network import SmallResNet
from benchmarks.processes import run_under_torchrun
from sgdgp.core.processes import process_group
from sgdgp.networks import Categorical, Isotropic, WeightCG, linearise
from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.priors import DiagonalPrior
from sgdgp.networks.stream import stream_of
from sgdgp.tangent import Tangent

MEASURED = Path(__file__).parent / "measured" / "data_parallel.json"

FASTER = 1.6
CLOSE = 1e-5
"""Targets: speed of two processes over one, relative difference of their results."""

_SAMPLES = 8
_SHAPE: dict[str, Any] = {
    "stem": (3, 2),
    "widths": (16, 32, 32),
    "strides": (1, 2, 1),
}


def measure(examples: int, repeats: int, out: Path) -> None:
    """In one of the processes: passes and a fit; process 0 writes what it found."""
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")) as processes:
        generator = torch.Generator().manual_seed(0)
        # Noisy images of ten patterns: something to learn.
        patterns = torch.randn(10, 1, 28, 28, generator=generator)
        y = torch.randint(10, (examples,), generator=generator)
        x = torch.randn(examples, 1, 28, 28, generator=generator) + patterns[y]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = SmallResNet(1, 10, **_SHAPE).eval()
        loader = DataLoader(TensorDataset(x, y), batch_size=64)
        tangent = Tangent(network)
        data = TangentData(tangent, stream_of(loader, torch.device("cpu")))
        prior = DiagonalPrior(tangent.num_weights, torch.ones(1))
        system = WeightSystem(data, prior, Categorical(), data.network_outputs)
        shape = (_SAMPLES, tangent.num_weights)
        v = torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).mT
        product = system.product(v)
        seconds, own = [], []
        for _ in range(repeats):
            processes.barrier()
            start, processor = time.perf_counter(), time.process_time()
            system.product(v)
            own.append(time.process_time() - processor)
            processes.barrier()
            seconds.append(time.perf_counter() - start)
        spent = torch.zeros(processes.size, dtype=torch.float64)
        spent[processes.rank] = min(own)
        processes.sum_(spent)
        # In float64: float32's rounding alone moves the precision by 4e-5.
        few = TensorDataset(x[:96].double(), y[:96])
        posterior = linearise(network.double(), Categorical(), Isotropic()).fit(
            DataLoader(few, batch_size=16),
            num_samples=4,
            final_samples=8,
            steps=2,
            solver=WeightCG(tolerance=1e-4),
            progress=False,
        )
        found = {
            "product": product,
            "predictions": posterior.predict(x[:64].double()),
            "precisions": posterior.precisions,
            "seconds": torch.tensor(min(seconds)),
            # Of the slowest process: what others on the machine do not stretch.
            "processor_seconds": spent.max(),
        }
        if processes.rank == 0:
            torch.save(found, out)


def run(count: int, examples: int, repeats: int) -> dict[str, torch.Tensor]:
    """What so many processes find.

    Raises:
        RuntimeError: They failed; with what they said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.pt"
        run_under_torchrun(
            count,
            "benchmarks.networks.data_parallel",
            *("--child", str(out)),
            *("--examples", str(examples), "--repeats", str(repeats)),
        )
        found: dict[str, torch.Tensor] = torch.load(out, weights_only=True)
        return found


def compare(examples: int, repeats: int) -> dict[str, Any]:
    """Two processes beside one."""
    one, two = (run(count, examples, repeats) for count in (1, 2))
    result = {
        "examples": examples,
        "samples": _SAMPLES,
        "seconds_per_pass_1": float(one["seconds"]),
        "seconds_per_pass_2": float(two["seconds"]),
        "speedup": float(one["seconds"] / two["seconds"]),
        "processor_speedup": float(one["processor_seconds"] / two["processor_seconds"]),
    }
    for name in ("product", "predictions", "precisions"):
        difference = (one[name] - two[name]).norm() / one[name].norm()
        result[f"{name}_difference"] = float(difference)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path, default=MEASURED)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        measure(options.examples, options.repeats, options.child)
        return
    result = compare(options.examples, options.repeats)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    print(json.dumps(plain(result), indent=1))
    print(f"targets: {FASTER:g} times the speed, the same to {CLOSE:g}")


if __name__ == "__main__":
    main()
