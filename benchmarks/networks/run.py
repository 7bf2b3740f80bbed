"""One setting and seed in this process, method after method.

``python -m benchmarks.networks.run SETTING SEED SAMPLES FOLDER METHOD...`` adds the
methods' results to the file of the setting and seed, each as soon as it is there.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from benchmarks.networks.data import Images, Task, load_task
from benchmarks.networks.methods import METHODS
from benchmarks.networks.scores import score
from benchmarks.networks.store import Result, read_result, write_result
from benchmarks.networks.train import outputs, trained
from benchmarks.uci.memory import peak_rss_mb

_CLEAR = Path("/proc/self/clear_refs")


def run(
    setting: str,
    seed: int,
    methods: Sequence[str],
    *,
    num_samples: int,
    folder: Path,
    tell: Callable[[str], None] = print,
) -> Result:
    """Measure some methods and keep what is found.

    Args:
        setting: One of ``SETTINGS``.
        seed: Of split, networks and samples.
        methods: Names of ``METHODS``.
        num_samples: Posterior samples of the Laplace methods, for joint predictions;
            those of sgdgp also give its variances.
        folder: Where the result is, or will be.
        tell: Told of each method that is done.
    """
    task = load_task(setting, seed)
    start = time.perf_counter()
    network = trained(task)
    result = read_result(folder, setting, seed)
    result["network"] = {
        "weights": sum(p.numel() for p in network.parameters()),
        "training_images": len(task.train),
        "calibration_images": len(task.calibration),
        "training_nll": _cross_entropy(network, task.train),
        "seconds": time.perf_counter() - start,
    }
    for name in methods:
        result["methods"].update(measure(name, task, network, num_samples))
        write_result(folder, result)
        for variant, found in result["methods"].items():
            if found["method"] == name:
                tell(f"{setting} {seed} {one_line(variant, found)}")
    return result


def measure(name: str, task: Task, network: nn.Module, num_samples: int) -> Result:
    """One method: scores, seconds and memory of each of its variants.

    ``seconds`` is the time until it can predict; training the network is not in it.
    ``peak_rss_mb`` is the largest resident set while the method ran, interpreter,
    libraries and data included.
    """
    gc.collect()
    cleared = _forget_peak()
    start, cpu = time.perf_counter(), time.process_time()
    fitted = METHODS[name](task, network, num_samples)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    found = score(task, fitted)
    peak = peak_rss_mb() if cleared else None
    return {
        variant: {
            "method": name,
            **scores,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_rss_mb": peak,
            "samples": num_samples,
            "about": dict(fitted.about.get(variant, {})),
        }
        for variant, scores in found.items()
    }


def one_line(variant: str, found: Result) -> str:
    """What is told of a method when it is done."""
    figures = ", ".join(
        f"{name} {found[name]:.4f}"
        for name in ("nll", "ece", "brier", "joint", "auroc", "accuracy")
    )
    return f"{variant}: {figures} ({found['seconds']:.0f} s)"


def _forget_peak() -> bool:
    """Start the kernel's peak of the resident set anew; whether that can be had."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _cross_entropy(network: nn.Module, images: Images) -> float:
    return float(functional.cross_entropy(outputs(network, images.x), images.y))


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments say."""
    setting, seed, num_samples, folder, *methods = arguments
    torch.set_num_threads(1)
    run(
        setting,
        int(seed),
        methods,
        num_samples=int(num_samples),
        folder=Path(folder),
        tell=lambda line: print(line, flush=True),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
