"""Heights of memory at several lengths -> the polynomials that are the highest somewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fitcheck.bench.layer_trace import Heights

Poly = list[float]
EXACT = 0.0005  # a height that is a polynomial misses the length that checks by less
TOLERANCE = 0.05  # of the highest: a kernel's workspace goes by steps, no polynomial


def basis(rows: int, length: int, rank: int) -> list[float]:
    """What a height is a sum of."""
    tokens = rows * length
    return [1.0, tokens, tokens * length] + ([rank, rank * tokens] if rank else [])


def solved(
    values: Sequence[list[int]], matrix: list[list[float]]
) -> tuple[list[Poly], list[float]]:
    """Polynomials through all points but the last, and their relative errors there."""
    a = torch.tensor(matrix, dtype=torch.float64)
    b = torch.tensor(values, dtype=torch.float64).T
    found = torch.linalg.solve(a[:-1], b[:-1])
    errors = (a[-1] @ found - b[-1]).abs() / b[-1].clamp(min=1)
    polys = [[tidy(x, i) for i, x in enumerate(column)] for column in found.T.tolist()]
    return polys, errors.tolist()


def tidy(value: float, place: int) -> float:
    """Without the noise of the arithmetic: bytes, bytes a token, bytes a pair of tokens."""
    rounded = round(value, (0, 2, 4, 0, 3)[place])
    return int(rounded) if rounded == int(rounded) else rounded


def single(values: list[int], matrix: list[list[float]]) -> Poly:
    polys, errors = solved([values], matrix)
    if errors[0] > TOLERANCE:
        raise ValueError(f"no polynomial of the length: {errors[0]:.1%} off")
    return trimmed(polys[0])


def trimmed(poly: Poly) -> Poly:
    while poly and not poly[-1]:
        poly = poly[:-1]
    return poly


def highest(curves: list[Heights], matrix: list[list[float]]) -> list[Poly]:
    """The polynomials of the allocations that are the highest somewhere.

    ValueError where they do not account for the highest of every trace.
    """
    columns = list(aligned(curves))
    polys, errors = solved(columns, matrix)
    exact = [poly for poly, error in zip(polys, errors, strict=True) if error < EXACT]
    if not exact:
        raise ValueError("no height is a polynomial of the length")
    ranks = (8, 16, 64, 256) if len(matrix[0]) > 3 else (0,)
    grid = [basis(rows, 2**i, rank) for rows in (1, 2, 8, 64) for i in range(21) for rank in ranks]
    table = torch.tensor(exact, dtype=torch.float64)
    best = sorted({int(i) for i in (torch.tensor(grid, dtype=torch.float64) @ table.T).argmax(1)})
    for point, curve in zip(matrix, curves, strict=True):
        top = max(height for _, height in curve)
        ours = float((torch.tensor(point, dtype=torch.float64) @ table[best].T).max())
        if abs(ours - top) > TOLERANCE * top + 4096:
            raise ValueError(f"{ours / top - 1:+.1%} of the highest of {point[1]:.0f} tokens")
    return [trimmed(exact[i]) for i in best]


def aligned(curves: list[Heights]) -> Iterator[list[int]]:
    """The heights of one allocation in every trace.

    A loop over tokens or chunks has more rounds where there are more of them, so the allocations of
    an operator are counted from the start and from the end, and its highest is one more.
    """
    labels = [dict[str, list[int]]() for _ in curves]
    for table, curve in zip(labels, curves, strict=True):
        for label, height in curve:
            table.setdefault(label, []).append(height)
    for label in labels[0]:
        if all(label in table for table in labels):
            heights = [table[label] for table in labels]
            yield [max(h) for h in heights]
            shared = min(map(len, heights))
            for i in range(-shared, shared):
                yield [h[i] for h in heights]
    yield [max(height for _, height in curve) for curve in curves]
