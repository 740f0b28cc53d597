"""The pictures and the table of `bench` hold the numbers of metrics.json."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from llmrec.evaluation import latency_plots
from llmrec.evaluation.drawing import png
from llmrec.evaluation.latency_table import amount, render, split_of


def way(mean, **more):
    return {"mean": mean, "ci95": [0.9 * mean, 1.2 * mean], "median": mean, "p95": 2 * mean, "peak_memory_mb": 12.4} | more


def model(kind, mean, hr, **more):
    metrics = {split: {"hr@10": hr + shift, "ndcg@10": hr / 2, "mrr@10": hr / 3} for split, shift in (("test", 0), ("test_masked", 0.01))}
    facts = {"kind": kind, "parameters": {"total": 297_312, "non_embedding": 78_624}, "metrics": metrics, "users_evaluated": 6040}
    return facts | {"one": way(mean), "batch": way(mean / 4)} | more


RETRIEVERS = {"sasrec": model("retriever", 0.008, 0.30), "2mamba4rec": model("retriever", 0.003, 0.34, step=way(0.0012))}
RANKER = model("ranker", 1.5, 0.25, one=way(1.5, tokens_per_second=321.4), parameters={"total": 134_975_808, "non_embedding": 106_664_256})
RANKER["metrics"].pop("test")
RANKER["users_evaluated"] = 200
SWEEPS = {
    "sasrec": [{"length": length, "mean": length**2 / 1e8, "training_memory_mb": length / 10} for length in (50, 1000, 16_000)],
    "gru4rec": [{"length": length, "mean": length / 1e6, "training_memory_mb": None, "step": way(1e-5)} for length in (50, 1000)],
}


def drawn(panel):
    ax = Figure().add_subplot()
    panel(ax)
    return ax


def test_quality_stands_over_the_latency_of_one_user():
    ax = drawn(latency_plots.quality_against_latency(RETRIEVERS, "test"))
    assert ax.get_xscale() == "log"
    points = {bars.get_label(): bars.lines[0].get_xydata()[0].tolist() for bars in ax.containers}
    assert points == {"sasrec, 6,040 users": [0.008, 0.30], "2mamba4rec, 6,040 users": [0.003, 0.34]}
    (interval,) = ax.containers[0].lines[2][0].get_segments()
    assert interval[:, 0] == pytest.approx([0.9 * 0.008, 1.2 * 0.008])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(points)


def test_models_without_the_metric_are_left_out():
    ax = drawn(latency_plots.quality_against_latency(RETRIEVERS | {"ranker": RANKER}, "test"))
    assert len(ax.containers) == 2
    ax = drawn(latency_plots.quality_against_latency(RETRIEVERS | {"ranker": RANKER}, "test_masked"))
    assert ax.containers[2].get_label() == "ranker\n200 users, its own time"
    assert "history masked" in ax.get_ylabel()


@pytest.mark.parametrize(
    ("panel", "lines"),
    [
        (
            latency_plots.latency_against_length(SWEEPS),
            {"sasrec": [2.5e-05, 0.01, 2.56], "gru4rec": [5e-05, 0.001], "_gru4rec, one event more": [1e-5, 1e-5]},
        ),
        (latency_plots.memory_against_length(SWEEPS), {"sasrec": [5, 100, 1600], "gru4rec": []}),
    ],
    ids=["latency", "memory"],
)
def test_a_sweep_is_a_line_for_each_model(panel, lines):
    ax = drawn(panel)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert {line.get_label(): pytest.approx(list(line.get_ydata())) for line in ax.lines} == lines
    assert [text.get_text() for text in ax.get_xticklabels()] == ["50", "1,000", "16,000"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["sasrec", "gru4rec"]


def test_looks_are_different_for_two_dozen_models():
    looks = [latency_plots._look(number) for number in range(24)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 24


def test_pictures_are_written(tmp_path):
    png(tmp_path / "a.png", [latency_plots.quality_against_latency(RETRIEVERS, "test"), latency_plots.memory_against_length(SWEEPS)])
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 10


def test_the_table_has_the_fastest_first_and_the_metrics_of_one_protocol():
    lines = render(RETRIEVERS, 256, 16).splitlines()
    assert "history not masked" in lines[0]
    assert [line.split()[0] for line in lines[2:4]] == ["2mamba4rec", "sasrec"]
    for word in ("297k (78.6k)", "0.3400", "0.1700", "6,040", "3.0 ms [2.7 ms, 3.6 ms]", "750 µs", "1.2 ms"):
        assert word in lines[2]
    both = RETRIEVERS | {"2mamba4rec.smollm2": RANKER}
    assert split_of(both) == "test_masked"
    lines = render(both, 256, 16).splitlines()
    assert "history masked" in lines[0]
    assert "0.3500" in lines[2]
    for word in ("135M (107M)", "0.2600", "1.5 s [1.4 s, 1.8 s]", "321"):
        assert word in lines[4]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (850, "850"), (78_624, "78.6k"), (999_600, "1M"), (1_765_344, "1.77M"), (6_738_415_616, "6.74B")]
)
def test_amounts(count, text):
    assert amount(count) == text
