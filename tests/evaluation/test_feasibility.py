"""Bounds between printed metrics, against closed forms written down independently and against true rankings."""

from decimal import Decimal
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.evaluation.feasibility import LAST_RANK, Cell, contradiction


def cell(column, text, percent=False):
    metric, k = column.lower().split("@")
    return Cell(column, metric, int(k), Decimal(text), percent)


def row(**printed):
    """row(hr_10="0.3", ndcg_10="0.2")."""
    return [cell(name.upper().replace("_", "@"), text) for name, text in printed.items()]


def possible(**printed):
    return contradiction(row(**printed)) is None


def metrics_of(ranks, k):
    """HR, MRR and NDCG by their definitions, user by user."""
    hits = [rank for rank in ranks if 1 <= rank <= k]
    n = len(ranks)
    return {"hr": len(hits) / n, "mrr": sum(1 / rank for rank in hits) / n, "ndcg": sum(np.log(2) / np.log(rank + 1) for rank in hits) / n}


ranks = st.lists(st.integers(0, 60), min_size=1, max_size=40)
cut_offs = st.sets(st.sampled_from([1, 2, 3, 5, 10, 20, 50]), min_size=1, max_size=4)


def printed_row(values_of, ks, digits, percent):
    scale = 100 if percent else 1
    return [cell(f"{name}@{k}", f"{value * scale:.{digits}f}", percent) for k in sorted(ks) for name, value in values_of(k).items()]


@settings(max_examples=200)
@given(ranks=ranks, ks=cut_offs, digits=st.integers(0, 14), percent=st.booleans())
def test_true_rankings_are_never_flagged(ranks, ks, digits, percent):
    assert contradiction(printed_row(lambda k: metrics_of(ranks, k), ks, digits, percent)) is None


@settings(max_examples=30)
@given(seeds=st.lists(ranks, min_size=2, max_size=4), ks=cut_offs, digits=st.integers(1, 14))
def test_means_over_seeds_are_never_flagged(seeds, ks, digits):
    def mean(k):
        found = [metrics_of(ranks, k) for ranks in seeds]
        return {name: sum(values[name] for values in found) / len(found) for name in found[0]}

    assert contradiction(printed_row(mean, ks, digits, False)) is None


@settings(max_examples=20)
@given(ranks=st.lists(st.integers(1, 60), min_size=5, max_size=40), ks=cut_offs, data=st.data())
def test_a_planted_slip_is_bounded_by_what_the_true_rows_allow(ranks, ks, data):
    """Whatever cell is spoilt and named: had the others been left alone, the true value would have been within the bounds."""
    cells = printed_row(lambda k: metrics_of(ranks, k), ks, 4, False)
    at = data.draw(st.integers(0, len(cells) - 1))
    slip = Decimal(data.draw(st.integers(-3000, 3000))).scaleb(-4)
    spoilt = [*cells[:at], Cell(cells[at].name, cells[at].metric, cells[at].k, cells[at].value + slip), *cells[at + 1 :]]
    found = contradiction(spoilt)
    if found is not None:
        assert spoilt[at] in (found.cell, *found.others)  # without the slip there is nothing to contradict
        if found.cell is spoilt[at]:
            assert found.low - 1e-4 <= float(cells[at].value) <= found.high + 1e-4
            assert not found.low - 5e-5 <= float(found.cell.value) <= found.high + 5e-5


def ndcg_range(hr, mrr, k):
    """The closed form at one cut-off: between the chord and the broken line of the points (1/r, 1/log2(r + 1))."""
    points = [(1 / r, float(np.log(2) / np.log(r + 1))) for r in range(1, k + 1)]
    x = mrr / hr
    (x_far, y_far), (x_near, y_near) = points[-1], points[0]
    chord = y_far + (y_near - y_far) * (x - x_far) / (x_near - x_far)
    for (right, top), (left, bottom) in pairwise(points):
        if left <= x <= right:
            return hr * chord, hr * (bottom + (top - bottom) * (x - left) / (right - left))
    raise ValueError(f"no rank up to {k} has a reciprocal rank of {x}")


@settings(max_examples=40)
@given(hr=st.floats(0.01, 1), position=st.floats(0.001, 0.999), k=st.sampled_from([2, 5, 10, 20]), place=st.floats(-0.5, 1.5))
def test_one_cut_off_agrees_with_the_closed_form(hr, position, k, place):
    mrr = hr * (1 / k + position * (1 - 1 / k))
    low, high = ndcg_range(hr, mrr, k)
    ndcg = low + place * (high - low)
    beyond = max(low - ndcg, ndcg - high)
    if abs(beyond) < 1e-6:
        return  # too near the edge for eight digits
    cells = [cell(f"{name}@{k}", f"{value:.8f}") for name, value in (("hr", hr), ("mrr", mrr), ("ndcg", ndcg))]
    assert (contradiction(cells) is None) == (beyond < 0)


@settings(max_examples=40)
@given(gain=st.floats(0.001, 0.3), place=st.floats(-1, 2), name=st.sampled_from(["ndcg", "mrr"]))
def test_two_cut_offs_agree_with_the_closed_form(gain, place, name):
    """What comes in between 5 and 20 stands at ranks 6 to 20."""
    low, high = (gain / 20, gain / 6) if name == "mrr" else (gain * np.log(2) / np.log(21), gain * np.log(2) / np.log(7))
    rise = low + place * (high - low)
    beyond = max(low - rise, rise - high)
    if abs(beyond) < 1e-6:
        return
    cells = [cell("hr@5", "0.50000000"), cell("hr@20", f"{0.5 + gain:.8f}"), cell(f"{name}@5", "0.40000000")]
    cells.append(cell(f"{name}@20", f"{0.4 + rise:.8f}"))
    assert (contradiction(cells) is None) == (beyond < 0)


def test_the_bounds_are_attained():
    """Half the users at rank 1 and half at rank 10 give the least NDCG of their HR and MRR; all at rank 2 the most."""
    half = {"hr_10": "1.000000", "mrr_10": "0.550000"}
    least = (1 + np.log(2) / np.log(11)) / 2
    assert possible(**half, ndcg_10=f"{least:.6f}")
    assert not possible(**half, ndcg_10=f"{least - 0.00001:.6f}")
    second = {"hr_10": "1.000000", "mrr_10": "0.500000"}
    assert possible(**second, ndcg_10=f"{np.log(2) / np.log(3):.6f}")
    assert not possible(**second, ndcg_10=f"{np.log(2) / np.log(3) + 0.00001:.6f}")


def test_at_one_the_metrics_are_one():
    assert possible(hr_1="0.12", ndcg_1="0.12", mrr_1="0.12")
    assert not possible(hr_1="0.12", ndcg_1="0.14")
    assert not possible(hr_1="0.12", mrr_1="0.10")


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        ({"hr_10": "1.2"}, "HR@10 1.2 is above 1.00, the most there can be"),
        ({"mrr_5": "-0.1"}, "MRR@5 -0.1 is below 0.00, the least there can be"),
        ({"hr_10": "0.30", "hr_5": "0.34"}, "HR@10 0.30 is below 0.335, the least that HR@5 0.34 allows"),
        ({"hr_10": "0.110", "ndcg_10": "0.072", "mrr_10": "0.1"}, None),  # .05 to .15
        (
            {"hr_10": "0.030", "ndcg_10": "0.025", "mrr_10": "0.015"},
            "NDCG@10 0.025 is above 0.0195, the most that HR@10 0.030 and MRR@10 0.015 allow",
        ),
        (
            {"hr_50": "0.3", "mrr_10": "0.1", "hr_10": "0.30", "ndcg_10": "0.2", "hr_5": "0.34"},
            "HR@10 0.30 is below 0.335, the least that HR@5 0.34 allows",
        ),
    ],
)
def test_it_names_the_fewest_cells_and_the_bound(printed, message):
    found = contradiction(row(**printed))
    assert (None if found is None else str(found)) == message


def test_no_named_cell_can_be_spared():
    found = contradiction(row(hr_10="0.7548", ndcg_10="0.6120", hr_20="0.7786", ndcg_20="0.6212"))
    cells = (found.cell, *found.others)
    assert {c.name for c in cells} == {"HR@10", "NDCG@10", "HR@20", "NDCG@20"}
    for spared in cells:
        assert contradiction([c for c in cells if c is not spared]) is None


def test_the_last_digit_says_how_much_was_rounded():
    assert not possible(hr_10="0.1000", hr_20="0.0998")
    assert possible(hr_10="0.100", hr_20="0.0998")  # 0.0995 .. 0.1005
    assert possible(hr_10="0.1000", hr_20="0.0999")  # 0.09995 is either
    assert possible(hr_10="0.1", hr_20="0.06")


def test_percent_and_fraction_differ_only_at_the_top():
    columns = {"hr@10": "12.34", "ndcg@10": "9.99", "mrr@10": "3.21"}
    as_percent = contradiction([cell(name, text, percent=True) for name, text in columns.items()])
    as_fraction = contradiction([cell(name, f"{Decimal(text) / 100}") for name, text in columns.items()])
    assert as_percent.high == pytest.approx(100 * as_fraction.high)
    assert contradiction([cell("hr@10", "12.34", percent=True)]) is None
    assert contradiction([cell("hr@10", "12.34")]) is not None


def test_nothing_printed_is_nothing_wrong():
    assert contradiction([]) is None


@pytest.mark.parametrize("k", [0, LAST_RANK + 1])
def test_refuses_cut_offs_beyond_reason(k):
    with pytest.raises(ValueError, match="cut-off"):
        contradiction([cell(f"hr@{k}", "0.1")])
