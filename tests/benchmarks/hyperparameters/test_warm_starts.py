import json

import pytest
import torch

from benchmarks.hyperparameters import warm_starts
from benchmarks.uci.data import Split


@pytest.fixture
def small(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 2, generator=generator)
    y = torch.sin(2.0 * x[:, 0]) + 0.1 * torch.randn(150, generator=generator)
    split = Split("small", 0, x[:120], y[:120], x[120:], y[120:])
    monkeypatch.setattr(warm_starts, "load_split", lambda *_, **__: split)


def test_every_scheme_learns_and_its_passes_are_told(small, tmp_path, capsys):
    path = tmp_path / "found.json"
    arguments = ["--datasets", "small", "--rows", "100", "--steps", "4"]
    arguments += ["--probes", "8", "--solvers", "cg-pivoted-100"]
    assert warm_starts.main([*arguments, "--results", str(path)]) == 0
    stored = json.loads(path.read_text())
    assert "--rows 100" in stored["command"]
    results = stored["results"]
    assert [r["scheme"] for r in results] == [s.name for s in warm_starts.schemes(8)]
    values = [r["log_likelihood"] for r in results]
    # GPyTorch's defaults are worth -0.994 here, four exact steps lead to -0.844.
    assert min(values) > -0.86
    assert max(values) - min(values) < 0.02
    assert all(r["passes"] >= 4.0 for r in results)
    assert capsys.readouterr().out.count("| small |") == 2 * len(results)
    assert warm_starts.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out.count("| small |") == len(results)
