"""Which stored results may be compared: the same settings, the same problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from benchmarks.thompson_sampling.request import SETTINGS, Request
from benchmarks.thompson_sampling.store import request_of

Result: TypeAlias = Mapping[str, Any]
Problem: TypeAlias = tuple[float, int]
"""A lengthscale and a seed."""


@dataclass(frozen=True)
class Comparison:
    """Methods on problems that all of them were run on.

    Attributes:
        methods: Results of each method by problem.
        problems: The problems of all, by lengthscale and seed.
    """

    methods: Mapping[str, Mapping[Problem, Result]]
    problems: tuple[Problem, ...]

    @property
    def request(self) -> Request:
        """One of the requests: settings and seconds are those of all."""
        runs = next(iter(self.methods.values()))
        return request_of(next(iter(runs.values())))

    @property
    def title(self) -> str:
        """The settings in words."""
        request = self.request
        return (
            f"d = {request.dim}, {request.initial:,} initial points, "
            f"{request.steps} steps x {request.batch}, {request.seconds:g} s a solve"
        )

    def runs(self, method: str) -> list[Result]:
        """The method's results, problem by problem."""
        return [self.methods[method][problem] for problem in self.problems]


def comparisons(results: Sequence[Result]) -> list[Comparison]:
    """One for each group of the same settings and seconds, sometimes two.

    Methods with less than half of the problems of the one that has most of them do
    not limit the comparison of the others; a second one has them all.
    """
    groups: dict[tuple[Any, ...], dict[str, dict[Problem, Result]]] = {}
    for result in results:
        request = request_of(result)
        key = (request.seconds, *(getattr(request, name) for name in SETTINGS))
        runs = groups.setdefault(key, {}).setdefault(request.label, {})
        runs[(request.lengthscale, request.seed)] = result
    found = []
    for key in sorted(groups, key=str):
        methods = groups[key]
        most = max(map(len, methods.values()))
        many = {name: runs for name, runs in methods.items() if 2 * len(runs) >= most}
        found.append(_comparison(many))
        if len(many) < len(methods):
            found.append(_comparison(methods))
    return found


def _comparison(methods: Mapping[str, Mapping[Problem, Result]]) -> Comparison:
    shared = set.intersection(*(set(runs) for runs in methods.values()))
    return Comparison(methods, tuple(sorted(shared)))
