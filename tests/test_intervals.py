"""The bootstrap over groups against slow resampling, known formulas and simulated data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from surgvqa import intervals
from surgvqa.intervals import Array, Tally, bootstrap, constant, draws, interval, p_value, summed


def share(sums: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return sums[..., :1] / sums[..., 1:]


def tally(right: Array, groups: Array, count: int) -> Tally:
    statistics = np.column_stack([right, np.ones(len(right))])
    return Tally(("exact",), summed(statistics, groups.astype(np.intp), count), share)


def test_every_resample_draws_as_many_groups_as_there_are() -> None:
    counts = np.concatenate(list(draws(37, 1000, seed=1)))
    assert counts.shape == (1000, 37)
    assert set(counts.sum(1)) == {37}
    # Each group is drawn once on average, with the variance 1 - 1/37 of a binomial count.
    assert counts.mean(0) == pytest.approx(1, abs=0.15)
    assert counts.var() == pytest.approx(1 - 1 / 37, rel=0.03)
    again = np.concatenate(list(draws(37, 1000, seed=1)))
    assert (counts == again).all()
    assert (counts != np.concatenate(list(draws(37, 1000, seed=2)))).any()


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(draws(10, 100, seed=3)))
    monkeypatch.setattr(intervals, "_CELLS", 70)
    parts = list(draws(10, 100, seed=3))
    assert [len(part) for part in parts] == [7] * 14 + [2]
    assert (np.concatenate(parts) == whole).all()


def test_sums_give_what_repeating_the_questions_gives() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 9, 60)
    right = rng.random(60).round(1)
    (fast,) = bootstrap([tally(right, groups, 9)], resamples=200, seed=4)
    counts = np.concatenate(list(draws(9, 200, seed=4)))
    for row, drawn in zip(fast, counts, strict=True):
        repeated = np.concatenate([np.tile(right[groups == g], int(drawn[g])) for g in range(9)])
        assert row[0] == pytest.approx(repeated.mean())


def test_kinds_of_groups_are_drawn_as_the_groups_are() -> None:
    """1,000 groups of one question are of two kinds; single questions are binomial."""
    right = (np.arange(1000) < 700).astype(float)
    (samples,) = bootstrap([tally(right, np.arange(1000), 1000)], resamples=20_000)
    assert samples.mean() == pytest.approx(0.7, abs=0.001)
    assert samples.std() == pytest.approx(np.sqrt(0.7 * 0.3 / 1000), rel=0.03)
    # With a column that tells all groups apart, groups themselves are drawn.
    apart = Tally(("n",), np.arange(1000.0)[:, None], lambda sums: sums)
    same, _ = bootstrap([tally(right, np.arange(1000), 1000), apart], resamples=20_000)
    assert same.std() == pytest.approx(samples.std(), rel=0.03)
    assert interval(same[:, 0]) == pytest.approx(interval(samples[:, 0]), abs=0.003)


def test_entries_share_their_resamples() -> None:
    rng = np.random.default_rng(1)
    right, groups = rng.integers(0, 2, 200).astype(float), rng.integers(0, 20, 200)
    one, other, wrong = bootstrap([tally(x, groups, 20) for x in (right, right, 1 - right)], resamples=500)
    assert (one == other).all()
    assert one + wrong == pytest.approx(np.ones((500, 1)))
    assert bootstrap([]) == []


def test_an_interval_is_the_middle_of_what_was_drawn() -> None:
    assert interval(np.arange(1001.0)) == pytest.approx((25, 975))
    assert interval(np.append(np.arange(1001.0), [np.nan] * 50)) == pytest.approx((25, 975))
    assert interval(np.ones(100)) is None
    assert interval(np.zeros(0)) is None


@pytest.mark.parametrize("groups", [1, 2, 9, 100, 2769])
def test_a_constant_share_has_the_exact_binomial_interval(groups: int) -> None:
    for value in (0, 1):
        exact = stats.binomtest(value * groups, groups).proportion_ci(0.95, method="exact")
        assert constant(value, groups, 0, 1) == pytest.approx((exact.low, exact.high), abs=1e-12)
    low, high = constant(0, groups, -1, 1)
    assert -low == high == pytest.approx(constant(0, groups, 0, 1)[1])
    assert constant(1, groups, -1, 1) == pytest.approx((1 - 2 * high, 1))
    assert constant(-1, groups, -1, 1) == pytest.approx((-1, 2 * high - 1))


def test_p_by_hand() -> None:
    # 10 of 999 differences are below 0: 2 · (10 + 1) / (999 + 1).
    assert p_value(np.append(-np.ones(10), np.ones(989))) == pytest.approx(0.022)
    assert p_value(np.ones(999)) == pytest.approx(0.002)
    assert p_value(np.zeros(999)) == 1
    assert p_value(np.array([np.nan])) is None


def test_groups_cover_the_truth_where_single_questions_do_not() -> None:
    """100 data sets of 40 images with 9 questions each; images differ in how hard they are."""
    rng = np.random.default_rng(5)
    covered = {"groups": 0, "questions": 0}
    for seed in range(100):
        hard = rng.beta(1, 1, 40)
        right = (rng.random((40, 9)) < hard[:, None]).astype(float).ravel()
        for name, groups in (("groups", np.repeat(np.arange(40), 9)), ("questions", np.arange(360))):
            (samples,) = bootstrap([tally(right, groups, groups[-1] + 1)], resamples=1000, seed=seed)
            found = interval(samples[:, 0])
            assert found
            covered[name] += found[0] <= 0.5 <= found[1]
    assert 88 <= covered["groups"] <= 100
    assert covered["questions"] < 75


def test_few_groups_are_too_sure() -> None:
    """The same with 4 images: their intervals miss the truth far more often than once in twenty."""
    rng = np.random.default_rng(6)
    covered = 0
    for seed in range(200):
        right = (rng.random((4, 50)) < rng.beta(1, 1, 4)[:, None]).astype(float).ravel()
        (samples,) = bootstrap([tally(right, np.repeat(np.arange(4), 50), 4)], resamples=500, seed=seed)
        found = interval(samples[:, 0]) or (0, 0)
        covered += found[0] <= 0.5 <= found[1]
    assert covered / 200 < 0.88
