import itertools
import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.evaluation.metrics import per_user
from llmrec.evaluation.significance import FEW, holm, interval, over_seeds, paired_bootstrap, paired_permutation


def systems(users, seed=0, gain=2):
    """NDCG@10 of a system and of a slightly better one, on the same users."""
    random = np.random.default_rng(seed)
    rank = random.integers(1, 30, users)
    return (per_user(r)["ndcg@10"] for r in (np.maximum(1, rank - random.integers(0, gain + 1, users)), rank))


def test_agrees_with_drawing_users_one_by_one():
    a, b = systems(200)
    ours = paired_bootstrap(a, b, resamples=20_000, seed=1)
    draws = np.random.default_rng(2).integers(0, 200, (20_000, 200))
    means = (a - b)[draws].mean(axis=1)
    assert ours.difference == pytest.approx((a - b).mean(), abs=1e-12)
    assert [ours.low, ours.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.05 * means.std())


def test_agrees_with_scipy():
    a, b = systems(60)
    ours = paired_bootstrap(a, b, resamples=20_000, seed=1, level=0.9)
    options = {"n_resamples": 20_000, "confidence_level": 0.9, "method": "percentile", "rng": np.random.default_rng(2)}
    theirs = scipy.stats.bootstrap((a - b,), np.mean, **options)
    tolerance = 0.05 * theirs.standard_error
    assert [ours.low, ours.high] == pytest.approx(list(theirs.confidence_interval), abs=tolerance)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    truth, covered = 0.3, 0
    for seed in range(300):
        sample = (np.random.default_rng(seed).random(200) < truth).astype(float)
        bounds = interval(sample, resamples=400, seed=seed)
        covered += bounds.low <= truth <= bounds.high
    assert 0.91 <= covered / 300 <= 0.985


def test_p_is_uniform_when_nothing_differs():
    """About 5 % of comparisons of equally good systems come out with p < 0.05, about half with p < 0.5."""
    p = []
    for seed in range(300):
        a, b = np.random.default_rng(seed).random((2, 100)).round(1)
        p.append(paired_bootstrap(a, b, resamples=400, seed=seed).p)
    assert 0.015 < np.mean(np.array(p) < 0.05) < 0.10
    assert 0.42 < np.mean(np.array(p) < 0.5) < 0.58


def test_p_and_interval_agree():
    for seed in range(20):
        result = paired_bootstrap(*systems(40, seed, gain=1), resamples=4000)
        if abs(result.p - 0.05) > 0.01:
            assert (result.p < 0.05) == (result.low > 0 or result.high < 0)


def test_swapping_the_systems_turns_the_sign():
    a, b = systems(100)
    there, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert there.difference == -back.difference
    assert there.low == pytest.approx(-back.high, abs=0.003)
    assert there.low > 0
    assert there.p < 0.01


def test_identical_systems_do_not_differ():
    a, _ = systems(50)
    result = paired_bootstrap(a, a)
    assert (result.difference, result.low, result.high, result.p) == (0, 0, 0, 1)


def test_gains_and_losses_that_cancel_are_zero_despite_rounding():
    """0.1 + 0.2 - 0.3 is not 0 in floats; all 27 draws of three users, counted in tenths, say what p is."""
    sums = [sum(draw) for draw in itertools.product([1, 2, -3], repeat=3)]
    expected = 2 * min(np.mean(np.array(sums) <= 0), np.mean(np.array(sums) >= 0))
    for a, b in (([0.1, 0.2, 0.0], [0.0, 0.0, 0.3]), ([0.0, 0.0, 0.3], [0.1, 0.2, 0.0])):
        assert paired_bootstrap(np.array(a), np.array(b)).p == pytest.approx(min(1, expected), abs=0.03)


def test_p_is_never_zero():
    assert paired_bootstrap(np.ones(50), np.zeros(50), resamples=999).p == pytest.approx(2 / 1000)


def test_the_seed_decides():
    a, b = systems(100)
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert paired_bootstrap(a, b, seed=3) != paired_bootstrap(a, b, seed=4)


def test_chunks_make_no_difference_to_the_shape(monkeypatch):
    monkeypatch.setattr("llmrec.evaluation.significance.CELLS", 50)
    a, b = systems(30)
    result = paired_bootstrap(a, b, resamples=1001)
    assert result.low < result.difference < result.high


@pytest.mark.parametrize("test", [paired_bootstrap, paired_permutation])
def test_hundred_thousand_users_take_seconds(test):
    a, b = systems(100_000)
    start = time.perf_counter()
    test(a, b, resamples=10_000)
    assert time.perf_counter() - start < 10


@pytest.mark.slow
@pytest.mark.parametrize("test", [paired_bootstrap, paired_permutation])
def test_a_hundred_thousand_different_values_take_seconds_too(test):
    a, b = np.random.default_rng(0).random((2, 100_000))
    start = time.process_time()
    test(a, b, resamples=10_000)
    assert time.process_time() - start < 10


def test_values_that_do_not_repeat_give_the_same_interval():
    """They are drawn user by user, others value by value; rounded to fewer different values, the one becomes the other."""
    a, b = np.random.default_rng(0).random((2, FEW + 500))
    fine, coarse = paired_bootstrap(a, b, resamples=4000), paired_bootstrap((a - b).round(2), 0 * b, resamples=4000)
    assert [fine.low, fine.high] == pytest.approx([coarse.low, coarse.high], abs=0.03 * (fine.high - fine.low))


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 0.0]), ([], []), ([np.nan], [1.0])])
@pytest.mark.parametrize("test", [paired_bootstrap, paired_permutation])
def test_refuses_what_it_cannot_compare(test, a, b):
    with pytest.raises(ValueError, match=r"different users|finite value"):
        test(np.array(a), np.array(b))


def test_permutation_agrees_with_scipy():
    for seed in range(3):
        a, b = systems(60, seed, gain=1)
        options = {"permutation_type": "samples", "n_resamples": 20_000, "rng": np.random.default_rng(2)}
        theirs = scipy.stats.permutation_test((a, b), lambda x, y, axis: np.mean(x - y, axis=axis), **options).pvalue
        assert paired_permutation(a, b, resamples=20_000, seed=1) == pytest.approx(theirs, abs=0.015)


@settings(max_examples=30)
@given(st.lists(st.sampled_from([-0.3, -0.1, 0.0, 0.1, 0.2, 0.3]), min_size=1, max_size=11))
def test_permutation_agrees_with_all_exchanges(differences):
    """Counted in tenths: 0.1 + 0.2 - 0.3 is not 0 in floats."""
    tenths = np.array([round(10 * d) for d in differences])
    sums = np.array(list(itertools.product([1, -1], repeat=len(tenths)))) @ tenths
    exact = np.mean(np.abs(sums) >= abs(tenths.sum()))
    assert paired_permutation(np.array(differences), np.zeros(len(tenths)), resamples=4000) == pytest.approx(exact, abs=0.04)


def test_permutation_of_many_values_agrees_with_the_normal_limit():
    random = np.random.default_rng(0)
    d = random.standard_normal(5000) + 0.02
    z = abs(d.sum()) / np.sqrt((d**2).sum())
    assert paired_permutation(d, np.zeros(5000)) == pytest.approx(2 * scipy.stats.norm.sf(z), abs=0.02)


def test_permutation_p_is_uniform_when_nothing_differs():
    pairs = (np.random.default_rng(seed).random((2, 100)).round(1) for seed in range(300))
    p = np.array([paired_permutation(a, b, resamples=400, seed=seed) for seed, (a, b) in enumerate(pairs)])
    assert 0.015 < (p < 0.05).mean() < 0.10
    assert 0.42 < (p < 0.5).mean() < 0.58


def test_permutation_ends():
    a, b = systems(100)
    assert paired_permutation(a, a) == 1
    assert paired_permutation(np.ones(50), np.zeros(50), resamples=999) == 1 / 1000
    assert paired_permutation(a, b, seed=3) == paired_permutation(a, b, seed=3)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_its_steps_reject(p):
    """Holm's rule as he states it: from the smallest p on, reject while p < level / hypotheses left."""
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for left, place in zip(range(len(p), 0, -1), sorted(range(len(p)), key=p.__getitem__), strict=True):
            if p[place] * left >= level:
                break
            rejected.add(place)
        assert {place for place, q in enumerate(holm(p)) if q < level} == rejected
    assert all(q >= alone for q, alone in zip(holm(p), p, strict=True))


@pytest.mark.parametrize("bad", [-0.1, 1.1, np.nan])
def test_holm_refuses_what_is_no_p(bad):
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, bad])


def test_seeds_by_hand():
    found = over_seeds([0.1, 0.2, 0.6])
    assert (found.mean, found.deviation, found.runs) == (pytest.approx(0.3), pytest.approx(np.sqrt(0.07)), 3)
    assert over_seeds([0.25]).deviation is None
    with pytest.raises(ValueError, match="each run"):
        over_seeds([])
