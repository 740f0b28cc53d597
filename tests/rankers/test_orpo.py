"""The ORPO loss against TRL's, the paper's gradient and a step of TRL's own trainer on the same token rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from llmrec.config import Lora, Orpo
from llmrec.errors import UserError
from llmrec.rankers.backbone import with_lora
from llmrec.rankers.orpo import SharedPromptORPOTrainer, orpo_loss, train_orpo

LETTERS = [21, 22, 23, 24]


def pairs(seed: int = 0) -> list[dict[str, list[int]]]:
    """Six prompts of different lengths with one to three pairs each: 11 pairs, several winners in a prompt."""
    generator = np.random.default_rng(seed)
    rows = []
    for prompt, count in enumerate([1, 2, 3, 1, 2, 2]):
        ids = generator.integers(30, 128, 6 + 3 * prompt).tolist()
        for _ in range(count):
            chosen, rejected = generator.choice(LETTERS, 2, replace=False).tolist()
            rows.append({"prompt_ids": ids, "chosen_ids": [chosen], "rejected_ids": [rejected]})
    return rows


def adapted(tiny, family, dropout: float = 0.0):
    """A tiny model whose adapter's second half is not zero, or the first half would get no gradient."""
    model = with_lora(tiny(family), Lora(r=4, dropout=dropout), seed=3)
    torch.manual_seed(4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.05)
    return model


def settings(folder, batch: int, accumulation: int, **other) -> ORPOConfig:
    return ORPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_length=64,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_dropout=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        max_grad_norm=0,
        save_strategy="no",
        **{"beta": 0.3, "learning_rate": 0.0, "max_steps": 1} | other,
    )


def gradients_of_one_step(trainer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients before the first optimiser step, and what was logged."""
    found = {}

    def keep(*args, **kwargs):
        found.update({name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return found, next(row for row in trainer.state.log_history if "loss" in row)


class StockOnTheSameTokens(ORPOTrainer):
    """TRL's trainer fed with token rows of ours; `prompt_in_nll=False` masks the prompt out of its NLL."""

    prompt_in_nll = True

    def tokenize_row(self, feature, model=None):
        made = {"prompt_input_ids": feature["prompt_ids"], "prompt_attention_mask": [1] * len(feature["prompt_ids"])}
        for side in ("chosen", "rejected"):
            ids = feature["prompt_ids"] + feature[f"{side}_ids"]
            made |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids)}
            made[f"{side}_labels"] = [-100] * len(feature["prompt_ids"]) + feature[f"{side}_ids"]
        return made

    def concatenated_forward(self, model, batch):
        chosen_logps, rejected_logps, chosen_logits, rejected_logits, nll = super().concatenated_forward(model, batch)
        if not self.prompt_in_nll:
            nll = torch.nn.functional.cross_entropy(chosen_logits.flatten(0, 1), batch["chosen_labels"][:, 1:].flatten())
        return chosen_logps, rejected_logps, chosen_logits, rejected_logits, nll


@pytest.mark.parametrize("nll_on", ["completion", "sequence"])
def test_one_step_equals_stock_trl_on_the_same_token_rows(family, nll_on, tiny, tokenizer, tmp_path):
    rows = Dataset.from_list(pairs())
    stock = StockOnTheSameTokens(adapted(tiny, family), settings(tmp_path, len(rows), 1), train_dataset=rows, processing_class=tokenizer)
    stock.prompt_in_nll = nll_on == "sequence"
    expected, expected_log = gradients_of_one_step(stock)
    ours = SharedPromptORPOTrainer(
        adapted(tiny, family), settings(tmp_path, 6, 1), train_dataset=rows, processing_class=tokenizer, nll_on=nll_on
    )
    assert len(ours.train_dataset) == 6
    found, log = gradients_of_one_step(ours)

    assert found.keys() == expected.keys()
    assert found
    for name in found:
        assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    compared = {name for name in expected_log if not name.startswith("logits/")}
    assert {"loss", "nll_loss", "rewards/margins", "rewards/accuracies", "log_odds_ratio", "log_odds_chosen"} <= compared
    assert {name: log[name] for name in compared} == pytest.approx({name: expected_log[name] for name in compared}, abs=1e-5)


@pytest.mark.parametrize("nll_on", ["completion", "sequence"])
@pytest.mark.parametrize(("batch", "accumulation"), [(2, 3), (1, 6), (4, 2)])
def test_accumulation_gives_the_gradients_of_one_large_batch(nll_on, batch, accumulation, tiny, tokenizer, tmp_path):
    """(4, 2) ends with a batch of two prompts, which must not weigh as much as the batch of four."""
    results = []
    for sizes in [(6, 1), (batch, accumulation)]:
        trainer = SharedPromptORPOTrainer(
            adapted(tiny, "llama"),
            settings(tmp_path, *sizes),
            train_dataset=Dataset.from_list(pairs()),
            processing_class=tokenizer,
            nll_on=nll_on,
        )
        results.append(gradients_of_one_step(trainer))
    (expected, expected_log), (found, log) = results
    for name in expected:
        assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)
    varying = {"epoch", "learning_rate"}
    assert {k: v for k, v in log.items() if k not in varying} == pytest.approx(
        {k: v for k, v in expected_log.items() if k not in varying}, abs=1e-5
    )


def test_text_rows_are_tokenised_as_in_trl_but_for_the_end_of_text(tiny, tokenizer, tmp_path):
    rows = [{"prompt": "which: ", "chosen": "A", "rejected": "B"}, {"prompt": "which: ", "chosen": "C", "rejected": "B"}]
    data = Dataset.from_list(rows)
    stock = ORPOTrainer(adapted(tiny, "gpt2"), settings(tmp_path, 2, 1), train_dataset=data, processing_class=tokenizer)
    ours = SharedPromptORPOTrainer(adapted(tiny, "gpt2"), settings(tmp_path, 2, 1), train_dataset=data, processing_class=tokenizer)
    (group,) = ours.train_dataset
    for at in range(2):
        assert group["prompt_ids"] + [group["chosen"][at], tokenizer.eos_token_id] == stock.train_dataset[at]["chosen_input_ids"]
        assert group["prompt_ids"] + [group["rejected"][at], tokenizer.eos_token_id] == stock.train_dataset[at]["rejected_input_ids"]


def test_evaluation_gives_the_training_loss_of_the_same_rows(tiny, tokenizer, tmp_path):
    rows = Dataset.from_list(pairs())
    trainer = SharedPromptORPOTrainer(
        adapted(tiny, "llama"),
        settings(tmp_path, 6, 1, per_device_eval_batch_size=6),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    _, log = gradients_of_one_step(trainer)
    measured = trainer.evaluate()
    assert measured["eval_loss"] == pytest.approx(log["loss"], abs=1e-5)


def test_lora_dropout_stays_on(tiny, tokenizer, tmp_path):
    trainer = SharedPromptORPOTrainer(
        adapted(tiny, "llama", dropout=0.5), settings(tmp_path, 6, 1), train_dataset=Dataset.from_list(pairs()), processing_class=tokenizer
    )
    assert {module.p for name, module in trainer.model.named_modules() if "lora_dropout.default" in name} == {0.5}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_ids": [40] * 64, "chosen_ids": [21], "rejected_ids": [22]}, "row 1: 65 tokens, max_length is 64"),
        ({"prompt_ids": [40], "chosen_ids": [21, 22], "rejected_ids": [22]}, "row 1: the chosen completion is 2 tokens"),
        ({"prompt_ids": [40], "chosen_ids": [21], "rejected_ids": []}, "row 1: the rejected completion is 0 tokens"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(row, message, tiny, tokenizer, tmp_path):
    rows = Dataset.from_list([{"prompt_ids": [40, 41], "chosen_ids": [21], "rejected_ids": [22]}, row])
    with pytest.raises(UserError, match=message):
        SharedPromptORPOTrainer(adapted(tiny, "gpt2"), settings(tmp_path, 2, 1), train_dataset=rows, processing_class=tokenizer)


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(tiny, tokenizer, tmp_path):
    model = adapted(tiny, "llama")
    model.get_input_embeddings().weight.data[40] = float("nan")
    rows = Dataset.from_list([{"prompt_ids": [40, 41], "chosen_ids": [21], "rejected_ids": [22]}] * 2)
    trainer = SharedPromptORPOTrainer(model, settings(tmp_path, 2, 1), train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(UserError, match=r"step 1, rows \[0, 1\]"):
        trainer.train()


def test_no_pairs(tiny, tokenizer, tmp_path):
    with pytest.raises(UserError, match="no rows"):
        train_orpo(adapted(tiny, "gpt2"), tokenizer, [], Orpo(), tmp_path, encode=list, label_ids={})


# ------------------------------------------------------------------ the loss by itself


class BetaAndDevice:
    """What TRL's method reads from its trainer."""

    beta = 0.7
    accelerator = type("", (), {"device": "cpu"})()


@pytest.mark.parametrize("low", [-2.0, -30.0, -1e3])
def test_loss_equals_trls(low):
    chosen = torch.linspace(low, -1e-7, 101)
    rejected = chosen.flip(0) * 0.9
    expected, *_ = ORPOTrainer.odds_ratio_loss(BetaAndDevice(), chosen, rejected)
    losses, log_sigmoid, log_odds = orpo_loss(chosen, rejected, beta=0.7)
    assert_close(losses, -expected)
    assert_close(log_sigmoid, expected / 0.7)
    assert torch.isfinite(log_odds).all()


@pytest.mark.parametrize("logp", [0.0, -1e-12, -1e4, -3e38])
def test_loss_and_gradient_are_finite_everywhere(logp):
    for chosen, rejected in [(logp, -1.0), (-1.0, logp), (logp, logp)]:
        inputs = torch.tensor([chosen], requires_grad=True), torch.tensor([rejected], requires_grad=True)
        losses, _, _ = orpo_loss(*inputs, beta=1.0)
        gradients = torch.autograd.grad(losses.sum(), inputs)
        assert torch.isfinite(losses).all()
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_equal_probabilities_give_log_two():
    logps = torch.tensor([-0.1, -1.0, -20.0])
    assert_close(orpo_loss(logps, logps, beta=1.0)[0], torch.full((3,), math.log(2)))


def test_gradient_is_the_papers():
    """Equations 6-8 of the paper: -delta h, with delta the odds' share and h the gradients over 1 - p."""
    chosen = torch.tensor([-0.3, -2.0, -0.01, -9.0], requires_grad=True)
    rejected = torch.tensor([-1.0, -0.2, -5.0, -8.0], requires_grad=True)
    losses, _, _ = orpo_loss(chosen, rejected, beta=1.0)
    found = torch.autograd.grad(losses.sum(), (chosen, rejected))
    p, q = chosen.detach().double().exp(), rejected.detach().double().exp()
    delta = 1 / (1 + (p / (1 - p)) / (q / (1 - q)))
    assert_close(found[0].double(), -delta / (1 - p), rtol=1e-4, atol=1e-6)
    assert_close(found[1].double(), delta / (1 - q), rtol=1e-4, atol=1e-6)


def test_beta_zero_leaves_the_winners_nll(tiny, tokenizer, tmp_path):
    trainer = SharedPromptORPOTrainer(
        adapted(tiny, "llama"), settings(tmp_path, 6, 1, beta=0.0), train_dataset=Dataset.from_list(pairs()), processing_class=tokenizer
    )
    _, log = gradients_of_one_step(trainer)
    assert log["loss"] == pytest.approx(log["nll_loss"])
    assert log["rewards/margins"] == 0
    assert 0 < log["rewards/accuracies"] < 1
