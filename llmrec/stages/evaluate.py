"""evaluate: let the language model rank the retriever's candidates, and measure what that bought."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl

from llmrec import distributed, runs
from llmrec.config import Config
from llmrec.data.sequences import Sequences
from llmrec.data.tables import list_column, load_sequences, load_statistics, load_titles
from llmrec.errors import UserError
from llmrec.evaluation import compare, metrics, plots, protocol
from llmrec.evaluation.report import Candidate, Context, Cost, Sample, write_report
from llmrec.prompting import PromptWriter
from llmrec.rankers import fusion
from llmrec.runs import Run
from llmrec.stages import dataset_name, ranker_name
from llmrec.stages.pairs import prompt_writer
from llmrec.stages.scoring import TIMED_USERS, Questions, median_seconds, questions_of, score

SAMPLE_USERS = 10


def evaluate(run: Run) -> None:
    """Rank the candidates of the test users by retriever, language model and their fusion.

    Reads `prepare`, `retrieve`, `sft`, `orpo`. Writes rankings.parquet, per_user.parquet, metrics.json, report.html, *.png,
    and the printed table as summary.txt.
    """
    config = run.config
    sequences = load_sequences(run.input("prepare"))
    writer = prompt_writer(config, load_titles(run.input("prepare")))
    asked = {split: questions_of(config, run, sequences, writer, split) for split in ("valid", "test")}
    for split, questions in asked.items():
        if not questions.retrieved.any():
            raise UserError(
                f"no {split} target is among the top {config.prompt.candidates}: nothing to rank. Try more users or another retriever"
            )
    systems = ["sft", "orpo"] if config.orpo.start == "sft" else ["orpo"]
    answers, seconds_ranker = score(run, systems, asked, writer)
    if not distributed.is_main():
        return

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


def _retriever_seconds(config: Config, run: Run, sequences: Sequences, questions: Questions) -> float:
    """Median seconds to retrieve one user's candidates on his own."""
    from llmrec.retrievers.candidates import top_items
    from llmrec.stages.retrieve import load

    retriever = load(run.input("retrieve"), config, sequences.item_count)
    users = questions.users[:TIMED_USERS]
    one = [users[at : at + 1] for at in range(len(users))]
    return median_seconds(lambda u: top_items(retriever, sequences, u, sequences.offsets[u + 1] - 1, config.retrieval.candidates), one)


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
