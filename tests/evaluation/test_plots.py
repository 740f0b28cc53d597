import matplotlib.image
import numpy as np
import pytest

from llmrec.evaluation import plots

CURVE = [(w / 20, 0.06 + 0.01 * (w / 20) * (1 - w / 20)) for w in range(21)]
LOG = [{"step": s, "loss": 1 / s, "rewards/margins": 0.01 * s} for s in range(1, 9)] + [{"step": 8, "train_runtime": 3.0}]


@pytest.mark.parametrize(
    "draw",
    [
        lambda path, table, ranks: plots.metric_bars(path, table),
        lambda path, table, ranks: plots.weight_curve(path, CURVE, 0.5),
        lambda path, table, ranks: plots.training_curves(path, LOG),
        lambda path, table, ranks: plots.target_ranks(path, ranks["retriever"], ranks["fused"], candidates=20),
    ],
    ids=["bars", "curve", "training", "ranks"],
)
def test_a_picture_is_written_whole_and_the_same_again(draw, table, ranks, tmp_path):
    draw(tmp_path / "a.png", table, ranks)
    draw(tmp_path / "b.png", table, ranks)
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert pixels.shape[1] > 500
    assert np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 10  # more than an empty page
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_training_curves_have_one_panel_for_each_value_logged(tmp_path):
    plots.training_curves(tmp_path / "two.png", LOG)
    plots.training_curves(tmp_path / "four.png", [row | {"nll_loss": 1.0, "log_odds_chosen": 0.1} for row in LOG])
    two, four = (matplotlib.image.imread(tmp_path / name) for name in ("two.png", "four.png"))
    assert four.shape[0] == 2 * two.shape[0]


def test_an_empty_training_log_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="none of loss"):
        plots.training_curves(tmp_path / "a.png", [{"step": 1, "train_runtime": 3.0}])
    assert list(tmp_path.iterdir()) == []
