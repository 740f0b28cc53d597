"""What the processes of test_distributed.py do together, and what one process does alone: python processes.py FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainingArguments,
)
from trl.experimental.orpo import ORPOConfig

from llmrec import config, distributed
from llmrec.data.sequences import TEST, TRAIN, VALID, Sequences
from llmrec.rankers.backbone import with_lora
from llmrec.rankers.orpo import SharedPromptORPOTrainer
from llmrec.rankers.sft import AnswerTrainer, collate
from llmrec.rankers.validation import RankingValidation, ValidationPrompts
from llmrec.retrievers import training
from llmrec.retrievers.sequence_model import SequenceModel
from llmrec.stages import scoring

LETTERS = [21, 22, 23, 24]


def adapted(family: str = "llama") -> nn.Module:
    """A tiny model with an adapter whose second half is not zero, or the first half would get no gradient."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
    if family == "llama":
        base = LlamaForCausalLM(LlamaConfig(intermediate_size=64, num_attention_heads=4, max_position_embeddings=64, **sizes))
    elif family == "gpt2":
        base = GPT2LMHeadModel(GPT2Config(n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **sizes))
    else:
        base = Mamba2ForCausalLM(Mamba2Config(num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8, **sizes))
    base.get_output_embeddings().weight.data.normal_(std=0.3)
    base.requires_grad_(False)
    model = with_lora(base, config.Lora(r=4, dropout=0.0), seed=3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.05)
    return model


def prompts() -> list[list[int]]:
    """Nine of different lengths: two whole steps of four and one of a single prompt, for which one of two processes has nothing."""
    generator = np.random.default_rng(0)
    return [generator.integers(30, 128, 6 + 3 * number).tolist() for number in range(9)]


def arguments(folder: Path) -> dict:
    """Four prompts a step: four at once alone, two each for two processes. SGD, because Adam makes large steps of small differences."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4 // distributed.world_size(),
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
    }


def tuned(kind: str, folder: Path, family: str = "llama", nll_on: str = "sequence", **limits: int) -> tuple[dict, list[dict]]:
    """The adapter after three steps, and the log."""
    model = adapted(family)
    if kind == "sft":
        rows = [
            {"row": n, "prompt_ids": ids, "completion_ids": [LETTERS[n % 4]], "length": len(ids), "copies": 1}
            for n, ids in enumerate(prompts())
        ]
        trainer = AnswerTrainer(model, TrainingArguments(**arguments(folder)), train_dataset=rows, data_collator=collate, **limits)
    else:
        pairs = [
            {"prompt_ids": ids, "chosen_ids": [LETTERS[(n + pair) % 4]], "rejected_ids": [LETTERS[(n + pair + 1 + n % 3) % 4]]}
            for n, ids in enumerate(prompts())
            for pair in range(1 + n % 3)
        ]
        if kind != "orpo":  # titles of one to three tokens
            pairs = [pair | {side: pair[side] + [50] * (pair[side][0] % 3) for side in ("chosen_ids", "rejected_ids")} for pair in pairs]
        settings = ORPOConfig(**arguments(folder), beta=0.3, max_length=64, disable_dropout=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<end>", pad_token="<end>")
        data = Dataset.from_list(pairs)
        trainer = SharedPromptORPOTrainer(
            model, settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer, nll_on=nll_on, **limits
        )
    items = np.tile(np.arange(1, 5), (5, 1))
    questions = ValidationPrompts(prompts()[:5], items, np.array([1, 2, 3, 4, 1]), LETTERS, batch=2)
    validation = RankingValidation(trainer, questions, folder, every=1, patience=None)
    trainer.add_callback(validation)
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    trainer.train()
    if kind != "sft":
        trainer.evaluate()
    last = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    kept = validation.restore_best()
    best = {f"best.{name}": weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    return last | best, [*trainer.state.log_history, {"kept": kept}]


def retrieved(folder: Path, **how) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """A small GRU after two epochs, and their log; 13 histories, three a step, the last alone."""
    generator = np.random.default_rng(2)
    lengths = generator.integers(5, 14, 13)
    split = np.concatenate([[TRAIN] * (length - 2) + [VALID, TEST] for length in lengths]).astype(np.int8)
    items = generator.integers(1, 31, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    sequences = Sequences(offsets, items, np.ones(len(items), dtype=np.float32), split, 30)
    torch.manual_seed(0)
    sizes = config.SequenceModel(dim=16, inner=32, dropout=0.0, mixer=config.Mixer(name="gru", hidden=16), residual=True)
    model = SequenceModel(sizes, 30, 10)
    settings = config.Training(max_length=10, batch=3, epochs=2, learning_rate=0.01, warmup=2, **how)
    folder.mkdir(parents=True, exist_ok=True)
    progress = training.train(model, sequences, settings, sequences.cases("valid"), folder, seed=1)
    return dict(model.state_dict()), progress.log


def asked(folder: Path) -> np.ndarray:
    """Scores of seven users in blocks of two, as the evaluation keeps them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [[ids] for ids in prompts()[:7]]
    rows[3] = []  # refused
    usual, scoring.BLOCK = scoring.BLOCK, 2
    try:
        return scoring._in_blocks(
            lambda some: np.array([[[len(rows[at][0]), sum(rows[at][0])]] for at in some], dtype=np.float32), rows, folder, "x"
        )
    finally:
        scoring.BLOCK = usual


def work(folder: Path) -> None:
    """Do everything and leave the results of this process in `folder`."""
    torch.set_num_threads(1)
    facts: dict = {"rank": distributed.rank(), "world": distributed.world_size(), "logs": {}}
    tensors: dict[str, torch.Tensor] = {}
    for name, (weights, log) in {
        "sft": tuned("sft", folder / "sft"),
        "orpo": tuned("orpo", folder / "orpo"),
        "budget": tuned("orpo", folder / "budget", max_tokens_per_batch=40),
        "titles": tuned("titles", folder / "titles", max_tokens_per_batch=60),
        "mamba2": tuned("titles", folder / "mamba2", family="mamba2"),
        "gpt2": tuned("titles", folder / "gpt2", family="gpt2", nll_on="completion"),
        "softmax": retrieved(folder / "softmax"),
        "sampled": retrieved(folder / "sampled", loss="sampled_softmax", negatives=7, windows="last"),
    }.items():
        facts["logs"][name] = log
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in weights.items()}
    tensors["scores"] = torch.from_numpy(asked(folder / "scores"))
    rows = distributed.gather_rows(distributed.share(5))
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.arange(3.0) + distributed.rank()
    distributed.sum_gradients([parameter, nn.Parameter(torch.zeros(2))])
    facts |= {"rows": rows.tolist(), "gradient": parameter.grad.tolist()}
    with distributed.main_first():
        facts["saw"] = sorted(path.name for path in folder.glob("order.*"))
        (folder / f"order.{distributed.rank()}").touch()
    save_file(tensors, folder / f"{distributed.rank()}.safetensors")
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    distributed.join()
    work(Path(sys.argv[1]))
    distributed.leave()
