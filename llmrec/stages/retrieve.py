"""retrieve: train a retriever, write every user's candidates and the rank of his target among all items."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from llmrec import distributed, machine, runs
from llmrec.config import Config, Retrieval
from llmrec.data.sequences import Cases, Sequences
from llmrec.data.tables import list_column, load_sequences, load_statistics
from llmrec.errors import UserError
from llmrec.evaluation import metrics, protocol
from llmrec.runs import Run, say
from llmrec.stages import retrieval_metrics, trained_on

if TYPE_CHECKING:
    from llmrec.retrievers.candidates import Ranked


def retrieve(run: Run) -> None:
    """Train the retriever on the training part and rank the catalogue for the validation and test users.

    Reads `prepare`. Writes model.safetensors, candidates.parquet, per_user.parquet, metrics.json, and states.safetensors
    where `retrieval.keep_states` asks for it.
    """
    from safetensors.torch import save_file

    from llmrec.retrievers import training

    config = run.config
    if config.retrieval.kind == "sequence":
        training.check(config.model, config.training)
    if config.retrieval.keep_states:
        _check_states(config)
    sequences = load_sequences(run.input("prepare"))
    asked = {split: sequences.cases(split) for split in ("valid", "test")}
    # before the training: there may be too few items to draw from
    drawn = None if config.retrieval.legacy is None else retrieval_metrics.draw_negatives(config, sequences, asked["test"])
    scorer, state, trained = _train(config, sequences, run)
    answers = {split: _ranked(scorer, sequences, cases, config.retrieval) for split, cases in asked.items()}
    card = _card(config, run, sequences, asked["test"])
    extra = retrieval_metrics.beside_the_means(config, run.input("prepare"), scorer, sequences, asked["test"], answers["test"])
    if drawn is not None:
        extra["legacy"] = retrieval_metrics.sampled_negatives(scorer, sequences, asked["test"], drawn, config.retrieval.legacy, card)
    if not distributed.is_main():
        return

    save_file({name: tensor.contiguous() for name, tensor in state.items()}, run.work / "model.safetensors")
    tables, per_user, result = [], [], {}
    for split, cases in asked.items():
        ranked = answers[split]
        result[split] = metrics.summary(ranked.target_rank, users=cases.users)
        result[f"{split}_masked"] = metrics.summary(ranked.target_rank_masked, users=cases.users)
        tables.append(_candidate_table(cases, ranked))
        per_user.append(_per_user(cases, ranked.target_rank))
    pl.concat(tables).write_parquet(run.work / "candidates.parquet")
    pl.concat(per_user).write_parquet(run.work / "per_user.parquet")
    if config.retrieval.keep_states:
        _keep_states(scorer.model, sequences, run.work / "states.safetensors")

    trained["train"]["peak_memory_mb"] = machine.peak_memory_mb()
    trained["trained_on"] = trained_on.checksum(config, sequences)
    runs.write_json(run.work / "metrics.json", {"protocol": asdict(card), **result, **extra, **trained})
    run.headline = {name: result["test"][name] for name in ("hr@10", "ndcg@10")}
    shown = "; ".join(f"{name.replace('_', ' ')} HR@10 {m['hr@10']:.4f} NDCG@10 {m['ndcg@10']:.4f}" for name, m in result.items())
    say(f"full ranking of {sequences.item_count:,} items: {shown}")
    if "legacy" in extra:
        kind, among = extra["legacy"]["protocol"]["candidate_set"], extra["legacy"]["test"]
        say(f"{kind}: test HR@10 {among['hr@10']:.4f} NDCG@10 {among['ndcg@10']:.4f}; not comparable with any of these")


def _card(config: Config, run: Run, sequences: Sequences, cases: Cases) -> protocol.ProtocolCard:
    """The card of the full ranking of the test cases."""
    facts = load_statistics(run.input("prepare"))
    users = len(np.unique(cases.users))
    return protocol.card(
        config,
        data_fingerprint=run.inputs[str(run.input("prepare"))],
        ambiguous_targets=facts["ambiguous_targets"]["test"],
        users_evaluated=users,
        candidate_set=f"all {sequences.item_count} items",
        history_masked=False,
        periods=facts.get("periods"),
        targets_evaluated=len(cases) if len(cases) > users else None,
    )


def _train(config: Config, sequences: Sequences, run: Run) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The trained retriever, its tensors, and what metrics.json says of model and training."""
    from llmrec.retrievers import training
    from llmrec.retrievers.lightfm import LightFM
    from llmrec.retrievers.popularity import Popularity

    begun = time.perf_counter()
    if config.retrieval.kind == "sequence":
        if config.model.mixer.legacy_leak:
            say("model.mixer.legacy_leak: training positions see their own targets, as in the public code; not for results")
        model = sequence_model(config, sequences.item_count)
        progress = training.train(model, sequences, config.training, sequences.cases("valid"), run.checkpoints, config.seed)
        say(f"best epoch {progress.best_epoch} of {progress.epoch}, {progress.seconds / progress.epoch:.1f} s per epoch")
        trained: dict[str, Any] = {"epochs": progress.epoch, "best_epoch": progress.best_epoch, "seconds": round(progress.seconds, 1)}
        trained |= {"seconds_per_epoch": round(progress.seconds / progress.epoch, 2), "log": progress.log}
        scorer = training.SequenceScorer(model, config.training.max_length)
        return scorer, model.state_dict(), {"parameters": model.parameter_counts(), "train": trained}
    simple: LightFM | Popularity
    if config.retrieval.kind == "lightfm":
        simple, epochs = LightFM.fit(sequences, config.lightfm, config.seed, run.checkpoints), config.lightfm.epochs
    else:
        simple, epochs = Popularity.fit(sequences), 1
    seconds = time.perf_counter() - begun
    trained = {"epochs": epochs, "seconds": round(seconds, 1), "seconds_per_epoch": round(seconds / max(1, epochs), 2)}
    total = sum(tensor.numel() for tensor in simple.state().values())
    return simple, simple.state(), {"parameters": {"total": total, "non_embedding": 0}, "train": trained}


def sequence_model(config: Config, item_count: int) -> Any:
    """A fresh sequence model, its weights drawn from the seed, on the GPU where there is one."""
    import torch

    from llmrec.retrievers.sequence_model import SequenceModel

    torch.manual_seed(config.seed)
    model = SequenceModel(config.model, item_count, config.training.max_length)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def load(folder: Path, config: Config, item_count: int) -> Any:
    """A finished retriever, ready to score (see `candidates.Scorer`)."""
    from safetensors.torch import load_file

    from llmrec.retrievers.lightfm import LightFM
    from llmrec.retrievers.popularity import Popularity
    from llmrec.retrievers.training import SequenceScorer

    state = load_file(folder / "model.safetensors")
    if config.retrieval.kind == "sequence":
        model = sequence_model(config, item_count)
        model.load_state_dict(state)
        return SequenceScorer(model, config.training.max_length)
    return LightFM(**state) if config.retrieval.kind == "lightfm" else Popularity(**state)


def _check_states(config: Config) -> None:
    """Before the training, not after it."""
    from llmrec.retrievers.mixers import check_steps

    if config.retrieval.kind != "sequence":
        raise UserError(
            f"{config.retrieval.kind} has no states to keep: leave retrieval.keep_states false, or take a sequence model such as 2mamba4rec"
        )
    check_steps(config.model)


def _keep_states(model: Any, sequences: Sequences, path: Path) -> None:
    """Every user's state after all of his events, test events too: for the next recommendation, not for any evaluation."""
    from llmrec.retrievers import online

    histories = [sequences.history(user, end) for user, end in enumerate(sequences.offsets[1:])]
    online.save(online.read(model, histories), path)
    size = path.stat().st_size / 2**20
    say(f"states of {len(histories):,} users after all their events, {size:.0f} MB: for recommendations to come; no evaluation uses them")


def _ranked(scorer: Any, sequences: Sequences, cases: Cases, retrieval: Retrieval) -> Ranked:
    """The catalogue ranked for all cases; several processes share them."""
    from llmrec.retrievers.candidates import Ranked, rank, rows_per_batch

    mine = cases.take(distributed.share(len(cases)))
    batch = rows_per_batch(sequences.item_count)
    ranked = rank(scorer, sequences, mine, retrieval.candidates, repeats=retrieval.repeats, batch=batch)
    return Ranked(**{name: distributed.gather_rows(rows) for name, rows in vars(ranked).items()})


def _candidate_table(cases: Cases, ranked: Ranked) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user": cases.users,
            "split": [cases.split] * len(cases),
            "target": cases.targets,
            "target_rank": ranked.target_rank.astype(np.int32),
            "target_rank_masked": ranked.target_rank_masked.astype(np.int32),
            "items": list_column(ranked.items, ranked.items > 0),
            "scores": list_column(ranked.scores, ranked.items > 0),
        }
    )


def _per_user(cases: Cases, ranks: np.ndarray) -> pl.DataFrame:
    columns = {"user": cases.users, "split": [cases.split] * len(cases), "rank": ranks.astype(np.int32)}
    return pl.DataFrame(columns | metrics.per_user(ranks))
