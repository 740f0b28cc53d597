"""prepare: raw files -> interactions, items and users."""

from __future__ import annotations

from llmrec import runs
from llmrec.data.prepare import prepare_tables
from llmrec.errors import UserError
from llmrec.runs import Run, say
from llmrec.stages import inputs


def prepare(run: Run) -> None:
    """Read the data set, filter, number and split it.

    Writes interactions.parquet, items.parquet, users.parquet, and the statistics in metrics.json.
    """
    config = run.config
    asset = inputs.dataset(config)
    run.origin = {"dataset": asset.origin, "licence": asset.licence or ""}
    prepared = prepare_tables(config.source, config.filter, config.split, asset.folder, config.seed)
    if not prepared.statistics["evaluated_users"]:
        raise UserError(f"no user has {config.split.minimum_events} events after filtering: lower split.minimum_events or filter.core")
    prepared.interactions.write_parquet(run.work / "interactions.parquet")
    prepared.items.write_parquet(run.work / "items.parquet")
    prepared.users.write_parquet(run.work / "users.parquet")
    facts = prepared.statistics
    runs.write_json(run.work / "metrics.json", facts)
    run.headline = {key: facts[key] for key in ("users", "items", "interactions")}
    lengths = facts["history_length"]
    say(
        f"{facts['users']:,} users, {facts['items']:,} items, {facts['interactions']:,} interactions (density {facts['density']:.2%}); "
        f"events per user {lengths['p0']} to {lengths['p100']}, median {lengths['p50']}; dropped {facts['dropped']}; "
        f"targets that hang on a timestamp tie: {facts['ambiguous_targets']}"
    )
    if "periods" in facts:
        bounds, events = facts["periods"], ", ".join(f"{count:,} {name}" for name, count in facts["events"].items())
        say(
            f"validation from {bounds['valid_from_date']}, test from {bounds['test_from_date']}; events: {events}; "
            f"users asked in test: {facts['evaluated_users']:,}, targets of items without training events: "
            f"{facts['targets']['test']['of_new_items']:,} of {facts['targets']['test']['targets']:,}"
        )
