"""Few combinations that have every pair of values in them (a covering array of strength two)."""

import itertools
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = frozenset[tuple[str, int]]
NUM_CANDIDATES = 20
"""Rows that are drawn for each that is kept; more make the array a little shorter."""


def covering_array(
    values: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool], seed: int = 0
) -> list[Row]:
    """Rows in which any two values of different fields that go together occur together.

    The greedy method of AETG (Cohen et al. 1997): of some random rows, each begun with a pair that
    is missing, the one with the most new pairs is kept.

    Args:
        values: What each field may be.
        allowed: Whether a row is possible. A pair is left out if it is not with the first value of
            all other fields.
        seed: Of the draws.
    """
    made = random.Random(seed)
    first = dict.fromkeys(values, 0)
    missing = {
        pair: None for pair in _pairs(values) if allowed(_valued(values, first | dict(pair)))
    }
    rows = []
    while missing:
        candidates = [_draw(values, allowed, missing, made) for _ in range(NUM_CANDIDATES)]
        best = max(candidates, key=lambda indices: sum(p in missing for p in _within(indices)))
        for pair in _within(best):
            missing.pop(pair, None)
        rows.append(_valued(values, best))
    return rows


def _pairs(values: Mapping[str, Sequence[Any]]) -> Iterator[Pair]:
    for one, other in itertools.combinations(values, 2):
        for i, j in itertools.product(range(len(values[one])), range(len(values[other]))):
            yield frozenset({(one, i), (other, j)})


def _within(indices: Mapping[str, int]) -> Iterator[Pair]:
    return (frozenset(pair) for pair in itertools.combinations(indices.items(), 2))


def _draw(
    values: Mapping[str, Sequence[Any]],
    allowed: Callable[[Row], bool],
    missing: Mapping[Pair, Hashable],
    made: random.Random,
) -> dict[str, int]:
    """A row with a missing pair; what is not allowed beside it becomes the first value."""
    pair = dict(made.choice(list(missing)))
    indices = dict.fromkeys(values, 0) | pair
    for name in made.sample(sorted(values), len(values)):
        if name in pair:
            continue
        tried = indices | {name: made.randrange(len(values[name]))}
        if allowed(_valued(values, tried)):
            indices = tried
    return indices


def _valued(values: Mapping[str, Sequence[Any]], indices: Mapping[str, int]) -> Row:
    return {name: values[name][index] for name, index in indices.items()}
