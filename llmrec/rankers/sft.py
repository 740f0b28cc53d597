"""Supervised fine-tuning on letters: cross-entropy of the right answer's token after the prompt, over the whole vocabulary.

LlamaRec (arXiv 2311.02089), without its end-of-text token: the letter is all that scoring reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainingArguments

from llmrec.config import Tuning
from llmrec.errors import UserError
from llmrec.rankers.letters import last_logits, pad
from llmrec.rankers.tuning import Sums, TrainResult, WindowTrainer, arguments, fit, limits
from llmrec.rankers.validation import ValidationPrompts


class LetterTrainer(WindowTrainer):
    """Trains on rows of prompt_ids, completion_ids (one token) and length; one forward pass per prompt."""

    def batch_sizes(self, batch: dict[str, Any]) -> Tensor:
        """Rows."""
        return torch.tensor([len(batch["answers"])], dtype=torch.float32)

    def window_loss(self, model: nn.Module, batch: dict[str, Any], window: Tensor) -> tuple[Tensor, Sums]:
        """Cross-entropy of the answers, as a share of the step's."""
        logits, answers = last_logits(model, batch["input_ids"], batch["lengths"])[batch["asked"]], batch["answers"]
        right = (logits.argmax(-1) == answers).sum()
        return F.cross_entropy(logits, answers, reduction="sum") / window[0], {"mean_token_accuracy": (right, len(answers))}


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """input_ids (rows, longest), lengths (rows,), answers and the places of their rows (answers,), and the rows' numbers."""
    ids, lengths = pad([row["prompt_ids"] for row in rows], pad_id=0)
    asked = torch.tensor([at for at, row in enumerate(rows) if row["completion_ids"]], dtype=torch.int64)
    answers = torch.tensor([token for row in rows for token in row["completion_ids"]], dtype=torch.int64)
    return {"input_ids": ids, "lengths": lengths, "asked": asked, "answers": answers, "rows": [row["row"] for row in rows]}


def train_sft(
    model: PeftModel,
    rows: Iterable[Mapping[str, Any]],
    tuning: Tuning,
    folder: str | Path,
    *,
    encode: Callable[[str], list[int]],
    label_ids: Mapping[str, int],
    seed: int = 0,
    prompts: ValidationPrompts | None = None,
) -> TrainResult:
    """Tune the trainable adapter of `model` to answer with the right letter; it goes on by itself after being killed.

    Args:
        model: with a trainable adapter (`with_lora`).
        rows: prompt and completion texts.
        tuning: optimisation.
        folder: of the checkpoints and train_log.jsonl.
        encode: prompt -> token ids, `PromptWriter.encode`.
        label_ids: completion -> token id.
        seed: order of rows and dropout.
        prompts: for validation, where `tuning.eval_steps` asks for it.

    Raises:
        UserError: rows that cannot be trained on, or a loss that is not finite.
    """
    data = []
    for number, row in enumerate(rows):
        ids = encode(row["prompt"])
        if not ids:
            raise UserError(f"row {number}: the prompt is empty")
        data.append({"row": number, "prompt_ids": ids, "completion_ids": [label_ids[row["completion"]]], "length": len(ids), "copies": 1})
    if not data:
        raise UserError("there are no rows to train on: see the pairs stage's README.md for what was skipped and why")
    args = TrainingArguments(**arguments(tuning, folder, seed))
    if tuning.gradient_checkpointing:
        model.enable_input_require_grads()  # the frozen embedding would cut the graph; TRL's trainer does it by itself
    trainer = LetterTrainer(model, args, train_dataset=data, data_collator=collate, **limits(tuning))
    return fit(trainer, Path(folder), "sft", tuning, prompts)
