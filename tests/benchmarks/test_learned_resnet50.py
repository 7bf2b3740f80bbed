"""What a learned prior of a ResNet-50 costs is measured; here on a layer of it."""

from __future__ import annotations

import json

from benchmarks.learned_priors.resnet50 import main
from benchmarks.learned_priors.table import checks


def test_a_prior_is_learned_stored_and_used(tmp_path, capsys):
    out = tmp_path / "found.json"
    small = "--random 2 --batch 2 --size 32 --classes 40 --uncertain layer1.0.*"
    main(f"{small} --out {out}".split())
    said = capsys.readouterr().out
    assert "32 passes back for 40 outputs" in said
    found = json.loads(out.read_text())
    assert (found["weights"], found["tensors"], found["examples"]) == (75_008, 12, 2)
    assert found["longest_full_side"] == 576
    assert found["solve_relative_residual"] < 1e-3
    (check,) = checks({"resnet50": {"batch": [found]}})
    assert check.holds
    (check,) = checks({"resnet50": {"batch": [{**found, "peak_rss_mb": 12_001.0}]}})
    assert not check.holds
    # Factors of sides (64, 64), (64, 576), (256, 64) twice, norms, and the mean.
    numbers = 64**2 * 5 + 576**2 + 2 * 256**2 + 4 * 64**2 + 4 * 256**2 + 75_008
    assert 4e-6 * numbers < found["file_mb"] < 4.2e-6 * numbers
