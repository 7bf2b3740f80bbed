"""What has been measured beside what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from benchmarks.checks import Check, thresholds
from benchmarks.learned_priors.priors import Record
from benchmarks.networks.table import markdown
from benchmarks.uci.columns import DASH, format_figure, mean_and_error

Results = Mapping[str, Mapping[str, Sequence[Record]]]
"""Records of each set of each row."""

_PRIOR, _BY_EVIDENCE = "strength 1", "learned"
"""What thresholds are for, as no target has a say in it, and what stands beside."""

_FEW = {"regression": (50, 100), "fewshot": (5, 10, 50)}
_GAIN = {"energy": 0.3}
_ACCURACY, _LOSS = 0.05, 1.1


def checks(results: Results) -> list[Check]:
    """All that are asked of the rows that there are."""
    parts = {
        "regression": _transfer,
        "fewshot": _few,
        "continual": _continual,
        "resnet50": _cost,
    }
    found: list[Check] = []
    for row, part in parts.items():
        if any(results.get(row, {}).values()):
            found += part(results[row])
    return found + list(_certificates(results))


def report(results: Results) -> str:
    """A table for each set, then the figures beside their thresholds."""
    parts = []
    for row, sets in results.items():
        for name, records in sets.items():
            if records and row != "resnet50":
                seeds = len({record["seed"] for record in records})
                table = _curves(records) if row == "continual" else _sizes(records)
                parts.append(f"**{row}, {name}** ({seeds} seeds)\n\n{table}")
    return "\n\n".join([*parts, thresholds(checks(results))])


def _transfer(sets: Mapping[str, Sequence[Record]]) -> Iterator[Check]:
    """Regressions: the learned prior against the isotropic one."""
    few, lower = _FEW["regression"], []
    for name, records in sets.items():
        least = _GAIN.get(name, 0.0)
        for prior in (_PRIOR, _BY_EVIDENCE):
            gains = _differences(records, few, "isotropic", prior, "nll")
            mean, error = mean_and_error(gains)
            yield Check(
                f"{name}: NLL gain of {prior} over isotropic, n = {_list(few)}",
                format_figure(mean, error, 3),
                f"at least {least}" if least else "positive",
                mean >= least if least else mean > 0,
            )
        lower += _differences(records, few, "isotropic", _PRIOR, "bound")
    mean, error = mean_and_error(lower)
    yield Check(
        f"{', '.join(sets)}: bound below isotropic's by, n = {_list(few)}",
        format_figure(mean, error, 3),
        "at least 0.03",
        mean >= 0.03,
    )


def _few(sets: Mapping[str, Sequence[Record]]) -> Iterator[Check]:
    """Few images: NLL below that of the others, and a bound that says something."""
    for name, records in sets.items():
        for n, other in product(
            _FEW["fewshot"], ("isotropic", "g-prior", "fine-tuning")
        ):
            figures = [
                mean_and_error(_differences(records, (n,), prior, other, "nll"))
                for prior in (_PRIOR, _BY_EVIDENCE)
            ]
            own, beside = (format_figure(*figure, 3) for figure in figures)
            yield Check(
                f"{name}: NLL minus that of {other}, {n} images a class",
                f"{own} (by evidence {beside})",
                "negative",
                figures[0][0] < 0,
            )
        learned = [r for r in records if r["method"] == _PRIOR]
        sizes = sorted({r["n"] for r in learned})
        bounds = {n: _mean(learned, "bound", n=n) for n in sizes}
        chance = learned[0]["chance"]
        told = [n for n in sizes if all(bounds[m] < chance for m in sizes if m >= n)]
        yield Check(
            f"{name}: bound below {chance:.2f} from so many images a class",
            f"{told[0]} ({bounds[told[0]]:.3f})" if told else DASH,
            "some number",
            bool(told),
        )


def _continual(sets: Mapping[str, Sequence[Record]]) -> Iterator[Check]:
    """The first task after the last one."""
    for name, records in sets.items():
        for method in ("learned", "EWC", "fine-tuning"):
            own = [r for r in records if r["method"] == method]
            fall, error = mean_and_error([_fall(r) for r in own])
            ratio, spread = mean_and_error([_ratio(r) for r in own])
            keeps = fall <= _ACCURACY and ratio <= _LOSS
            asked = {"learned": "at most", "fine-tuning": "not at most"}.get(method)
            holds = {"learned": keeps, "fine-tuning": not keeps}.get(method, True)
            yield Check(
                f"{name}: {method}, first task's accuracy lost, NLL times",
                f"{format_figure(fall, error, 3)}, {format_figure(ratio, spread, 2)}",
                f"{asked} {_ACCURACY}, {_LOSS}" if asked else "beside",
                holds,
            )
        sizes = [r["bytes"] for r in records if r["method"] == "learned"]
        most = max(max(s) / s[0] for s in sizes)
        grown = "the outputs alone" if name == "classes" else "nothing"
        yield Check(
            f"{name}: bytes of the prior after the first and the last task",
            f"{sizes[0][0]:,}, {sizes[0][-1]:,}",
            f"grows by {grown}",
            most < (1.05 if name == "classes" else 1.0001),
        )


def _cost(sets: Mapping[str, Sequence[Record]]) -> Iterator[Check]:
    """A prior of 25.6 million weights."""
    for record in (r for records in sets.values() for r in records):
        peak, size = record["peak_rss_mb"] / 1e3, record["file_mb"] / 1e3
        yield Check(
            "ResNet-50: GB at most for factors of a batch of "
            f"{record['examples']}, product, solve, sample; GB of the file",
            f"{peak:.1f}; {size:.2f}",
            "at most 12",
            peak <= 12,
        )


def _certificates(results: Results) -> Iterator[Check]:
    """Bounds hold on test examples, all sets, sizes and priors."""
    found = [
        record
        for sets in results.values()
        for records in sets.values()
        for record in records
        if "bound" in record
    ]
    if not found:
        return
    seeds = len({record["seed"] for record in found})
    for what, violated in (
        ("test risk above its bound", lambda r: r["test_risk"] > r["bound"]),
        ("inverse kl above McAllester", lambda r: r["bound"] > r["mcallester"]),
    ):
        count = sum(map(violated, found))
        yield Check(
            f"{what}, of {len(found)} certificates ({seeds} seeds)",
            str(count),
            "0",
            count == 0,
        )


def _sizes(records: Sequence[Record]) -> str:
    """Means over seeds by method and number of examples."""
    columns = {
        "NLL": ("nll", 3),
        "ECE": ("ece", 3),
        "accuracy": ("accuracy", 3),
        "evidence": ("evidence", 1),
        "bound": ("bound", 3),
        "test risk": ("test_risk", 3),
        "strength": ("strength", 2),
    }
    columns = {
        name: column
        for name, column in columns.items()
        if any(column[0] in record for record in records)
    }
    rows = [["n", "", *columns], ["---:", "---", *("---:" for _ in columns)]]
    for n, method in dict.fromkeys((r["n"], r["method"]) for r in records):
        own = [r for r in records if (r["n"], r["method"]) == (n, method)]
        rows.append([str(n), method, *(_cell(own, *c) for c in columns.values())])
    return markdown(rows)


def _curves(records: Sequence[Record]) -> str:
    """Of the first task after each, and of all after the last."""
    count = len(records[0]["after"])
    heads = [f"first after {k + 1}" for k in range(count)] + ["all after the last"]
    rows = [["accuracy / NLL", *heads], ["---", *("---:" for _ in heads)]]
    for method in dict.fromkeys(r["method"] for r in records):
        own = [r["after"] for r in records if r["method"] == method]
        cells = [_pair([after[k][0] for after in own]) for k in range(count)] + [
            _pair([score for after in own for score in after[-1]])
        ]
        rows.append([method, *cells])
    return markdown(rows)


def _pair(scores: Sequence[Record]) -> str:
    return f"{_mean(scores, 'accuracy'):.3f} / {_mean(scores, 'nll'):.3f}"


def _cell(records: Sequence[Record], key: str, digits: int) -> str:
    values = [record[key] for record in records if record.get(key) is not None]
    return format_figure(*mean_and_error(values), digits) if values else DASH


def _differences(
    records: Sequence[Record], sizes: Sequence[int], one: str, other: str, key: str
) -> list[float]:
    """One method's score minus another's, of each seed a mean over sizes."""
    found = []
    for seed in sorted({record["seed"] for record in records}):
        own = [r for r in records if r["seed"] == seed and r["n"] in sizes]
        left, right = (
            [r[key] for r in own if r["method"] == method] for method in (one, other)
        )
        if left and right:
            found.append(sum(left) / len(left) - sum(right) / len(right))
    return found


def _mean(records: Sequence[Record], key: str, **where: object) -> float:
    values = [
        r[key]
        for r in records
        if all(r[name] == value for name, value in where.items())
    ]
    return sum(values) / len(values)


def _fall(record: Record) -> float:
    first = [after[0]["accuracy"] for after in record["after"]]
    return first[0] - first[-1]


def _ratio(record: Record) -> float:
    first = [after[0]["nll"] for after in record["after"]]
    return first[-1] / first[0]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
