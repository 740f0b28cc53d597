"""Supervised fine-tuning: cross-entropy of the answer's tokens after the prompt, over the whole vocabulary.

An answer is the letter of the right candidate (LlamaRec, arXiv 2311.02089, without its end-of-text token: the letter is all that
scoring reads), or the title of the next item with the end of text (GPT4Rec, arXiv 2304.03879). The prompt's own tokens are not
trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainingArguments

from llmrec.config import Tuning
from llmrec.errors import UserError
from llmrec.rankers.backbone import TunedModel
from llmrec.rankers.completions import kept_logits, lay_out, row_size
from llmrec.rankers.training_log import Sums
from llmrec.rankers.tuning import TrainResult, WindowTrainer, arguments, fit, limits
from llmrec.rankers.validation import ValidationPrompts


class AnswerTrainer(WindowTrainer):
    """Trains on rows of prompt_ids, completion_ids and length; one forward pass per prompt. The mean is over the step's tokens."""

    def batch_sizes(self, batch: dict[str, Any]) -> Tensor:
        """Tokens of the answers."""
        return torch.tensor([len(batch["targets"])], dtype=torch.float32)

    def window_loss(self, model: nn.Module, batch: dict[str, Any], window: Tensor) -> tuple[Tensor, Sums]:
        """Cross-entropy of the answers' tokens, as a share of the step's."""
        base: Any = self.accelerator.unwrap_model(model)
        logits, targets = kept_logits(model, base.config, batch)[0][batch["at"]].float(), batch["targets"]
        right = (logits.argmax(-1) == targets).sum()
        return F.cross_entropy(logits, targets, reduction="sum") / window[0], {"mean_token_accuracy": (right, len(targets))}


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each prompt followed by its answer, of `lay_out`, and the rows' numbers. With one answer a prompt nothing is computed twice."""
    answers = [[row["completion_ids"]] if row["completion_ids"] else [] for row in rows]
    return lay_out("concatenated", [row["prompt_ids"] for row in rows], answers, 0) | {"rows": [row["row"] for row in rows]}


def train_sft(
    model: TunedModel,
    rows: Iterable[Mapping[str, Any]],
    tuning: Tuning,
    folder: str | Path,
    *,
    encode: Callable[[str], list[int]],
    answers: Mapping[str, Sequence[int]],
    seed: int = 0,
    prompts: ValidationPrompts | None = None,
) -> TrainResult:
    """Tune what is trainable in `model` to answer rightly; it goes on by itself after being killed.

    Args:
        model: with a trainable adapter, or trainable itself (`load_trainable`).
        rows: prompt and completion texts.
        tuning: optimisation.
        folder: of the checkpoints and train_log.jsonl.
        encode: prompt -> token ids, `Writer.encode`.
        answers: completion -> its token ids.
        seed: order of rows and dropout.
        prompts: for validation, where `tuning.eval_steps` asks for it.

    Raises:
        UserError: rows that cannot be trained on, or a loss that is not finite.
    """
    data = []
    for number, row in enumerate(rows):
        ids, answer = encode(row["prompt"]), list(answers[row["completion"]])
        if not ids:
            raise UserError(f"row {number}: the prompt is empty")
        if not answer:
            raise UserError(f"row {number}: the completion is 0 tokens")
        length, copies = row_size("concatenated", len(ids), [len(answer)], single=len(answer) == 1)
        data.append({"row": number, "prompt_ids": ids, "completion_ids": answer, "length": length, "copies": copies})
    if not data:
        raise UserError("there are no rows to train on: see the pairs stage's README.md for what was skipped and why")
    args = TrainingArguments(**arguments(tuning, folder, seed))
    if tuning.gradient_checkpointing:
        model.enable_input_require_grads()  # a frozen embedding would cut the graph; TRL's trainer does it by itself
    trainer = AnswerTrainer(model, args, train_dataset=data, data_collator=collate, **limits(tuning))
    return fit(trainer, Path(folder), "sft", tuning, prompts)
