"""``sgdgp fit``, ``predict`` and ``info``: regression on tables, from a shell.

What can be wrong with a table is found before long work, and told in lines that name
the column and the row. Results go to standard output, all else to standard error. Exit
codes: 0, 2 where the input or the arguments are wrong, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from gpytorch.kernels import Kernel
from scipy.special import ndtri

from sgdgp import metrics
from sgdgp.core.files import place_of

try:
    import pandas as pd
    import tyro

    from sgdgp.sklearn import SGDGPRegressor
    from sgdgp.sklearn.arguments import check_quantiles
except ImportError as error:
    raise ImportError(
        f"the command line needs what is missing here ({error}); install it with "
        "pip install 'sgdgp[cli]'"
    ) from error

_PARQUET = {".parquet", ".pq"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zip", ".zst"}
_TOLD = 5
"""Columns with something wrong in them that are told of at once."""

_LEVEL = 0.95
"""Of the intervals whose coverage is told."""

Data = Annotated[Path, tyro.conf.arg(metavar="DATA")]
Model = Annotated[Path, tyro.conf.arg(metavar="MODEL")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see ``sgdgp --help``.

    Args:
        arguments: What was typed behind the name. Default: those of this process.

    Returns:
        The exit code.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
        try:
            tyro.extras.subcommand_cli_from_dict(
                {"fit": fit, "predict": predict, "info": info},
                prog="sgdgp",
                description="Gaussian process regression on tables (CSV or Parquet).",
                args=arguments,
            )
        except KeyboardInterrupt:
            _say("interrupted")
            return 130
        except (ValueError, OSError, ImportError) as error:
            _say(str(error))
            return 2
    return 0


def fit(
    data: Data,
    /,
    *,
    target: str,
    save: Path,
    drop: tuple[str, ...] = (),
    kernel: str = "matern32",
    steps: int = 100,
    solver: str = "auto",
    dtype: Literal["float64", "float32"] = "float64",
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Learn a model from a table.

    Args:
        data: Table (.csv, .csv.gz, .parquet) with a named column of numbers for each
            input and for the target.
        target: Column to be predicted.
        save: File to write the model into, say model.safetensors. It holds the table's
            numbers too.
        drop: Columns to leave out.
        kernel: matern12, matern32, matern52, rbf, rq, linear, or a sum such as
            "linear + rbf".
        steps: Steps of learning at most.
        solver: Name of a solver, such as sdd or cg.
        dtype: Precision; float32 takes half the memory.
        device: Where to compute, such as cuda. By default a GPU if there is one.
        seed: Seed of everything random.
    """
    place = place_of(save, "--save")
    _not_the_same(place, data, "--save")
    table = _read(data)
    _need(table, [target, *drop], data)
    inputs = [name for name in table if name != target and name not in drop]
    if not inputs:
        raise ValueError(f"{data}: no column is left to predict {target!r} from")
    numbers = _numbers(table[[*inputs, target]], data, "; --drop leaves columns out")
    y = numbers[target]
    if y.nunique() == 1:
        raise ValueError(
            f"{data}: column {target!r} is {y.iloc[0]:g} in every row; there is "
            "nothing to learn"
        )
    _say(f"learning {target!r} from {len(y)} rows, columns {_listed(inputs)}")
    model = SGDGPRegressor(
        kernel,
        steps=steps,
        solver=solver,
        dtype=dtype,
        device=device,
        random_state=seed,
        verbose=sys.stderr.isatty(),
    )
    model.fit(numbers[inputs], y)
    model.save(place)
    print(_description(model))
    _say(f"wrote {save}")


def predict(
    model: Model,
    data: Data,
    /,
    *,
    out: Path,
    quantiles: tuple[float, ...] = (),
    device: str = "auto",
) -> None:
    """Predict the target of new rows.

    Columns are found by their names, in any order. Where the target is among them too,
    the predictions are scored against it.

    Args:
        model: File that `sgdgp fit` wrote.
        data: Table with the same input columns.
        out: Table to write (.csv, .csv.gz, .parquet), a row for each row: mean and
            standard deviation (std) of a new observation, and quantiles.
        quantiles: Probabilities, such as .05 .5 .95, each a column: q0.05, q0.5, q0.95.
        device: Where to compute, such as cuda. By default a GPU if there is one.
    """
    levels = check_quantiles(quantiles)
    place = place_of(out, "--out")
    _is_parquet(place)
    _not_the_same(place, data, "--out")
    _not_the_same(place, model, "--out")
    regressor = SGDGPRegressor.load(model, device)
    names = _inputs_of(regressor, model)
    target = regressor.target_names_[0] if regressor.target_names_ else None
    table = _read(data)
    _need(table, names, data)
    ignored = [name for name in table if name not in [*names, target]]
    if ignored:
        _say(f"{data}: ignored columns {_listed(ignored)}")
    numbers = _numbers(table[names], data)
    seen = None
    if target in table:
        seen = _numbers(table[[target]], data, missing=True)[target].to_numpy()
    regressor.verbose = sys.stderr.isatty()
    _say(f"predicting {target or 'the target'} of {len(table)} rows")
    mean, std = regressor.predict(numbers, return_std=True, observation_noise=True)
    found = pd.DataFrame({"mean": mean, "std": std})
    for level in levels:
        found[f"q{level:g}"] = mean + std * ndtri(level)
    if _is_parquet(place):
        found.to_parquet(place, index=False)
    else:
        found.to_csv(place, index=False)
    if seen is not None:
        _print_scores(mean, std, seen)
    _say(f"wrote {out}")


def info(model: Model, /) -> None:
    """Say what a model file holds.

    Args:
        model: File that `sgdgp fit` wrote.
    """
    regressor = SGDGPRegressor.load(model, "cpu")
    _inputs_of(regressor, model)
    print(_description(regressor))


def _say(words: str) -> None:
    print(f"sgdgp: {words}", file=sys.stderr, flush=True)


def _listed(names: Sequence[Any]) -> str:
    """Names in a few words."""
    shown = ", ".join(repr(name) for name in names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def _not_the_same(place: Path, other: Path, argument: str) -> None:
    if place.exists() and other.exists() and place.samefile(other):
        raise ValueError(f"{argument}: {place} would be written over the input")


def _is_parquet(path: Path) -> bool:
    """Whether a table is in Parquet, and not CSV.

    Raises:
        ValueError: In neither, by its name.
    """
    ends = path.suffixes
    if ends and ends[-1] in _COMPRESSED:
        ends = ends[:-1]
    if not ends or (ends[-1] != ".csv" and path.suffix not in _PARQUET):
        raise ValueError(f"{path}: expected a name that ends in .csv or .parquet")
    return path.suffix in _PARQUET


def _read(path: Path) -> pd.DataFrame:
    """A table with a row and a column at least; its columns have names."""
    parquet = _is_parquet(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        if parquet:
            table = pd.read_parquet(path)
        else:
            with warnings.catch_warnings():
                # A row that is longer than the header would lose its end.
                warnings.simplefilter("error", pd.errors.ParserWarning)
                table = pd.read_csv(
                    path, index_col=False, skipinitialspace=True, low_memory=False
                )
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path}: the file is empty") from None
    except (ValueError, EOFError, pd.errors.ParserWarning) as error:
        kind = "Parquet" if parquet else "CSV"
        raise ValueError(f"{path}: cannot be read as {kind}: {error}") from error
    if table.empty:
        raise ValueError(
            f"{path}: there are no rows below the names of the columns, "
            f"{_listed(list(table))}"
        )
    return table.rename(columns=str).reset_index(drop=True)


def _need(table: pd.DataFrame, names: Sequence[str], path: Path) -> None:
    """Name the columns that are not there."""
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(
            f"{path}: there is no column {_listed(missing)}; the first line has "
            f"{_listed(list(table))}"
        )


def _numbers(
    table: pd.DataFrame, path: Path, advice: str = "", *, missing: bool = False
) -> pd.DataFrame:
    """The table in float64.

    Raises:
        ValueError: A column holds something else; names its first row that does.
    """
    wrong: list[str] = []
    columns = {}
    for name, column in table.items():
        problem = _problem(column, missing)
        if problem:
            wrong.append(f"{path}: column {name!r}{problem}")
        else:
            columns[name] = _as_float(column)
    if len(wrong) > _TOLD:
        wrong[_TOLD:] = [f"{path}: {len(wrong) - _TOLD} more columns"]
    if wrong:
        raise ValueError("\n".join(wrong) + advice)
    return pd.DataFrame(columns)


def _as_float(column: pd.Series) -> np.ndarray:
    """Numbers (n,); text that is none is NaN."""
    found = pd.to_numeric(column, errors="coerce")
    return found.to_numpy(np.float64, na_value=np.nan)


def _problem(column: pd.Series, missing: bool) -> str:
    """What is wrong with a column of numbers; "" if nothing is."""
    types = pd.api.types
    real = types.is_numeric_dtype(column) and not types.is_complex_dtype(column)
    if not real and not types.is_string_dtype(column) and column.dtype != object:
        return f" holds {column.dtype}, expected numbers"
    values, empty = _as_float(column), column.isna().to_numpy()
    text = np.isnan(values) & ~empty
    bad = ~np.isfinite(values) & ~(empty if missing else False)
    row = int((text if text.any() else bad).argmax())
    if text.any():
        return f", row {row + 1}: expected a number, found {column.iloc[row]!r}"
    if not bad.any():
        return ""
    found = "nothing" if empty[row] else f"{values[row]}"
    return (
        f", row {row + 1}: expected a finite number, found {found} (in {bad.sum()} of "
        f"{len(bad)} rows)"
    )


def _inputs_of(regressor: SGDGPRegressor, path: Path) -> list[str]:
    """Names of the columns that a model wants."""
    if len(regressor.y_mean_) > 1 or not hasattr(regressor, "feature_names_in_"):
        raise ValueError(
            f"{path}: this model has several targets, or inputs without names; it is "
            "read by sgdgp.load in Python"
        )
    return regressor.feature_names_in_.tolist()


def _print_scores(mean: np.ndarray, std: np.ndarray, seen: np.ndarray) -> None:
    known = ~np.isnan(seen)
    if not known.any():
        return
    found, variance, y = map(
        torch.from_numpy, (mean[known], std[known] ** 2, seen[known])
    )
    nll = metrics.negative_log_predictive_density(found, variance, y)
    coverage = metrics.interval_coverage(found, variance, y, _LEVEL)
    print(f"rows      {len(y)}")
    print(f"RMSE      {metrics.rmse(found, y):.4g}")
    print(f"NLL       {nll:.4g}")
    print(f"coverage  {coverage:.3f} of {_LEVEL:.0%} intervals")


def _description(model: SGDGPRegressor) -> str:
    """What a model is, in lines."""
    problem = model.posterior_.solved[0].problem
    learned, noise = model.learning_, model._noise
    kernel = model.kernel if isinstance(model.kernel, str) else model.kernel_
    lines = [
        f"target     {(model.target_names_ or ['without a name'])[0]}: mean "
        f"{model.y_mean_[0]:.4g}, standard deviation {model.y_scale_[0]:.4g}",
        f"rows       {len(problem.x)}",
        f"columns    {model.n_features_in_}",
        "noise      of each row"
        if noise is None
        else f"noise      standard deviation {model.noise_**0.5:.4g}",
        "learning   none"
        if learned is None
        else f"learning   {learned.steps} steps, ended by {learned.reason}",
        f"solver     {model.solver_}",
        f"kernel     {kernel}",
    ]
    if not isinstance(model.kernel_, Kernel):
        return "\n".join(lines)
    names = model.feature_names_in_
    for path, raw, constraint in model.kernel_.named_parameters_and_constraints():
        values = (raw if constraint is None else constraint.transform(raw)).flatten()
        name = path.replace("raw_", "").replace("base_kernel.", "")
        if len(values) == len(names):
            lines.append(f"{name}, by column:")
            pairs = zip(names, values.tolist(), strict=True)
            lines += [f"  {column}  {value:.4g}" for column, value in pairs]
        else:
            lines.append(f"{name}  {', '.join(f'{v:.4g}' for v in values.tolist())}")
    return "\n".join(lines)
