"""Arms of an experiment with rankers side by side: evaluations of the same users that differ in how ORPO was done.

    python benchmarks/arms.py runs/ml-1m/evaluate/NAME.{control,sampled,rating} --control control
    python benchmarks/arms.py ... --held_out 300            # and pairs of users that no arm has trained on
    python benchmarks/arms.py ... --plot docs/orpo.png      # and ORPO's course by epoch

An arm goes by the last part of its folder's name. Each has NDCG@10 over all users and over those whose target was retrieved, of the
language model alone and fused; differences are paired bootstraps over users. `letters_evened` is the language model's on the latter when
each letter's mean log-probability over the validation users is taken off, so that it does not matter which letters it likes.
Held out are rating pairs of users without a row in sft.parquet or preferences.parquet of any arm; accuracy is the share of pairs
whose higher rated film has the more probable letter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from measure import report, same_settings

from llmrec.cli import read_settings
from llmrec.config import Config
from llmrec.data.tables import load_sequences, load_titles, padded
from llmrec.evaluation.metrics import per_user, tie_range
from llmrec.evaluation.significance import paired_bootstrap
from llmrec.preferences import preference_rows
from llmrec.prompting import shuffled
from llmrec.rankers.backbone import load_adapter, load_base
from llmrec.rankers.letters import letter_logprobs
from llmrec.retrievers.candidates import rows_per_batch, top_items
from llmrec.stages import inputs
from llmrec.stages.pairs import prompt_writer
from llmrec.stages.retrieve import load

METRIC = "ndcg@10"
SMOOTHED = 25  # steps of a running mean in the plot
CURVES = {
    "loss": "loss",
    "rewards/accuracies": "pairs in the right order",
    "rewards/margins": "margin of the rewards",
    "log_odds_chosen": "log odds ratio",
}


def stage_folder(arm: Path, stage: str) -> Path:
    """The folder of another stage of the same arm."""
    return arm.parent.parent / stage / arm.name


def compared(arms: dict[str, Path], control: str) -> dict[str, Any]:
    """Means of every arm, and its differences to the control, to SFT and to the retriever."""
    tables = {name: pl.read_parquet(folder / "per_user.parquet").sort("user") for name, folder in arms.items()}
    users = tables[control]["user"]
    found = {}
    for name, table in tables.items():
        if not table["user"].equals(users):
            raise SystemExit(f"{name} was evaluated on other users than {control}")
        systems = {"retriever": "retriever_rank", "sft": "sft_rank", "alone": "orpo_rank", "fused": "rank"}
        values = {system: per_user(table[column].to_numpy())[METRIC] for system, column in systems.items()}
        reference = {
            "alone": per_user(tables[control]["orpo_rank"].to_numpy())[METRIC],
            "fused": per_user(tables[control]["rank"].to_numpy())[METRIC],
        }
        hit = table["rank"].to_numpy() > 0
        differences = {
            "alone - control": (values["alone"], reference["alone"]),
            "alone - sft": (values["alone"], values["sft"]),
            "alone - retriever": (values["alone"], values["retriever"]),
            "fused - control fused": (values["fused"], reference["fused"]),
            "fused - retriever": (values["fused"], values["retriever"]),
        }
        found[name] = {
            "overall": {system: round(float(value.mean()), 4) for system, value in values.items()},
            "hit_subset": {system: round(float(value[hit].mean()), 4) for system, value in values.items()},
            "letters_evened": round(letters_evened(arms[name]), 4),
            "fusion_weight": json.loads((arms[name] / "metrics.json").read_text())["fusion"]["weight"],
            "differences": {label: shown(*sides) for label, sides in differences.items()},
        }
    return {"users": len(users), "hit": int(hit.sum()), "arms": found}


def letters_evened(arm: Path) -> float:
    """NDCG@10 of the language model on the hit subset of the test users without its liking of letters, as validation users show it.

    For users asked in one order, shuffled by seed and user (`llmrec.stages.scoring.questions_of`).
    """
    seed = json.loads((arm / "stage.json").read_text())["seed"]
    rankings = pl.read_parquet(arm / "rankings.parquet").filter(pl.col("items").list.contains(pl.col("target")))
    items, targets = padded(rankings["items"].to_list()), rankings["target"].to_numpy()
    scores = padded(rankings["ranker_scores"].to_list(), np.nan, dtype=np.float32)
    letters = np.full(items.shape, items.shape[1] - 1)  # of each candidate the letter that it was shown with
    for row, user, count in zip(letters, rankings["user"], rankings["items"].list.len(), strict=True):
        row[shuffled(range(count), seed, user)] = range(count)
    valid = rankings["split"].to_numpy() == "valid"
    liked = np.array([np.nanmean(scores[valid][letters[valid] == letter]) for letter in range(items.shape[1])])
    _, rank = tie_range(scores[~valid] - liked[letters[~valid]], items[~valid], targets[~valid])
    return float(per_user(rank)[METRIC].mean())


def shown(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Difference, 95 % interval, p."""
    d = paired_bootstrap(a, b)
    return {"difference": round(d.difference, 4), "ci95": [round(d.low, 4), round(d.high, 4)], "p": round(d.p, 4)}


def settings_of(folder: Path, *options: str) -> Config:
    """What a finished folder of a ranker was made with, and its prompts and pairs whatever its recipes say now; `options` over that."""
    made = json.loads((folder / "stage.json").read_text())["config"]
    names = [word for key in ("dataset", "retriever", "ranker", "recipe", "runs") for word in (f"--{key}", str(made[key]))]
    sections = [word for key in ("prompt", "pairs") for word in (f"--{key}", json.dumps(made[key]))]
    variant = ["--variant", made["variant"]] if made["variant"] else []
    return read_settings("evaluate", [*names, *sections, *variant, *options])[0]


def held_out_pairs(arms: dict[str, Path], config: Config, limit: int) -> pl.DataFrame:
    """Rating pairs of users whom no arm has seen, on prompts like those of training."""
    root = next(iter(arms.values())).parent.parent
    train = load_sequences(root / "prepare").train_only()
    seen: set[int] = set()
    for arm in arms.values():
        for table in ("sft", "preferences"):
            seen |= set(pl.read_parquet(stage_folder(arm, "pairs") / f"{table}.parquet", columns=["user"])["user"])
    users = np.array([user for user in range(train.user_count) if user not in seen])
    retriever, batch = load(root / "retrieve" / config.retriever, config, train.item_count), rows_per_batch(train.item_count)

    def pool_for(some: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return top_items(retriever, train, some, ends, config.retrieval.candidates, batch)

    pairs = replace(config.pairs, rating=True, lightfm="none", prompts=limit)
    writer = prompt_writer(config, load_titles(root / "prepare"))
    pool = pool_for if config.pairs.pool == "retriever" else None
    return preference_rows(train, writer, pairs, config.seed, users, pool, None)[0]


def accuracies(arms: dict[str, Path], config: Config, limit: int) -> dict[str, Any]:
    """Of every arm and of SFT on the held-out pairs, with standard errors."""
    pairs = held_out_pairs(arms, config, limit)
    root = next(iter(arms.values())).parent.parent
    writer = prompt_writer(config, load_titles(root / "prepare"))
    rows = [writer.encode(prompt) for prompt in pairs["prompt"]]
    letters = {answer: place for place, answer in enumerate(writer.answers)}
    chosen, rejected = (np.array([letters[answer] for answer in pairs[side]]) for side in ("chosen", "rejected"))
    base = load_base(inputs.base_folder(config), config.base)
    folders = {"sft": stage_folder(next(iter(arms.values())), "sft")} | {name: stage_folder(arm, "orpo") for name, arm in arms.items()}
    found = {}
    for name, folder in folders.items():
        model = load_adapter(base, folder, float32=False)
        scores = letter_logprobs(model, rows, writer.labels, batch=config.evaluation.batch)
        right = np.take_along_axis(scores, chosen[:, None], 1) > np.take_along_axis(scores, rejected[:, None], 1)
        found[name] = {"accuracy": round(float(right.mean()), 3), "standard_error": round(float(right.std() / len(right) ** 0.5), 3)}
        base = model.unload()
    return {"pairs": len(rows), "accuracy": found}


def plot(arms: dict[str, Path], file: Path) -> None:
    """Course of the training by epoch, as figures 1 and 2 of arXiv 2408.05606."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3.3), constrained_layout=True)
    for number, (name, arm) in enumerate(arms.items()):
        log = [json.loads(line) for line in (stage_folder(arm, "orpo") / "train_log.jsonl").open()]
        for axis, (key, label) in zip(axes, CURVES.items(), strict=True):
            axis.set(xlabel="epoch", title=label)
            logged = [row for row in log if key in row]
            if logged:  # softmax has no odds
                values = running_mean([row[key] for row in logged])
                axis.plot([row["epoch"] for row in logged[len(logged) - len(values) :]], values, color=f"C{number}", label=name)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=len(arms))
    figure.savefig(file, dpi=110)


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Means of `SMOOTHED` values in a row, or of all where there are fewer."""
    width = min(SMOOTHED, max(1, len(values)))
    return np.convolve(values, np.ones(width) / width, mode="valid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", type=Path, help="folders of `llmrec evaluate`")
    parser.add_argument("--control", required=True, help="the arm that the others are compared with")
    parser.add_argument("--held_out", type=int, default=0, help="so many pairs of unseen users; 0: none")
    parser.add_argument("--plot", type=Path, help="a png file")
    options = parser.parse_args()
    same_settings()
    arms = {folder.name.rpartition(".")[2]: folder for folder in options.arms}
    if options.control not in arms:
        parser.error(f"no arm {options.control}: there are {', '.join(arms)}")
    found = compared(arms, options.control)
    if options.held_out:
        found["held_out"] = accuracies(arms, settings_of(arms[options.control]), options.held_out)
    if options.plot:
        plot(arms, options.plot)
    report(found)


if __name__ == "__main__":
    main()
