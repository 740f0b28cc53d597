"""Timing, outliers and intervals against numbers known beforehand."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.evaluation.latency import outliers, peak_growth_mb, resampled, timed


def test_every_pass_goes_over_all_inputs_and_the_last_answers_come_back():
    calls = []
    seconds, answers = timed(lambda case: calls.append(case) or len(calls), ["a", "b", "c"], repeats=2)
    assert calls == ["a", "b", "c"] * 2
    assert answers == [4, 5, 6]
    assert seconds.shape == (3, 2)
    assert (seconds > 0).all()


def test_what_a_device_has_queued_counts_for_the_call_that_queued_it():
    """A device that works when it is waited for: 5 ms for each call in the queue."""
    queue = []

    def synchronize():
        time.sleep(0.005 * len(queue))
        queue.clear()

    queue += [1] * 20  # left over from before: not to be charged to the first call
    seconds, _ = timed(queue.append, ["x", "y"], repeats=2, synchronize=synchronize)
    assert (seconds >= 0.005).all()
    assert seconds.min() < 0.05
    plain, _ = timed(queue.append, ["x", "y"], repeats=2)
    assert plain.min() < 0.005


@pytest.mark.parametrize(("inputs", "repeats"), [([], 3), (["a"], 0)])
def test_nothing_to_time_is_an_error(inputs, repeats):
    with pytest.raises(ValueError, match="nothing to time"):
        timed(print, inputs, repeats)


def test_disturbed_measurements_are_outliers_and_slow_users_are_not():
    random = np.random.default_rng(0)
    usual = random.lognormal(0, 1.5, size=(300, 1))  # users differ by far more than a disturbance does
    seconds = usual * random.uniform(0.97, 1.03, size=(300, 4))
    planted = np.zeros(seconds.shape, dtype=bool)
    planted[random.choice(300, 20, replace=False), random.integers(4, size=20)] = True
    assert np.array_equal(outliers(np.where(planted, 3 * seconds, seconds)), planted)


TIMES = st.integers(1, 12).flatmap(
    lambda users: st.integers(1, 5).flatmap(
        lambda repeats: st.lists(st.lists(st.floats(1e-6, 1e3), min_size=repeats, max_size=repeats), min_size=users, max_size=users).map(
            np.array
        )
    )
)


@given(TIMES)
def test_no_user_loses_all_his_measurements(seconds):
    assert (~outliers(seconds)).any(axis=1).all()


@given(TIMES, st.floats(0.01, 100))
def test_outliers_do_not_depend_on_the_unit_and_equal_times_have_none(seconds, factor):
    assert outliers(seconds * factor).sum() == outliers(seconds).sum()
    assert not outliers(np.repeat(seconds[:, :1], 3, axis=1)).any()


def test_numbers_by_hand():
    """Users of 1, 2 and 3 s, one of them once disturbed. Their standard deviation is 1, so that of their mean 1 over the root of 3."""
    found = resampled(np.array([[1, 1, 1], [2, 2, 2], [3, 3, 30]], dtype=float), samples=40_000)
    assert (found.mean, found.median, found.p95) == pytest.approx((2, 2, 2.9))
    assert (found.timed, found.repeats, found.outliers) == (3, 3, 1)
    low, high = found.ci95
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(4.3027 * 1 / 3**0.5, rel=0.02)  # Student's t with 2 degrees of freedom


def test_the_interval_holds_the_true_mean_in_95_of_100_experiments():
    """Users whose times are lognormal with mean 1, thirty samples, as in the paper."""
    random = np.random.default_rng(1)
    held = 0
    for experiment in range(600):
        users = random.lognormal(-0.125, 0.5, size=(200, 1))
        low, high = resampled(users * random.uniform(0.99, 1.01, size=(200, 3)), samples=30, seed=experiment).ci95
        held += low <= 1 <= high
    assert 0.92 <= held / 600 <= 0.975


@pytest.mark.parametrize("count", [3, 5, 12])
def test_so_it_does_when_few_were_timed(count):
    """A few batches, or a few lengths."""
    random = np.random.default_rng(count)
    held = 0
    for experiment in range(600):
        low, high = resampled(random.normal(10, 1, size=(count, 1)), samples=30, seed=experiment).ci95
        held += low <= 10 <= high
    assert 0.92 <= held / 600 <= 0.98


def test_more_users_than_usual_make_the_interval_narrower():
    seconds = np.random.default_rng(2).lognormal(size=(6400, 1))
    wide, narrow = (np.ptp(resampled(seconds[:count], samples=1000).ci95) for count in (1600, 6400))
    assert narrow == pytest.approx(wide / 2, rel=0.1)


def test_one_user_says_nothing_of_others():
    assert resampled(np.array([[1.0, 2.0, 3.0]])).ci95 is None


@pytest.mark.parametrize(
    ("seconds", "samples", "message"),
    [([[1.0]], 1, "at least 2"), ([[1.0, 0.0]], 30, "1 of 2 times"), ([[np.nan, 1.0]], 30, "1 of 2 times")],
)
def test_impossible_inputs_are_errors(seconds, samples, message):
    with pytest.raises(ValueError, match=message):
        resampled(np.array(seconds), samples)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_memory_is_what_the_work_adds_not_what_came_before():
    def take(megabytes):
        return np.ones(megabytes << 20, dtype=np.int8).sum()

    take(200)
    held = np.ones(50 << 20, dtype=np.int8)
    for megabytes in (40, 120, 40):
        assert peak_growth_mb(lambda size=megabytes: take(size)) == pytest.approx(megabytes, abs=6)
    assert held.all()


def test_the_work_is_done_once():
    done = itertools.count()
    peak_growth_mb(lambda: next(done))
    assert next(done) == 1
