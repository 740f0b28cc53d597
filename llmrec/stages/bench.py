"""bench: how long a recommendation takes and what it needs, of every finished model of a data set, beside how good it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from llmrec import machine, runs
from llmrec.config import Bench, Config
from llmrec.data.tables import load_sequences
from llmrec.errors import UserError
from llmrec.runs import Run, say
from llmrec.stages import finished, run_folder

if TYPE_CHECKING:
    from llmrec.stages.timing import Timing

AT_LEAST = {"users": 1, "ranker_users": 1, "repeats": 1, "batch": 1, "ranker_batch": 1, "samples": 2}


@dataclass(frozen=True)
class Models:
    """Finished run folders that are timed, by name.

    Attributes:
        retrievers: of `retrieve`.
        rankers: of `orpo`, or of `sft` where there is no `orpo`.
    """

    retrievers: dict[str, Path]
    rankers: dict[str, Path]

    def fingerprints(self, config: Config) -> dict[str, str]:
        """What decides about them, by `stage/name`: how each was made, and how it was evaluated."""
        folders = [*self.retrievers.values(), *self.rankers.values()]
        folders += [finished.folder_of("evaluate", name, config) for name in self.rankers]
        identities = {f"{folder.parent.name}/{folder.name}": finished.identity(folder) for folder in folders}
        return {name: identity[:16] for name, identity in identities.items() if identity}


def models_of(config: Config) -> Models:
    """The models that `bench.retrievers` and `bench.rankers` ask for.

    Raises:
        UserError: one of them is not finished.
    """
    prepared = run_folder("prepare", config)
    there = {name: finished.folder_of("retrieve", name, config) for name in finished.names("retrieve", config)}
    there = {name: folder for name, folder in there.items() if finished.reads(folder, prepared)}
    tuned = {name: finished.folder_of(stage, name, config) for stage in ("sft", "orpo") for name in finished.names(stage, config)}
    return Models(
        retrievers=_chosen(config.bench.retrievers, there, "bench.retrievers"),
        rankers=_chosen(config.bench.rankers, tuned, "bench.rankers"),
    )


def _chosen(asked: str | None, there: dict[str, Path], setting: str) -> dict[str, Path]:
    if asked is None:
        return there
    names = [] if asked == "none" else [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in there:
            raise UserError(f"{setting}: there is no finished run '{name}' on this data; there are: {', '.join(there) or 'none'}")
    return {name: there[name] for name in names}


def bench(run: Run) -> None:
    """Time the models one after the other.

    Reads `prepare` and the run folders of the models. Writes latency.parquet, metrics.json, *.png, and the printed table as
    summary.txt. What has been measured of a model is kept, so that a killed run goes on with the next one.
    """
    from llmrec.stages.bench_lengths import lengths_of, sweep
    from llmrec.stages.bench_rankers import time_ranker
    from llmrec.stages.bench_retrievers import time_retriever

    config, how, seed = run.config, run.config.bench, run.config.seed
    _check(how)
    lengths = lengths_of(how)
    models = models_of(config)
    if not models.retrievers and not models.rankers:
        raise UserError(
            f"there is no finished model of this data in {run_folder('prepare', config).parent}: train one first, e.g. llmrec retrieve"
        )
    sequences = load_sequences(run.input("prepare"))
    found, sweeps = {}, {}
    for name, folder in models.retrievers.items():
        own = finished.config_of(folder, config)
        found[name] = _kept(run.checkpoints / f"retriever.{name}", partial(time_retriever, name, folder, own, sequences, how, seed))
        if lengths and own.retrieval.kind == "sequence":
            sweeps[name] = _kept(run.checkpoints / f"lengths.{name}", partial(sweep, name, own, sequences.item_count, lengths, how, seed))
    for name, folder in models.rankers.items():
        evaluated = finished.folder_of("evaluate", name, config)
        own = finished.config_of(evaluated if finished.identity(evaluated) else folder, config)  # which knows how it is asked
        found[name] = _kept(run.checkpoints / f"ranker.{name}", partial(time_ranker, name, folder, own, sequences, how, seed))
    _write(run, found, sweeps)


def _check(how: Bench) -> None:
    for name, least in AT_LEAST.items():
        if vars(how)[name] < least:
            raise UserError(f"bench.{name} is {vars(how)[name]}: it must be at least {least}")


def _kept(path: Path, measure: Callable[[], Timing]) -> Timing:
    """What was measured of a model, from its checkpoint where it was measured before; the facts are written last."""
    from llmrec.stages.timing import Timing

    facts, rows = path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.parquet")
    if facts.exists():
        return Timing(json.loads(facts.read_text(encoding="utf-8")), pl.read_parquet(rows))
    say(f"timing {path.name.replace('.', ' ', 1)}")
    measured = measure()
    measured.rows.write_parquet(rows)
    runs.write_json(facts, measured.facts)
    return measured


def _write(run: Run, found: dict[str, Timing], sweeps: dict[str, Timing]) -> None:
    """Tables, pictures, the printed summary, and metrics.json last."""
    import torch

    from llmrec.evaluation import latency_plots
    from llmrec.evaluation.drawing import png
    from llmrec.evaluation.latency import RULE
    from llmrec.evaluation.latency_table import render, split_of
    from llmrec.stages.timing import WARM_UP

    how = run.config.bench
    models = {name: measured.facts for name, measured in found.items()}
    lengths = {name: measured.facts["lengths"] for name, measured in sweeps.items()}
    pl.concat([measured.rows for measured in [*found.values(), *sweeps.values()]]).write_parquet(run.work / "latency.parquet")
    png(run.work / "quality_latency.png", [latency_plots.quality_against_latency(models, split_of(models))])
    if lengths:
        png(run.work / "latency_length.png", [latency_plots.latency_against_length(lengths)])
        png(run.work / "memory_length.png", [latency_plots.memory_against_length(lengths)])
    table = f"{render(models, how.batch, how.ranker_batch)}\n"
    (run.work / "summary.txt").write_text(table, encoding="utf-8")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    protocol: dict[str, Any] = {
        **{name: vars(how)[name] for name in ("users", "ranker_users", "repeats", "samples")},
        "interval": "mean and Student's t, users - 1 degrees of freedom, times the samples' means' standard deviation by sqrt(n / (n - 1))",
        "outliers": RULE,
        "warm_up_users": WARM_UP,
        "machine": {"cpu": machine.cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu},
        "torch": torch.__version__,
    }
    facts = {"protocol": protocol, "models": models, **({"lengths": lengths} if lengths else {})}
    runs.write_json(run.work / "metrics.json", facts)
    fastest = min(facts["one"]["mean"] for facts in models.values())
    run.headline = {"models": len(models), "fastest_ms": round(1e3 * fastest, 3)}
    print(table)
