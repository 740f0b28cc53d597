"""evaluate: let the language model rank the retriever's candidates, and measure what that bought."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llmrec import runs
from llmrec.config import Config
from llmrec.data.sequences import Sequences
from llmrec.data.tables import list_column, load_sequences, load_statistics, load_titles
from llmrec.errors import UserError
from llmrec.evaluation import compare, metrics, plots, protocol
from llmrec.evaluation.report import Candidate, Context, Cost, Sample, write_report
from llmrec.prompting import PromptWriter, Refused, shuffled
from llmrec.rankers import fusion
from llmrec.runs import Run, say
from llmrec.stages import dataset_name, inputs, ranker_name
from llmrec.stages.pairs import prompt_writer, sampled

BLOCK = 128  # prompts between two checkpoints of the scoring
TIMED_USERS = 20
SAMPLE_USERS = 10


@dataclass
class Questions:
    """What the language model is asked: one row per user of a split.

    Attributes:
        split: "valid" or "test".
        users: (users,) int32.
        targets: (users,) int32.
        items: the retriever's best, (users, pool) int32, 0 where there are fewer.
        scores: the retriever's scores of them, -inf for padding.
        order: how a prompt shows them: candidate `order[u, letter]` of `items[u]`, (users, pool).
        rows: token ids of each prompt; empty where it was refused.
        refused: refused prompts by reason.
    """

    split: str
    users: np.ndarray
    targets: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    order: np.ndarray
    rows: list[list[int]]
    refused: Counter[str]

    @property
    def retrieved(self) -> np.ndarray:
        """Whether the target is among the items, (users,)."""
        return (self.items == self.targets[:, None]).any(1)


def evaluate(run: Run) -> None:
    """Rank the candidates of the test users by retriever, language model and their fusion.

    Reads `prepare`, `retrieve`, `sft`, `orpo`. Writes rankings.parquet, per_user.parquet, metrics.json, report.html, *.png,
    and the printed table as summary.txt.
    """
    config = run.config
    sequences = load_sequences(run.input("prepare"))
    writer = prompt_writer(config, load_titles(run.input("prepare")))
    asked = {split: _questions(config, run, sequences, writer, split) for split in ("valid", "test")}
    for split, questions in asked.items():
        if not questions.retrieved.any():
            raise UserError(
                f"no {split} target is among the top {config.prompt.candidates}: nothing to rank. Try more users or another retriever"
            )
    systems = ["sft", "orpo"] if config.orpo.start == "sft" else ["orpo"]
    answers, seconds_ranker = _score(run, systems, asked, writer)

    valid, test = asked["valid"], asked["test"]
    weight, curve = fusion.choose_weight(valid.scores, answers["orpo", "valid"], valid.items, valid.targets)
    fused = {split: fusion.fuse(q.scores, answers["orpo", split], q.items, weight) for split, q in asked.items()}
    by_system = {"retriever": test.scores, **{name: answers[name, "test"] for name in systems}, "fused": fused["test"]}
    ranks = {name: metrics.rank_of_target(scores, test.items, test.targets) for name, scores in by_system.items()}
    table = compare.table(ranks, config.prompt.candidates, config.evaluation.resamples, config.seed)
    seconds_retriever = _retriever_seconds(config, run, sequences, test)
    verdict = compare.verdict(table["comparisons"], weight, seconds_retriever, seconds_ranker)

    _write_tables(run, asked, answers, fused, ranks)
    card = protocol.card(
        config,
        data_fingerprint=runs.fingerprint_of(run.input("prepare")),
        ambiguous_targets=load_statistics(run.input("prepare"))["ambiguous_targets"]["test"],
        users_evaluated=len(test.users),
        candidate_set=f"the retriever's top {config.prompt.candidates}",
        history_masked=not config.retrieval.repeats,
    )
    facts = {
        "protocol": asdict(card),
        **table,
        "fusion": {"weight": weight, "valid_users": len(valid.users), "curve": curve},
        "latency": {"retriever_seconds": seconds_retriever, "ranker_seconds": seconds_ranker},
        "refused_prompts": dict(test.refused),
        "verdict": verdict,
    }
    runs.write_json(run.work / "metrics.json", facts)
    run.headline = {f"{name}_ndcg@10": table["overall"][name]["ndcg@10"] for name in ("retriever", "orpo", "fused")}
    _write_report(run, table, verdict, curve, weight, ranks, asdict(card), _samples(writer, sequences, test, by_system))
    weight_line = f"fusion weight {weight:g}, chosen on {len(valid.users)} validation users whose target was retrieved"
    summary = f"{compare.render(table)}\n{weight_line}\n\n{verdict}\n\nreport: {run.folder / 'report.html'}\n"
    (run.work / "summary.txt").write_text(summary, encoding="utf-8")
    print(summary)


def _questions(config: Config, run: Run, sequences: Sequences, writer: PromptWriter, split: str) -> Questions:
    """The prompts of a split's users. Validation asks only where the target was retrieved: elsewhere every order scores 0."""
    found = pl.read_parquet(run.input("retrieve") / "candidates.parquet").filter(pl.col("split") == split).sort("user")
    found = found.filter(pl.col("user").is_in(sampled(np.arange(sequences.user_count), config.limit_users, config.seed).tolist()))
    pool = config.prompt.candidates
    found = found.with_columns(pl.col("items").list.head(pool), pl.col("scores").list.head(pool))
    if split == "valid":
        found = found.filter(pl.col("items").list.contains(pl.col("target")))
    limit = config.evaluation.valid_users if split == "valid" else config.evaluation.test_users
    found = found[sampled(np.arange(found.height), limit, config.seed)]

    cases = sequences.cases(split)
    ends = dict(zip(cases.users.tolist(), cases.ends.tolist(), strict=True))
    items, scores = np.zeros((found.height, pool), dtype=np.int32), np.full((found.height, pool), -np.inf, dtype=np.float32)
    order = np.tile(np.arange(pool), (found.height, 1))
    rows, refused = [], Counter[str]()
    for at, (user, listed, listed_scores) in enumerate(found.select("user", "items", "scores").iter_rows()):
        count = len(listed)
        items[at, :count], scores[at, :count] = listed, listed_scores
        if config.prompt.order == "shuffled":
            order[at, :count] = shuffled(np.arange(count), config.seed, user)
        prompt = writer.write(sequences.history(user, ends[user]), items[at, order[at, :count]])
        if isinstance(prompt, Refused):
            refused[prompt.reason] += 1
        rows.append([] if isinstance(prompt, Refused) else prompt.ids)
    if refused:
        say(f"{split}: {sum(refused.values())} prompts refused ({dict(refused)}): their users keep the retriever's order")
    return Questions(split, found["user"].to_numpy(), found["target"].to_numpy(), items, scores, order, rows, refused)


def _score(
    run: Run, systems: list[str], asked: dict[str, Questions], writer: PromptWriter
) -> tuple[dict[tuple[str, str], np.ndarray], float]:
    """Letter log-probabilities in the order of `items` by (system, split), and seconds of one prompt on its own."""
    from llmrec.rankers.backbone import load_adapter, load_base
    from llmrec.rankers.letters import letter_logprobs

    base = load_base(inputs.base_folder(run.config), run.config.base)
    answers = {}
    seconds = 0.0
    for system in systems:
        model = load_adapter(base, run.input(system))

        def ask(rows: list[list[int]], model: Any = model) -> np.ndarray:
            return letter_logprobs(model, rows, writer.labels, batch=run.config.evaluation.batch)

        for split, questions in asked.items():
            if (system, split) == ("sft", "valid"):
                continue  # the fusion weight is for the last adapter alone
            rows = questions.rows
            if system == "sft":  # for the table, and there an order without the target counts nothing
                rows = [row if found else [] for row, found in zip(rows, questions.retrieved, strict=True)]
            shown = _in_blocks(ask, rows, run.checkpoints, f"{system}.{split}")
            answers[system, split] = _in_candidate_order(shown, questions, rows)
        if system == "orpo":
            seconds = _median_seconds(ask, [[row] for row in asked["test"].rows if row][:TIMED_USERS])
        base = model.unload()
    return answers, seconds


def _in_blocks(ask: Callable[[list[list[int]]], np.ndarray], rows: list[list[int]], checkpoints: Path, name: str) -> np.ndarray:
    """Answers to all rows, (rows, letters); blocks of similar length are kept, so that a killed scoring goes on."""
    from llmrec.progress import track

    answers: np.ndarray | None = None
    by_length = np.argsort([len(row) for row in rows], kind="stable")
    by_length = np.array([at for at in by_length if rows[at]], dtype=np.int64)
    for start in track(range(0, len(by_length), BLOCK), f"scoring {name}"):
        block = by_length[start : start + BLOCK]
        path = checkpoints / f"{name}.{start}.npy"
        if path.exists():
            found = np.load(path)
        else:
            found = ask([rows[at] for at in block])
            beside = path.with_suffix(".tmp.npy")
            np.save(beside, found)
            beside.replace(path)
        if answers is None:
            answers = np.zeros((len(rows), found.shape[1]), dtype=np.float32)
        answers[block] = found
    if answers is None:
        raise UserError(f"{name}: not one prompt fits the budget: raise prompt.budget")
    return answers


def _in_candidate_order(shown: np.ndarray, questions: Questions, rows: list[list[int]]) -> np.ndarray:
    """From letters as shown back to the order of `items`. Where nothing was asked the retriever's scores stand in."""
    restored = np.empty_like(questions.scores)
    np.put_along_axis(restored, questions.order, shown, axis=1)
    unasked = np.array([not row for row in rows])
    restored[unasked] = questions.scores[unasked]
    restored[questions.items == 0] = -np.inf
    return restored


def _median_seconds(work: Callable[[Any], Any], cases: list[Any]) -> float:
    times = []
    for case in cases[:2] + cases:  # the first two warm up
        begun = time.perf_counter()
        work(case)
        times.append(time.perf_counter() - begun)
    return float(np.median(times[2:]))


def _retriever_seconds(config: Config, run: Run, sequences: Sequences, questions: Questions) -> float:
    """Median seconds to retrieve one user's candidates on his own."""
    from llmrec.retrievers.candidates import top_items
    from llmrec.stages.retrieve import load

    retriever = load(run.input("retrieve"), config, sequences.item_count)
    users = questions.users[:TIMED_USERS]
    one = [users[at : at + 1] for at in range(len(users))]
    return _median_seconds(lambda u: top_items(retriever, sequences, u, sequences.offsets[u + 1] - 1, config.retrieval.candidates), one)


def _write_tables(
    run: Run,
    asked: dict[str, Questions],
    answers: dict[tuple[str, str], np.ndarray],
    fused: dict[str, np.ndarray],
    ranks: dict[str, np.ndarray],
) -> None:
    tables = []
    for split, q in asked.items():
        real = q.items > 0
        lists = {
            "items": q.items,
            "retriever_scores": q.scores,
            "ranker_scores": answers["orpo", split],
            "fused_scores": fused[split].astype(np.float32),
        }
        columns = {name: list_column(values, real) for name, values in lists.items()}
        tables.append(pl.DataFrame({"user": q.users, "split": [split] * len(q.users), "target": q.targets} | columns))
    pl.concat(tables).write_parquet(run.work / "rankings.parquet")
    test = asked["test"]
    others = {f"{name}_rank": rank for name, rank in ranks.items() if name != "fused"}
    identity = {"user": test.users, "split": ["test"] * len(test.users), "rank": ranks["fused"]}
    pl.DataFrame(identity | metrics.per_user(ranks["fused"]) | others).write_parquet(run.work / "per_user.parquet")


def _samples(writer: PromptWriter, sequences: Sequences, test: Questions, by_system: dict[str, np.ndarray]) -> list[Sample]:
    """Some test users whose target was retrieved, with what each system made of their candidates."""
    hits = np.flatnonzero(test.retrieved)[:SAMPLE_USERS]
    ends = dict(zip(*(column.tolist() for column in (sequences.cases("test").users, sequences.cases("test").ends)), strict=True))
    samples = []
    for at in hits:
        items = test.items[at][test.items[at] > 0]
        place = {name: np.argsort(np.argsort(-scores[at][: len(items)], kind="stable")) + 1 for name, scores in by_system.items()}
        logprobs = by_system["orpo"][at][: len(items)]
        probability = np.exp(logprobs - logprobs.max())
        probability /= probability.sum()
        candidates = [
            Candidate(
                title=writer.titles[item],
                retriever_rank=int(place["retriever"][n]),
                ranker_rank=int(place["orpo"][n]),
                fused_rank=int(place["fused"][n]),
                probability=float(probability[n]),
                is_target=bool(item == test.targets[at]),
            )
            for n, item in enumerate(items)
        ]
        user = int(test.users[at])
        history = sequences.history(user, ends[user])[-writer.config.history :]
        samples.append(Sample(user=str(user), history=[writer.titles[item] for item in history], candidates=candidates))
    return samples


def _write_report(
    run: Run,
    table: compare.Table,
    verdict: str,
    curve: list[tuple[float, float]],
    weight: float,
    ranks: dict[str, np.ndarray],
    card: dict[str, Any],
    samples: list[Sample],
) -> None:
    config, work = run.config, run.work
    plots.metric_bars(work / "metrics.png", table)
    plots.weight_curve(work / "fusion.png", curve, weight)
    plots.target_ranks(work / "ranks.png", ranks["retriever"], ranks["fused"], config.prompt.candidates)
    pictures = {
        "What each step bought, with 95 % intervals": work / "metrics.png",
        "Validation NDCG@10 against the language model's weight": work / "fusion.png",
        "Where the target stood before and after": work / "ranks.png",
    }
    stages = ("prepare", "retrieve", "pairs", "sft", "orpo") if config.orpo.start == "sft" else ("prepare", "retrieve", "pairs", "orpo")
    folders = [(name, run.input(name)) for name in stages]
    for name, folder in folders:
        log = folder / "train_log.jsonl"
        if log.exists():
            plots.training_curves(work / f"{name}.png", [json.loads(line) for line in log.read_text().splitlines()])
            pictures[f"Training: {name}"] = work / f"{name}.png"
    made = {name: runs.read_stage(folder) or {} for name, folder in folders}
    context = Context(
        title=f"{dataset_name(config)}: {ranker_name(config)}",
        verdict=verdict,
        table=table,
        plots=pictures,
        samples=samples,
        pairs=json.loads((run.input("pairs") / "metrics.json").read_text()),
        costs=[Cost(name, stage["seconds"], stage["peak_memory_mb"]) for name, stage in made.items()],
        protocol=card,
        data=load_statistics(run.input("prepare")),
        weights=made["orpo"]["origin"].get("weights", config.base.id),
        recipe={name: stage["settings"] for name, stage in made.items()},
    )
    write_report(work / "report.html", context)
