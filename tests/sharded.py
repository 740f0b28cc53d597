"""SFT with validation and ORPO as test_distributed.py runs them alone and split over two processes: python sharded.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from processes import LETTERS, adapted, prompts
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llmrec import distributed
from llmrec.config import Base, Orpo, Tuning
from llmrec.rankers.backbone import save_adapter
from llmrec.rankers.orpo import train_orpo
from llmrec.rankers.sft import train_sft
from llmrec.rankers.validation import ValidationPrompts

HOW = {"batch": 2, "accumulation": 2, "epochs": 2, "warmup": 0, "learning_rate": 1e-2, "save_steps": 2, "max_tokens_per_batch": 40}


def work(folder: Path) -> None:
    """Train both; logs and adapters stay in `folder`."""
    torch.set_num_threads(1)
    questions = ValidationPrompts(prompts()[:5], np.tile(np.arange(1, 5), (5, 1)), np.array([1, 2, 3, 4, 1]), LETTERS, batch=2)
    encoded = {str(number): ids for number, ids in enumerate(prompts())}
    labels = {letter: [token] for letter, token in zip("abcd", LETTERS, strict=True)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<end>", pad_token="<end>")
    answers = [{"prompt": str(n), "completion": "abcd"[n % 4], "chosen": "abcd"[n % 4], "rejected": "abcd"[(n + 1) % 4]} for n in range(9)]
    for kind in ("sft", "orpo"):
        model, own = adapted(), folder / kind
        if kind == "sft":
            tuning = Tuning(**HOW, eval_steps=2)
            train_sft(model, answers, tuning, own, encode=encoded.__getitem__, answers=labels, prompts=questions)
        else:
            train_orpo(model, tokenizer, answers, Orpo(**HOW), own, encode=encoded.__getitem__, answers=labels)
        if distributed.is_main():
            save_adapter(model, own / "adapter", Base())


if __name__ == "__main__":
    distributed.join()
    # accelerate splits models over GPUs alone; nothing of what it does then needs one
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    work(Path(sys.argv[1]))
    distributed.leave()
