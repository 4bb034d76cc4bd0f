"""How sure a score is: the bootstrap over groups.

Questions about one video or one image are not independent, so whole groups are drawn with replacement, all
their questions with them (Field & Welsh, "Bootstrapping clustered data", JRSS B 69, 2007), and every score is
computed on each draw. Its interval runs between percentiles of what came out (Efron & Tibshirani, "An
Introduction to the Bootstrap", 1993, section 13.3). Scores of one draw belong together: their differences,
between two runs or between a run and its prior, have intervals by the same means.

Every score here depends on its questions through sums alone (`Tally`), so no question is looked at twice: the
sums of each group are taken once, and a draw is a row of counts times those sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95
FEW_GROUPS = 10
"""With fewer groups an interval is too narrow and not to be trusted (Cameron, Gelbach & Miller,
"Bootstrap-based improvements for inference with clustered errors", Rev. Econ. Stat. 90, 2008)."""

_FEWER_KINDS = 4
"""So many times fewer kinds of groups than groups are quicker to draw."""
_CELLS = 2**20
"""Counts that are held at a time: 8 MiB."""


@dataclass(frozen=True, eq=False)
class Tally:
    """Scores that are functions of sums over questions."""

    names: tuple[str, ...]
    sums: Array
    """(groups, k): of each group's questions."""
    formula: Callable[[Array], Array]
    """(..., k) sums to (..., len(names)) scores; NaN where one is not defined."""

    def told(self) -> dict[str, float | None]:
        """Each score's value on the questions themselves; None where it is not defined."""
        values = self.formula(self.sums.sum(0))
        return {n: float(v) if np.isfinite(v) else None for n, v in zip(self.names, values, strict=True)}


def summed(statistics: Array, groups: NDArray[np.intp], count: int) -> Array:
    """(questions, k) numbers, summed over the questions of each of `count` groups: (count, k)."""
    columns = [np.bincount(groups, weights=column, minlength=count) for column in statistics.T]
    return np.stack(columns, axis=1) if columns else np.zeros((count, 0))


def draws(groups: int, resamples: int, seed: int, shares: Array | None = None) -> Iterator[Array]:
    """Blocks (some resamples, groups) of how often each group was drawn; `resamples` rows in all.

    With `shares` it is kinds of groups that are counted, and what share of the groups each kind is.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    kinds = groups if shares is None else len(shares)
    most = max(1, _CELLS // kinds)
    for start in range(0, resamples, most):
        rows = min(most, resamples - start)
        if shares is None:
            drawn = generator.integers(0, groups, (rows, groups))
            drawn += np.arange(rows)[:, None] * groups
            counts = np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups)
        else:
            counts = generator.multinomial(groups, shares, rows)
        yield counts.astype(np.float64)


def bootstrap(tallies: Sequence[Tally], *, resamples: int = RESAMPLES, seed: int = 0) -> list[Array]:
    """Each entry's scores on the same resamples of the groups: (resamples, len(names)) arrays.

    All entries must be about the same groups, of which there is at least one.
    """
    if not tallies:
        return []
    sums = np.concatenate([tally.sums for tally in tallies], axis=1)
    groups = len(sums)
    # Groups with the same sums need no telling apart: where there are few kinds of them, kinds are drawn.
    kinds = Counter(row.tobytes() for row in sums)
    shares = None
    if _FEWER_KINDS * len(kinds) <= groups:
        shares = np.array([kinds[kind] for kind in sorted(kinds)]) / groups
        sums = np.frombuffer(b"".join(sorted(kinds))).reshape(len(kinds), -1)
    # Nor is a column that several scores need, or that is empty, summed twice.
    number: dict[bytes, int] = {}
    place = [number.setdefault(column.tobytes(), len(number)) for column in sums.T]
    sums = sums[:, np.unique(place, return_index=True)[1]]
    ends = np.cumsum([tally.sums.shape[1] for tally in tallies])[:-1]
    found: list[list[Array]] = [[] for _ in tallies]
    for counts in draws(groups, resamples, seed, shares):
        parts = np.split((counts @ sums)[:, place], ends, axis=1)
        for tally, own, drawn in zip(tallies, parts, found, strict=True):
            drawn.append(tally.formula(own))
    return [np.concatenate(drawn) for drawn in found]


def interval(samples: Array) -> tuple[float, float] | None:
    """The middle 95 % of (resamples,) values, those that are not defined left out.

    None if all resamples are equal, as with a score of 0 or 1 in every group. `constant` gives an interval
    for shares of questions then.
    """
    known = samples[np.isfinite(samples)]
    if len(known) < 2 or np.ptp(known) < 1e-12:
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def constant(value: float, groups: int, low: float, high: float) -> tuple[float, float]:
    """Return the 95 % interval of a mean that has the same `value` in each of `groups` groups.

    All resamples are equal then, so the bootstrap gives no interval, but groups that were not drawn may
    differ. If a share q of all groups differs, `groups` drawn ones agree with probability (1 - q)^groups,
    which is at least 2.5 % for q up to u = 1 - 0.025^(1 / groups). The others lie between `low` and `high`,
    the ends of the scale. For a value of 0 or 1 on a scale from 0 to 1 this is the exact binomial interval
    (Clopper & Pearson, Biometrika 26, 1934).
    """
    most = 1 - ((1 - LEVEL) / 2) ** (1 / groups)
    return (1 - most) * value + most * low, (1 - most) * value + most * high


def p_value(differences: Array) -> float | None:
    """Two-sided: how small 1 - level can be with 0 still outside of the percentile interval of that level.

    Twice the smaller share of resampled differences on either side of 0, itself counted on both (Efron &
    Tibshirani 1993, section 15.4), with one more on each side, so that it is never 0. None without samples.
    """
    known = differences[np.isfinite(differences)]
    if not len(known):
        return None
    below, above = int((known <= 1e-12).sum()), int((known >= -1e-12).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(known) + 1))
