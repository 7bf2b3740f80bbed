"""``python -m benchmarks.solvers.step``: what a step of stochastic dual descent costs.

Three questions, each with a plain answer on the terminal: how much CPU time a step
takes beside a plain NumPy version and beside what the machine can do; what 65 columns
cost beside one; how much memory ``sgdgp.condition`` takes under a budget.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import torch

import sgdgp
from benchmarks.solvers.clock import Turn, interleaved, median, timed
from benchmarks.solvers.memory import measure_memory
from benchmarks.solvers.plain_sdd import Distances, PlainSDD
from benchmarks.solvers.setting import NOISE, Setting, make_setting, pass_seconds
from benchmarks.solvers.throughput import CACHE_BYTES_PER_ENTRY, flop_per_entry, probes

Figures: TypeAlias = dict[str, Any]

_COLUMNS = 65
_PLAIN: tuple[Distances, ...] = get_args(Distances)


def parser() -> argparse.ArgumentParser:
    """The options of the timings."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.solvers.step", description=__doc__.splitlines()[0]
    )
    add = result.add_argument
    add("--n", type=int, default=15_000, help="points of the step timing")
    add("--d", type=int, default=18, help="inputs of the step timing")
    add("--block", type=int, default=512, help="coordinates per step")
    add("--rounds", type=int, default=7, help="turns that each contender gets")
    add("--threads", type=int, default=1, help="threads of the step timing")
    add("--columns-n", type=int, default=45_000, help="points of 1 against 65 columns")
    add("--columns-d", type=int, default=9)
    add("--columns-passes", type=int, default=2, help="timed passes of each")
    add("--budget", type=float, default=1e9, help="bytes, for columns and memory")
    add("--skip-columns", action="store_true", help="only the step timing")
    add("--memory", action="store_true", help="the peak memory of condition, too")
    add("--results", type=Path, metavar="DIR", help="write DIR/solver_step.json")
    return result


def time_step(n: int, d: int, block: int, rounds: int, threads: int) -> Figures:
    """CPU seconds of a step and the rates of the machine, measured in turns."""
    setting = make_setting(n, d)
    block = min(block, n)
    clock = time.process_time
    vector = torch.randn(n, 1, generator=torch.Generator().manual_seed(1))
    rows = setting.operator.rows(slice(0, block))
    rates = probes(d)
    with torch_threads(threads):
        turns: dict[str, Turn] = {
            # A pass is n / block steps, also where the blocks are a little smaller.
            "sgdgp.SDD": lambda: pass_seconds(setting, block, 3, clock) * block / n,
            "row block": timed(lambda: rows.matmul(vector), 20, clock),
        }
        for kind in _PLAIN:
            plain = plain_contender(setting, block, kind)
            turns[f"numpy {kind}"] = timed(plain.step, 3, clock)
        contenders = list(turns)
        for probe in rates:
            turns[probe.name] = timed(probe.run, 20, clock)
        seconds = interleaved(turns, rounds)
    step = median(seconds["sgdgp.SDD"])
    rate = block * n / step
    return {
        "n": n,
        "d": d,
        "block": block,
        "threads": threads,
        "cpu_seconds": {name: median(seconds[name]) for name in contenders},
        "ratio": {kind: median(seconds[f"numpy {kind}"]) / step for kind in _PLAIN},
        "entries_per_second": rate,
        "entries_per_second_row_block": block * n / median(seconds["row block"]),
        "machine": {
            probe.name: {
                "unit": probe.unit,
                "per_second": probe.amount / median(seconds[probe.name]),
            }
            for probe in rates
        },
        "all_seconds": seconds,
    }


def plain_contender(setting: Setting, block: int, kind: Distances) -> PlainSDD:
    """The NumPy version on the same system; its steps are too small to diverge."""
    return PlainSDD(
        x=setting.scaled_inputs.numpy(),
        y=np.ascontiguousarray(setting.rhs[:, 0].numpy()),
        noise=NOISE,
        step_size=0.1 / len(setting.rhs),
        block_size=block,
        distances=kind,
    )


def time_columns(n: int, d: int, passes: int, budget: int) -> Figures:
    """Wall seconds of a pass with one column and with 65, in turns."""
    settings = {k: make_setting(n, d, k, budget) for k in (1, _COLUMNS)}

    # Each turn runs a pass before the one it times: no further round to warm up.
    seconds: dict[str, list[float]] = {str(k): [] for k in settings}
    for _ in range(passes):
        for columns, setting in settings.items():
            taken = pass_seconds(setting, None, 1, time.perf_counter)
            seconds[str(columns)].append(taken)
    one, many = (median(seconds[str(k)]) for k in (1, _COLUMNS))
    return {
        "n": n,
        "d": d,
        "memory_budget": budget,
        "threads": torch.get_num_threads(),
        "seconds_per_pass": {"1": one, str(_COLUMNS): many},
        "ratio": many / one,
        "all_seconds": seconds,
    }


def step_report(figures: Figures) -> str:
    """The step timing in words."""
    seconds, rate = figures["cpu_seconds"], figures["entries_per_second"]
    d = figures["d"]
    lines = [
        f"one step, n = {figures['n']:,}, d = {d}, block {figures['block']}, float32, "
        f"one column, Matern-3/2, {figures['threads']} thread(s): CPU time",
        f"  sgdgp.SDD             {1e3 * seconds['sgdgp.SDD']:9.2f} ms",
        f"    row block alone     {1e3 * seconds['row block']:9.2f} ms",
    ]
    for kind in _PLAIN:
        lines.append(
            f"  NumPy, {kind:<15}{1e3 * seconds[f'numpy {kind}']:9.2f} ms"
            f"   {figures['ratio'][kind]:6.2f} times sgdgp.SDD"
        )
    lines.append(f"  {rate / 1e6:.0f} million kernel entries per CPU second, which is")
    work = {"flop": flop_per_entry(d), "entry": 1, "byte": CACHE_BYTES_PER_ENTRY}
    for name, probe in figures["machine"].items():
        unit = probe["unit"]
        used = rate * work[unit]
        lines.append(
            f"    {100 * used / probe['per_second']:5.1f} % of {name}: "
            f"{used / 1e9:.2f} of {probe['per_second'] / 1e9:.2f} G{unit}/s"
            + (f" ({work[unit]} {unit} per kernel entry)" if work[unit] > 1 else "")
        )
    return "\n".join(lines)


def columns_report(figures: Figures) -> str:
    """One column against 65 in words."""
    seconds = figures["seconds_per_pass"]
    return (
        f"one pass, n = {figures['n']:,}, d = {figures['d']}, tiles, budget "
        f"{figures['memory_budget'] / 1e9:g} GB, {figures['threads']} thread(s): wall"
        f"\n  1 column   {seconds['1']:8.3f} s"
        f"\n  {_COLUMNS} columns {seconds[str(_COLUMNS)]:8.3f} s"
        f"   {figures['ratio']:.2f} times one column (bound: 3)"
    )


def memory_report(figures: Figures) -> str:
    """The memory of condition in words."""
    return (
        f"sgdgp.condition, n = {figures['n']:,}, d = {figures['d']}, "
        f"{figures['num_samples']} samples, budget {figures['memory_budget'] / 1e9:g} "
        f"GB, operator {figures['operator']}, {figures['passes']:.1f} passes"
        f"\n  peak resident set {figures['peak_rss_mb'] / 1e3:.2f} GB (bound: 2.5), "
        f"{figures['rss_before_mb'] / 1e3:.2f} GB of it before"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the figures if asked to."""
    options = parser().parse_args(arguments)
    figures: Figures = {"versions": _versions()}
    parts: list[tuple[str, Callable[[], Figures], Callable[[Figures], str]]] = [
        (
            "step",
            lambda: time_step(
                options.n, options.d, options.block, options.rounds, options.threads
            ),
            step_report,
        )
    ]
    size = (options.columns_n, options.columns_d)
    budget = int(options.budget)
    if not options.skip_columns:
        parts.append(
            (
                "columns",
                lambda: time_columns(*size, options.columns_passes, budget),
                columns_report,
            )
        )
    if options.memory:
        parts.append(
            ("memory", lambda: measure_memory(*size, budget, 64, 2), memory_report)
        )
    for name, measure, report in parts:
        print(f"measuring: {name} ...", file=sys.stderr, flush=True)
        figures[name] = measure()
        print(report(figures[name]) + "\n", flush=True)
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        path = options.results / "solver_step.json"
        path.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"figures: {path}")
    return 0


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads inside, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _versions() -> dict[str, str | int | None]:
    return {
        "sgdgp": sgdgp.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    sys.exit(main())
