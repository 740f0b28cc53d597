"""Training learns, repeats itself, and goes on after a kill as if nothing had happened."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llmrec import config
from llmrec.data.sequences import TEST, TRAIN, VALID, Sequences
from llmrec.errors import UserError
from llmrec.retrievers import training
from llmrec.retrievers.candidates import rank
from llmrec.retrievers.lightfm import LightFM
from llmrec.retrievers.popularity import Popularity
from llmrec.retrievers.sequence_model import SequenceModel

LATENT = config.Mixer(name="latent_mamba", heads=2, d_latent=4, d_state=8, headdim=8)
MODELS = {
    "mamba2": {"mixer": config.Mixer(d_state=8, headdim=8), "residual": True},
    "attention": {"mixer": config.Mixer(name="attention"), "residual": True, "positions": True},
    "hydra": {"mixer": config.Mixer(name="hydra", d_state=8, headdim=8, d_conv=3)},
    "leak": {"mixer": config.Mixer(name="gated_mamba_attention", d_state=4, legacy_leak=True), "residual": True},
    "lru": {"mixer": config.Mixer(name="lru", hidden=16), "residual": True, "item_bias": True},
    "repeats": {"mixer": config.Mixer(name="lru", hidden=16), "item_bias": True, "repeat_bias": True},
    "latent": {"mixer": LATENT, "residual": True, "norm": "pre", "norm_kind": "rms", "feed_forward": "swiglu", "temperature": 0.05},
}


def fit(name, sequences, folder, epochs=4, seed=1, dropout=0.2, **settings):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = SequenceModel(config.SequenceModel(**{"dim": 16, "inner": 32, "dropout": dropout} | MODELS[name]), 30, 10)
    how = config.Training(**{"max_length": 10, "batch": 8, "epochs": epochs, "learning_rate": 0.01, "warmup": 5} | settings)
    return model, training.train(model, sequences, how, sequences.cases("valid"), folder, seed=seed)


def assert_same_weights(a, b):
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def first_ranked(model, sequences):
    """The share of test targets that stand first among all items."""
    scorer = training.SequenceScorer(model, 10)
    return (rank(scorer, sequences, sequences.cases("test"), 5, repeats=False, batch=64).target_rank == 1).mean()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mamba2", {}),
        ("attention", {}),
        ("lru", {"schedule": "cosine"}),
        ("hydra", {"windows": "prefixes"}),
        ("attention", {"loss": "sampled_softmax", "negatives": 20}),
        ("latent", {"loss": "sampled_softmax", "negatives": 20, "weight_decay": 0.1}),
        ("attention", {"loss": "gbce", "negatives": 10, "dropout": 0.0, "epochs": 30, "learning_rate": 0.01}),
        ("attention", {"loss": "bce", "dropout": 0.0, "epochs": 30, "learning_rate": 0.01}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("loss", "full_softmax"),
)
def test_it_learns_to_count(name, settings, counting, tmp_path):
    model, progress = fit(name, counting, tmp_path / "a", **{"epochs": 10, "learning_rate": 0.02} | settings)
    assert first_ranked(model, counting) > 0.9
    assert progress.best > 0.9
    assert not model.items.weight[0].any()  # the padding


# with what a kill must not change: dropout, negatives, prefixes, the schedule's place, the epochs that are validated
REPEATED = [
    ("mamba2", {}),
    ("attention", {"loss": "bce", "dropout": 0.5}),
    ("latent", {"loss": "sampled_softmax", "negatives": 7, "schedule": "cosine", "weight_decay": 0.1, "dropout": 0.5, "validate_every": 2}),
    ("hydra", {"windows": "prefixes", "dropout": 0.3}),
    ("repeats", {"weight_decay": 0.1}),
]


@pytest.mark.parametrize(("name", "settings"), REPEATED, ids=[name for name, _ in REPEATED])
def test_a_killed_training_ends_with_the_same_weights(name, settings, counting, tmp_path, monkeypatch):
    whole, expected = fit(name, counting, tmp_path / "whole", **settings)
    again, _ = fit(name, counting, tmp_path / "again", **settings)
    real, calls = training.train_epoch, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(name, counting, tmp_path / "killed", **settings)
    monkeypatch.setattr(training, "train_epoch", real)
    resumed, progress = fit(name, counting, tmp_path / "killed", **settings)
    assert progress.log == expected.log
    assert_same_weights(whole, again)
    assert_same_weights(whole, resumed)


def test_the_seed_decides_about_order_and_borders(counting, tmp_path):
    one, other = (fit("mamba2", counting, tmp_path / str(seed), epochs=1, seed=seed, dropout=0.0)[0] for seed in (1, 2))
    assert not torch.equal(one.items.weight, other.items.weight)


@pytest.mark.parametrize("settings", [{"dropout": 0.3}, {"loss": "bce"}, {"loss": "gbce"}, {"loss": "sampled_softmax"}])
def test_the_seed_decides_about_dropout_and_negatives(settings, tmp_path):
    items, split = np.arange(1, 10, dtype=np.int32), np.array([TRAIN] * 7 + [VALID, TEST], dtype=np.int8)
    alone = Sequences(np.array([0, 9]), items, np.ones(9, dtype=np.float32), split, 30)  # one window: no order, no borders

    def loss(seed, folder, **settings):
        _, progress = fit("mamba2", alone, tmp_path / folder, epochs=1, seed=seed, **{"dropout": 0.0, "negatives": 5} | settings)
        return progress.log[0]["loss"]

    assert loss(1, "a") == loss(2, "b")
    assert loss(1, "c", **settings) == loss(1, "d", **settings) != loss(2, "e", **settings)


def test_early_stopping_keeps_the_best_epoch(counting, tmp_path):
    _, progress = fit("attention", counting, tmp_path / "a", epochs=100, patience=2)
    assert progress.epoch == progress.best_epoch + 2
    assert progress.best == max(row["valid_ndcg@10"] for row in progress.log)


def validated(progress):
    return [row["epoch"] for row in progress.log if "valid_ndcg@10" in row]


@pytest.mark.parametrize(("every", "epochs", "expected"), [(1, 4, [1, 2, 3, 4]), (3, 7, [3, 6, 7]), (3, 6, [3, 6]), (9, 4, [4])])
def test_every_few_epochs_and_the_last_are_validated(every, epochs, expected, counting, tmp_path):
    _, progress = fit("mamba2", counting, tmp_path / "a", epochs=epochs, validate_every=every)
    assert validated(progress) == expected
    assert [row["epoch"] for row in progress.log] == list(range(1, epochs + 1))
    assert progress.best_epoch in expected


def test_patience_counts_validations(counting, tmp_path):
    # weights that never move: the first validation is the best
    _, progress = fit("mamba2", counting, tmp_path / "a", epochs=50, learning_rate=0.0, validate_every=3, patience=2)
    assert (progress.best_epoch, progress.epoch, validated(progress)) == (3, 9, [3, 6, 9])


def test_the_kept_weights_are_those_of_the_best_validation(counting, tmp_path):
    model, progress = fit("mamba2", counting, tmp_path / "a", epochs=6, learning_rate=0.05, validate_every=2)
    ranks = rank(training.SequenceScorer(model, 10), counting, counting.cases("valid"), 1, repeats=True, batch=64).target_rank
    assert np.where(ranks <= 10, 1 / np.log2(ranks + 1.0), 0).mean() == pytest.approx(progress.best)


# ------------------------------------------------------------------ learning rate


def rates(steps, **settings):
    return [training._rate(step, 10, config.Training(epochs=4, **settings)) for step in steps]


def test_warm_up_is_linear_and_then_constant():
    assert rates([0, 1, 3, 4, 5, 39], warmup=5) == pytest.approx([0.2, 0.4, 0.8, 1, 1, 1])
    assert rates([0, 39], warmup=0) == [1, 1]


def test_cosine_falls_from_one_over_a_half_to_zero():
    cosine = {"schedule": "cosine", "warmup": 0}
    assert rates([0, 10, 20, 30, 40], **cosine) == pytest.approx([1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0])
    assert rates([41, 60], **cosine) == pytest.approx([0, 0])  # epochs need not have the same number of steps
    falling = rates(range(41), **cosine)
    assert falling == sorted(falling, reverse=True)


def test_cosine_is_warmed_up_too():
    plain = rates(range(40), schedule="cosine", warmup=0)
    assert rates(range(40), schedule="cosine", warmup=20) == pytest.approx([min(1, (k + 1) / 20) * rate for k, rate in enumerate(plain)])


def test_a_cosine_leaves_the_weights_almost_alone_in_the_end(counting, tmp_path, monkeypatch):
    real, weights = training.train_epoch, []

    def watched(model, *arguments):
        loss = real(model, *arguments)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        return loss

    monkeypatch.setattr(training, "train_epoch", watched)
    fit("mamba2", counting, tmp_path / "a", epochs=10, schedule="cosine")
    moves = [(after - before).norm() for before, after in pairwise(weights)]
    assert moves[-1] < 0.1 * moves[0]


# ------------------------------------------------------------------ what must not be trained


@pytest.mark.parametrize("windows", ["all", "last"])
def test_a_mixer_that_sees_the_future_is_not_trained_on_all_positions(windows, counting, tmp_path):
    with pytest.raises(UserError, match=r"hydra sees the future .*prefixes"):
        fit("hydra", counting, tmp_path / "a", windows=windows)
    assert not list((tmp_path / "a").iterdir())


def test_a_prefix_has_one_target_the_item_after_it(counting, tmp_path, monkeypatch):
    real, batches = training._loss, []

    def watched(model, inputs, targets, *how):
        batches.append((inputs, targets))
        return real(model, inputs, targets, *how)

    monkeypatch.setattr(training, "_loss", watched)
    fit("hydra", counting, tmp_path / "a", epochs=1, windows="prefixes", prefixes_per_user=2)
    assert sum(len(inputs) for inputs, _ in batches) == 2 * 60
    for inputs, targets in batches:
        last = (inputs > 0).sum(1) - 1
        rows = torch.arange(len(inputs))
        assert torch.equal((targets > 0).sum(1), torch.ones_like(last))
        assert torch.equal(targets[rows, last], inputs[rows, last] % 30 + 1)  # everyone counts


def test_the_legacy_leak_may_be_trained_on_all_positions(counting, tmp_path):
    _, progress = fit("leak", counting, tmp_path / "a", epochs=2)
    assert progress.epoch == 2
    training.check(config.SequenceModel(mixer=config.Mixer(name="hydra")), config.Training(windows="prefixes"))


IN_MIXER = ("heads", "hidden", "d_state", "headdim", "d_conv", "expand", "chunk")
OUT_OF_RANGE = [
    *((f"training.{name}", 0) for name in training.AT_LEAST_ONE),
    ("training.batch", -8),
    ("training.calibration", 5),
    ("training.calibration", -0.1),
    *((f"model.{name}", 0) for name in ("dim", "layers", "inner")),
    *((f"model.mixer.{name}", 0) for name in IN_MIXER),
    *((f"{place}.dropout", p) for place in ("model", "model.mixer") for p in (1.0, 3, -0.5)),
    ("model.temperature", 0),
    ("model.temperature", -1),
    ("model.temperature", math.nan),
    ("model.mixer.d_latent", 0),
    ("training.learning_rate", -0.1),
    ("training.learning_rate", math.nan),
    ("training.gradient_clip", 0),
    ("training.weight_decay", -0.1),
    ("training.warmup", -1),
]


def sections(name, value):
    """The settings of model and training with this one changed."""
    parts = {"model": {}, "training": {}, "model.mixer": {}}
    section, key = name.rsplit(".", 1)
    parts[section][key] = value
    return config.SequenceModel(mixer=config.Mixer(**parts["model.mixer"]), **parts["model"]), config.Training(**parts["training"])


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(UserError, match=rf"^{name} (is|must)"):
        training.check(*sections(name, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((f"training.{name}", 1) for name in training.AT_LEAST_ONE),
        *((f"model.mixer.{name}", 1) for name in IN_MIXER),
        *(("training.calibration", t) for t in (0, 1)),
        *((f"{place}.dropout", p) for place in ("model", "model.mixer") for p in (0, 0.99)),
        ("model.temperature", 1e-3),
    ],
)
def test_the_ends_of_the_ranges_are_in_them(name, value):
    training.check(*sections(name, value))


@pytest.mark.parametrize("loss", ["sampled_softmax", "gbce", "bce"])
def test_a_repeat_bias_needs_the_full_softmax(loss):
    model = config.SequenceModel(repeat_bias=True)
    training.check(model, config.Training())
    with pytest.raises(UserError, match=rf"model\.repeat_bias .*full_softmax, not {loss}"):
        training.check(model, config.Training(loss=loss))


def test_nothing_is_trained_under_settings_out_of_range(counting, tmp_path):
    with pytest.raises(UserError, match=r"training\.patience"):
        fit("attention", counting, tmp_path / "a", patience=0)
    assert not list((tmp_path / "a").iterdir())


# ------------------------------------------------------------------ the negative of bce


def bare_model(items):
    torch.manual_seed(0)
    sizes = config.SequenceModel(mixer=config.Mixer(name="gru", hidden=4), dim=4, norm="none", feed_forward="none", dropout=0.0)
    model = SequenceModel(sizes, items, 50).double()
    with torch.no_grad():
        model.items.weight[1:].normal_()
    return model


def test_of_two_items_the_negative_is_the_other_one():
    model, inputs = bare_model(2), torch.randint(1, 3, (6, 20))
    targets = torch.randint(1, 3, (6, 20))
    loss = training._loss(model, inputs, targets, config.Training(loss="bce"))
    scores = model(inputs) @ model.items.weight[1:].T
    right, wrong = scores.gather(2, targets[..., None] - 1), scores.gather(2, 2 - targets[..., None])
    assert_close(loss, -(right.sigmoid().log() + (1 - wrong.sigmoid()).log()).mean())


def test_every_item_but_the_target_is_as_likely_a_negative(monkeypatch):
    model, rows = bare_model(5), []
    real = model.item_vectors
    monkeypatch.setattr(model, "item_vectors", lambda ids=None: rows.append(ids) or real(ids))
    inputs, targets = (torch.randint(1, 6, (200, 50)) for _ in range(2))
    training._loss(model, inputs, targets, config.Training(loss="bce"))
    positives, negatives = rows
    assert torch.equal(positives, targets.flatten())
    counts = torch.zeros(6, 6).index_put_((positives, negatives), torch.ones(10_000), accumulate=True)[1:, 1:]
    shares = counts / counts.sum(1, keepdim=True)
    assert not counts.diag().any()
    assert ((shares - 0.25).abs() < 0.05).logical_or(torch.eye(5, dtype=torch.bool)).all()  # five deviations of 2,000 draws


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
