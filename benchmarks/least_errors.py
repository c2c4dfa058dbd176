"""Fitting constants of a model that is linear in them by least absolute relative errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.speed_samples import Sample

Fitted = dict[str, float]


def fitted(samples: Sequence[Sample], rounds: int = 30) -> Fitted:
    """Constants, none negative, that minimize the sum of |1 - predicted / measured|.

    Least squares, reweighted by the errors of the round before, by coordinate descent.
    """
    names = sorted({name for sample in samples for name in sample.features})
    at = {name: i for i, name in enumerate(names)}
    rows = [[(at[n], x / s.seconds) for n, x in s.features.items()] for s in samples]
    scale = [1e-30] * len(names)
    for row in rows:
        for i, x in row:
            scale[i] = max(scale[i], x)
    values, weights = [0.0] * len(names), [1.0] * len(rows)
    for _ in range(rounds):
        values = _least_squares(rows, weights, scale, values)
        misses = [abs(1 - sum(values[i] * x for i, x in row)) for row in rows]
        weights = [1 / max(0.01, miss) for miss in misses]
    return dict(zip(names, values, strict=True))


def _least_squares(
    rows: list[list[tuple[int, float]]],
    weights: list[float],
    scale: list[float],
    values: list[float],
) -> list[float]:
    """Weighted least squares to 1, not negative: each constant in turn, until none moves."""
    size = len(scale)
    square = [[0.0] * size for _ in range(size)]
    target = [0.0] * size
    for row, weight in zip(rows, weights, strict=True):
        for i, x in row:
            target[i] += weight * x / scale[i]
            for j, y in row:
                square[i][j] += weight * x / scale[i] * y / scale[j]
    found = [value * unit for value, unit in zip(values, scale, strict=True)]
    for _ in range(2000):
        moved = 0.0
        for i in range(size):
            if square[i][i] <= 0:
                continue
            rest = target[i] - sum(
                square[i][j] * found[j] for j in range(size) if j != i and square[i][j]
            )
            new = max(0.0, rest / square[i][i])
            moved, found[i] = max(moved, abs(new - found[i])), new
        if moved < 1e-7:
            break
    return [value / unit for value, unit in zip(found, scale, strict=True)]


def percentile(values: Iterable[float], percent: int) -> float:
    """The smallest value that at least `percent` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[-(-len(ordered) * percent // 100) - 1]


def median(values: Iterable[float]) -> float:
    return percentile(values, 50)
