"""Parameter counts of the published models; what every recipe's model sees, repeats and learns from; the norms by hand."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.testing import assert_close

from llmrec.cli import read_settings
from llmrec.config import Mixer, Training
from llmrec.config import SequenceModel as Sizes
from llmrec.errors import UserError
from llmrec.retrievers import training, windows
from llmrec.retrievers.mixers import is_causal
from llmrec.retrievers.sequence_model import SequenceModel

RECIPES = Path(__file__).parents[2] / "recipes"
SEQUENCE = sorted(
    path.stem for path in RECIPES.glob("retrievers/*.yaml") if yaml.safe_load(path.read_text())["retrieval"]["kind"] == "sequence"
)
LEAK = "moematrrec --model.mixer.legacy_leak true"
BUDGETS = sorted(RECIPES.glob("training/*.yaml"))
EVERY = pytest.mark.parametrize("recipe", [*SEQUENCE, LEAK], ids=lambda recipe: recipe.replace(" --model.mixer.", " "))


@functools.cache
def settings(recipe):
    """Of a retriever's name and, after it, options."""
    name, *options = recipe.split()
    return read_settings("retrieve", ["--dataset", "ml-1m", "--retriever", name, *options])[0]


def model_of(recipe, items=30, dtype=torch.float64):
    torch.manual_seed(0)
    config = settings(recipe)
    return SequenceModel(config.model, items, config.training.max_length).to(dtype).eval()


def random_history(length=9, rows=2):
    return torch.randint(1, 31, (rows, length), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ parameter counts

# The parts of 64 wide models by hand; of state-space layers with inner width 128 and states of 32
LAYER_NORM, RMS_NORM = 2 * 64, 64
MAMBA = 64 * 256 + (128 * 4 + 128) + 128 * (4 + 2 * 32) + (4 * 128 + 128) + 128 * 32 + 128 + 128 * 64  # in, conv, x, dt, A, D, out
ATTENTION = 4 * (64 * 64 + 64)
GATE = 64 + 1
RELU = 2 * (64 * 64 + 64)
WIDE_RELU = 64 * 256 + 256 + 256 * 64 + 64
HSTU = 64 * 256 + 50 + (64 * 64 + 64)  # uvqk, a weight per distance, out; its norm has no weights
# in, conv of x, B and C, three numbers of the one head, norm, out: a Mamba-2 of width 16; four of them between two projections
LATENT = 4 * (16 * (32 + 32 + 2 * 32 + 1) + 96 * 5 + 3 + 32 + 32 * 16) + 64 * 128 + 64 * 64
COUNTS = {
    "mamba4rec": 72_256,
    "2mamba4rec": 78_624,
    "2mamba4rec-cpu": 64 * (128 + 128 + 64 + 4) + 192 * 5 + 3 * 4 + 128 + 128 * 64 + (64 * 512 + 256 + 64) + 3 * LAYER_NORM,
    "2mamba4rec-ml-1m": 2 * (63_500 - LAYER_NORM) + LAYER_NORM + 1,  # two layers, and the repeat bias
    "sasrec": 100_096,
    "hydra4rec": 68_934,
    "hydra4rec --model.mixer.d_conv 4": 68_166,
    "lrurec": 133_888,
    "gru4rec": 81_984,
    "recmamba": 38_784,
    # norms of the embeddings, before a feed-forward layer, before every mixer but the first, and at the end
    "mambarec": 2 * (MAMBA + RELU) + 5 * LAYER_NORM,
    "mambarec-block": 2 * MAMBA + 3 * LAYER_NORM,
    # of the embeddings, after the mixer and after the feed-forward layer
    "moematrrec": MAMBA + ATTENTION + GATE + WIDE_RELU + 3 * LAYER_NORM,
    LEAK: MAMBA + ATTENTION + GATE + WIDE_RELU + 3 * LAYER_NORM,
    # cosines need no norm at the end
    "hstu": 2 * HSTU + 2 * LAYER_NORM,
    "latent-mamba": 2 * (LATENT + 3 * 64 * 128) + 4 * RMS_NORM,
    "latent-mamba --model.feed_forward gated": 2 * (LATENT + 3 * 64 * 64) + 4 * RMS_NORM,
}


def test_parts_counted_by_hand_are_the_published_ones():
    assert COUNTS["recmamba"] == MAMBA
    assert COUNTS["moematrrec"] == 88_961
    assert COUNTS["latent-mamba"] == 98_712


@pytest.mark.parametrize("recipe", sorted({*COUNTS, *SEQUENCE}))
def test_non_embedding_parameters(recipe):
    assert model_of(recipe).parameter_counts()["non_embedding"] == COUNTS[recipe]


@pytest.mark.parametrize(
    ("recipe", "ids", "total"),
    [
        ("mamba4rec", 211_452, 13_605_184),
        ("2mamba4rec", 3_417, 297_312),
        ("2mamba4rec", 26_355, 1_765_344),
        ("sasrec", 3_417, 321_984),
        ("sasrec", 26_355, 1_790_016),
        ("sasrec", 211_452, 13_636_224),
        ("hydra4rec --model.mixer.d_conv 4", 3_417, 286_854),
        ("hydra4rec --model.mixer.d_conv 4", 10_673, 751_238),
        ("hydra4rec --model.mixer.d_conv 4", 12_102, 842_694),
        ("lrurec", 3_417, 133_888 + 3_417 * 64 + 3_417),
        ("recmamba", 3_417, 38_784 + (3_417 + 50) * 64),
        ("hstu", 3_417, COUNTS["hstu"] + (3_417 + 50) * 64),
    ],
)
def test_total_parameters_with_the_padding_among_the_ids(recipe, ids, total):
    config = settings(recipe)
    with torch.device("meta"):
        model = SequenceModel(config.model, ids - 1, config.training.max_length)
    assert model.parameter_counts()["total"] == total


def test_lrurec_with_complex_numbers_counted_once():
    whole = {"in_weight", "in_bias", "out_weight", "out_bias"}  # real and imaginary part in the last dimension
    parameters = [
        (name.split(".")[-1], p.numel()) for name, p in model_of("lrurec").named_parameters() if name.startswith(("layers", "norm"))
    ]
    assert sum(size // 2 if name in whole else size for name, size in parameters) == 100_736


# ------------------------------------------------------------------ what a position sees


@EVERY
def test_a_position_sees_the_future_only_where_the_mixer_says_so(recipe):
    model, history = model_of(recipe), random_history()
    changed = history.clone()
    changed[:, 6:] = changed[:, 6:] % 30 + 1
    difference = (model(history) - model(changed))[:, :6].detach().abs().amax(-1)
    assert is_causal(settings(recipe).model.mixer) == (recipe not in ("hydra4rec", LEAK))
    if is_causal(settings(recipe).model.mixer):
        assert difference.max() < 1e-10
    else:
        assert difference.min() > 1e-6


@EVERY
def test_every_past_item_matters(recipe):
    model, history = model_of(recipe), random_history(6)
    for position in range(6):
        changed = history.clone()
        changed[:, position] = changed[:, position] % 30 + 1
        # the bare mixer of small embeddings has vectors of 3e-3 and leaves 8e-7 of the first of six items
        assert (model(history) - model(changed))[:, -1].abs().amax(-1).min() > (1e-7 if recipe == "recmamba" else 1e-6)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_on_the_right_changes_nothing(recipe, dtype):
    model, history, lengths = model_of(recipe, dtype=dtype), random_history(rows=3), torch.tensor([9, 4, 1])
    padded = F.pad(history * (torch.arange(9) < lengths[:, None]), (0, 5))
    whole, last = model(padded), model.last(padded, lengths)
    near = {"atol": 2e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-9, "rtol": 1e-9}
    for row, length in enumerate(lengths.tolist()):
        alone = model(history[row : row + 1, :length])[0]
        assert_close(whole[row, :length], alone, **near)
        assert_close(last[row], alone[-1], **near)


@EVERY
def test_dropout_is_in_training_only(recipe):
    model, history = model_of(recipe), random_history()
    assert torch.equal(model(history), model(history))
    model.train()
    assert (model(history) - model(history)).abs().max() > 1e-6


# ------------------------------------------------------------------ scores and gradients


@EVERY
def test_scores_are_products_of_vectors_and_item_vectors(recipe):
    model, history = model_of(recipe), random_history()
    table, ids = model.item_vectors(), torch.tensor([[3, 1], [30, 0]])
    vectors, sizes = model(history), settings(recipe).model
    assert vectors.shape == (2, 9, model.width)
    assert table.shape == (31, model.width)
    assert model.width == 64 + sizes.item_bias
    assert_close(model.item_vectors(ids), table[ids])
    if sizes.temperature:
        scores = vectors @ table[1:].T
        assert scores.abs().max() <= 1 / sizes.temperature + 1e-9
        assert_close(scores * sizes.temperature, F.cosine_similarity(vectors[:, :, None], model.items.weight[1:], dim=-1))
    if not sizes.temperature and not sizes.item_bias:
        assert table is model.items.weight


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_an_item_bias_is_added_to_the_scores(temperature):
    torch.manual_seed(0)
    history = random_history()
    sizes = {"mixer": Mixer(name="gru", hidden=5), "dim": 8, "inner": 8, "temperature": temperature}
    plain, biased = SequenceModel(Sizes(**sizes), 30, 50).eval(), SequenceModel(Sizes(**sizes, item_bias=True), 30, 50).eval()
    biased.load_state_dict(plain.state_dict() | {"item_bias": torch.randn(31)})
    assert biased.item_bias is not None
    expected = plain(history) @ plain.item_vectors().T + biased.item_bias
    assert_close(biased(history) @ biased.item_vectors().T, expected)
    ids = torch.tensor([4, 9])
    assert_close(biased(history) @ biased.item_vectors(ids).T, expected[..., ids])
    assert biased.parameter_counts() == {name: n + 31 * (name == "total") for name, n in plain.parameter_counts().items()}


@EVERY
def test_one_loss_gives_every_parameter_a_finite_gradient(recipe, counting):
    model, how = model_of(recipe, dtype=torch.float32).train(), settings(recipe).training
    random = np.random.default_rng(0)
    pieces = windows.cut(counting, how, random)
    inputs, targets = next(windows.batches(pieces, how.batch, random, last_only=how.windows == "prefixes"))
    loss = training._loss(model, inputs, targets, how)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert not model.items.weight.grad[0].any()  # the padding


@EVERY
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda path: path.stem)
def test_every_training_budget_fits_every_recipe(recipe, budget, counting):
    name, *options = recipe.split()
    config = read_settings("retrieve", ["--dataset", "ml-1m", "--retriever", name, *options, "--config", str(budget)])[0]
    training.check(config.model, config.training)
    if not is_causal(config.model.mixer):
        assert config.training.windows == settings(recipe).training.windows
    torch.manual_seed(0)
    model = SequenceModel(config.model, 30, config.training.max_length).train()
    pieces = windows.cut(counting, config.training, np.random.default_rng(0))
    last_only = config.training.windows == "prefixes"
    inputs, targets = next(windows.batches(pieces, 4, np.random.default_rng(0), last_only=last_only))
    assert training._loss(model, inputs, targets, config.training).isfinite()


@pytest.mark.parametrize("positions", [False, True])
def test_scaled_embeddings_are_multiplied_by_the_root_of_the_width(positions):
    torch.manual_seed(0)
    sizes = Sizes(mixer=Mixer(name="gru", hidden=5), dim=9, norm="none", feed_forward="none", scaled=True, positions=positions)
    model, history = SequenceModel(sizes, 30, 12).double().eval(), random_history()
    x = 3 * model.items.weight[history]
    if positions:
        x = x + model.positions.weight[:9]  # not scaled
    (layer,) = model.layers
    assert_close(model(history), layer.mixer(x), atol=1e-12, rtol=1e-12)
    assert model.item_vectors() is model.items.weight  # as they are


# ------------------------------------------------------------------ what decays


@EVERY
def test_matrices_alone_decay(recipe):
    model = model_of(recipe, dtype=torch.float32)
    optimiser = training.optimiser_of(model, Training(weight_decay=0.5, learning_rate=0.1))
    for parameter in model.parameters():
        parameter.data[parameter == 0] = 1.0  # zeros cannot show it
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser.step()
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        is_matrix = "weight" in last and "norm" not in name  # of items, positions, linear layers and convolutions
        assert_close(parameter.detach(), before[name] * (0.95 if is_matrix else 1), msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------ norms

X = torch.tensor([1.0, 1.0, -1.0, -1.0])  # its own LayerNorm, and its own RMSNorm
MIXED = torch.tensor([3.0, 1.0, -1.0, -3.0])  # what the mixer below makes of it


def out_of(embedding, **sizes):
    """The model's vector after one item, where a mixer multiplies by 3, 1, 1 and 3, and there is no feed-forward layer."""
    small = {"dim": 4, "dropout": 0.0, "feed_forward": "none"}
    model = SequenceModel(Sizes(**small | sizes), 2, 5).eval()
    for layer in model.layers:
        layer.mixer = nn.Linear(4, 4, bias=False)
        layer.mixer.weight.data = torch.diag(torch.tensor([3.0, 1.0, 1.0, 3.0]))
    model.items.weight.data[1] = embedding
    return model(torch.tensor([[1]]))[0, 0].detach()


def test_post_norm_stands_after_the_sum():
    assert_close(out_of(5 * X), MIXED / 5**0.5)
    assert_close(out_of(5 * X, residual=True), (X + MIXED) / 10**0.5)
    assert_close(out_of(5 * X + 7, norm_kind="layer"), MIXED / 5**0.5)  # the mean goes


def test_pre_norm_stands_before_the_mixer_but_not_before_the_first():
    first = X + MIXED
    assert_close(out_of(5 * X, norm="pre", residual=True), first / 10**0.5)
    second = first + first / 10**0.5 * torch.tensor([3.0, 1.0, 1.0, 3.0])
    assert_close(out_of(5 * X, norm="pre", residual=True, layers=2), second / second.square().mean().sqrt())


def test_cosines_take_the_place_of_the_last_norm():
    assert_close(out_of(5 * X, norm="pre", residual=True, temperature=0.5), 2 * (X + MIXED) / 40**0.5)
    by_norm = {norm: SequenceModel(Sizes(norm=norm, feed_forward="none", temperature=0.5), 2, 5) for norm in ("pre", "post", "none")}
    assert all(isinstance(model.last_norm, nn.Identity) for model in by_norm.values())
    first, second = SequenceModel(Sizes(norm="pre", layers=2), 2, 5).layers
    assert isinstance(first.mixer_norm, nn.Identity)
    assert isinstance(second.mixer_norm, nn.LayerNorm)


def test_without_norms_the_mixer_is_the_model():
    assert_close(out_of(5 * X, norm="none"), 5 * MIXED)
    with pytest.raises(UserError, match="feed_forward none"):
        SequenceModel(Sizes(norm="none"), 2, 5)


def test_rms_norm_keeps_the_mean():
    x = torch.tensor([3.0, 1.0, 1.0, 1.0])  # mean square 3
    mixed = torch.tensor([9.0, 1.0, 1.0, 3.0]) / 3**0.5
    assert_close(out_of(x, norm_kind="rms"), mixed / mixed.square().mean().sqrt())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_two_layers_with_feed_forward_against_the_formulas(norm, residual):
    torch.manual_seed(0)
    model = SequenceModel(Sizes(dim=4, inner=6, layers=2, norm=norm, residual=residual, positions=True), 9, 5).double().eval()
    for layer in model.layers:
        layer.mixer = nn.Linear(4, 4).double()
    with torch.no_grad():
        for parameter in model.parameters():  # every norm has weights of its own
            parameter.normal_()

    def normed(x, by):
        centred = x - x.mean(-1, keepdim=True)
        return centred / centred.square().mean(-1, keepdim=True).sqrt() * by.weight + by.bias

    history, (a, b) = torch.tensor([[4, 9, 2]]), model.layers
    x = normed(model.items.weight[history] + model.positions.weight[:3], model.norm)
    if norm == "post":
        for layer in (a, b):
            x = normed(layer.mixer(x) + (x if residual else 0), layer.mixer_norm)
            x = normed(layer.feed_forward(x) + x, layer.feed_forward_norm)
    else:
        x = a.mixer(x) + (x if residual else 0)
        x = a.feed_forward(normed(x, a.feed_forward_norm)) + x
        x = b.mixer(normed(x, b.mixer_norm)) + (x if residual else 0)
        x = b.feed_forward(normed(x, b.feed_forward_norm)) + x
        x = normed(x, model.last_norm)
    assert_close(model(history), x)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"mixer": Mixer(headdim=7)}, "mamba2: .*7"),
        ({"mixer": Mixer(name="latent_mamba", d_latent=3)}, "latent_mamba: .*even"),
        ({"mixer": Mixer(name="attention", heads=3)}, "multiple"),
        ({"mixer": Mixer(name="hydra", legacy_leak=True)}, "legacy_leak"),
        ({"norm": "none"}, "feed_forward none"),
        ({"norm": "none", "feed_forward": "none", "residual": True}, "residual false"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, complaint):
    with pytest.raises(UserError, match=complaint):
        SequenceModel(Sizes(**sizes), 9, 9)
