"""The step timing: the NumPy version is right, and the bookkeeping is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import sgdgp
from benchmarks.solvers.clock import interleaved, median
from benchmarks.solvers.memory import measure_memory
from benchmarks.solvers.plain_sdd import Distances, PlainSDD
from benchmarks.solvers.setting import NOISE, make_setting, pass_seconds
from benchmarks.solvers.step import main, time_step
from benchmarks.solvers.throughput import flop_per_entry

KINDS: tuple[Distances, ...] = get_args(Distances)


def plain(setting, kind: Distances, **settings) -> PlainSDD:
    return PlainSDD(
        x=setting.scaled_inputs.double().numpy(),
        y=setting.rhs[:, 0].double().numpy(),
        noise=NOISE,
        distances=kind,
        **settings,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_numpy_rows_are_those_of_the_kernel(kind: Distances):
    setting = make_setting(300, 4)
    rows = np.array([5, 0, 299])
    found = plain(setting, kind, step_size=1e-3).kernel_rows(rows)
    with torch.no_grad():
        kernel = setting.operator.kernel.double()
        x = setting.operator.x.double()
        expected = kernel(x[torch.from_numpy(rows)], x).to_dense()
    # GPyTorch keeps its lengthscale in float32 digits.
    assert np.allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numpy_version_solves_the_system_that_sgdgp_solves(kind: Distances):
    setting = make_setting(120, 3)
    solver = plain(setting, kind, step_size=5e-3, block_size=32)
    for _ in range(4000):
        solver.step()
    operator = setting.operator.to(torch.float64)
    rhs = setting.rhs.double()
    exact = sgdgp.Cholesky().solve(operator, NOISE, rhs).weights[:, 0].numpy()
    sdd = sgdgp.SDD(tolerance=1e-6, max_passes=5000.0).solve(operator, NOISE, rhs)
    assert sdd.reason == "converged"
    scale = np.linalg.norm(exact)
    assert np.linalg.norm(solver.average - exact) < 1e-3 * scale
    assert np.linalg.norm(solver.average - sdd.weights[:, 0].numpy()) < 1e-3 * scale


def test_unknown_distances_are_refused():
    with pytest.raises(ValueError, match=r"distances: expected one of .*'broadcast'"):
        plain(make_setting(10, 2), "gemm", step_size=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [64, 1100])
def test_a_pass_is_the_time_between_two_readings_of_the_clock(n: int):
    setting = make_setting(n, 2)
    ticks = itertools.count()
    assert pass_seconds(setting, n // 2, 3, lambda: float(next(ticks))) == 1.0
    assert next(ticks) == 4


def test_contenders_take_turns_and_the_first_round_does_not_count():
    order: list[str] = []

    def turn(name: str):
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    seconds = interleaved({"a": turn("a"), "b": turn("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert median(seconds["a"]) == 4.0


def test_a_kernel_entry_costs_its_distance_and_its_products():
    assert flop_per_entry(18) == 2 * 20 + 2
    assert flop_per_entry(18, columns=65) == 2 * 20 + 130


def test_the_step_figures_belong_together():
    before = torch.get_num_threads()
    figures = time_step(n=256, d=3, block=64, rounds=1, threads=1)
    assert torch.get_num_threads() == before
    seconds = figures["cpu_seconds"]
    for kind in KINDS:
        ratio = seconds[f"numpy {kind}"] / seconds["sgdgp.SDD"]
        assert figures["ratio"][kind] == pytest.approx(ratio)
    rate = 64 * 256 / seconds["sgdgp.SDD"]
    assert figures["entries_per_second"] == pytest.approx(rate)
    assert {probe["unit"] for probe in figures["machine"].values()} == {
        "flop",
        "entry",
        "byte",
    }


def test_the_command_prints_its_tables_and_writes_json(tmp_path: Path, capsys):
    sizes = ["--n", "200", "--d", "4", "--block", "50", "--rounds", "1"]
    columns = ["--columns-n", "300", "--columns-d", "2", "--columns-passes", "1"]
    assert main([*sizes, *columns, "--results", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for text in ("million kernel entries", "% of exp2", "65 columns", "NumPy, chunked"):
        assert text in printed
    figures = json.loads((tmp_path / "out" / "solver_step.json").read_text())
    assert set(figures) == {"versions", "step", "columns"}
    per_pass = figures["columns"]["seconds_per_pass"]
    ratio = per_pass["65"] / per_pass["1"]
    assert figures["columns"]["ratio"] == pytest.approx(ratio)


def test_memory_is_measured_in_a_process_of_its_own():
    figures = measure_memory(n=600, d=2, budget=10**6, num_samples=2, passes=1)
    assert figures["operator"] == "tiled"
    assert 0 < figures["rss_before_mb"] <= figures["peak_rss_mb"]
