"""What the training rows are made of, in numbers and as the dataset card that lies beside them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import polars as pl

from llmrec.config import Pairs, Prompting

MANY_PAIRS, HIGH_SHARE = 50, 0.3
"""The card warns when, of at least so many pairs, the ten most frequent losers lose more than this share."""


@dataclass(frozen=True)
class SftStatistics:
    """Counts of `sft_rows`.

    Attributes:
        rows: number of rows, one prompt each.
        users: users who gave them.
        target_retrieved: share of rows whose target the retriever had among the candidates by itself; None for uniform pools.
        refused: prompts that could not be written, by reason.
    """

    rows: int
    users: int
    target_retrieved: float | None
    refused: dict[str, int]


@dataclass(frozen=True)
class LoserStatistics:
    """Who loses in the pairs of one source.

    Attributes:
        pairs: number of pairs.
        distinct: number of different losing items.
        top10_share: share of the pairs that the ten most frequent losers account for.
    """

    pairs: int
    distinct: int
    top10_share: float


@dataclass(frozen=True)
class PreferenceStatistics:
    """Counts of `preference_rows`.

    Attributes:
        prompts: number of prompts, one per user.
        losers: pairs and losers by source, "rating" and "lightfm".
        skipped: pairs that users could not give, by reason.
        refused: prompts that could not be written, by reason.
    """

    prompts: int
    losers: dict[str, LoserStatistics]
    skipped: dict[str, int]
    refused: dict[str, int]


def loser_statistics(preferences: pl.DataFrame) -> dict[str, LoserStatistics]:
    """Pairs and losers of each source of a `preferences` table."""
    statistics = {}
    for source in sorted(preferences["source"].unique()):
        counts = [count for _, count in Counter(preferences.filter(source=source)["rejected_item"]).most_common()]
        statistics[source] = LoserStatistics(sum(counts), len(counts), sum(counts[:10]) / sum(counts))
    return statistics


def dataset_card(
    sft: SftStatistics,
    preferences: PreferenceStatistics,
    pairs: Pairs,
    prompt: Prompting,
    *,
    dataset: str,
    retriever: str,
    seed: int,
    licence: str | None,
    titles: bool = False,
) -> str:
    """The README.md of a `pairs` folder, a dataset card in the model hub's format.

    Args:
        sft: from `sft_rows`.
        preferences: from `preference_rows`.
        pairs: the settings the rows were built with.
        prompt: the settings the prompts were written with.
        dataset: name of the data set.
        retriever: name of the retriever.
        seed: seed of the rows.
        licence: what the publisher of the data allows; None where nothing is known.
        titles: answers are titles, and prompts show no candidates.
    """
    total = sum(source.pairs for source in preferences.losers.values())
    pool = (
        f"the best items of {retriever} for the history shown"
        if pairs.pool == "retriever"
        else "uniformly drawn items the user has not seen"
    )
    lines = [
        "---",
        "configs:",
        "- config_name: sft",
        "  data_files: sft.parquet",
        "- config_name: preferences",
        "  data_files: preferences.parquet",
        "---",
        f"# Training rows for an LLM ranker: {dataset}, {retriever}",
        "",
        f"Licence of the data: {' '.join((licence or 'unknown; ask the publisher of the data before you pass this on').split())}",
        "",
        "| rows | number |",
        "|---|---:|",
        f"| SFT rows | {sft.rows} |",
        f"| users behind them | {sft.users} |",
        f"| preference prompts, one per user | {preferences.prompts} |",
        f"| preference pairs | {total} |",
        "",
        "## Protocol",
        "",
        "- Rows are built from the training part alone."
        + ("" if titles else " The retriever behind the pools was trained on it too, but stopped early by its validation NDCG@10."),
        f"- SFT: up to {pairs.prefixes_per_user} points of each user's training part; the answer is the "
        f"{'title' if titles else 'letter'} of the next item.",
        "- Preferences: the history ends before the last two training items. "
        f"Rating pairs{'' if pairs.rating else ' (off)'}: the higher rated of the two wins. "
        f"LightFM pairs (`{pairs.lightfm}`): the last one wins against {pairs.losers} unseen.",
        f"- Prompts show the history alone, and answers are titles. Seed {seed}."
        if titles
        else f"- Pools of {prompt.candidates}: the items of the pairs and, as fillers, {pool}; shuffled. Seed {seed}.",
        f"- Prompts: template `{prompt.template}`, at most {prompt.history} titles of history, {prompt.budget} tokens.",
    ]
    if sft.target_retrieved is not None:
        lines.append(
            f"- In {sft.target_retrieved:.1%} of the SFT rows the retriever had the target among the candidates by itself; "
            "elsewhere it was put in. The retriever was trained on these events, so expect less at test time."
        )
    lines += ["", "## Losers", "", "| source | pairs | distinct losers | share of the ten most frequent |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {s.pairs} | {s.distinct} | {s.top10_share:.1%} |" for name, s in preferences.losers.items()]
    for name, source in preferences.losers.items():
        if source.pairs >= MANY_PAIRS and source.top10_share > HIGH_SHARE:
            remedy = " `--pairs.lightfm sampled` spreads the losers." if name == "lightfm" and pairs.lightfm != "sampled" else ""
            warning = f"ten titles lose {source.top10_share:.0%} of the {name} pairs. A ranker can win them by avoiding ten titles"
            lines += ["", f"**Warning:** {warning}, whatever the user likes.{remedy}"]
    lines += ["", "## Left out", "", "| what | why | number |", "|---|---|---:|"]
    for what, reasons in (("SFT row", sft.refused), ("preference pair", preferences.skipped), ("preference prompt", preferences.refused)):
        lines += [f"| {what} | {reason} | {number} |" for reason, number in sorted(reasons.items())]
    return "\n".join(lines) + "\n"
