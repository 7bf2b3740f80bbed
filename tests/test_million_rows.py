"""The example of a million rows, with fewer; its exit status is what it checks."""

from examples.million_rows import main, memory_plan


def test_it_converges_and_the_residual_is_true(tmp_path, capsys):
    kept = tmp_path / "run.safetensors"
    options = ["--rows", "2500", "--samples", "3", "--rank", "100", "--device", "cpu"]
    assert main([*options, "--checkpoint", str(kept)]) == 0
    assert "converged" in capsys.readouterr().out


def test_what_does_not_fit_is_not_begun(capsys):
    assert main(["--rows", str(10**12), "--rank", "1", "--device", "cpu"]) == 1
    assert "too much" in capsys.readouterr().out


def test_a_million_rows_with_64_samples_fit_a_card_of_40_gigabytes():
    assert sum(memory_plan(10**6, 64, 1000).values()) < 40e9
