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
    return {
        "components": _components(state["components"]),
        "solver": state["solver"],
        "solution": _solution(state["solution"], ""),
        "probe": _dict(_below("probe.", tensors)),
    }


def posterior(tensors: Tensors, state: State, prefix: str = "") -> State:
    """A posterior.

    Args:
        tensors: All tensors of the file.
        state: The state of the posterior.
        prefix: What the names of its tensors begin with.
    """
    model = {name: _tensor(f"{prefix}model.{name}") for name in state["parameters"]}
    firsts = list(dict.fromkeys(part["rows"] for part in state["parts"]))
    systems, parts = [], []
    for rows in firsts:
        first = state["parts"][int(rows.removeprefix("part."))]
        system = _named(f"{prefix}{rows}.", "x", "inputs", "noise")
        check = _named(f"{prefix}{rows}.check.", "mean", "kernel")
        systems.append(_dict({**system, **check, "operator": first["operator"]}))
    for i, part in enumerate(state["parts"]):
        name = f"{prefix}part.{i}."
        inputs = tensors[f"{prefix}{part['rows']}.inputs"]
        dtype = {"dtype": str(inputs.dtype).removeprefix("torch.")}
        own = {
            "system": firsts.index(part["rows"]),
            "draws": _draws(part["draws"], prefix, dtype),
            "solution": _solution(part["solution"], f"{name}solution."),
            **_named(name, "rhs", "noise_draws"),
            # It was among what a solver chose.
            "passes_from_zero": part["solution"]["settings"].get(
                "passes_from_zero", 0.0
            ),
        }
        parts.append(_dict({**_values(part), **own}))
    return {
        "kind": state["kind"],
        "structure": _value(state["structure"]),
        "model": _dict(model),
        "widths": {"list": state["widths"]},
        "dtypes": {"list": [{"dtype": name} for name in state["dtypes"]]},
        "systems": {"list": systems},
        "parts": {"list": parts},
    }


def fit(tensors: Tensors, state: State) -> State:
    """The checkpoint of a fit."""
    optimiser: dict[str, State] = {}
    for name, tensor in _below("optimiser.", tensors).items():
        number, _, key = name.partition(".")
        optimiser.setdefault(number, {})[key] = tensor
    path = None
    if "mll.path.value" in tensors:
        points = {
            part: _numbered(f"mll.path.{part}.", tensors)
            for part in ("point", "gradient")
        }
        value = float(tensors["mll.path.value"])
        path = _built("PathIntegral", value=value, **points)
    weights = _below("mll.weights.", tensors)
    systems = range(int(state["mll"]["systems"]))
    mll = {
        "passes": state["mll"]["passes"],
        "evaluations": state["mll"]["evaluations"],
        "weights": {"list": [weights.get(str(i)) for i in systems]},
        "path": path,
    }
    return {
        **_values(state),
        "components": _components(state["components"]),
        "history": {"list": [_object("FitEntry", e) for e in state["history"]]},
        # What it did not know of.
        **{name: {"list": []} for name in ("best", "images")},
        **dict.fromkeys(("falls", "first_steps", "last_step"), 0),
        "groups": {"list": [_value(group) for group in state["groups"]]},
        "model": _dict(_below("model.", tensors)),
        "before": _numbered("before.", tensors),
        "optimiser": _dict({n: _dict(parts) for n, parts in optimiser.items()}),
        "mll": _dict(mll),
    }


def network(tensors: Tensors, state: State) -> State:
    """The posterior of a network."""
    return {
        "weights": {"list": state["weights"]},
        "network": _value(state["network"]),
        "fields": {"dict": _with_priors(state["fields"])},
    }


def network_fit(tensors: Tensors, state: State) -> State:
    """The checkpoint of a network's fit."""
    components = _value(state["components"])
    return {"components": components, "run": _with_priors(state["run"])}


def botorch(tensors: Tensors, state: State) -> State:
    """A ``PathwiseModel``."""
    settings = {**state["settings"], "solver": state["settings"]["solver"] or "auto"}
    model = {name: _tensor(f"model.{name}") for name in state["parameters"]}
    data = [_below(f"data.{i}.", tensors) for i in range(len(state["posteriors"]))]
    found: State = {
        "model": _dict(model),
        "columns": _value(state["columns"]),
        "cursor": state["cursor"],
        "settings": _object("SolveSettings", settings),
        "data": {"list": [_dict(seen) for seen in data]},
    }
    for i, own in enumerate(state["posteriors"]):
        prefix = f"posterior.{i}."
        for name, value in posterior(tensors, own, prefix).items():
            found[f"{prefix}{name}"] = value
    return found


def thompson(tensors: Tensors, state: State) -> State:
    """The record of a Thompson sampling run."""
    pending = None
    if state["pending"] is not None:
        pending = _built(
            "Pending",
            step=_object("Step", state["pending"]),
            **_named("", "proposals", "results"),
        )
    history = _tuple(_object("Step", step) for step in state["history"])
    record = _built("Record", **_named("", "x", "y"), history=history, pending=pending)
    return {"components": _value(state["settings"]), "record": record}


def recycled(tensors: Tensors, state: State) -> State:
    """What a solve left for the next one, in a file of its own."""
    pairs = []
    if "directions" in tensors:
        pairs.append(_tuple(_named("", "directions", "images").values()))
    found = _built(
        "Recycled",
        residual=_tensor("residual"),
        inverse=_inverse(state, "inverse.") if state else None,
        collected=_tuple(pairs),
    )
    return {"recycled": found}


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
    history = _dict(_named(f"{prefix}history.", "clock", "residuals"))
    own = _named(prefix, "weights", "residuals")
    return _built("Solution", **{**_values(stored), **own, "history": history})


def _draws(stored: State, prefix: str, dtype: State) -> State:
    name = f"{prefix}{stored['name']}."
    if stored["draws"] == "exact":
        return _built(
            "ExactDraws",
            kernel={"given": "kernel"},
            num_samples=stored["num_samples"],
            dtype=dtype,
            max_points=stored["max_points"],
            **_named(name, "points", "factor", "normals", "values", "generator"),
        )
    if stored["draws"] != "features":
        raise ValueError(f"unknown prior draws {stored['draws']!r}")
    groups = [
        _built(
            "DrawGroup",
            feature_map=_value(group, prefix),
            **_named(f"{name}{i}.", "weights"),
        )
        for i, group in enumerate(stored["groups"])
    ]
    return _built(
        "PriorDraws",
        groups=_tuple(groups),
        dim=stored["dim"],
        dtype=dtype,
        device={"device": "of the reader"},
    )


def _inverse(stored: State, prefix: str) -> State:
    """A preconditioner."""
    known: State = {"passes": stored["passes"]}
    if stored["kind"] == "low_rank":
        known |= _named(prefix, "scale", "basis", "shrinkage")
        return _built("LowRankInverse", magnitude=stored["magnitude"], **known)
    known["settings"] = _value(stored["settings"])
    sparse = _named(prefix, "starts", "columns", "values")
    if stored["kind"] == "two_level":
        known |= _named(prefix, "basis", "shrinkage")
        factor = _built("SparseFactor", **sparse, explained=stored["explained"])
        return _built("TwoLevelInverse", sparse=factor, **known)
    inner = _inverse(stored["inverse"], f"{prefix}first.")
    known |= {"inverse": inner, "first": stored["first"], "rows": _dict(sparse)}
    return _built("ExtendedInverse", **known)


def _with_priors(state: Any) -> Any:
    """The codec of networks is today's, but for the priors of weights."""
    if isinstance(state, list):
        return [_with_priors(item) for item in state]
    if not isinstance(state, dict):
        return state
    if "prior" not in state or "names" not in state:
        return {key: _with_priors(value) for key, value in state.items()}
    name, stored = f"{state['prior']}.", state["state"]
    stops = stored["stops"]
    slices = zip([0, *stops[:-1]], stops, strict=True)
    shared = {
        "num_weights": stored["num_weights"],
        "precisions": _tensor(f"{name}precisions"),
        "groups": _tuple({"slice": list(ends)} for ends in slices),
        "group_of": _value(stored["group_of"]),
    }
    if stored["kind"] == "diagonal":
        scales = _tensor(f"{name}scales") if "scales" in state["names"] else None
        return _built("DiagonalPrior", **shared, scales=scales)
    blocks = []
    for i, parts in enumerate(stored["blocks"]):
        own = _named(f"{name}block.{i}.", *parts)
        blocks.append(own["scales"] if "scales" in own else _built("MatrixRoot", **own))
    return _built("KroneckerPrior", **shared, blocks=_tuple(blocks))


def _value(stored: Any, prefix: str = "") -> Any:
    """Plain values, solvers with their settings, and feature maps."""
    if isinstance(stored, list):
        return _tuple(_value(item, prefix) for item in stored)
    if not isinstance(stored, dict) or "dtype" in stored:
        return stored
    if "tensor" in stored:
        return _tensor(prefix + stored["tensor"])
    if "of_kernel" in stored:
        return {"given": {"features": ".".join(str(i) for i in stored["of_kernel"])}}
    if stored.get("type") == "Refined":
        return _value(_without_refinement(stored["settings"]))
    if "type" in stored and "settings" in stored:
        return _object(stored["type"], stored["settings"])
    if "map" in stored and "arguments" in stored:
        return _object(stored["map"], stored["arguments"], prefix)
    return _dict(_values(stored, prefix))


def _without_refinement(settings: Mapping[str, Any]) -> State:
    """The inner solver of Refined, which alone does the same, with its limits."""
    inner = settings["solver"]
    limits = ("tolerance", "max_passes", "max_seconds")
    own = {name: settings[name] for name in limits if name in inner["settings"]}
    return {**inner, "settings": {**inner["settings"], **own}}


def _values(stored: Mapping[str, Any], prefix: str = "") -> State:
    return {name: _value(value, prefix) for name, value in stored.items()}


def _object(cls: str, arguments: Mapping[str, Any], prefix: str = "") -> State:
    """An object of arguments as they were stored."""
    return _built(cls, **_values(arguments, prefix))


def _built(cls: str, **arguments: Any) -> State:
    """An object of arguments as they are stored now."""
    return {"class": cls, "arguments": arguments}


def _tensor(name: str) -> State:
    return {"tensor": name, "turned": False}


def _named(prefix: str, *names: str) -> State:
    """Tensors by their names behind a prefix."""
    return {name: _tensor(f"{prefix}{name}") for name in names}


def _below(prefix: str, tensors: Tensors) -> State:
    """All tensors whose names begin so, by the rest of their names."""
    names = [name for name in tensors if name.startswith(prefix)]
    return _named(prefix, *(name.removeprefix(prefix) for name in names))


def _numbered(prefix: str, tensors: Tensors) -> State:
    """All tensors that are numbered behind a prefix."""
    count = len(_below(prefix, tensors))
    return {"list": [_tensor(f"{prefix}{i}") for i in range(count)]}


def _tuple(items: Iterable[Any]) -> State:
    return {"tuple": list(items)}


def _dict(items: Mapping[str, Any]) -> State:
    return {"dict": dict(items)}
