"""Forecasts of retrievers against what was measured, and what decides about them."""

from pathlib import Path

import pytest

from llmrec.cli import read_settings
from llmrec.stages import forecast

RETRIEVERS = sorted(path.stem for path in (Path(__file__).parents[1] / "recipes/retrievers").glob("*.yaml"))


def seconds(monkeypatch, retriever, *options, events=650_000, users=6_040, items=3_416):
    """Of one epoch, on two cores of 103 GFLOP/s."""
    monkeypatch.setattr(forecast, "_speed", lambda dtype: 2.06e11)
    monkeypatch.setattr(forecast, "_facts", lambda config: {"interactions": events, "users": users, "items": items})
    config = read_settings("retrieve", ["--retriever", retriever, "--training.epochs", "1", *options])[0]
    return forecast.of("retrieve", config).seconds - 8  # of the start


# 647,430 targets in windows of 200, seconds per epoch on two threads: `benchmarks/retrievers.py models`
@pytest.mark.parametrize(
    ("retriever", "measured"),
    [
        ("sasrec", 14.7),
        ("2mamba4rec", 15.6),
        ("2mamba4rec-cpu", 12.6),
        ("gru4rec", 14.6),
        ("lrurec", 17.1),
        ("hstu", 7.6),
        ("mamba4rec", 15.1),
        ("mambarec", 19.9),
        ("mambarec-block", 18.6),
        ("recmamba", 13.2),
        ("moematrrec", 16.0),
        ("latent-mamba", 15.8),
    ],
)
def test_within_a_factor_of_two_of_what_was_measured(monkeypatch, retriever, measured):
    assert 0.5 < seconds(monkeypatch, retriever, "--training.max_length", "200") / measured < 2


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_every_retriever_has_a_forecast(monkeypatch, retriever):
    assert 0 < seconds(monkeypatch, retriever) + 8 < 60


def test_prefixes_cost_by_their_number_and_length_not_by_the_events(monkeypatch):
    def hydra(prefixes, **facts):
        return seconds(monkeypatch, "hydra4rec", "--training.prefixes_per_user", str(prefixes), **facts)

    assert hydra(8) == pytest.approx(2 * hydra(4))
    assert hydra(8) == pytest.approx(hydra(8, events=1_300_000))  # all are longer than max_length
    assert hydra(8, users=650_000) == hydra(1_000, users=650_000)  # a history of one event has no eight prefixes


def test_only_a_full_softmax_costs_more_with_the_catalogue(monkeypatch):
    def growth(loss):
        few, many = (seconds(monkeypatch, "sasrec", "--training.loss", loss, items=items) for items in (3_000, 300_000))
        return many / few

    assert growth("full_softmax") > 10
    assert growth("sampled_softmax") == growth("gbce") == growth("bce") == 1


def test_the_last_window_alone_costs_less(monkeypatch):
    whole, last = (seconds(monkeypatch, "sasrec", "--training.windows", windows) for windows in ("all", "last"))
    assert last / whole == pytest.approx(50 * 6_040 / 650_000)
