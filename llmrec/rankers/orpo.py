"""ORPO with one forward pass per prompt.

    loss = NLL(winner) - beta * log sigmoid(log odds(winner) - log odds(loser)),    odds = p / (1 - p)

Hong et al. 2024 (arXiv 2403.07691), equations 4-7, as in TRL's `ORPOTrainer`, whose loss this equals on the same token rows.
TRL forwards prompt + winner and prompt + loser for every pair, with logits at all positions. Here completions are one
token (a candidate's letter, without end of text), so that all pairs of a prompt are read from the logits after its last token.

When completions grow longer, `SharedPromptORPOTrainer.window_loss` is the place: it needs log-probabilities per pair, and
everything after that stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmrec.config import Orpo
from llmrec.errors import UserError
from llmrec.rankers.letters import last_logits, pad
from llmrec.rankers.tuning import Sums, TrainResult, WindowTrainer, arguments, checked_rows, fit

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # pyproject.toml pins the version instead

from trl.experimental.orpo import ORPOConfig, ORPOTrainer

NLL_CHUNK = 256
"""Positions whose logits exist at the same time when the NLL covers the prompt."""


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation (Mächler 2012, equation 7)."""
    return torch.where(x < -0.6931471805599453, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def orpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The odds-ratio term of each pair, to be added to the winner's NLL.

    Args:
        chosen_logps: mean log-probability per token of the winners, (pairs,), below 0.
        rejected_logps: of the losers, (pairs,).
        beta: weight of the term; lambda in the paper.

    Returns:
        losses (pairs,), which are -beta * log sigmoid(log odds ratio); log sigmoid(log odds ratio) (pairs,); the log odds ratio (pairs,).
        All float32. Where a probability rounds to 1 its odds are taken at the float32 next to it, so that nothing is infinite.
    """
    # At p = 1 TRL's odds are infinite and their gradient NaN. A float32 softmax has no value between this and 0.
    top = -torch.finfo(torch.float32).eps / 2
    chosen, rejected = chosen_logps.float().clamp(max=top), rejected_logps.float().clamp(max=top)
    log_odds_ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    log_sigmoid = F.logsigmoid(log_odds_ratio)
    return -beta * log_sigmoid, log_sigmoid, log_odds_ratio


class SharedPromptORPOTrainer(WindowTrainer, ORPOTrainer):  # type: ignore[misc]  # loss_is_scaled_for_ga
    """TRL's ORPOTrainer for completions of one token: equal prompts are grouped by themselves and forwarded once.

    Takes what TRL's takes: a data set with the columns prompt, chosen and rejected (text, or conversations that the
    chat template ends the same way), or token ids made elsewhere in prompt_ids, chosen_ids and rejected_ids.
    Differences from TRL: no end of text after the completion, LoRA's dropout stays on unless `disable_dropout` says
    otherwise in the config, a row that is too long is refused, no `logits/*` metrics. A prompt's NLL counts as often
    as the prompt has pairs, as in TRL, though it is computed once.

    Args:
        *args: of TRL's constructor.
        nll_on: "completion", or "sequence": prompt and completion, as in TRL.
        **kwargs: of TRL's constructor.

    Raises:
        UserError: a row cannot be trained on; the message names it.
    """

    processing_class: Any

    def __init__(self, *args: Any, nll_on: Literal["completion", "sequence"] = "completion", **kwargs: Any):
        self.nll_on = nll_on
        super().__init__(*args, **kwargs)
        if self.aux_loss_enabled:
            raise UserError("mixtures of experts with a router loss are not supported: set output_router_logits to false")
        self.args.remove_unused_columns = False
        self.use_dpo_data_collator = True  # or TRL warns at every evaluation step
        self.data_collator = self.collate
        self.train_dataset = self._grouped(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._grouped(rows) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._grouped(self.eval_dataset)

    def _send_telemetry(self) -> None:
        """TRL reports every trainer that is made to its publisher; this one does not."""

    def tokenize_row(self, feature: dict[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
        """Token ids of one pair: the row's own where it has them, else TRL's tokenisation without the end of text."""
        if "prompt_ids" in feature:
            return {name: list(feature[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        chosen = self.build_tokenized_answer(feature["prompt"], feature["chosen"])
        rejected = self.build_tokenized_answer(feature["prompt"], feature["rejected"])
        prompt = chosen["prompt_input_ids"]
        if prompt != rejected["prompt_input_ids"]:
            raise UserError("a completion merges with the last token of its prompt: end the prompt or begin the completions differently")
        bos = self.processing_class.bos_token_id
        if bos is not None and prompt[:1] != [bos]:
            prompt = [bos, *prompt]
        return {"prompt_ids": prompt, "chosen_ids": chosen["input_ids"], "rejected_ids": rejected["input_ids"]}

    def collate(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of prompts and all their pairs.

        Returns:
            input_ids (prompts, longest) and lengths (prompts,); per pair the prompt's place in the batch `prompt`
            (pairs,) and the token ids `chosen` and `rejected` (pairs,); `rows`: the pairs' numbers in the data set.
        """
        ids, lengths = pad([group["prompt_ids"] for group in groups], self.padding_value or 0)
        return {
            "input_ids": ids,
            "lengths": lengths,
            "prompt": torch.tensor([at for at, group in enumerate(groups) for _ in group["rows"]]),
            "chosen": torch.tensor([token for group in groups for token in group["chosen"]]),
            "rejected": torch.tensor([token for group in groups for token in group["rejected"]]),
            "rows": [row for group in groups for row in group["rows"]],
        }

    def batch_sizes(self, batch: dict[str, Any]) -> Tensor:
        """Pairs, and tokens under the NLL."""
        pairs = batch["prompt"].numel()
        # of a prompt of n tokens and its completion, the first token is not predicted
        tokens = pairs if self.nll_on == "completion" else int(batch["lengths"][batch["prompt"]].sum())
        return torch.tensor([pairs, tokens], dtype=torch.float32)

    def window_loss(self, model: nn.Module, batch: dict[str, Any], window: Tensor) -> tuple[Tensor, Sums]:
        """The ORPO loss of all pairs of the batch, as a share of the step's."""
        prompt = batch["prompt"]
        if self.nll_on == "completion":
            logits, prompt_nll = last_logits(model, batch["input_ids"], batch["lengths"]), torch.zeros((), device=prompt.device)
        else:
            logits, prompt_nll = self._logits_and_prompt_nll(model, batch)
        logps = logits.log_softmax(-1)
        chosen, rejected = logps[prompt, batch["chosen"]], logps[prompt, batch["rejected"]]
        losses, log_sigmoid, log_odds = orpo_loss(chosen, rejected, self.beta)
        nll = prompt_nll - chosen.sum()
        loss = nll / window[1] + losses.sum() / window[0]

        pairs, tokens = self.batch_sizes(batch).tolist()
        means = {
            "rewards/chosen": self.beta * chosen,
            "rewards/rejected": self.beta * rejected,
            "rewards/accuracies": (chosen > rejected).float(),  # TRL compares rewards, which all tie at beta 0
            "rewards/margins": self.beta * (chosen - rejected),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "log_odds_ratio": log_sigmoid,
            "log_odds_chosen": log_odds,
        }
        sums: Sums = {name: (values.detach().sum(), pairs) for name, values in means.items()}
        return loss, sums | {"nll_loss": (nll.detach(), tokens)}

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: Literal["train", "eval"] = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and mean metrics of a batch by itself; TRL's evaluation calls this."""
        loss, sums = self.window_loss(model, batch, self.batch_sizes(batch).to(batch["lengths"].device))
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {prefix + name: float(total / count) for name, (total, count) in sums.items()}

    def _logits_and_prompt_nll(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Last logits, and the summed NLL of the prompts' own tokens, each prompt as often as it has pairs.

        The vocabulary-wide softmax is made for `NLL_CHUNK` positions at a time and again in the backward pass.
        """
        ids, lengths = batch["input_ids"], batch["lengths"]
        last = lengths[:, None] - 1
        out = model(input_ids=ids, logits_to_keep=last, output_hidden_states=True, use_cache=False)
        predicts = torch.arange(ids.shape[1] - 1, device=ids.device) < last
        hidden, targets = out.hidden_states[-1][:, :-1][predicts], ids[:, 1:][predicts]
        pairs = batch["prompt"].bincount(minlength=len(ids))
        weights = pairs[:, None].expand_as(predicts)[predicts].float()
        head = self.accelerator.unwrap_model(model).get_output_embeddings()

        def chunk_nll(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return F.cross_entropy(head(hidden).float(), targets, reduction="none") @ weights

        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), NLL_CHUNK):
            part = slice(start, start + NLL_CHUNK)
            total = total + checkpoint(chunk_nll, hidden[part], targets[part], weights[part], use_reentrant=False)
        return out.logits[:, 0].float(), total

    def _grouped(self, rows: Any) -> list[dict[str, Any]]:
        """One row per different prompt, in the order in which they first appear."""
        pairs = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows]
        checked_rows(pairs, ["chosen_ids", "rejected_ids"])
        groups: dict[tuple[int, ...], dict[str, Any]] = {}
        for number, pair in enumerate(pairs):
            if len(pair["prompt_ids"]) + 1 > self.max_length:
                raise UserError(f"row {number}: {len(pair['prompt_ids']) + 1} tokens, max_length is {self.max_length}: shorten the prompt")
            key = tuple(pair["prompt_ids"])
            group = groups.setdefault(key, {"prompt_ids": pair["prompt_ids"], "chosen": [], "rejected": [], "rows": [], "length": len(key)})
            group["chosen"] += pair["chosen_ids"]
            group["rejected"] += pair["rejected_ids"]
            group["rows"].append(number)
        return list(groups.values())


def train_orpo(
    model: nn.Module,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    orpo: Orpo,
    folder: str | Path,
    *,
    encode: Callable[[str], list[int]],
    label_ids: Mapping[str, int],
    seed: int = 0,
) -> TrainResult:
    """Tune the trainable adapter of `model` on preference pairs; it goes on by itself after being killed.

    Args:
        model: with a trainable adapter (`with_lora`, or `load_adapter(..., trainable=True)` to continue SFT).
        tokenizer: for padding, and kept in the checkpoints.
        rows: prompt, chosen and rejected texts, one pair each.
        orpo: optimisation and loss.
        folder: of the checkpoints and train_log.jsonl.
        encode: prompt -> token ids, `PromptWriter.encode`.
        label_ids: completion -> token id.
        seed: order of rows and dropout.

    Raises:
        UserError: rows that cannot be trained on, or a loss that is not finite.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()  # TRL maps over token ids that are made already
    pairs = [
        {"prompt_ids": encode(row["prompt"]), "chosen_ids": [label_ids[row["chosen"]]], "rejected_ids": [label_ids[row["rejected"]]]}
        for row in rows
    ]
    checked_rows(pairs, ["chosen_ids", "rejected_ids"])
    longest = max(len(pair["prompt_ids"]) for pair in pairs)
    args = ORPOConfig(**arguments(orpo, folder, seed), beta=orpo.beta, max_length=longest + 1, disable_dropout=False)
    trainer = SharedPromptORPOTrainer(model, args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, nll_on=orpo.nll_on)
    return fit(trainer, Path(folder), "orpo")
