"""ORPO with one forward pass per prompt, whatever the number of its pairs.

    loss = NLL(winner) - beta * log sigmoid(log odds(winner) - log odds(loser)),    odds = p / (1 - p)

Hong et al. 2024 (arXiv 2403.07691), equations 4-7, as in TRL's `ORPOTrainer`, whose loss this equals on the same token rows. TRL
forwards prompt + winner and prompt + loser for every pair, with logits at all positions. Here pairs are grouped by prompt
(`preference_rows`), their completions share its forward pass (`completions`), and the loss is one of `preference_losses`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmrec.config import Orpo
from llmrec.errors import UserError
from llmrec.rankers import preference_losses
from llmrec.rankers.completions import choose, completion_logps, lay_out, prompt_nll, row_size, scaled_logits
from llmrec.rankers.preference_losses import check_settings, mean_over_losers
from llmrec.rankers.preference_rows import Group, comparisons, grouped
from llmrec.rankers.tuning import Sums, TrainResult, WindowTrainer, arguments, fit, limits
from llmrec.rankers.validation import ValidationPrompts
from llmrec.runs import say

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # pyproject.toml pins the version instead

from trl.experimental.orpo import ORPOConfig, ORPOTrainer


class SharedPromptORPOTrainer(WindowTrainer, ORPOTrainer):  # type: ignore[misc]  # loss_is_scaled_for_ga
    """TRL's ORPOTrainer with equal prompts grouped by themselves and forwarded once.

    Takes what TRL's takes: a data set with the columns prompt, chosen and rejected (text, or conversations that the chat
    template ends the same way), or token ids made elsewhere in prompt_ids, chosen_ids and rejected_ids, of any length.
    Differences from TRL: no end of text after the completion unless asked for, LoRA's dropout stays on unless
    `disable_dropout` says otherwise in the config, a row that is too long is refused, no `logits/*` metrics.

    The loss of a step is a mean over all its winners, on all processes and in all forward passes, of the winner's mean over its
    losers; the NLL is a mean over the tokens of all winners. Pair-wise (`negatives` 1) every pair has a winner of its own, as in
    TRL: a completion that wins twice counts twice. List-wise a completion is one winner of its prompt, with one NLL.

    Args:
        *args: of TRL's constructor.
        nll_on: "completion", or "sequence": prompt and completion, as in TRL.
        loss: "orpo"; "simpo" or "softmax" instead of it, both without NLL (see `preference_losses`).
        negatives: losers of a winner: 1, the pair's own; k, its own and others of the pool, drawn once by seed and row; "all", the
            pool, except what wins against it in another pair. More than 1 is for completions of one token.
        label_ids: the tokens of the pool, the same in all rows; otherwise the column pool_ids says it for each.
        gamma: the margin of loss simpo.
        end_of_text: end texts with the tokenizer's end of text, as TRL does. Token ids are taken as they are.
        **kwargs: of TRL's constructor.

    Raises:
        UserError: settings that do not go together, or a row that cannot be trained on; the message names it.
    """

    processing_class: Any

    def __init__(
        self,
        *args: Any,
        nll_on: Literal["completion", "sequence"] = "completion",
        loss: Literal["orpo", "simpo", "softmax"] = "orpo",
        negatives: int | Literal["all"] = 1,
        label_ids: Sequence[int] | None = None,
        gamma: float = 0.5,
        end_of_text: bool = False,
        **kwargs: Any,
    ):
        self.nll_on, self.loss, self.negatives, self.label_ids = nll_on, loss, negatives, label_ids
        self.gamma, self.end_of_text = gamma, end_of_text
        super().__init__(*args, **kwargs)
        check_settings(loss, nll_on, negatives, self.beta, gamma)
        if self.aux_loss_enabled:
            raise UserError("mixtures of experts with a router loss are not supported: set output_router_logits to false")
        self.args.remove_unused_columns = False
        self.use_dpo_data_collator = True  # or TRL warns at every evaluation step
        self.data_collator = self.collate
        base: Any = self.model
        if nll_on == "sequence":
            self._check_sequence(base.config)
        self.strategy, why = choose(base, bool(self.args.gradient_checkpointing))
        self.train_dataset = self._grouped(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._grouped(rows) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._grouped(self.eval_dataset)
        several = any(len(completion) > 1 for group in self.train_dataset for completion in group["completions"])
        say(f"completions {self.strategy}: {why}" if several else "completions of one token: read from the logits after the prompt")

    def _check_sequence(self, config: Any) -> None:
        """The NLL of a prompt goes through the head by itself, in chunks whose number differs from process to process."""
        if scaled := scaled_logits(config):
            raise UserError(
                f"nll_on sequence: {config.model_type} changes logits after its head ({scaled}), which is not done here: choose completion"
            )
        if self.is_fsdp_enabled or (self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3):
            raise UserError("nll_on sequence needs the whole head on every process: choose completion, or ddp in place of fsdp2 and zero3")

    def _send_telemetry(self) -> None:
        """TRL reports every trainer that is made to its publisher; this one does not."""

    def tokenize_row(self, feature: dict[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
        """Token ids of one pair: the row's own where it has them, else TRL's tokenisation."""
        if "prompt_ids" in feature:
            return {name: list(feature[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        chosen = self.build_tokenized_answer(feature["prompt"], feature["chosen"])
        rejected = self.build_tokenized_answer(feature["prompt"], feature["rejected"])
        prompt = chosen["prompt_input_ids"]
        if prompt != rejected["prompt_input_ids"]:
            start = repr(feature["prompt"])[:60]
            raise UserError(f"prompt {start}: a completion merges with its last token: end the prompt or begin the completions differently")
        bos, eos = self.processing_class.bos_token_id, self.processing_class.eos_token_id
        if bos is not None and prompt[:1] != [bos]:
            prompt = [bos, *prompt]
        completions = {"chosen_ids": chosen["input_ids"], "rejected_ids": rejected["input_ids"]}
        if self.end_of_text:
            completions = {side: ids if ids[-1:] == [eos] else [*ids, eos] for side, ids in completions.items()}
        return {"prompt_ids": prompt, **completions}

    def collate(self, groups: Sequence[Group]) -> dict[str, Any]:
        """A batch of prompts with all their completions and pairs: of `lay_out`, of `comparisons`, and `rows`, the pairs' numbers."""
        prompts, completions = [group["prompt_ids"] for group in groups], [group["completions"] for group in groups]
        layout = lay_out(self.strategy, prompts, completions, self.padding_value or 0)
        return layout | comparisons(groups) | {"rows": [row for group in groups for row in group["rows"]]}

    def batch_sizes(self, batch: dict[str, Any]) -> Tensor:
        """Winners, and tokens under their NLL."""
        winners = batch["winners"]
        tokens = batch["completion_lengths"][winners].sum()
        if self.nll_on == "sequence":  # the first token of a prompt is not predicted
            tokens = tokens + (batch["lengths"][batch["prompt"]] - 1).sum()
        return torch.tensor([len(winners), int(tokens)], dtype=torch.float32)

    def window_loss(self, model: nn.Module, batch: dict[str, Any], window: Tensor) -> tuple[Tensor, Sums]:
        """The loss of all winners of the batch, as a share of the step's. A batch without pairs adds 0."""
        base = self.accelerator.unwrap_model(model)
        logps, hidden = completion_logps(model, base.config, batch, hidden_states=self.nll_on == "sequence")
        winners, real = batch["winners"], batch["real"]
        means = logps / batch["completion_lengths"]
        chosen, rejected = means[winners], means[batch["losers"]]
        nll = -logps[winners].sum()
        if hidden is not None:
            nll = nll + prompt_nll(hidden, base.get_output_embeddings(), batch)[batch["prompt"]].sum()

        all_winners, all_tokens = window.clamp(min=1)
        terms, logged = self._terms(chosen, rejected, real)
        loss = terms.sum() / all_winners
        if self.loss == "orpo":
            loss = loss + nll / all_tokens

        rejected = mean_over_losers(rejected, real)
        logged |= {
            "rewards/chosen": self.beta * chosen,
            "rewards/rejected": self.beta * rejected,
            "rewards/margins": self.beta * (chosen - rejected),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        count, tokens = self.batch_sizes(batch).tolist()
        sums: Sums = {name: (values.detach().sum(), count) for name, values in logged.items()}
        return loss, sums | {"nll_loss": (nll.detach(), tokens)}

    def _terms(self, chosen: Tensor, rejected: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Each winner's loss but for its NLL, and what is logged of its comparisons, (winners,) each."""
        ahead = (chosen[:, None] > rejected).float()  # TRL compares rewards, which all tie at beta 0
        logged = {"rewards/accuracies": mean_over_losers(ahead, real)}
        if self.loss == "softmax":
            return preference_losses.softmax(chosen, rejected, real), logged
        if self.loss == "simpo":
            return mean_over_losers(preference_losses.simpo(chosen[:, None], rejected, self.beta, self.gamma), real), logged
        losses, log_sigmoid, log_odds = preference_losses.orpo(chosen[:, None], rejected, self.beta)
        logged |= {"log_odds_ratio": mean_over_losers(log_sigmoid, real), "log_odds_chosen": mean_over_losers(log_odds, real)}
        return mean_over_losers(losses, real), logged

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: Literal["train", "eval"] = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and mean metrics of a batch by itself; TRL's evaluation calls this."""
        loss, sums = self.window_loss(model, batch, self.batch_sizes(batch).to(batch["lengths"].device))
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {prefix + name: float(total / count) for name, (total, count) in sums.items()}

    def _grouped(self, rows: Any) -> list[Group]:
        """The groups of a data set, each with the length and number of its token rows (`WindowTrainer`)."""
        pairs = rows if self.label_ids is None else [row | {"pool_ids": list(self.label_ids)} for row in rows]
        groups = grouped(pairs, negatives=self.negatives, max_length=self.max_length, seed=self.args.seed)
        single = all(len(completion) == 1 for group in groups for completion in group["completions"])
        for group in groups:
            sizes = [len(completion) for completion in group["completions"]]
            group["length"], group["copies"] = row_size(self.strategy, len(group["prompt_ids"]), sizes, single)
        return groups


def train_orpo(
    model: nn.Module,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    orpo: Orpo,
    folder: str | Path,
    *,
    encode: Callable[[str], list[int]],
    answers: Mapping[str, Sequence[int]],
    seed: int = 0,
    prompts: ValidationPrompts | None = None,
) -> TrainResult:
    """Tune what is trainable in `model` on preference pairs; it goes on by itself after being killed.

    Args:
        model: with a trainable adapter, or trainable itself (`load_trainable`; `load_tuned(..., to_train=True)` to continue SFT).
        tokenizer: for padding, and kept in the checkpoints.
        rows: prompt, chosen and rejected texts, one pair each; for more negatives than one also pool_items, the candidates that
            the prompt shows, the first of which the first answer names.
        orpo: optimisation and loss.
        folder: of the checkpoints and train_log.jsonl.
        encode: prompt -> token ids, `Writer.encode`.
        answers: completion -> its token ids; for more negatives than one a single token each, in the order of the candidates.
        seed: order of rows and dropout.
        prompts: for validation, where `orpo.eval_steps` asks for it.

    Raises:
        UserError: rows that cannot be trained on, or a loss that is not finite.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()  # TRL maps over token ids that are made already
    labels = [ids[0] for ids in answers.values()]
    pairs = []
    for row in rows:
        sides = {f"{side}_ids": list(answers[row[side]]) for side in ("chosen", "rejected")}
        pair = {"prompt_ids": encode(row["prompt"]), **sides}
        pairs.append(pair if orpo.negatives == 1 else pair | {"pool_ids": labels[: len(row["pool_items"])]})
    longest = max((len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs), default=0)
    args = ORPOConfig(**arguments(orpo, folder, seed), beta=orpo.beta, max_length=longest, disable_dropout=False)
    options: dict[str, Any] = {"nll_on": orpo.nll_on, "loss": orpo.loss, "negatives": orpo.negatives, "gamma": orpo.gamma, **limits(orpo)}
    data = Dataset.from_list(pairs)
    trainer = SharedPromptORPOTrainer(model, args, train_dataset=data, processing_class=tokenizer, **options)
    return fit(trainer, Path(folder), "orpo", orpo, prompts)
