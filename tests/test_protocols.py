"""Protocols by the commands a user types: a temporal split with one target per user or several, ties, sampled negatives."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from llmrec.cli import main, read_settings
from llmrec.stages import dataset_name, inputs

USERS, STEPS, ITEMS = 12, 20, 200


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Users take turns through 20 rounds, so that all of them have events in every period."""
    folder = tmp_path_factory.mktemp("shop")
    random = np.random.default_rng(0)
    taken = np.stack([random.permutation(ITEMS)[:STEPS] for _ in range(USERS)])
    ratings = ["user,item,rating,timestamp"]
    for step in range(STEPS):
        for user in range(USERS):
            ratings.append(f"{user},{taken[user, step]},{random.integers(1, 6)},{1_700_000_000 + 60 * (step * USERS + user)}")
    (folder / "ratings.csv").write_text("\n".join(ratings) + "\n")
    (folder / "titles.csv").write_text("item,title\n" + "".join(f"{item},Film number {item}\n" for item in range(ITEMS)))
    source = "source: {format: csv, interactions: ratings.csv, items: titles.csv}\nfilter: {core: 0}\n"
    (folder / "loo.yaml").write_text(source)
    (folder / "last.yaml").write_text(source + "split: {kind: temporal}\n")
    (folder / "successive.yaml").write_text(source + "split: {kind: temporal, target: successive}\n")
    return folder


TRAINED = 119
CHANCES = 1 / np.arange(1, 31)
"""Of the popular ones among them."""


@pytest.fixture(scope="module")
def tied_shop(shop):
    """Leave-one-out: of every other user the last three events share a second; three users are asked about an item that nobody had before.

    Each of the 12 users has 19 of the 119 items with training events, so that negatives drawn by popularity are the other 100.
    """
    random = np.random.default_rng(1)
    ratings = ["user,item,rating,timestamp"]
    for user in range(USERS):
        own = [item for item in range(10 * user, 10 * user + 10) if item < TRAINED]  # every item has an event
        fresh = user >= 9
        drawn = random.choice(30, 30, replace=False, p=CHANCES / CHANCES.sum())
        others = random.permutation([item for item in drawn if item not in own][: 19 - len(own)])
        items = [*random.permutation([*own, *others[:-2]]), *others[-2:], *([1_000 + user] if fresh else [])]
        for step, item in enumerate(items):
            last_three = step >= len(items) - 3 and user % 2 == 0
            second = 1_700_000_000 + 60 * (len(items) if last_three else step)
            ratings.append(f"{user},{item},{random.integers(1, 6)},{second}")
    (shop / "tied.csv").write_text("\n".join(ratings) + "\n")
    (shop / "tied.yaml").write_text((shop / "loo.yaml").read_text().replace("ratings.csv", "tied.csv").replace("titles.csv", "more.csv"))
    titles = "".join(f"{item},Film number {item}\n" for item in [*range(TRAINED), *range(1_009, 1_012)])
    (shop / "more.csv").write_text("item,title\n" + titles)
    return shop


@pytest.fixture
def made(shop, monkeypatch):
    """Prepare and retrieve by popularity, once per data set and name; gives the folder of `retrieve` and its metrics."""
    monkeypatch.chdir(shop)

    def make(dataset: str, name: str = "popularity.sampled") -> tuple[Path, dict]:
        arguments = ["--dataset", f"{dataset}.yaml"]
        assert main(["prepare", *arguments]) == 0
        sampled = ["--retrieval.legacy", {"sampled": "uniform", "weighted": "popularity"}[name.split(".")[1]]] if "." in name else []
        assert main(["retrieve", *arguments, "--retriever", name, *sampled]) == 0
        folder = shop / "runs" / dataset / "retrieve" / name
        return folder, json.loads((folder / "metrics.json").read_text())

    return make


@pytest.mark.parametrize(("dataset", "cases"), [("loo", 1), ("last", 1), ("successive", 2)])
def test_every_user_counts_once(made, dataset, cases):
    """The 240 events end with 24 test events: two rounds of all users."""
    folder, metrics = made(dataset)
    rows = pl.read_parquet(folder / "per_user.parquet").filter(pl.col("split") == "test")
    assert rows["user"].value_counts()["count"].to_list() == [cases] * USERS
    ranks = rows["rank"].to_numpy()
    gains = np.where(ranks <= 20, 1 / np.log2(ranks + 1), 0)
    by_user = [gains[rows["user"].to_numpy() == user].mean() for user in range(USERS)]
    assert metrics["test"]["ndcg@20"] == pytest.approx(np.mean(by_user))
    candidates = pl.read_parquet(folder / "candidates.parquet").filter(pl.col("split") == "test")
    assert candidates["target_rank"].to_list() == ranks.tolist()
    card = metrics["protocol"]
    assert (card["users_evaluated"], card["targets_evaluated"]) == (USERS, None if cases == 1 else 2 * USERS)
    assert card["split_kind"] == ("leave_one_out" if dataset == "loo" else "temporal")


def test_ranks_follow_from_what_lies_before_validation(made):
    """Popularity counted by hand from the events before the printed point in time."""
    folder, metrics = made("last")
    events = pl.read_parquet(folder.parents[1] / "prepare" / "interactions.parquet")
    before = events.filter(pl.col("timestamp") < metrics["protocol"]["valid_from"])
    count = np.bincount(before["item"], minlength=events["item"].max() + 1)[1:]
    rows = pl.read_parquet(folder / "candidates.parquet").filter(pl.col("split") == "test")
    for user, target, rank in rows.select("user", "target", "target_rank").iter_rows():
        mine = events.filter(pl.col("user") == user)
        assert target == mine["item"][-1]
        assert rank == (count >= count[target - 1]).sum()


def test_ties_and_sampled_negatives_stand_beside_the_full_ranking(made):
    _, metrics = made("loo")
    ties = metrics["ties"]["test"]
    assert 0 < ties["tied_users"] <= USERS  # counts of few events
    for name in ("hr@10", "ndcg@10"):
        best, worst = ties[name]
        assert best >= ties[f"expected_{name}"] >= worst == metrics["test"][name]
    assert ties["ndcg@10"][0] > ties["ndcg@10"][1]
    legacy = metrics["legacy"]
    assert legacy["protocol"]["candidate_set"] == "1 + 100 uniform negatives, none of them the user's"
    assert metrics["protocol"]["candidate_set"].startswith("all ")
    assert legacy["protocol"]["ties_in_score"] != metrics["protocol"]["ties_in_score"]


def test_without_the_option_nothing_is_sampled(made):
    _, sampled = made("last")
    _, plain = made("last", "popularity")
    assert sampled.keys() - plain.keys() == {"legacy"}
    assert all(sampled[key] == plain[key] for key in plain.keys() - {"train"})


def test_what_hangs_on_times_and_what_was_liked(made):
    """No two events share a time here, so that the bounds are the metrics themselves."""
    _, metrics = made("last")
    assert metrics["ambiguity"]["test"] == {"users": 0, "low": metrics["test"], "high": metrics["test"]}
    _, successive = made("successive")
    assert "preference" not in successive


def ndcg(rank, k=10):
    return 1 / np.log2(rank + 1) if rank <= k else 0


def test_tied_times_ratings_and_negatives_by_hand(tied_shop, made):
    """By popularity, so that every rank is a count of counts."""
    folder, metrics = made("tied", "popularity.weighted")
    events = pl.read_parquet(folder.parents[1] / "prepare" / "interactions.parquet")
    of_users = [events.filter(user=user) for user in range(USERS)]
    trained = events.filter(split="train")["item"].to_list()
    count = {item: trained.count(item) for item in events["item"].unique()}
    assert sum(n > 0 for n in count.values()) == TRAINED

    def rank(item):
        return sum(n >= count[item] for n in count.values())

    possible = [mine.filter(pl.col("timestamp") == mine["timestamp"][-1])["item"].to_list() for mine in of_users]
    ambiguity = metrics["ambiguity"]["test"]
    assert ambiguity["users"] == sum(len(items) == 3 for items in possible) == 6
    assert metrics["test"]["ndcg@10"] == pytest.approx(np.mean([ndcg(rank(mine["item"][-1])) for mine in of_users]))
    assert ambiguity["low"]["ndcg@10"] == pytest.approx(np.mean([ndcg(max(map(rank, items))) for items in possible]))
    assert ambiguity["high"]["ndcg@10"] == pytest.approx(np.mean([ndcg(min(map(rank, items))) for items in possible]))
    assert ambiguity["low"]["ndcg@10"] < metrics["test"]["ndcg@10"] < ambiguity["high"]["ndcg@10"]

    won = []
    for mine in of_users:
        (a, b), (stars_a, stars_b) = mine["item"][-2:], mine["rating"][-2:]
        if stars_a != stars_b:
            won.append(0.5 if count[a] == count[b] else float((count[a] > count[b]) == (stars_a > stars_b)))
    pairwise = metrics["preference"]["pairwise"]["retriever"]
    assert (pairwise["users"], pairwise["accuracy"]) == (len(won), np.mean(won))
    assert len(won) < USERS
    assert 0 < np.mean(won) < 1

    expected = []  # a tie is worth its mean over all places
    for mine in of_users:
        target, others = mine["item"][-1], [n for item, n in count.items() if n > 0 and item not in mine["item"].to_list()]
        assert len(others) == 100
        above, level = sum(n > count[target] for n in others), sum(n == count[target] for n in others)
        expected.append(np.mean([place <= 10 for place in range(above + 1, above + level + 2)]))
    assert any(0 < share < 1 for share in expected)
    legacy = metrics["legacy"]
    assert legacy["protocol"]["candidate_set"] == "1 + 100 negatives drawn by training popularity, none of them the user's"
    assert legacy["test"]["hr@10"] == pytest.approx(np.mean(expected))
    _, uniform = made("tied", "popularity.sampled")
    assert uniform["legacy"]["test"] != legacy["test"]  # some of these negatives nobody had before


def test_what_is_liked_is_on_the_scale_of_the_data(shop, made):
    folder, _ = made("last")
    data = shop / "runs" / "last" / "prepare"
    rated = pl.read_parquet(next(data.rglob("interactions.parquet"))).filter(split="test")["rating"]
    for threshold in (2, 5):
        arguments = ["--dataset", "last.yaml", "--retriever", f"popularity.liked{threshold}", "--evaluation.liked", str(threshold)]
        assert main(["retrieve", *arguments]) == 0
        liked = json.loads((folder.parent / f"popularity.liked{threshold}" / "metrics.json").read_text())["preference"]["liked"]
        assert (liked["threshold"], liked["users"]) == (threshold, (rated >= threshold).sum())


def test_too_few_items_to_draw_from_are_said_before_the_training(shop, monkeypatch, capsys):
    monkeypatch.chdir(shop)
    (shop / "few.yaml").write_text((shop / "loo.yaml").read_text().replace("ratings.csv", "few.csv"))
    lines = (shop / "ratings.csv").read_text().splitlines()
    (shop / "few.csv").write_text("\n".join(lines[: 1 + 7 * USERS]) + "\n")  # at most 84 items
    assert main(["prepare", "--dataset", "few.yaml"]) == 0
    assert main(["retrieve", "--dataset", "few.yaml", "--retriever", "sasrec", "--retrieval.legacy", "uniform"]) == 2
    said = capsys.readouterr().err
    assert "items can be drawn for user 0" in said
    assert "epoch" not in said


def test_two_splits_of_a_data_set_share_its_files(monkeypatch):
    files = Path(__file__).parent / "fixtures"
    monkeypatch.setenv("LLMREC_DATA", str(files))
    temporal = read_settings("prepare", ["--dataset", "ml-100k-temporal"])[0]
    assert dataset_name(temporal) == "ml-100k-temporal"
    assert inputs.dataset(temporal).folder == files / "ml-100k"
    assert inputs.missing("prepare", temporal) is None


@pytest.mark.parametrize("stage", ["sft", "orpo"])
def test_language_models_refuse_several_targets_per_user(made, stage, tiny_llama, capsys):
    made("successive", "popularity")
    options = ["--dataset", "successive.yaml", "--retriever", "popularity", "--base.id", str(tiny_llama), "--pairs.lightfm", "none"]
    assert main(["pairs", *options]) == 0
    assert main([stage, *options, *(["--orpo.start", "base"] if stage == "orpo" else [])]) == 2
    assert "split.target is successive, which retrievers alone answer" in capsys.readouterr().err
