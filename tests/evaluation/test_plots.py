"""Pictures show the numbers they are given, as PNG files and inside a page."""

import xml.etree.ElementTree as ET

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from llmrec.evaluation import data_plots, letter_plots, plots, training_plots
from llmrec.evaluation.drawing import COLOURS, SERIES, VARIABLES, look, png, svg
from llmrec.evaluation.slices import slices

CURVE = [(w / 20, 0.06 + 0.01 * (w / 20) * (1 - w / 20)) for w in range(21)]
LOG = [{"step": s, "loss": 1 / s, "rewards/margins": 0.01 * s} for s in range(1, 9)] + [{"step": 8, "train_runtime": 3.0}]


def drawn(panel):
    ax = Figure().add_subplot()
    panel(ax)
    return ax


def lines(ax):
    return {line.get_label(): line.get_xydata() for line in ax.lines}


def words(ax):
    return "\n".join([ax.get_title(), *(text.get_text() for text in ax.texts), *(label.get_text() for label in ax.get_xticklabels())])


def test_a_picture_is_written_whole_and_the_same_again(table, tmp_path):
    for name in ("a.png", "b.png"):
        png(tmp_path / name, plots.metric_bars(table))
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert pixels.shape[1] > 500
    assert np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 10  # more than an empty page
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_panel_in_a_page_takes_the_pages_colours_and_leaves_nothing_else_behind(table):
    (panel, _) = plots.metric_bars(table)
    element = svg(panel, "bars-0")
    root = ET.fromstring(element)
    assert root.tag == "svg"
    assert "://" not in element
    assert {name for node in root.iter() for name in node.attrib} <= {
        *("viewBox", "fill", "aria-hidden", "id", "d", "style", "transform", "x", "y", "width", "height", "clip-path", "href", "type")
    }
    for colour in COLOURS.values():
        assert colour not in element
        assert VARIABLES[colour] in element
    assert "NDCG" not in element
    assert "HR@10" in "".join(root.itertext())  # text, not outlines
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    other = {node.get("id") for node in ET.fromstring(svg(panel, "bars-1")).iter()} - {None}
    assert len(ids) == len(set(ids))
    assert not other & set(ids)
    assert svg(panel, "bars-0") == element


def test_bars_stand_at_the_means_below_the_bound(table):
    for panel, metric in zip(plots.metric_bars(table), ("hr@10", "ndcg@10"), strict=True):
        ax = drawn(panel)
        assert [bar.get_height() for bar in ax.patches] == pytest.approx([values[metric] for values in table["overall"].values()])
        assert f"the bound, {table['bound']['hr@20']:.4f}" in words(ax)


def test_the_curves_meet_at_the_bound_and_go_on_with_the_full_ranking(ranks):
    full = np.where(ranks["retriever"] > 0, ranks["retriever"], 25).astype(int)
    ax = drawn(*plots.two_stage_bound(ranks, 20, full))
    found = lines(ax)
    for name, rank in ranks.items():
        for k, value in found[name]:
            assert value == pytest.approx(((rank > 0) & (rank <= k)).mean())
    ends = {found[name][-1, 1] for name in ranks}
    assert ends == {(ranks["retriever"] > 0).mean()}
    beyond = next(data for label, data in found.items() if label.startswith("_") and data[-1, 0] == 40)
    assert beyond[beyond[:, 0] == 24, 1] == pytest.approx(ends.pop())
    assert beyond[-1, 1] == 1


def test_the_chosen_weight_is_marked():
    ax = drawn(*plots.weight_curve(CURVE, 0.5))
    assert [0.5, CURVE[10][1]] in [line.get_xydata().tolist()[0] for line in ax.lines if len(line.get_xydata()) == 1]


def test_target_ranks_count_users(ranks):
    ax = drawn(*plots.target_ranks(ranks["retriever"], ranks["fused"], 20))
    heights = np.array([bar.get_height() for bar in ax.patches]).reshape(2, 20)
    for row, name in zip(heights, ("retriever", "fused"), strict=True):
        assert row.tolist() == [(ranks[name] == k).sum() for k in range(1, 21)]


def test_help_and_hurt_says_whom_and_how_much(ranks):
    cuts = {"history length": slices(ranks, np.arange(300) % 40 + 5, resamples=100)}
    ax = drawn(*plots.help_and_hurt(cuts))
    shown = [part.differences["fused"].difference for part in cuts["history length"]]
    assert any(np.allclose(line.get_ydata(), shown) for line in ax.lines if len(line.get_ydata()) == len(shown))
    assert "5 – 14\n80 users" in words(ax)


def test_training_curves_have_one_panel_for_each_value_logged():
    assert len(training_plots.training_curves(LOG)) == 2
    assert len(training_plots.training_curves([row | {"nll_loss": 1.0, "log_odds_chosen": 0.1} for row in LOG])) == 4
    (loss, margins) = training_plots.training_curves(LOG)
    assert drawn(loss).lines[0].get_xydata().tolist() == [[s, 1 / s] for s in range(1, 9)]
    assert drawn(margins).get_title() == "margin (beta x log-probabilities)"


def test_long_trainings_are_thinned_to_means():
    rows = [{"step": step, "loss": float(step)} for step in range(1, 1001)]
    (panel,) = training_plots.training_curves(rows)
    points = drawn(panel).lines[0].get_xydata()
    assert len(points) == training_plots.POINTS
    assert points[0].tolist() == [3, 3]
    assert points.mean(axis=0) == pytest.approx([500.5, 500.5])


def test_trainings_laid_over_each_other_differ_in_look():
    (loss, _) = training_plots.overlaid_curves([LOG, [], LOG[:4]])
    ax = drawn(loss)
    assert [line.get_color() for line in ax.lines] == [SERIES[0], SERIES[2]]
    assert training_plots.overlaid_curves([[], []]) == []
    looks = [look(number) for number in range(18)]
    assert len(set(looks)) == 18


def test_an_empty_training_log_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="none of loss"):
        training_plots.training_curves([{"step": 1, "train_runtime": 3.0}])
    with pytest.raises(ValueError, match="at least one panel"):
        png(tmp_path / "a.png", [])
    assert list(tmp_path.iterdir()) == []


def test_popularity_falls_and_counts_what_was_never_seen():
    events = np.array([0, 1, 100, 4, 4, 0, 10, 2, 1, 1])
    ax = drawn(*data_plots.popularity(events))
    assert ax.lines[0].get_xydata().tolist() == [[place, count] for place, count in enumerate([100, 10, 4, 4, 2, 1, 1, 1], start=1)]
    assert "10 items, 2 without training events" in words(ax)
    assert f"{110 / 123:.0%} of the events" in words(ax)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["1", "10", "100"]


@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], list(range(1, 400))])
def test_every_user_is_in_the_histogram_of_history_lengths(lengths):
    ax = drawn(*data_plots.history_lengths(np.array(lengths), 10))
    assert sum(bar.get_height() for bar in ax.patches) == len(lengths)


def test_letters_are_shares_and_one_order_has_no_second_panel():
    found = {"letters": {"A": 30, "B": 10}, "p": 0.01, "orders": 2, "ndcg@10_per_order": [0.2, 0.3]}
    letters, orders = letter_plots.position_bias(found)
    assert [bar.get_height() for bar in drawn(letters).patches] == [0.75, 0.25]
    assert lines(drawn(letters))["no preference"][:, 1].tolist() == [0.5, 0.5]
    assert drawn(orders).lines[0].get_ydata().tolist() == [0.2, 0.3]
    (letters,) = letter_plots.position_bias(found | {"orders": 1, "p": None})
    assert len(drawn(letters).lines) == 0  # the retriever's order has better items at A


def test_reliability_shows_every_bin():
    bins = [{"users": 5, "confidence": 0.1 * n, "accuracy": 0.08 * n} for n in range(1, 6)]
    ax = drawn(*letter_plots.reliability({"orpo": {"bins": bins, "ece": 0.123}}))
    assert lines(ax)["orpo, ECE 0.123"].tolist() == [[b["confidence"], b["accuracy"]] for b in bins]
