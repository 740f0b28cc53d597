"""Small evaluations, made up: ranks of 300 users by a ranker that helps a little, and whole run folders of 40 users."""

import json
from dataclasses import asdict, replace

import numpy as np
import polars as pl
import pytest

from llmrec import runs
from llmrec.config import Config
from llmrec.data.prepare import prepare_tables
from llmrec.data.tables import load_sequences
from llmrec.evaluation import compare, metrics, protocol
from llmrec.evaluation.bias import position_bias
from llmrec.evaluation.calibration import calibration, probabilities
from llmrec.rankers import fusion
from llmrec.stages import report, reporting


@pytest.fixture(scope="session")
def ranks():
    """Ranks of four systems; 0 where the target was not retrieved, the same users for all."""
    random = np.random.default_rng(0)
    users, candidates = 300, 20
    hit = random.random(users) < 0.4
    retriever = random.integers(1, candidates + 1, users)
    better = np.maximum(1, retriever - random.integers(0, 4, users))
    systems = {"retriever": retriever, "sft": random.integers(1, candidates + 1, users), "orpo": better, "fused": better}
    return {name: np.where(hit, rank, 0) for name, rank in systems.items()}


@pytest.fixture(scope="session")
def table(ranks):
    return compare.table(ranks, candidates=20, resamples=500)


USERS, ITEMS, POOL = 40, 30, 10


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory):
    """Writes a finished evaluation with all that it rests on: everything measured by the project's own functions, the models made up.

    evaluated(titles, name, dataset, root) -> its folder.
    """

    def write(titles=None, name="popular.made-up", dataset="shop", root=None, reported=True):
        root = (root or tmp_path_factory.mktemp("runs")) / dataset
        titles = titles or [f"Film number {n} ({1960 + n})" for n in range(ITEMS)]
        settings = Config(dataset=dataset, runs=str(root.parent), evaluation=replace(Config().evaluation, resamples=200))
        sequences = _prepared(root / "prepare", titles, settings)
        asked = {split: _candidates(root / "retrieve" / "popular", sequences, split) for split in ("valid", "test")}
        _finish(root / "retrieve" / "popular", "retrieve", settings)
        for stage in ("pairs", "sft", "orpo"):
            folder = root / stage / name
            folder.mkdir(parents=True)
            runs.write_json(folder / "metrics.json", {"rating": {"pairs": 1234, "skipped": None}})
            if stage != "pairs":
                (folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _log(stage)))
            _finish(folder, stage, settings)
        return _evaluation(root, name, settings, asked, reported)

    return write


@pytest.fixture(scope="session")
def finished(evaluated):
    """One of them, not to be changed."""
    return evaluated()


def _prepared(folder, titles, settings):
    """Users who go up through the items from where they began, a rating every minute."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    events = [
        (f"u{user}", f"i{(user + step) % ITEMS}", float(random.integers(1, 6)), 60_000 * step)
        for user in range(USERS)
        for step in range(4 + user % 9)
    ]
    raw = pl.DataFrame(events, schema=["user", "item", "rating", "timestamp"], orient="row")
    raw.write_csv(folder / "ratings.csv")
    pl.DataFrame({"item": [f"i{n}" for n in range(ITEMS)], "title": titles}).write_csv(folder / "titles.csv")
    source = replace(settings.source, format="csv", interactions="ratings.csv", items="titles.csv", timestamp_unit="ms")
    made = prepare_tables(source, replace(settings.filter, core=1), replace(settings.split, minimum_events=3), folder)
    for table in ("interactions", "items", "users"):
        vars(made)[table].write_parquet(folder / f"{table}.parquet")
    as_they_came = {f"i{n}": title for n, title in enumerate(titles)}  # `prepare` cleans them; a page must stand without that
    made.items.with_columns(title=pl.col("raw_id").replace_strict(as_they_came)).write_parquet(folder / "items.parquet")
    runs.write_json(folder / "metrics.json", made.statistics)
    _finish(folder, "prepare", settings)
    return load_sequences(folder)


def _candidates(folder, sequences, split):
    """Candidates of a split's users with the scores of a retriever and of a language model, and the target's rank among all items."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(split))
    cases = sequences.cases(split)
    scores = random.random((len(cases), ITEMS)) + 0.4 * (np.arange(1, ITEMS + 1) == cases.targets[:, None])
    items = np.argsort(-scores, axis=1)[:, :POOL].astype(np.int32) + 1
    retriever = -np.sort(-scores, axis=1)[:, :POOL].astype(np.float32)
    ranker = np.log(random.random((len(cases), POOL)) + 0.5 * (items == cases.targets[:, None])).astype(np.float32)
    rank = 1 + (scores > scores[np.arange(len(cases)), cases.targets - 1][:, None]).sum(axis=1)
    table = pl.DataFrame(
        {"user": cases.users, "split": [split] * len(cases), "target": cases.targets, "target_rank": rank, "target_rank_masked": rank}
    )
    before = pl.read_parquet(folder / "candidates.parquet") if split == "test" else table.clear()
    pl.concat([before, table]).write_parquet(folder / "candidates.parquet")
    return cases, items, retriever, ranker


def _log(stage):
    names = ("loss",) if stage == "sft" else ("loss", "nll_loss", "log_odds_chosen", "rewards/margins", "rewards/accuracies")
    return [
        {"step": step, "seconds": 1.0} | {name: np.cos(step / (3 + number)) for number, name in enumerate(names)} for step in range(1, 9)
    ]


def _evaluation(root, name, settings, asked, reported):
    folder = root / "evaluate" / name
    folder.mkdir(parents=True)
    (valid, valid_items, valid_scores, valid_answers), (cases, items, scores, answers) = asked["valid"], asked["test"]
    weight, curve = fusion.choose_weight(valid_scores, valid_answers, valid_items, valid.targets)
    by_system = {"retriever": scores, "sft": answers[:, ::-1], "orpo": answers, "fused": fusion.fuse(scores, answers, items, weight)}
    ranks = {system: metrics.rank_of_target(found, items, cases.targets) for system, found in by_system.items()}
    table = compare.table(ranks, POOL, resamples=200)
    found = (ranks["retriever"] > 0).nonzero()[0]
    order = np.argsort(np.random.default_rng(2).random((len(cases), 3, POOL)), axis=2)
    by_order = np.repeat(answers[:, None], 3, axis=1)
    card = {
        "data_fingerprint": "ab",
        "ambiguous_targets": 7,
        "users_evaluated": len(cases),
        "candidate_set": f"top {POOL}",
        "history_masked": True,
    }
    facts = {
        "protocol": asdict(protocol.card(settings, **card)),
        **table,
        "fusion": {"weight": weight, "valid_users": len(valid), "curve": curve},
        "latency": {"retriever_seconds": 0.001, "ranker_seconds": 0.5},
        "verdict": compare.verdict(table["comparisons"], weight, 0.001, 0.5),
        "calibration": {"orpo": calibration(probabilities(answers[found], items[found]), items[found], cases.targets[found])},
        "position_bias": position_bias(by_order, order, items, cases.targets, np.ones(len(cases), bool)),
    }
    runs.write_json(folder / "metrics.json", facts)
    listed = {"items": items, "retriever_scores": scores, "ranker_scores": answers, "fused_scores": by_system["fused"].astype(np.float32)}
    lists = {
        column: pl.Series(values.tolist(), dtype=pl.List(pl.Int32 if column == "items" else pl.Float32))
        for column, values in listed.items()
    }
    pl.DataFrame({"user": cases.users, "split": ["test"] * len(cases), "target": cases.targets} | lists).write_parquet(
        folder / "rankings.parquet"
    )
    columns = {"rank" if system == "fused" else f"{system}_rank": rank for system, rank in ranks.items()}
    pl.DataFrame({"user": cases.users, "split": ["test"] * len(cases)} | columns).write_parquet(folder / "per_user.parquet")
    inputs = {
        stage: root / stage / (name if stage in ("pairs", "sft", "orpo") else "popular") for stage in ("retrieve", "pairs", "sft", "orpo")
    }
    inputs = {str(path): f"{'ab' * 32}:{'cd' * 32}" for path in (root / "prepare", *inputs.values())}
    _finish(folder, "evaluate", settings, inputs | {"model.safetensors": "123"})
    if reported:
        reporting.write(folder, report.inputs_of(folder), asdict(settings))
    return folder


def _finish(folder, stage, settings, inputs=None):
    made = {"stage": stage, "fingerprint": "ab" * 32, "content": "cd" * 32, "inputs": inputs or {}, "origin": {"weights": "made up"}}
    made["seed"] = 0
    made |= {
        "settings": {"prompt.history": 10, "seed": 0},
        "config": asdict(settings),
        "seconds": 200.0,
        "peak_memory_mb": 3456.7,
        "made": "2026-01-01",
    }
    runs.write_json(folder / "stage.json", made)
