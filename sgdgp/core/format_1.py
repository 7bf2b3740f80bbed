"""What files of version 0.1.0 say, in the terms of format 2.

Format 1 had a layout for every kind of file; format 2 has one codec. Each function here
takes the tensors and the state of one kind and returns the state that ``codec.encode``
would have made, over the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

Tensors: TypeAlias = Mapping[str, Tensor]
State: TypeAlias = dict[str, Any]


def solve(tensors: Tensors, state: State) -> State:
    """The checkpoint of a solve."""
    probe = [name for name in tensors if name.startswith("probe.")]
    return {
        "components": _components(state["components"]),
        "solver": state["solver"],
        "solution": _solution(state["solution"], ""),
        "probe": {"dict": {n.removeprefix("probe."): _tensor(n) for n in probe}},
    }


def posterior(tensors: Tensors, state: State, prefix: str = "") -> State:
    """A posterior.

    Args:
        tensors: All tensors of the file.
        state: The state of the posterior.
        prefix: What the names of its tensors begin with.
    """
    systems: dict[str, State] = {}
    numbers: dict[str, int] = {}
    parts = []
    for i, part in enumerate(state["parts"]):
        rows, name = prefix + part["rows"], f"{prefix}part.{i}"
        if rows not in numbers:
            numbers[rows] = len(numbers)
            systems[rows] = {
                "x": _tensor(f"{rows}.x"),
                "inputs": _tensor(f"{rows}.inputs"),
                "noise": _tensor(f"{rows}.noise"),
                "operator": part["operator"],
                "mean": _tensor(f"{rows}.check.mean"),
                "kernel": _tensor(f"{rows}.check.kernel"),
            }
        dtype = str(tensors[f"{rows}.inputs"].dtype).removeprefix("torch.")
        parts.append(
            {
                "system": numbers[rows],
                "rhs": _tensor(f"{name}.rhs"),
                "noise_draws": _tensor(f"{name}.noise_draws"),
                "draws": _draws(part["draws"], prefix, {"dtype": dtype}),
                "solution": _solution(part["solution"], f"{name}.solution."),
                "solver": _settings(part["solver"]),
                "solver_in_words": part["solver_in_words"],
                "num_samples": part["num_samples"],
                "timings": _plain(part["timings"]),
                "settings": _plain(part["settings"]),
            }
        )
    return {
        "kind": state["kind"],
        "structure": _plain(state["structure"]),
        "model": _dict(
            {name: _tensor(f"{prefix}model.{name}") for name in state["parameters"]}
        ),
        "widths": _plain(state["widths"]),
        "dtypes": {"list": [{"dtype": name} for name in state["dtypes"]]},
        "systems": {"list": [_dict(system) for system in systems.values()]},
        "parts": {"list": [_dict(part) for part in parts]},
    }


def fit(tensors: Tensors, state: State) -> State:
    """The checkpoint of a fit."""
    optimiser: dict[str, State] = {}
    for name in tensors:
        part, _, rest = name.partition(".")
        if part == "optimiser":
            number, _, key = rest.partition(".")
            optimiser.setdefault(number, {})[key] = _tensor(name)
    path = None
    if "mll.path.value" in tensors:
        path = _object(
            "PathIntegral",
            {
                "value": float(tensors["mll.path.value"]),
                "point": _numbered("mll.path.point.", tensors),
                "gradient": _numbered("mll.path.gradient.", tensors),
            },
        )
    weights = _below("mll.weights.", tensors)
    systems = range(int(state["mll"]["systems"]))
    return {
        "components": _components(state["components"]),
        "reason": state["reason"],
        "seconds": state["seconds"],
        "recoveries": state["recoveries"],
        "history": {"list": [_fit_entry(entry) for entry in state["history"]]},
        "groups": _plain(state["groups"]),
        "model": _dict(_below("model.", tensors)),
        "before": _numbered("before.", tensors),
        "optimiser": _dict({n: _dict(parts) for n, parts in optimiser.items()}),
        "mll": _dict(
            {
                "passes": state["mll"]["passes"],
                "evaluations": state["mll"]["evaluations"],
                "weights": {"list": [weights.get(str(i)) for i in systems]},
                "path": path,
            }
        ),
    }


def botorch(tensors: Tensors, state: State) -> State:
    """A ``PathwiseModel``."""
    solver = _settings(state["settings"]["solver"]) or "auto"
    settings = {**state["settings"], "solver": solver}
    found: State = {
        "model": _dict({n: _tensor(f"model.{n}") for n in state["parameters"]}),
        "columns": None if state["columns"] is None else _tuple(state["columns"]),
        "cursor": state["cursor"],
        "settings": _object("SolveSettings", settings),
        "data": {"list": []},
    }
    for i, own in enumerate(state["posteriors"]):
        found["data"]["list"].append(_dict(_below(f"data.{i}.", tensors)))
        for name, value in posterior(tensors, own, f"posterior.{i}.").items():
            found[f"posterior.{i}.{name}"] = value
    return found


def thompson(tensors: Tensors, state: State) -> State:
    """The record of a Thompson sampling run."""
    pending = None
    if state["pending"] is not None:
        pending = _object(
            "Pending",
            {
                "step": _object("Step", state["pending"]),
                "proposals": _tensor("proposals"),
                "results": _tensor("results"),
            },
        )
    record = {
        "x": _tensor("x"),
        "y": _tensor("y"),
        "history": _tuple(_object("Step", step) for step in state["history"]),
        "pending": pending,
    }
    return {
        "components": _plain(state["settings"]),
        "record": _object("Record", record),
    }


def recycled(tensors: Tensors, state: State) -> State:
    """What a solve left for the next one, in a file of its own."""
    pair = [_tensor(name) for name in ("directions", "images") if name in tensors]
    parts = {
        "residual": _tensor("residual"),
        "inverse": _inverse(state, "inverse.") if state else None,
        "collected": _tuple([_tuple(pair)] if pair else []),
    }
    return {"recycled": _object("Recycled", parts)}


def network(tensors: Tensors, state: State) -> State:
    """The posterior of a network."""
    return {
        "weights": _plain(state["weights"]),
        "network": _plain(state["network"]),
        "fields": {"dict": _with_priors(state["fields"])},
    }


def network_fit(tensors: Tensors, state: State) -> State:
    """The checkpoint of a network's fit."""
    return {
        "components": _plain(state["components"]),
        "run": _with_priors(state["run"]),
    }


def _with_priors(state: Any) -> Any:
    """The codec of networks is today's, but for the priors of weights."""
    if isinstance(state, list):
        return [_with_priors(item) for item in state]
    if not isinstance(state, dict):
        return state
    if "prior" not in state or "names" not in state:
        return {key: _with_priors(value) for key, value in state.items()}
    name, stored = state["prior"], state["state"]
    stops = stored["stops"]
    arguments = {
        "num_weights": stored["num_weights"],
        "precisions": _tensor(f"{name}.precisions"),
        "groups": _tuple(
            {"slice": [start, stop]}
            for start, stop in zip([0, *stops[:-1]], stops, strict=True)
        ),
        "group_of": _plain(stored["group_of"]),
    }
    if stored["kind"] == "diagonal":
        scales = _tensor(f"{name}.scales") if "scales" in state["names"] else None
        return _object("DiagonalPrior", {**arguments, "scales": scales})
    blocks = (
        _tensor(f"{name}.block.{i}.scales")
        if "scales" in parts
        else _object(
            "MatrixRoot", {part: _tensor(f"{name}.block.{i}.{part}") for part in parts}
        )
        for i, parts in enumerate(stored["blocks"])
    )
    return _object("KroneckerPrior", {**arguments, "blocks": _tuple(blocks)})


def _components(stored: Mapping[str, str]) -> State:
    """Names that have come to be words."""
    words = {
        "y": "the training targets y",
        "seed": "the seed, or the state of the generator that was passed",
    }
    return _dict(
        {
            words.get(name, re.sub(r"^x(\d*)$", r"the training inputs x\1", name)): text
            for name, text in stored.items()
        }
    )


def _solution(stored: State, prefix: str) -> State:
    parts = {name: _plain(value) for name, value in stored.items()}
    history = {
        "clock": _tensor(f"{prefix}history.clock"),
        "residuals": _tensor(f"{prefix}history.residuals"),
    }
    own = {
        "weights": _tensor(f"{prefix}weights"),
        "residuals": _tensor(f"{prefix}residuals"),
        "history": _dict(history),
        "warnings": _tuple(stored["warnings"]),
    }
    return _object("Solution", {**parts, **own})


def _settings(stored: Any) -> Any:
    """A solver, or a part of its settings."""
    if isinstance(stored, list):
        return _tuple(_settings(item) for item in stored)
    if not isinstance(stored, dict) or "dtype" in stored:
        return stored
    settings = {name: _settings(value) for name, value in stored["settings"].items()}
    return _object(stored["type"], settings)


def _draws(stored: State, prefix: str, dtype: State) -> State:
    name = prefix + stored["name"]
    if stored["draws"] == "exact":
        tensors = ("points", "factor", "normals", "values", "generator")
        return _object(
            "ExactDraws",
            {
                "kernel": {"given": "kernel"},
                "num_samples": stored["num_samples"],
                "dtype": dtype,
                "max_points": stored["max_points"],
                **{part: _tensor(f"{name}.{part}") for part in tensors},
            },
        )
    if stored["draws"] != "features":
        raise ValueError(f"unknown prior draws {stored['draws']!r}")
    groups = (
        _object(
            "DrawGroup",
            {
                "feature_map": _features(group, prefix),
                "weights": _tensor(f"{name}.{i}.weights"),
            },
        )
        for i, group in enumerate(stored["groups"])
    )
    return _object(
        "PriorDraws",
        {
            "groups": _tuple(groups),
            "dim": stored["dim"],
            "dtype": dtype,
            "device": {"device": "of the reader"},
        },
    )


def _features(stored: Any, prefix: str) -> Any:
    """A feature map, or a part of one."""
    if isinstance(stored, list):
        return {"list": [_features(item, prefix) for item in stored]}
    if not isinstance(stored, dict):
        return stored
    if "tensor" in stored:
        return _tensor(prefix + stored["tensor"])
    if "of_kernel" in stored:
        return {"given": {"features": ".".join(str(i) for i in stored["of_kernel"])}}
    arguments = {k: _features(v, prefix) for k, v in stored["arguments"].items()}
    return _object(stored["map"], arguments)


def _inverse(stored: State, prefix: str) -> State:
    """A preconditioner."""

    def named(*names: str) -> State:
        return {name: _tensor(prefix + name) for name in names}

    known = {"passes": stored["passes"]}
    if stored["kind"] == "low_rank":
        known["magnitude"] = stored["magnitude"]
        return _object(
            "LowRankInverse", {**named("scale", "basis", "shrinkage"), **known}
        )
    known["settings"] = _plain(stored["settings"])
    sparse = named("starts", "columns", "values")
    if stored["kind"] == "two_level":
        factor = _object("SparseFactor", {**sparse, "explained": stored["explained"]})
        return _object(
            "TwoLevelInverse",
            {"sparse": factor, **named("basis", "shrinkage"), **known},
        )
    inner = _inverse(stored["inverse"], f"{prefix}first.")
    return _object(
        "ExtendedInverse",
        {"inverse": inner, "first": stored["first"], "rows": _dict(sparse), **known},
    )


def _fit_entry(stored: State) -> State:
    values = {name: _tuple(value) for name, value in stored["parameters"].items()}
    return _object("FitEntry", {**stored, "parameters": _dict(values)})


def _below(prefix: str, tensors: Tensors) -> State:
    """Tensors whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): _tensor(name)
        for name in tensors
        if name.startswith(prefix)
    }


def _numbered(prefix: str, tensors: Tensors) -> State:
    """Tensors that are numbered behind a prefix."""
    found = _below(prefix, tensors)
    return {"list": [found[str(i)] for i in range(len(found))]}


def _object(cls: str, arguments: Mapping[str, Any]) -> State:
    return {"class": cls, "arguments": dict(arguments)}


def _tensor(name: str) -> State:
    return {"tensor": name, "turned": False}


def _tuple(items: Iterable[Any]) -> State:
    return {"tuple": list(items)}


def _dict(items: Mapping[str, Any]) -> State:
    return {"dict": dict(items)}


def _plain(value: Any) -> Any:
    """Numbers, strings, lists and dictionaries of JSON."""
    if isinstance(value, list):
        return {"list": [_plain(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": {key: _plain(item) for key, item in value.items()}}
    return value
