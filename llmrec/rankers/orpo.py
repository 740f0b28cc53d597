"""ORPO with one forward pass per prompt, whatever the number of its pairs.

    loss = NLL(winner) - beta * log sigmoid(log odds(winner) - log odds(loser)),    odds = p / (1 - p)

Hong et al. 2024 (arXiv 2403.07691), equations 4-7, as in TRL's `ORPOTrainer`, whose loss this equals on the same token rows. TRL
forwards prompt + winner and prompt + loser for every pair, with logits at all positions. Here pairs are grouped by prompt
(`preference_rows`), their completions share its forward pass (`completions`), and the loss is one of `preference_losses`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llmrec import distributed
from llmrec.config import Orpo
from llmrec.errors import UserError
from llmrec.rankers import preference_losses
from llmrec.rankers.completions import choose, completion_logps, lay_out, prompt_nll, row_size, scaled_logits
from llmrec.rankers.preference_losses import check_settings, mean_over_losers
from llmrec.rankers.preference_rows import Group, comparisons, grouped
from llmrec.rankers.training_log import Sums, add, means
from llmrec.rankers.tuning import TrainResult, WindowTrainer, arguments, fit, limits, weightless
from llmrec.rankers.validation import ValidationPrompts
from llmrec.runs import say

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # pyproject.toml pins the version instead

from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
from trl.experimental.orpo import ORPOConfig, ORPOTrainer


class SharedPromptORPOTrainer(WindowTrainer, ORPOTrainer):  # type: ignore[misc]  # loss_is_scaled_for_ga
    """TRL's ORPOTrainer with equal prompts grouped by themselves and forwarded once.

    Takes what TRL's takes: a data set with the columns prompt, chosen and rejected (text, or conversations that the chat
    template ends the same way), or token ids made elsewhere in prompt_ids, chosen_ids and rejected_ids, of any length.
    Differences from TRL: no end of text after the completion unless asked for, LoRA's dropout stays on (`disable_dropout` in
    the config is for the base's), a row that is too long is refused, no `logits/*` metrics and so no `compute_metrics`. The batch size
    counts prompts, each with all its pairs, where TRL counts pairs. Batches are made here (`WindowTrainer`): `data_collator` is
    refused, and what the config says of the data loader (workers, dropping the last, grouping by length) has no effect.

    The loss of a step is a mean over all its winners, on all processes and in all forward passes, of the winner's mean over its
    losers; the NLL is a mean over the tokens of all winners. `evaluate` gives the same over a data set. Pair-wise (`negatives` 1)
    every pair has a winner of its own, as in TRL: a completion that wins twice counts twice. List-wise a completion is one winner
    of its prompt, with one NLL.

    Args:
        *args: of TRL's constructor.
        nll_on: "completion", or "sequence": prompt and completion, as in TRL.
        loss: "orpo"; "simpo" or "softmax" instead of it, both without NLL (see `preference_losses`).
        negatives: losers of a winner: 1, the pair's own; k, all its own and, up to k, others of the pool, drawn once by seed and row;
            "all", the pool, except what wins against it in another pair. More than 1 is for completions of one token.
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
        self._evaluated: dict[str, list[Any]] = defaultdict(lambda: [0.0, 0.0])
        super().__init__(*args, **kwargs)
        check_settings(loss, nll_on, negatives, self.beta, gamma)
        if self.compute_metrics is not None or self.generate_during_eval:
            raise UserError("compute_metrics and generate_during_eval read logits that are not made here: leave them out")
        if not self.use_dpo_data_collator:
            raise UserError("data_collator: batches in which completions share a prompt are laid out here: leave it out")
        if self.is_encoder_decoder:
            raise UserError("an encoder-decoder reads its prompt another way: take a causal language model, or TRL's own ORPOTrainer")
        if loss == "simpo" and self.beta < 1:
            say(f"simpo with beta {self.beta:g} hardly looks at how far apart two answers are; its authors take 2")
        if self.aux_loss_enabled:
            raise UserError("mixtures of experts with a router loss are not supported: set output_router_logits to false")
        self.args.remove_unused_columns = False
        self.data_collator = self.collate
        base: Any = self.model
        _keep_lora_dropout(base)
        split = self.is_fsdp_enabled or self.zero3
        if nll_on == "sequence":
            _check_sequence(base.config, split)
        self.strategy, why = choose(base, self.args.gradient_checkpointing or base.is_activation_checkpointing, split)
        self.train_dataset = self._grouped(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._grouped(rows) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._grouped(self.eval_dataset)
        several = any(len(completion) > 1 for group in self.train_dataset for completion in group["completions"])
        say(f"completions {self.strategy}: {why}" if several else "completions of one token: read from the logits after the prompt")

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

    def _read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with its token ids, by the steps that TRL's constructor takes for its data sets."""
        row = maybe_apply_chat_template(maybe_extract_prompt(dict(row)), self.processing_class)
        return row | self.tokenize_row(row)

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
        sums = self._batch_sums(model, batch)
        all_winners, all_tokens = window.clamp(min=1)
        loss = sums.pop("preference")[0] / all_winners
        if self.loss == "orpo":
            loss = loss + sums["nll_loss"][0] / all_tokens
        return loss, {name: (total.detach(), count) for name, (total, count) in sums.items()}

    def _batch_sums(self, model: nn.Module, batch: dict[str, Any]) -> Sums:
        """Over the batch's winners: the loss but for its NLL as "preference", the NLL and, without gradients, what is logged."""
        base = self.accelerator.unwrap_model(model)
        logps, hidden = completion_logps(model, base.config, batch, hidden_states=self.nll_on == "sequence")
        winners, real = batch["winners"], batch["real"]
        per_token = logps / batch["completion_lengths"]
        chosen, rejected = per_token[winners], per_token[batch["losers"]]
        nll = -logps[winners].sum()
        if hidden is not None:
            nll = nll + prompt_nll(hidden, base.get_output_embeddings(), batch)[batch["prompt"]].sum()

        terms, logged = self._terms(chosen, rejected, real)
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
        return sums | {"preference": (terms.sum(), count), "nll_loss": (nll, tokens)}

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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This process's part of the prompts. Those of whom there are not enough for all processes are made up by ones without pairs."""
        own: Any = self.eval_dataset
        rows: Any = own[eval_dataset] if isinstance(eval_dataset, str) else own if eval_dataset is None else eval_dataset
        if rows is None:
            raise UserError("there is nothing to evaluate on: give the trainer an eval_dataset")
        made = len(rows) and "completions" in rows[0]  # groups already: a data set of the constructor
        groups: list[Group] = rows if made else self._grouped([self._read(row) for row in rows])
        processes = self.args.world_size
        groups = groups + [weightless(groups[0])] * (-len(groups) % processes)  # as many batches everywhere
        mine: Any = groups[self.args.process_index :: processes]
        return DataLoader(mine, batch_size=self.args.eval_batch_size, collate_fn=self.collate)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The same for `predict`."""
        return self.get_eval_dataloader(test_dataset)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Adds a batch to the sums that `evaluation_loop` divides."""
        with torch.no_grad(), self.compute_loss_context_manager():
            add(self._evaluated, self._batch_sums(model, self._prepare_inputs(inputs)))
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Loss and metrics as means over the whole data set, whatever the batches and processes it is cut into."""
        self._evaluated.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        found = means(distributed.gather({name: (float(total), float(count)) for name, (total, count) in self._evaluated.items()}))
        loss = found.pop("preference") + (found["nll_loss"] if self.loss == "orpo" else 0.0)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in ({"loss": loss} | found).items()}
        return output._replace(metrics=(output.metrics or {}) | metrics)

    def _grouped(self, rows: Any) -> list[Group]:
        """The groups of a data set, each with the length and number of its token rows (`WindowTrainer`)."""
        pairs = rows if self.label_ids is None else [row | {"pool_ids": list(self.label_ids)} for row in rows]
        groups = grouped(pairs, negatives=self.negatives, max_length=self.max_length, seed=self.args.seed)
        single = all(len(completion) == 1 for group in groups for completion in group["completions"])
        for group in groups:
            sizes = [len(completion) for completion in group["completions"]]
            group["length"], group["copies"] = row_size(self.strategy, len(group["prompt_ids"]), sizes, single)
        return groups


def _keep_lora_dropout(model: nn.Module) -> None:
    """TRL turns all dropout off; the adapter's was asked for with the adapter."""
    if isinstance(model, PeftModel):
        for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
            for adapter, dropout in layer.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    config: Any = model.peft_config[adapter]
                    dropout.p = config.lora_dropout


def _check_sequence(config: Any, split: bool) -> None:
    """The NLL of a prompt goes through the head by itself, in chunks whose number differs from process to process."""
    if scaled := scaled_logits(config):
        raise UserError(
            f"nll_on sequence: {config.model_type} changes logits after its head ({scaled}), which is not done here: choose completion"
        )
    if split:
        raise UserError("nll_on sequence needs the whole head on every process: choose completion, or ddp in place of fsdp2 and zero3")


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
