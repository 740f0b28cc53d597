"""States against reading the whole history again; only what an event touches changes; states belong to their model."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llmrec.cli import main
from llmrec.config import Config, Mixer, Retrieval
from llmrec.config import SequenceModel as Sizes
from llmrec.data.tables import load_sequences
from llmrec.errors import UserError
from llmrec.retrievers import mixers, online, training
from llmrec.retrievers.candidates import top_items
from llmrec.retrievers.sequence_model import SequenceModel
from llmrec.stages import STAGES

ITEMS = 30


# what the sizes of a mixer and the rest of the skeleton may be in a model that keeps states
SMALL = {"headdim": 4, "d_state": 4, "chunk": 5}
MIXERS = {
    "mamba": {"mixer": Mixer("mamba", d_state=4)},
    "mamba2": {"mixer": Mixer("mamba2", **SMALL)},
    "latent_mamba": {"mixer": Mixer("latent_mamba", heads=2, d_latent=4, **SMALL), "norm": "pre", "norm_kind": "rms", "temperature": 0.1},
    "gru": {"mixer": Mixer("gru", hidden=12), "residual": False, "norm": "none", "feed_forward": "none"},
    "lru": {"mixer": Mixer("lru", hidden=12), "item_bias": True},
}
SKELETONS = {
    "one layer": {"layers": 1},
    "no residual": {"layers": 3, "residual": False},
    "pre": {"norm": "pre"},
    "pre, no feed-forward": {"norm": "pre", "feed_forward": "none"},
    "bias": {"item_bias": True},
    "bias, temperature": {"norm": "pre", "item_bias": True, "temperature": 0.05},
}
KINDS = MIXERS | {name: MIXERS["mamba2"] | sizes for name, sizes in SKELETONS.items()}
EVERY_MIXER = pytest.mark.parametrize("kind", MIXERS)


def model_of(kind="mamba2", seed=0, dtype=torch.float64, **sizes):
    torch.manual_seed(seed)
    known = KINDS[kind] if kind in KINDS else {"mixer": Mixer(kind)}
    model = SequenceModel(Sizes(**{"dim": 16, "inner": 32, "layers": 2, "residual": True} | known | sizes), ITEMS, 50)
    if model.item_bias is not None:
        torch.nn.init.normal_(model.item_bias)
    return model.to(dtype).eval()


@pytest.fixture
def model():
    return model_of()


@pytest.fixture
def histories():
    draw = np.random.default_rng(0)
    return [draw.integers(1, ITEMS + 1, length) for length in (7, 1, 40, 12, 3)]


def read_again(model, history):
    """The vector after a history, by the model's forward pass over all of it."""
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(history, dtype=np.int64))[None])[0, -1]


def assert_states_are_those_of(states, model, histories):
    """`histories` maps users to all of their events."""
    assert sorted(states.users) == sorted(histories)
    for user, history in histories.items():
        assert_close(states.hidden[states.rows[user]], read_again(model, history))
        with torch.no_grad():
            _, alone = model.read(torch.tensor([list(history)]))
        for kept, expected in zip(online._tensors(states.layers), online._tensors(alone), strict=True):
            assert_close(kept[states.rows[user]], expected[0])


def test_every_mixer_with_a_state_is_here():
    assert set(MIXERS) == {name for name, mixer in mixers.MIXERS.items() if mixer.STEPS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reading_in_pieces_and_stepping_equal_the_forward_pass(kind, dtype):
    model = model_of(kind, dtype=dtype)
    history = torch.randint(1, ITEMS + 1, (3, 17))
    whole = model(history)
    first, states = model.read(history[:, :6])
    second, states = model.read(history[:, 6:11], states)
    vectors = [first, second]
    for items in history[:, 11:].T:
        vector, states = model.step(states, items)
        vectors.append(vector[:, None])
    assert_close(torch.cat(vectors, 1), whole)

    states, vectors = model.initial_states(3), []
    for items in history.T:
        vector, states = model.step(states, items)
        vectors.append(vector)
    assert_close(torch.stack(vectors, 1), whole)


@EVERY_MIXER
@torch.no_grad()
def test_padding_leaves_states_as_they_are(kind):
    model = model_of(kind)
    history = torch.randint(1, ITEMS + 1, (3, 9))
    lengths = torch.tensor([9, 4, 0])
    _, before = model.read(torch.randint(1, ITEMS + 1, (3, 5)))
    vectors, after = model.read(history * (torch.arange(9) < lengths[:, None]), before)
    for row, length in enumerate(lengths):
        own = online._map(lambda tensor, row=row: tensor[row : row + 1], before)
        alone, expected = model.read(history[row : row + 1, :length], own) if length else (vectors[:0], own)
        assert_close(vectors[row, :length], alone.flatten(0, 1))
        for kept, tensor in zip(online._tensors(after), online._tensors(expected), strict=True):
            assert_close(kept[row], tensor[0])


@pytest.mark.parametrize(
    ("mixer", "sizes", "problem"),
    [(name, {}, f"mixer {name}") for name in ("attention", "hydra", "hstu", "gated_mamba_attention")]
    + [("mamba2", {option: True}, f"model.{option}") for option in ("positions", "repeat_bias")],
)
def test_models_without_a_state_say_which_have_one(mixer, sizes, problem):
    model = model_of(mixer, **sizes)
    items = torch.tensor([1])
    for attempt in (lambda: model.initial_states(1), lambda: model.read(items[None]), lambda: model.step([None, None], items)):
        with pytest.raises(UserError, match=rf"{problem} .*\(gru, lru, mamba, mamba2, latent_mamba\)"):
            attempt()
    with pytest.raises(UserError, match=problem):
        online.read(model, [[1]])


@EVERY_MIXER
@pytest.mark.parametrize(("users", "positions"), [(64, 128), (2, 5), (3, 1)])
def test_states_of_histories_of_any_length_however_they_are_cut(histories, monkeypatch, kind, users, positions):
    monkeypatch.setattr(online, "USERS", users)
    monkeypatch.setattr(online, "POSITIONS", positions)
    model = model_of(kind)
    states = online.read(model, [*histories, []], users=[4, 9, 2, 700, 0, 1])
    assert_states_are_those_of(states, model, dict(zip([4, 9, 2, 700, 0], histories, strict=True)))


@EVERY_MIXER
def test_events_one_at_a_time_equal_the_longer_history_at_once(kind):
    model, draw = model_of(kind), np.random.default_rng(1)
    states, known = online.read(model, []), {}
    for user in draw.choice([0, 3, 10**12, -5, 8, 21, 34], 60):
        item = int(draw.integers(1, ITEMS + 1))
        online.update(model, states, [user], [item])
        known.setdefault(int(user), []).append(item)
    assert len(known) == 7
    assert_states_are_those_of(states, model, known)


def test_several_events_of_several_users_old_and_new_in_one_call(model, histories):
    states = online.read(model, histories)
    online.update(model, states, [3, 77, 3, 1, 77, 3], [5, 6, 5, 7, 8, 9])
    expected = {user: history.tolist() for user, history in enumerate(histories)} | {77: [6, 8]}
    expected[3] += [5, 5, 9]
    expected[1] += [7]
    assert_states_are_those_of(states, model, expected)


def test_dropout_of_a_model_in_training_does_not_enter(model, histories):
    states = online.read(model.train(), histories)
    online.update(model.train(), states, [2], [4])
    assert_states_are_those_of(states, model.eval(), {u: [*h, 4] if u == 2 else h.tolist() for u, h in enumerate(histories)})


def test_other_users_are_not_touched(model, histories):
    states = online.read(model, histories)
    before = [tensor.clone() for tensor in [states.hidden, *online._tensors(states.layers)]]
    online.update(model, states, [2, 50], [4, 4])
    for old, new in zip(before, [states.hidden, *online._tensors(states.layers)], strict=True):
        assert torch.equal(old[[0, 1, 3, 4]], new[[0, 1, 3, 4]])
        assert not torch.equal(old[2], new[2])


@pytest.mark.parametrize(
    ("users", "items", "complaint"),
    [
        ([1, 8, 1], [3, ITEMS + 1, 3], rf"row 1 \(user 8\): item {ITEMS + 1} .* 1 to {ITEMS}: leave the event out"),
        ([1], [0], r"row 0 \(user 1\): item 0 "),
        ([1, 2], [3], "1 items for 2 users"),
        ([1], [3.5], "whole numbers"),
        (["u1"], [3], "whole numbers"),
    ],
)
def test_bad_events_are_refused_and_change_nothing(model, histories, users, items, complaint):
    states = online.read(model, histories)
    with pytest.raises(UserError, match=complaint):
        online.update(model, states, users, items)
    assert_states_are_those_of(states, model, {user: history.tolist() for user, history in enumerate(histories)})


@pytest.mark.parametrize(("users", "complaint"), [([0, 1, 2, 3, 1], "user 1 has 2 histories"), ([0, 1], "5 histories for 2 users")])
def test_every_user_has_one_history(model, histories, users, complaint):
    with pytest.raises(UserError, match=complaint):
        online.read(model, histories, users)


@pytest.mark.parametrize("kind", [*MIXERS, "bias, temperature"])
@pytest.mark.parametrize("count", [5, ITEMS + 3])
def test_recommendations_are_those_of_reading_again(counting, count, kind):
    model = model_of(kind)
    users, ends = np.arange(counting.user_count), counting.offsets[1:]
    histories = [counting.history(user, end) for user, end in zip(users, ends, strict=True)]
    states = online.read(model, histories)
    again = training.SequenceScorer(model, 50)
    asked = np.array([7, 7, 0, 59])
    found = online.recommend(model, states, asked, count, exclude=[histories[user] for user in asked])
    assert np.array_equal(found, top_items(again, counting, users, ends, count)[asked])
    everything = again.scores(asked, [histories[user] for user in asked]).argsort(1, descending=True).numpy() + 1
    assert np.array_equal(online.recommend(model, states, asked, count)[:, :ITEMS], everything[:, :count])


@pytest.mark.parametrize(
    ("users", "exclude", "complaint"),
    [([0, 99], None, "user 99 has no state"), ([0], [[0]], "item 0 is not"), ([0, 1], [[3]], "1 lists of items to exclude for 2 users")],
)
def test_bad_questions_are_refused(model, histories, users, exclude, complaint):
    states = online.read(model, histories)
    with pytest.raises(UserError, match=complaint):
        online.recommend(model, states, users, 3, exclude)


@EVERY_MIXER
def test_saved_states_go_on_where_they_were_and_the_file_does_not_change(kind, histories, tmp_path):
    model, path = model_of(kind), tmp_path / "states.safetensors"
    states = online.read(model, histories)
    online.update(model, states, [70], [1])  # spare rows, which are not saved
    online.save(states, path)
    content = path.read_bytes()
    loaded = online.load(path, model)
    assert loaded.users.tolist() == states.users.tolist() == [0, 1, 2, 3, 4, 70]
    assert {len(tensor) for tensor in [loaded.hidden, *online._tensors(loaded.layers)]} == {6}
    for some in (states, loaded):
        online.update(model, some, [2, 70, 71], [5, 6, 7])
    expected = {user: history.tolist() for user, history in enumerate(histories)} | {70: [1, 6], 71: [7]}
    expected[2] += [5]
    assert_states_are_those_of(loaded, model, expected)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_states_of_another_model_and_files_that_are_none_are_refused(model, histories, tmp_path):
    path = tmp_path / "states.safetensors"
    online.save(online.read(model, histories), path)
    other = model_of()
    assert online.load(path, other).users.tolist() == [0, 1, 2, 3, 4]  # the same weights, made again
    with torch.no_grad():
        other.layers[1].mixer.D[0] += 1e-6
    with pytest.raises(UserError, match="states of another model"):
        online.load(path, other)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        online.load(path, model)
    with pytest.raises(UserError, match="keep_states"):
        online.load(tmp_path / "none.safetensors", model)


def test_a_kill_between_write_and_rename_leaves_the_old_file_or_none(model, histories, tmp_path):
    states = online.read(model, histories)

    def save_and_be_killed(path):
        child = os.fork()
        if not child:
            try:
                os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
                online.save(states, path)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    old, none = tmp_path / "old.safetensors", tmp_path / "none.safetensors"
    online.save(states, old)
    before = old.read_bytes()
    online.update(model, states, [0], [1])
    save_and_be_killed(old)
    save_and_be_killed(none)
    assert old.read_bytes() == before
    assert not none.exists()
    online.save(states, none)
    assert_close(online.load(none, model).hidden[0], read_again(model, [*histories[0], 1]))


def test_keeping_states_changes_a_fingerprint_only_when_asked_for():
    decides = STAGES["retrieve"].decides
    off = decides(Config())
    assert {key for key in off if key.startswith("retrieval.")} == {"retrieval.kind", "retrieval.candidates", "retrieval.repeats"}
    assert decides(Config(retrieval=Retrieval(keep_states=True))) == off | {"retrieval.keep_states": True}


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A prepared data set of 12 users who each go up through 20 items."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMREC_HOME", str(tmp_path / "cache"))
    rows = [f"u{user},i{(3 * user + step) % 20},{user * 8 + step}" for user in range(12) for step in range(8)]
    Path("ratings.csv").write_text("\n".join(["user,item,when", *rows]) + "\n")
    Path("titles.csv").write_text("item,title\n" + "".join(f"i{n},Film {n}\n" for n in range(20)))
    Path("shop.yaml").write_text(
        "source: {format: csv, interactions: ratings.csv, items: titles.csv, columns: {rating: null, timestamp: when}}\nfilter: {core: 2}\n"
    )
    assert main(["prepare", "--dataset", "shop.yaml"]) == 0
    return tmp_path


def test_the_stage_keeps_states_and_the_documented_example_runs(shop, capsys):
    retrieve = ["retrieve", "--dataset", "shop.yaml", "--training.epochs", "1", "--retrieval.keep_states"]
    page = (Path(__file__).parents[2] / "docs/online.md").read_text()
    assert '--retrieval.keep_states true"' in page
    assert main([*retrieve, "true", "--retriever", "2mamba4rec.online"]) == 0
    assert main([*retrieve, "false"]) == 0
    kept, plain = (Path("runs/shop/retrieve") / name for name in ("2mamba4rec.online", "2mamba4rec"))
    assert {path.name for path in kept.iterdir()} - {path.name for path in plain.iterdir()} == {"states.safetensors"}
    assert (kept / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()

    capsys.readouterr()
    names = {}
    exec(page.split("```python\n")[1].split("```")[0].replace("ml-100k", "shop.yaml"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert all(line.count("Film") == 5 for line in printed)
    sequences = load_sequences(Path("runs/shop/prepare"))
    events = {user: sequences.history(user, end).tolist() for user, end in enumerate(sequences.offsets[1:])}
    assert all(len(history) == 8 for history in events.values())  # the held-out events, too
    events[3] += [17, 4]
    assert_states_are_those_of(names["states"], names["model"], events | {5000: [11]})


@pytest.mark.parametrize(("retriever", "complaint"), [("sasrec", "mixer attention"), ("popularity", "popularity has no states to keep")])
def test_the_stage_refuses_before_it_trains(shop, monkeypatch, capsys, retriever, complaint):
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("it trained"))
    assert main(["retrieve", "--dataset", "shop.yaml", "--retriever", retriever, "--retrieval.keep_states", "true"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert complaint in error
    assert "2mamba4rec" in error or "mamba2" in error
    assert not list(Path("runs/shop/retrieve").iterdir())
