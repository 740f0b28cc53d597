from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmrec.evaluation.metrics import per_user
from llmrec.evaluation.slices import slices


def test_quartiles_of_distinct_values_have_a_quarter_of_the_users_each(ranks):
    values = np.random.default_rng(3).permutation(300)
    found = slices(ranks, values, resamples=200)
    assert [part.users for part in found] == [75] * 4
    assert [(part.low, part.high) for part in found] == [(0, 74), (75, 149), (150, 224), (225, 299)]
    ndcg = {name: per_user(rank)["ndcg@10"] for name, rank in ranks.items()}
    for part in found:
        of_part = (values >= part.low) & (values <= part.high)
        assert part.base == pytest.approx(ndcg["retriever"][of_part].mean())
        assert part.differences["orpo"].difference == pytest.approx((ndcg["orpo"] - ndcg["retriever"])[of_part].mean())
        assert part.differences["orpo"].low <= part.differences["orpo"].difference <= part.differences["orpo"].high


@given(arrays(np.int64, 40, elements=st.integers(0, 6)), st.integers(2, 5))
@settings(max_examples=25)
def test_users_of_equal_value_stay_together_and_slices_add_up(values, parts):
    random = np.random.default_rng(0)
    ranks = {name: random.integers(0, 21, 40) for name in ("retriever", "fused")}
    found = slices(ranks, values, parts=parts, resamples=10)
    assert 1 <= len(found) <= parts
    assert sum(part.users for part in found) == 40
    assert [part.users for part in found] == [((values >= part.low) & (values <= part.high)).sum() for part in found]
    assert all(a.high < b.low for a, b in pairwise(found))
    overall = np.mean(per_user(ranks["fused"])["ndcg@10"] - per_user(ranks["retriever"])["ndcg@10"])
    assert sum(part.users * part.differences["fused"].difference for part in found) / 40 == pytest.approx(overall)


def test_spans_are_said_in_words(ranks):
    few, many = slices(ranks, np.where(np.arange(300) < 100, 3, np.arange(300) + 1000), parts=2, resamples=10)
    assert (few.span, many.span) == ("3 – 1,149", "1,150 – 1,299")
    (one,) = slices(ranks, np.full(300, 12), resamples=10)
    assert one.span == "12"


@pytest.mark.parametrize("values", [np.zeros(299), np.full(300, np.nan)])
def test_a_value_for_every_user_is_needed(ranks, values):
    with pytest.raises(ValueError, match="one finite value per user"):
        slices(ranks, values)
