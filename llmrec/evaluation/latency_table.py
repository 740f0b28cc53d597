"""What models find, what they cost and how large they are, side by side: the columns of arXiv 2408.05606, tables 1-3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrec.evaluation.compare import duration

METRICS = ("hr@10", "ndcg@10", "mrr@10")


def split_of(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Which metrics all models can be shown with: "test", or "test_masked" where one ranks candidates, which leave the history out."""
    return "test_masked" if any(facts["kind"] == "ranker" for facts in models.values()) else "test"


def render(models: Mapping[str, Mapping[str, Any]], batch: int, ranker_batch: int) -> str:
    """The table as plain text for a terminal, fastest model first.

    Args:
        models: "models" of bench's metrics.json.
        batch: users at once of the retrievers.
        ranker_batch: users at once of the language models.
    """
    split = split_of(models)
    width = max(map(len, models)) + 2
    heads = ("parameters", "HR@10", "NDCG@10", "MRR@10", "users", "one user [95 % interval]", "in batches", "one event", "tokens/s", "MB")
    sizes = (20, 8, 9, 8, 7, 30, 11, 11, 10, 8)
    masked = "history masked" if split == "test_masked" else "history not masked"
    lines = [
        f"Seconds per user; HR, NDCG and MRR on test, {masked}, over so many users",
        f"{'':<{width}}" + "".join(f"{head:>{size}}" for head, size in zip(heads, sizes, strict=True)),
    ]
    for name, facts in sorted(models.items(), key=lambda item: item[1]["one"]["mean"]):
        cells = _cells(facts, split)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>{size}}" for cell, size in zip(cells, sizes, strict=True)))
    notes = [f"In batches: up to {batch} users at once, language models {ranker_batch}. One event: taken into a kept state."]
    notes += [
        "A language model's time is its own: its retriever's comes on top. Tokens: read by models that pick letters, written by others."
    ]
    notes += [
        "Parameters in parentheses: without tables of items, tokens and positions. MB: peak above the loaded model, one user at a time."
    ]
    return "\n".join([*lines, *notes])


def _cells(facts: Mapping[str, Any], split: str) -> list[str]:
    metrics, one, step = facts["metrics"].get(split), facts["one"], facts.get("step")
    interval = f" [{duration(one['ci95'][0])}, {duration(one['ci95'][1])}]" if one["ci95"] else ""
    return [
        f"{amount(facts['parameters']['total'])} ({amount(facts['parameters']['non_embedding'])})",
        *(f"{metrics[name]:.4f}" if metrics else "-" for name in METRICS),
        f"{facts['users_evaluated']:,}" if facts["users_evaluated"] else "-",
        duration(one["mean"]) + interval,
        duration(facts["batch"]["mean"]),
        duration(step["mean"]) if step else "-",
        f"{one['tokens_per_second']:,.0f}" if "tokens_per_second" in one else "-",
        f"{one['peak_memory_mb']:,.0f}" if one["peak_memory_mb"] is not None else "-",
    ]


def amount(count: int) -> str:
    """A number of parameters as people say it: 850, 297k, 1.8M, 135M, 7B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return str(count)
