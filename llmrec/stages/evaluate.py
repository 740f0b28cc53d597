"""evaluate: let the language model rank the retriever's candidates, and measure what that bought."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl

from llmrec import distributed, runs
from llmrec.config import Config
from llmrec.data.sequences import Sequences
from llmrec.data.split import ambiguous_targets
from llmrec.data.tables import list_column, load_sequences, load_statistics, load_titles
from llmrec.errors import UserError
from llmrec.evaluation import bias, catalogue, compare, metrics, preference, protocol
from llmrec.query_prompts import QueryWriter
from llmrec.rankers import fusion
from llmrec.runs import Run
from llmrec.stages import measures, reporting
from llmrec.stages.pairs import prompt_writer
from llmrec.stages.querying import check_settings, recommend
from llmrec.stages.scoring import TIMED_USERS, Questions, median_seconds, questions_of, score


def evaluate(run: Run) -> None:
    """Rank the candidates of the test users by retriever, language model and their fusion; a model that writes queries recommends, too.

    Reads `prepare`, `retrieve`, `sft`, `orpo`. Writes rankings.parquet, per_user.parquet, metrics.json, report.html, *.png, the
    printed table as summary.txt, and of models that write queries queries.parquet.
    """
    config = run.config
    sequences = load_sequences(run.input("prepare"))
    writer = prompt_writer(config, load_titles(run.input("prepare")))
    if isinstance(writer, QueryWriter):
        check_settings(config)
    asked = {split: questions_of(config, run, sequences, writer, split) for split in ("valid", "test")}
    for split, questions in asked.items():
        if not questions.retrieved.any():
            raise UserError(
                f"no {split} target is among the top {config.prompt.candidates}: nothing to rank. Try more users or another retriever"
            )
    systems = ["sft", "orpo"] if config.orpo.start == "sft" else ["orpo"]
    pairs = measures.listed_pairs(sequences, asked["valid"])
    answered = score(run, systems, asked, writer, pairs.rows)
    answers, seconds_ranker = answered.scores, answered.seconds
    written = recommend(run, systems, sequences, writer, asked["test"]) if isinstance(writer, QueryWriter) else None
    if not distributed.is_main():
        return

    measures.check_scores(answers, asked, run.input("prepare"))
    valid, test = asked["valid"], asked["test"]
    weight, curve = fusion.choose_weight(valid.scores, answers["orpo", "valid"], valid.items, valid.targets)
    # in the precision in which they are written, so that rankings.parquet has the ties that the ranks have
    fused = {split: fusion.fuse(q.scores, answers["orpo", split], q.items, weight).astype(np.float32) for split, q in asked.items()}
    # not the fused ranking: its weight was chosen on these users
    valid_scores = {"retriever": valid.scores, **{name: answers[name, "valid"] for name in systems if (name, "valid") in answers}}
    by_system = {"retriever": test.scores, **{name: answers[name, "test"] for name in systems}, "fused": fused["test"]}
    ranges = {name: metrics.tie_range(scores, test.items, test.targets) for name, scores in by_system.items()}
    ranks = {name: pessimistic for name, (_, pessimistic) in ranges.items()}
    table = compare.table(ranks, config.prompt.candidates, config.evaluation.resamples, config.seed)
    seconds_retriever = _retriever_seconds(config, run, sequences, test)
    verdict = compare.verdict(table["comparisons"], weight, seconds_retriever, seconds_ranker)

    _write_tables(run, asked, answers, fused, ranks)
    interactions = pl.read_parquet(run.input("prepare") / "interactions.parquet")
    card = protocol.card(
        config,
        data_fingerprint=runs.fingerprint_of(run.input("prepare")),
        ambiguous_targets=ambiguous_targets(interactions.filter(pl.col("user").is_in(test.users.tolist())))["test"],
        users_evaluated=len(test.users),
        candidate_set=f"the retriever's top {config.prompt.candidates}",
        history_masked=not config.retrieval.repeats,
        periods=load_statistics(run.input("prepare")).get("periods"),
    )
    # SFT is asked only about lists that have the target; a title's mean log-probability a token is no probability
    asked_of_all = {name: by_system[name] for name in ("retriever", *(("orpo", "fused") if config.evaluation.ask == "all" else ()))}
    letters = {} if isinstance(writer, QueryWriter) else {name: by_system[name] for name in systems}
    facts: dict[str, Any] = {
        "protocol": asdict(card),
        **table,
        "ties": {name: metrics.ties(best, worst) for name, (best, worst) in ranges.items()},
        "beyond_accuracy": measures.beyond(asked_of_all, test.items, sequences, writer.titles),
        "calibration": measures.calibrations(letters, test),
        "preference": measures.preferences(
            pairs, valid_scores, measures.ratings_of(sequences, test), ranks, config.evaluation, config.seed
        ),
        "fusion": {"weight": weight, "valid_users": len(valid.users), "curve": curve},
        "latency": {
            "retriever_seconds": seconds_retriever,
            "ranker_seconds": seconds_ranker,
            "ranker_seconds_one_order": answered.seconds_of_one_order,
        },
        "refused_prompts": dict(test.refused),
        "verdict": verdict,
    }
    run.headline = {f"{name}_ndcg@10": table["overall"][name]["ndcg@10"] for name in ("retriever", "orpo", "fused")}
    if not isinstance(writer, QueryWriter):
        facts["labels"] = dict(zip(writer.answers, writer.labels, strict=True))  # by which tokens letters were scored, for audits
        facts["position_bias"] = measures.letters_chosen(answered, test, shuffled=config.prompt.order == "shuffled")
    if written is not None:
        facts["catalogue"] = written.facts
        written.queries.write_parquet(run.work / "queries.parquet")
        run.headline |= {"catalogue_hr@10": written.table["overall"]["orpo"]["hr@10"]}
    runs.write_json(run.work / "metrics.json", facts)
    reporting.write(run.work, {name: run.input(name, its) for name, its in run.stage.needs(config)}, asdict(config))
    by_letters = f"{bias.sentence(facts['position_bias'])}\n\n" if "position_bias" in facts else ""
    weight_line = f"fusion weight {weight:g}, chosen on {len(valid.users)} validation users whose target was retrieved"
    by_queries = "" if written is None else f"{catalogue.render(written.table)}\n{reporting.cost_of_queries(written.facts)}\n\n"
    by_ratings = f"{preference.render(facts['preference'])}\n\n" if facts["preference"] else ""
    beside = f"{by_ratings}{by_letters}{by_queries}"
    summary = f"{compare.render(table)}\n{weight_line}\n\n{beside}{verdict}\n\nreport: {run.folder / 'report.html'}\n"
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
            "fused_scores": fused[split],
        }
        columns = {name: list_column(values, real) for name, values in lists.items()}
        tables.append(pl.DataFrame({"user": q.users, "split": [split] * len(q.users), "target": q.targets} | columns))
    pl.concat(tables).write_parquet(run.work / "rankings.parquet")
    test = asked["test"]
    others = {compare.rank_column(name): rank for name, rank in ranks.items() if name != "fused"}
    identity = {"user": test.users, "split": ["test"] * len(test.users), compare.rank_column("fused"): ranks["fused"]}
    pl.DataFrame(identity | metrics.per_user(ranks["fused"]) | others).write_parquet(run.work / "per_user.parquet")
