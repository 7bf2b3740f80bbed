"""The command line: ``python -m benchmarks.dockstring``; see docs/molecules.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dockstring.data import Molecules, read_dockstring
from benchmarks.dockstring.files import locate
from benchmarks.dockstring.fingerprints import BINS, fingerprints, import_rdkit
from benchmarks.dockstring.generated import (
    generated_counts,
    generated_scores,
    generated_smiles,
)
from benchmarks.dockstring.run import Problem, Settings, run
from benchmarks.dockstring.targets import TARGETS, Target, target_named
from benchmarks.json_file import write_json
from benchmarks.uci.run import versions
from sgdgp.core.checks import check_count

_TEST_SHARE = 0.2
_INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.dockstring",
        description="Docking scores by a Gaussian process with the Tanimoto kernel.",
    )
    add = result.add_argument
    add("--targets", nargs="+", default=["PARP1"], help=", ".join(TARGETS))
    add("--folder", type=Path, help="folder of the two DOCKSTRING files")
    add("--download", action="store_true", help="load missing files from figshare")
    add("--generated", type=int, metavar="N", help="N made-up molecules instead")
    add("--counts", action="store_true", help="generate counts, not SMILES (no RDKit)")
    add("--bins", type=int, default=BINS, help=f"of a fingerprint (default: {BINS})")
    add("--train", type=int, metavar="N", help="some training molecules")
    add("--test", type=int, metavar="N", help="some test molecules")
    add("--solver", default="auto", help="a solver's name (default: auto)")
    add("--samples", type=int, default=64, help="posterior samples (default: 64)")
    add("--features", type=int, default=16_384, help="random features of prior draws")
    add("--memory", type=float, metavar="GB", help="budget of the solve")
    add("--seed", type=int, default=0)
    add("--fit", action="store_true", help="learn the hyperparameters, don't fix them")
    add("--exact", action="store_true", help="compare with Cholesky (n^2 memory)")
    add("--double", action="store_true", help="float64 (default: float32)")
    add("--results", type=Path, metavar="FILE", help="also write the figures as JSON")
    return result


def problem_of(options: argparse.Namespace, target: Target) -> Problem:
    """The molecules of one target, made up or read, as fingerprints.

    Raises:
        ImportError: RDKit is needed and missing.
        OSError: Files are missing or damaged.
        ValueError: A count or a molecule makes no sense.
    """
    dtype = torch.float64 if options.double else torch.float32
    if options.generated is None:
        import_rdkit()
        paths = locate(options.folder, download=options.download)
        found = read_dockstring(*paths, target.name)
        wanted = (options.train, options.test)
        sides = [
            side.some(count, options.seed)
            for side, count in zip(found, wanted, strict=True)
        ]
        parts = [(_fingerprints(side, options.bins), side.y) for side in sides]
    else:
        parts = _generated(options, target)
    (x, y), (x_test, y_test) = parts
    return Problem(target, x.to(dtype), y.to(dtype), x_test.to(dtype), y_test.to(dtype))


def _fingerprints(side: Molecules, bins: int) -> Tensor:
    return fingerprints(side.smiles, bins=bins)


def _generated(
    options: argparse.Namespace, target: Target
) -> list[tuple[Tensor, Tensor]]:
    """Training and test molecules that are all different."""
    n = options.generated
    count = n + max(2, round(_TEST_SHARE * n))
    if options.counts:
        x = generated_counts(count, options.bins, options.seed)
    else:
        import_rdkit()
        smiles = generated_smiles(count, options.seed)
        x = fingerprints(smiles, bins=options.bins)
    y = generated_scores(x.float(), target, options.seed)
    return [(x[:n], y[:n]), (x[n:], y[n:])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the targets one after another and print a line for each.

    Returns:
        0; 2 for arguments, data or packages that are missing; 130 after Ctrl-C.
    """
    options = parser().parse_args(arguments)
    try:
        results = [_run(options, target_named(name)) for name in options.targets]
        if options.results is not None:
            content = {"results": results, "versions": versions()}
            print(f"figures: {write_json(options.results, content)}")
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _run(options: argparse.Namespace, target: Target) -> dict[str, Any]:
    for name, least in (("samples", 2), ("features", 1), ("bins", 1)):
        check_count(name, getattr(options, name), least)
    for name in ("generated", "train", "test"):
        if getattr(options, name) is not None:
            check_count(name, getattr(options, name), 2)
    settings = Settings(
        solver=options.solver,
        num_samples=options.samples,
        num_features=options.features,
        seed=options.seed,
        memory_budget=None if options.memory is None else int(options.memory * 1e9),
        fit=options.fit,
        exact=options.exact,
    )
    found = run(problem_of(options, target), settings)
    print(line(found))
    return found


def line(found: dict[str, Any]) -> str:
    """The figures of one target in words."""
    seconds = found["seconds"]
    text = (
        f"{found['target']}: R2 {found['r2']:.3f}, RMSE {found['rmse']:.3f}, "
        f"{found['n']} molecules conditioned in {seconds['condition']:.1f} s "
        f"({found['solver']}, {found['operator']}, {found['passes']:.1f} passes, "
        f"{found['reason']}), {found['num_test']} predicted in "
        f"{seconds['predict']:.1f} s, peak {found['peak_rss_mb']:.0f} MB"
    )
    if "exact" in found:
        exact = found["exact"]
        text += (
            f"; exact: R2 {exact['r2']:.3f} in {exact['seconds']:.1f} s, means differ "
            f"by {exact['rms_difference_of_means']:.4f} (RMS), variances are "
            f"{exact['mean_ratio_of_variances']:.3f} +- "
            f"{exact['spread_of_ratio_of_variances']:.3f} of the exact ones"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
