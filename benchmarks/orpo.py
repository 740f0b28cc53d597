"""Tuning and scoring a ranker: TRL's ORPOTrainer and transformers' generate beside ours, on the same token rows.

    python benchmarks/orpo.py --pairs runs/ml-1m/pairs/2mamba4rec.llamarec-smollm2-135m
    python benchmarks/orpo.py train --shape 1b --length 1024 --peak_tflops 989      # a GPU; 989 for H100 and H200
    python benchmarks/orpo.py scoring

Sections:
    train: an optimiser step of `--batch` prompts with one and with two pairs each; pairs per second and peak memory above the
        loaded model. Stock is TRL's trainer with its own loss, whose NLL covers prompt and answer, and the model as transformers
        loads it. `sequence` is ours with the same loss: like for like. `completion` is ours with the NLL of the answer alone:
        another loss, which needs no logits of the prompt. Where a prompt has two pairs stock makes two forward passes of
        `--batch` pairs, so that its memory is that of one. No dropout and no gradient checkpointing on either side.
        Losses of the same loss agree up to the rounding of stock's bfloat16 logits, and with two pairs up to its mean of means.
    scoring: the letters' log-probabilities; ours against `generate` for one token with 8 prompts at a time, in one order of the
        candidates and in five, where instruction and history are computed once for a user.

Without `--pairs` the prompts are random tokens of about `--length`; the first 55 % are the same in all orders.
Without `--model` the base is the default ranker's. Each side of train has a process of its own; sides take steps in turn.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import elsewhere, in_turn, medians, memory, report, same_settings
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from llmrec.cli import read_settings
from llmrec.config import Base, Config, Lora
from llmrec.data.tables import load_titles
from llmrec.prompting import PromptWriter
from llmrec.rankers.backbone import compile_layers, float_head, load_base, load_tokenizer, resolve_dtype, with_lora
from llmrec.rankers.letters import letter_logprobs
from llmrec.rankers.orders import letter_logprobs_of_orders
from llmrec.rankers.orpo import ORPOConfig, ORPOTrainer, SharedPromptORPOTrainer
from llmrec.stages import inputs
from llmrec.templates import load_template

SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
}
LETTERS = 20
ORDERS = 5
SHARED = 0.55  # part of a random prompt that stands for instruction and history
PAD = 0
SIDES = ("stock", "sequence", "completion")


@dataclass(frozen=True)
class Model:
    """Where the language model comes from: a folder of weights, or a shape with random ones.

    Attributes:
        folder: of weights; "" with a shape.
        base: its dtype and attention.
        shape: a key of `SHAPES`, or None.
    """

    folder: str
    base: Base
    shape: str | None

    def load(self, stock: bool) -> PreTrainedModel:
        """Frozen, on the GPU where there is one. Ours as `llmrec` loads it, with a head in float32; stock as transformers does."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        how: dict[str, Any] = {"dtype": resolve_dtype(self.base.dtype), "attn_implementation": self.base.attention}
        if self.shape is None and not stock:
            return load_base(self.folder, self.base)
        if self.shape is None:
            return AutoModelForCausalLM.from_pretrained(self.folder, **how).to(device).requires_grad_(False)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[self.shape]), **how).requires_grad_(False)
        if not stock:
            float_head(model)
        return model.eval()

    def vocabulary(self) -> int:
        """Number of tokens."""
        return SHAPES[self.shape]["vocab_size"] if self.shape else AutoConfig.from_pretrained(self.folder).vocab_size


@dataclass(frozen=True)
class Prompts:
    """What the models are asked.

    Attributes:
        rows: token ids of each user's prompt in each order of his candidates, users x orders.
        order: candidate `order[user, order, letter]`, (users, orders, letters).
        labels: token id of each letter.
    """

    rows: list[list[list[int]]]
    order: np.ndarray
    labels: list[int]


# ---------------------------------------------------------------- prompts


def shuffles(users: int) -> np.ndarray:
    """An order of the candidates for each user and prompt; the first is the one they come in."""
    random = np.random.default_rng(0)
    later = [[random.permutation(LETTERS) for _ in range(ORDERS - 1)] for _ in range(users)]
    return np.concatenate([np.tile(np.arange(LETTERS), (users, 1, 1)), np.array(later)], axis=1)


def random_prompts(vocabulary: int, users: int, length: int) -> Prompts:
    """Random tokens; a user's prompts begin alike."""
    random = np.random.default_rng(0)
    shared = round(SHARED * length)
    rows = []
    for size in random.integers(round(0.9 * length), round(1.1 * length) + 1, users):
        history = random.integers(LETTERS, vocabulary, shared).tolist()
        rows.append([history + random.integers(LETTERS, vocabulary, size - shared).tolist() for _ in range(ORDERS)])
    return Prompts(rows, shuffles(users), list(range(LETTERS)))


def real_prompts(folder: Path, model: str, users: int, length: int) -> Prompts:
    """The prompts of preference rows: those of about that length, in the pool's own order and in others."""
    import polars as pl

    config = read_settings("pairs", [])[0]
    made = json.loads((folder / "stage.json").read_text())["config"]["prompt"]
    titles = load_titles(folder.parent.parent / "prepare")
    writer = PromptWriter(load_tokenizer(model), load_template(made["template"]), replace(config.prompt, **made), titles)
    table = pl.read_parquet(folder / "preferences.parquet", columns=["group", "history_items", "pool_items"])
    table = table.unique("group", maintain_order=True).filter(pl.col("pool_items").list.len() == LETTERS)
    order, rows = shuffles(table.height), []
    for at, (history, pool) in enumerate(table.select("history_items", "pool_items").iter_rows()):
        rows.append([writer.write(history, np.array(pool)[shown]).ids for shown in order[at]])
    nearest = sorted(range(len(rows)), key=lambda at: abs(len(rows[at][0]) - length))[:users]
    if len(nearest) < users:
        raise SystemExit(f"{folder} has {len(nearest)} prompts with {LETTERS} candidates, {users} are needed")
    return Prompts([rows[at] for at in nearest], order[nearest], writer.labels[:LETTERS])


def preference_rows(prompts: Prompts, count: int, pairs: int) -> list[dict[str, list[int]]]:
    """So many prompts with so many pairs each: one winner and as many losers, drawn by seed."""
    random = np.random.default_rng(1)
    rows = []
    for user in prompts.rows[:count]:
        winner, *losers = random.permutation(prompts.labels)[: pairs + 1].tolist()
        rows += [{"prompt_ids": user[0], "chosen_ids": [winner], "rejected_ids": [loser]} for loser in losers]
    return rows


# ---------------------------------------------------------------- train


class StockTrainer(ORPOTrainer):
    """TRL's trainer on token rows that are made already, without an end of text."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """What TRL's own method gives for the text of these tokens."""
        prompt = feature["prompt_ids"]
        made: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            ids = prompt + feature[f"{side}_ids"]
            made |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids)}
            made[f"{side}_labels"] = [-100] * len(prompt) + feature[f"{side}_ids"]
        return made


class Stopwatch(TrainerCallback):
    """Seconds of the last optimiser step: forward, backward, clipping, optimiser."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begins where the batch is there."""
        finished()
        self.begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Ends with the optimiser."""
        finished()
        self.seconds = time.perf_counter() - self.begun


def finished() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def padding_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer to pad with; the rows are tokens already."""
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": PAD}, "<pad>")), pad_token="<pad>")


def trainer_of(side: str, model: Model, rows: list[dict[str, list[int]]], prompts: int, compiled: bool, folder: str) -> ORPOTrainer:
    """A trainer whose optimiser step holds all the rows."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    tuned = with_lora(model.load(stock=side == "stock"), Lora(r=8, alpha=32, dropout=0.0), seed=0)
    args = ORPOConfig(
        output_dir=folder,
        per_device_train_batch_size=prompts,
        gradient_accumulation_steps=len(rows) // prompts if side == "stock" else 1,
        max_length=max(len(row["prompt_ids"]) for row in rows) + 1,
        max_steps=1,
        learning_rate=0.0,  # every step is the same step
        beta=0.05,
        bf16=False,  # the weights are
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
    )
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": padding_tokenizer()}
    if side == "stock":
        return StockTrainer(tuned, args, **data)
    if compiled:
        compile_layers(tuned, training=True)
    return SharedPromptORPOTrainer(tuned, args, **data, nll_on=side)


def steps(side: str, model: Model, rows: list[dict[str, list[int]]], prompts: int, compiled: bool) -> Iterator[dict[str, float]]:
    """Optimiser step after step, the first of them unseen: seconds, loss, and the peak of memory above the loaded model so far."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, watch = trainer_of(side, model, rows, prompts, compiled, folder), Stopwatch()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        loaded = forget_the_past()
        trainer.train()
        while True:
            trainer.train()
            loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
            yield {"seconds": watch.seconds, "loss": loss, "peak_mb": peak() - loaded}


def forget_the_past() -> float:
    """Give free memory back and start to count peaks anew; what is held now, in MB."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def peak() -> float:
    """The most memory since, in MB: of the GPU where there is one, else of the process."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else memory("VmHWM")


def step_flops(side: str, shape: dict[str, Any], rows: list[dict[str, list[int]]]) -> float:
    """Floating-point operations a step cannot do without, the way the side goes about it.

    Weights are frozen, so that a linear layer costs 2 a weight and token forward and 2 backward; of attention half the square counts.
    """
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    keys = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    weights = layers * (2 * width * width + 2 * width * keys + 3 * width * shape["intermediate_size"])
    total = 0.0
    lengths = [len(row["prompt_ids"]) for row in rows] if side == "stock" else [*map(len, {tuple(row["prompt_ids"]) for row in rows})]
    for prompt in lengths:
        tokens, passes = (prompt + 1, 2) if side == "stock" else (prompt, 1)
        logits = 1 if side == "completion" else tokens
        body = 4 * weights * tokens + 6 * layers * width * tokens**2
        total += passes * (body + 4 * width * shape["vocab_size"] * logits)
    return total


def train(options: argparse.Namespace, model: Model, prompts: Prompts) -> dict[str, Any]:
    """Stock and ours, with one and with two pairs per prompt."""
    lengths = [len(user[0]) for user in prompts.rows[: options.batch]]
    found: dict[str, Any] = {
        "compiled": options.compile,
        "prompts_per_step": options.batch,
        "prompt_tokens": {"least": min(lengths), "most": max(lengths)},
    }
    for pairs in (1, 2):
        rows = preference_rows(prompts, options.batch, pairs)
        runs = {side: elsewhere(steps, side, model, rows, options.batch, options.compile) for side in SIDES}
        sides: dict[str, Any] = {}
        for side, values in in_turn(runs, options.rounds).items():
            seconds = statistics.median(value["seconds"] for value in values)
            sides[side] = {
                "s_per_step": [round(value["seconds"], 3) for value in values],
                "pairs_per_s": round(len(rows) / seconds, 3),
                "peak_mb_above_model": round(max(value["peak_mb"] for value in values)),
                "loss": round(values[-1]["loss"], 5),
            }
            if model.shape is not None:
                rate = step_flops(side, SHAPES[model.shape], rows) / seconds / 1e12
                sides[side] |= {"tflops": round(rate, 1), "mfu": round(rate / options.peak_tflops, 3) if options.peak_tflops else None}
        stock = sides["stock"]
        for side in SIDES[1:]:
            ours = sides[side]
            ours["speedup"] = round(ours["pairs_per_s"] / stock["pairs_per_s"], 2)
            ours["memory_ratio"] = round(ours["peak_mb_above_model"] / stock["peak_mb_above_model"], 3)
        found[f"{pairs}_per_prompt"] = {
            "stock": stock,
            "like_for_like": sides["sequence"],
            "completion": {"note": "another loss: the NLL of the answer alone", **sides["completion"]},
        }
    return found


# ---------------------------------------------------------------- scoring


def generated(model: Any, rows: list[list[int]], labels: list[int], batch: int = 8) -> np.ndarray:
    """The letters' log-probabilities by `generate`: one token, nothing cached, rows of similar length together."""
    scores = np.empty((len(rows), len(labels)), dtype=np.float32)
    by_length = sorted(range(len(rows)), key=lambda at: -len(rows[at]))
    for start in range(0, len(rows), batch):
        numbers = by_length[start : start + batch]
        longest = max(len(rows[at]) for at in numbers)
        ids = torch.tensor([[PAD] * (longest - len(rows[at])) + rows[at] for at in numbers], device=model.device)
        mask = torch.tensor([[0] * (longest - len(rows[at])) + [1] * len(rows[at]) for at in numbers], device=model.device)
        how = {"max_new_tokens": 1, "do_sample": False, "use_cache": False, "return_dict_in_generate": True, "output_logits": True}
        logits = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=PAD, **how).logits[0]
        scores[numbers] = logits.float().log_softmax(-1)[:, labels].cpu().numpy()
    return scores


def by_candidate(shown: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Mean log-probability of each candidate over the orders, (users, letters), from those of the letters (users, orders, letters)."""
    found = np.empty_like(shown)
    np.put_along_axis(found, order, shown, axis=2)
    return found.mean(1)


def agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How alike two rankings of the same candidates are, (users, candidates) each."""
    pairs = [(a, b) for a in range(LETTERS) for b in range(a)]
    first, second = (np.array([np.sign(scores[:, a] - scores[:, b]) for a, b in pairs]) for scores in (ours, theirs))
    return {
        "same_best": round(float((ours.argmax(1) == theirs.argmax(1)).mean()), 3),
        "pairs_in_the_same_order": round(float((first == second).mean()), 4),
        "largest_difference": round(float(np.abs(ours - theirs).max()), 4),
    }


def scoring(options: argparse.Namespace, model: Model, prompts: Prompts) -> dict[str, Any]:
    """Ours and `generate` in one order of the candidates and in five."""
    scorer = with_lora(model.load(stock=False), Lora(r=8, alpha=32, dropout=0.0), seed=0).eval()
    for name, weight in scorer.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.01)  # an adapter that does something
    alone = copy.deepcopy(scorer)  # `generate` has the adapter in float32, as peft loads it
    for name, weight in alone.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(scorer.dtype)
    together = copy.deepcopy(alone)
    if options.compile:
        compile_layers(alone, training=False)
        compile_layers(together, training=False, states=True)
    one = [user[0] for user in prompts.rows[: options.users]]
    several = prompts.rows[: max(1, options.users // ORDERS)]
    flat = [row for user in several for row in user]
    order = prompts.order[: len(several)]
    sides: dict[str, Callable[[], Tensor | np.ndarray]] = {
        "generate": partial(generated, scorer, one, prompts.labels),
        "ours": partial(letter_logprobs, alone, one, prompts.labels, batch=options.scoring_batch),
        "generate_5_orders": partial(generated, scorer, flat, prompts.labels),
        "plain_5_orders": partial(letter_logprobs, alone, flat, prompts.labels, batch=options.scoring_batch),
        "ours_5_orders": partial(letter_logprobs_of_orders, together, several, prompts.labels, batch=options.scoring_batch),
    }
    answers = {name: np.asarray(side()) for name, side in sides.items()}
    rows = {name: len(flat if "5" in name else one) for name in sides}
    rate = {name: round(1e3 * rows[name] / milliseconds, 2) for name, milliseconds in medians(sides, options.rounds).items()}
    shaped = {name: by_candidate(found.reshape(len(several), ORDERS, LETTERS), order) for name, found in answers.items() if "5" in name}
    return {
        "compiled": options.compile,
        "tokens": round(float(np.mean([len(row) for row in one]))),
        "one_order": {
            "prompts": len(one),
            "prompts_per_s": {name: rate[name] for name in ("generate", "ours")},
            "speedup": round(rate["ours"] / rate["generate"], 2),
            "agreement": agreement(answers["ours"], answers["generate"]),
        },
        "five_orders": {
            "prompts": len(flat),
            "prompts_per_s": {name.removesuffix("_5_orders"): rate[name] for name in sides if "5" in name},
            "speedup": round(rate["ours_5_orders"] / rate["generate_5_orders"], 2),
            "agreement": agreement(shaped["ours_5_orders"], shaped["generate_5_orders"]),
            "agreement_with_plain": agreement(shaped["ours_5_orders"], shaped["plain_5_orders"]),
        },
    }


def main() -> None:
    sections = {"train": train, "scoring": scoring}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help="train, scoring; both by default")
    parser.add_argument("--pairs", type=Path, help="the folder of `llmrec pairs`, within its runs folder")
    parser.add_argument("--model", help="a folder or hub id; the default ranker's base by default")
    parser.add_argument("--shape", choices=SHAPES, help="a Llama of this size with random weights in place of a model")
    parser.add_argument("--length", type=int, default=450, help="tokens of the prompts")
    parser.add_argument("--batch", type=int, default=4, help="train: prompts per step")
    parser.add_argument("--users", type=int, default=60, help="scoring: prompts in one order; a fifth of them in five")
    parser.add_argument("--scoring_batch", type=int, default=32, help="scoring: prompts in a forward pass of ours")
    parser.add_argument("--rounds", type=int, default=5, help="steps or runs that count, after one that does not")
    parser.add_argument("--peak_tflops", type=float, help="train --shape: what the GPU can do in bfloat16, for the utilisation")
    parser.add_argument("--compile", action="store_true", help="our layers compiled, as by base.compile")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    chosen = options.sections or list(sections)
    if unknown := set(chosen) - set(sections):
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(sections)}")
    if options.shape and (options.pairs or options.model):
        parser.error("--shape has random weights and no tokenizer: leave --pairs and --model away")
    same_settings()
    torch.set_num_threads(options.threads)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL's

    config: Config = read_settings("orpo", [])[0]
    if options.model:
        config = replace(config, base=Base(id=options.model))
    folder = "" if options.shape else str(inputs.base_folder(config))
    model = Model(folder, config.base, options.shape)
    users = max(options.batch, options.users)
    if options.pairs:
        prompts = real_prompts(options.pairs, model.folder, users, options.length)
    else:
        prompts = random_prompts(model.vocabulary(), users, options.length)
    facts = {
        "model": options.shape or config.base.id,
        "dtype": str(resolve_dtype(config.base.dtype)),
        "prompts": str(options.pairs or "random"),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    report(facts | {name: sections[name](options, model, prompts) for name in chosen})


if __name__ == "__main__":
    main()
