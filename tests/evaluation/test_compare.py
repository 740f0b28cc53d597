import json

import numpy as np
import pytest

from llmrec.errors import UserError
from llmrec.evaluation import report
from llmrec.evaluation.compare import duration, p_value, render, render_comparison, table, verdict
from llmrec.evaluation.metrics import per_user
from llmrec.evaluation.significance import holm, paired_permutation


def comparisons(fused, orpo):
    """Comparisons with the retriever on NDCG@10 that have the given (difference, corrected p); their intervals are all far above zero."""
    rows = {"fused": fused, "orpo": orpo}
    return [
        {
            "a": a,
            "b": "retriever",
            "metric": "ndcg@10",
            "difference": d,
            "ci95": [0.01, 0.03],
            "p": 0.001,
            "p_permutation": 0.001,
            "p_holm": p,
        }
        for a, (d, p) in rows.items()
    ]


UP, UNSURE, DOWN, NONE = (0.02, 0.01), (0.004, 0.06), (-0.02, 0.01), (0.0, 1.0)


def test_overall_is_the_hit_subset_times_the_share_of_hits(table):
    share = table["users"]["hit"] / table["users"]["evaluated"]
    assert table["bound"] == {"hr@20": share}
    for system, values in table["overall"].items():
        for name, value in values.items():
            assert value == pytest.approx(table["hit_subset"][system][name] * share)


def test_no_system_exceeds_the_bound_and_all_reach_it_at_the_end(table):
    for values in table["overall"].values():
        assert max(values.values()) <= table["bound"]["hr@20"]
        assert values["hr@20"] == table["bound"]["hr@20"]


def test_comparisons_are_the_differences_of_the_table(table):
    assert [(c["a"], c["b"]) for c in table["comparisons"][::2]] == [("orpo", "retriever"), ("orpo", "sft"), ("fused", "retriever")]
    for c in table["comparisons"]:
        assert c["difference"] == pytest.approx(table["overall"][c["a"]][c["metric"]] - table["overall"][c["b"]][c["metric"]])
        assert c["ci95"][0] <= c["difference"] <= c["ci95"][1]


def test_comparisons_are_tested_alone_and_corrected_together(table, ranks):
    for c in table["comparisons"]:
        a, b = (per_user(ranks[system])[c["metric"]] for system in (c["a"], c["b"]))
        assert c["p_permutation"] == paired_permutation(a, b, resamples=500, seed=0)
    assert [c["p_holm"] for c in table["comparisons"]] == holm([c["p_permutation"] for c in table["comparisons"]])


def test_every_mean_lies_in_its_interval(table):
    for subset in ("overall", "hit_subset"):
        for system, values in table[subset].items():
            for name, value in values.items():
                low, high = table["intervals"][subset][system][name]
                assert low - 1e-9 <= value <= high + 1e-9


def test_the_table_is_json(table):
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_systems_must_rank_the_same_lists():
    with pytest.raises(ValueError, match="fused did not rank the same candidates as retriever"):
        table_of(retriever=[1, 0], fused=[1, 2])


def test_nothing_retrieved_says_what_to_do():
    with pytest.raises(UserError, match="evaluate more users"):
        table_of(retriever=[0, 0])


def table_of(**ranks):
    return table({name: np.array(rank) for name, rank in ranks.items()}, candidates=20, resamples=50)


def test_a_missing_system_is_left_out():
    assert [(c["a"], c["b"]) for c in table_of(retriever=[1, 2], fused=[2, 1])["comparisons"]] == [("fused", "retriever")] * 2


def test_render_shows_every_number(table):
    text = render(table)
    for part in ("overall", "hit_subset"):
        for system, values in table[part].items():
            line = next(line for line in text.split("\n\n")[part == "hit_subset"].splitlines() if line.startswith(system))
            assert line.split()[1:] == [f"{value:.4f}" for value in values.values()]
    assert f"{table['bound']['hr@20']:.4f}" in text.splitlines()[0]
    assert max(map(len, text.splitlines())) < 120
    assert [line for line in text.splitlines() if "(Holm)" in line] == [render_comparison(c) for c in table["comparisons"]]


def test_a_comparison_is_shown_with_its_corrected_p():
    c = {"a": "orpo", "b": "sft", "metric": "hr@10", "difference": 0.02, "ci95": [0.01, 0.03], "p": 0.001, "p_permutation": 0.002}
    assert render_comparison(c | {"p_holm": 0.012}) == "orpo - sft           HR@10    +0.0200 [+0.0100, +0.0300]  p 0.012 (Holm)"


@pytest.mark.parametrize(
    ("fused", "start"),
    [
        (UP, "Worth it where 482 ms per user is affordable: the LLM adds +0.0200 [+0.0100, +0.0300] NDCG@10"),
        (UNSURE, "Not shown"),
        (DOWN, "It hurts"),
    ],
)
def test_the_verdict_follows_the_corrected_test(fused, start):
    text = verdict(comparisons(fused, UNSURE), 0.4, seconds_retriever=0.002, seconds_ranker=0.48)
    assert text.startswith(start)
    assert "241 times the latency (2.0 ms -> 482 ms per user)" in text
    assert "Fusion weight 0.40" in text
    assert "By itself the LLM changes it by +0.0040 [+0.0100, +0.0300], not shown to differ" in text


@pytest.mark.parametrize("difference", [0.01, -0.01])
def test_the_verdict_and_the_marks_of_the_page_agree_at_the_edge(difference):
    for p, shown in ((0.05, False), (0.0499, True)):
        found = comparisons((difference, p), UNSURE)
        assert verdict(found, 0.4, 1, 1).startswith("Not shown") != shown
        assert (("fused", "ndcg@10") in report.marks(found)) == shown
    assert "p 0.050 (Holm)" in verdict(comparisons((difference, 0.05), UNSURE), 0.4, 1, 1)


@pytest.mark.parametrize(
    ("alone", "reading"), [(UP, "better than the retriever"), (DOWN, "worse than the retriever"), (UNSURE, "not shown to differ")]
)
def test_the_verdict_tells_how_the_ranker_does_alone(alone, reading):
    assert reading in verdict(comparisons(UP, alone), 0.4, 1, 1)


@pytest.mark.parametrize("alone", [UP, DOWN, UNSURE])
def test_weight_zero_never_praises_the_fusion(alone):
    text = verdict(comparisons(NONE, alone), 0.0, 1, 1)
    assert text.startswith("Left out")
    assert "worth" not in text.lower()
    assert ("more validation users" in text) == (alone == UP)


@pytest.mark.parametrize(
    ("seconds", "words"), [(85e-6, "85 µs"), (0.0012, "1.2 ms"), (0.482, "482 ms"), (1.44, "1.4 s"), (42.2, "42 s"), (200, "3 min 20 s")]
)
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_p_values_are_not_zero():
    assert p_value(2e-4) == "<0.001"
    assert p_value(0.0312) == "0.031"
