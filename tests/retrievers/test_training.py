"""Training learns, repeats itself, and goes on after a kill as if nothing had happened."""

import numpy as np
import pytest
import torch

from llmrec import config
from llmrec.errors import UserError
from llmrec.retrievers import training
from llmrec.retrievers.candidates import rank
from llmrec.retrievers.lightfm import LightFM
from llmrec.retrievers.popularity import Popularity
from llmrec.retrievers.sequence_model import SequenceModel

MIXERS = {"mamba2": config.Mixer(d_state=8, headdim=8), "attention": config.Mixer(name="attention")}


def fit(mixer, sequences, folder, epochs=4, **settings):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = SequenceModel(
        config.SequenceModel(mixer=MIXERS[mixer], dim=16, inner=32, residual=True, positions=mixer == "attention"), 30, 10
    )
    how = config.Training(**{"max_length": 10, "batch": 8, "epochs": epochs, "learning_rate": 0.01, "warmup": 5} | settings)
    return model, training.train(model, sequences, how, sequences.cases("valid"), folder, seed=1)


@pytest.mark.parametrize("mixer", MIXERS)
def test_it_learns_to_count(mixer, counting, tmp_path):
    model, progress = fit(mixer, counting, tmp_path / "a", epochs=30)
    ranks = rank(training.SequenceScorer(model, 10), counting, counting.cases("test"), 5, repeats=False, batch=64).target_rank
    assert (ranks == 1).mean() > 0.9
    assert progress.best > 0.9


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_killed_training_ends_with_the_same_weights(mixer, counting, tmp_path, monkeypatch):
    whole, expected = fit(mixer, counting, tmp_path / "whole")
    again, _ = fit(mixer, counting, tmp_path / "again")
    real, calls = training._epoch, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(mixer, counting, tmp_path / "killed")
    monkeypatch.setattr(training, "_epoch", real)
    resumed, progress = fit(mixer, counting, tmp_path / "killed")
    assert progress.log == expected.log
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_early_stopping_keeps_the_best_epoch(counting, tmp_path):
    _, progress = fit("attention", counting, tmp_path / "a", epochs=100, patience=2)
    assert progress.epoch == progress.best_epoch + 2
    assert progress.best == max(row["valid_ndcg@10"] for row in progress.log)


def test_a_loss_that_explodes_stops_with_advice(counting, tmp_path):
    with pytest.raises(UserError, match="learning_rate"):
        fit("attention", counting, tmp_path / "a", epochs=30, learning_rate=1e30, warmup=0, gradient_clip=1e30)


def test_popularity_counts_training_events_only(counting):
    counts = Popularity.fit(counting).counts.numpy()
    expected = np.zeros(30)
    for user in range(counting.user_count):
        for item in counting.train_part(user):
            expected[item - 1] += 1
    assert counts.tolist() == expected.tolist()


def test_lightfm_repeats_itself_and_survives_a_kill(counting, tmp_path):
    settings = config.LightFM(components=8, epochs=6)
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    a, b = (LightFM.fit(counting, settings, 3, folder) for folder in folders[:2])
    LightFM.fit(counting, config.LightFM(components=8, epochs=2), 3, folders[2])  # as if killed after two epochs
    c = LightFM.fit(counting, settings, 3, folders[2])
    for other in (b, c):
        assert all(torch.equal(a.state()[name], other.state()[name]) for name in a.state())
