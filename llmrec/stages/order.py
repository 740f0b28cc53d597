"""order: ask a trained retriever about the same histories in other orders. Does order matter on this data?"""

from __future__ import annotations

import numpy as np
import polars as pl

from llmrec import runs
from llmrec.data.tables import load_sequences
from llmrec.errors import UserError
from llmrec.evaluation import order as ablation
from llmrec.evaluation.order import AS_IT_IS, RANDOM, VARIANTS
from llmrec.progress import track
from llmrec.runs import Run


def order(run: Run) -> None:
    """Rank the test users' targets with their histories as they are, shuffled, shuffled but for the last event, and reversed.

    Reads `prepare` and `retrieve`; trains nothing. Writes metrics.json, per_user.parquet, order.png and summary.txt.

    Raises:
        UserError: a retriever that does not read histories in order, or nothing to shuffle.
    """
    from llmrec.evaluation import drawing, order_plots
    from llmrec.retrievers.candidates import ranks_of, rows_per_batch
    from llmrec.stages.retrieve import load

    config, settings = run.config, run.config.order
    if config.retrieval.kind != "sequence":
        raise UserError(f"{config.retrieval.kind} does not read histories in order: take a sequence model such as 2mamba4rec")
    if settings.shuffles < 1:
        raise UserError(f"order.shuffles is {settings.shuffles}: the histories are shuffled at least once")
    sequences = load_sequences(run.input("prepare"))
    scorer = load(run.input("retrieve"), config, sequences.item_count)
    cases, batch, window = sequences.cases("test"), rows_per_batch(sequences.item_count), config.training.max_length
    histories = [sequences.history(user, end) for user, end in zip(cases.users, cases.ends, strict=True)]

    def ranks(how: str, number: int) -> np.ndarray:
        random = np.random.default_rng([config.seed, number])
        asked = [ablation.rearranged(history, how, window, random) for history in histories]
        return ranks_of(scorer, cases.users, asked, cases.targets, batch)

    repeats = {how: settings.shuffles if how in RANDOM else 1 for how in (AS_IT_IS, *VARIANTS)}
    todo = [(how, number) for how, times in repeats.items() for number in range(times)]
    found: dict[str, list[np.ndarray]] = {how: [] for how in repeats}
    for how, number in track(todo, "orders"):
        found[how].append(ranks(how, number))

    table = ablation.table(found, cases.users, settings.resamples, config.seed)
    columns = {f"{how.replace(' ', '_')}_rank": pl.Series(np.stack(ranks, axis=1).tolist()) for how, ranks in found.items()}
    pl.DataFrame({"user": cases.users, "target": cases.targets} | columns).write_parquet(run.work / "per_user.parquet")
    card = runs.read_metrics(run.input("retrieve"))["protocol"]
    facts = {"protocol": card, "window": window, "shuffles": settings.shuffles, **table, "verdict": ablation.verdict(table)}
    runs.write_json(run.work / "metrics.json", facts)
    drawing.png(run.work / "order.png", order_plots.orders(table))
    run.headline = {f"{how.replace(' ', '_')}_ndcg@10": table["variants"][how]["ndcg@10"] for how in (AS_IT_IS, "shuffled")}
    text = f"{table['users']:,} test users, the last {window} events of each in another order\n\n{ablation.render(table)}\n"
    (run.work / "summary.txt").write_text(text, encoding="utf-8")
    print(text)
