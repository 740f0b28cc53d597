"""A step of the trainer against a step of TRL's own on the same token rows, and list-wise losses against loops."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from torch.testing import assert_close
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from llmrec.config import Lora, Orpo
from llmrec.errors import UserError
from llmrec.rankers.backbone import with_lora
from llmrec.rankers.orpo import SharedPromptORPOTrainer, train_orpo

LETTERS = [21, 22, 23, 24]
TITLES = [[21], [22, 30], [22, 31, 32], [23, 33, 34, 35], [24, 25]]


def pairs(kind: str = "letters", prompts: int = 6) -> list[dict[str, list[int]]]:
    """Prompts of different lengths with one to three pairs: one completion wins twice, and one loses here and wins there."""
    generator = np.random.default_rng(0)
    completions = [[letter] for letter in LETTERS] if kind == "letters" else TITLES
    rows = []
    for prompt, count in zip(range(prompts), [3, 1, 2, 1, 2, 3], strict=False):
        ids = generator.integers(40, 128, 6 + 3 * prompt).tolist()
        order = generator.permutation(len(completions)).tolist()
        for winner, loser in [(0, 1), (0, 2), (2, 3)][:count]:
            rows.append({"prompt_ids": ids, "chosen_ids": completions[order[winner]], "rejected_ids": completions[order[loser]]})
            if kind == "letters":  # pools of three and four
                rows[-1]["pool_ids"] = [LETTERS[at] for at in sorted(order[: 3 if count == 1 else 4])]
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
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        max_grad_norm=0,
        save_strategy="no",
        **{"disable_dropout": False, "bf16": False, "beta": 0.3, "learning_rate": 0.0, "max_steps": 1, "gradient_checkpointing": False}
        | other,
    )


def trainer_of(model, rows, tokenizer, config, **options) -> SharedPromptORPOTrainer:
    return SharedPromptORPOTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **options)


def gradients_of_one_step(trainer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients before the first optimiser step, and what was logged."""
    found = {}

    def keep(*args, **kwargs):
        found.update({name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return found, next(row for row in trainer.state.log_history if "loss" in row)


def assert_same_step(found, expected) -> None:
    """Gradients, loss and the metrics that both have logged; not how long it took."""
    (gradients, log), (expected_gradients, expected_log) = found, expected
    assert gradients
    assert gradients.keys() == expected_gradients.keys()
    for name in gradients:
        assert_close(gradients[name], expected_gradients[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    measured = {"seconds", "tokens_per_second", "peak_memory_mb", "epoch", "tokens"}
    compared = {name for name in expected_log if not name.startswith("logits/")} - measured
    assert {"loss", "nll_loss", "rewards/margins", "rewards/accuracies", "log_odds_ratio", "log_odds_chosen"} <= compared
    assert {name: log[name] for name in compared} == pytest.approx({name: expected_log[name] for name in compared}, abs=1e-5)


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
            labels = batch["chosen_labels"][:, 1:]
            nll = F.cross_entropy(chosen_logits[:, : labels.shape[1]].flatten(0, 1), labels.flatten())
        return chosen_logps, rejected_logps, chosen_logits, rejected_logits, nll


@pytest.mark.parametrize("kind", ["letters", "titles"])
@pytest.mark.parametrize("nll_on", ["completion", "sequence"])
def test_one_step_equals_stock_trl_on_the_same_token_rows(family, kind, nll_on, tiny, tokenizer, tmp_path):
    """Stock makes one forward pass of the whole global batch."""
    rows = pairs(kind)
    stock = StockOnTheSameTokens(
        adapted(tiny, family), settings(tmp_path, len(rows), 1), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    stock.prompt_in_nll = nll_on == "sequence"
    expected = gradients_of_one_step(stock)
    ours = trainer_of(adapted(tiny, family), rows, tokenizer, settings(tmp_path, 6, 1), nll_on=nll_on)
    assert len(ours.train_dataset) == 6
    assert_same_step(gradients_of_one_step(ours), expected)


@pytest.mark.parametrize("options", [{}, {"nll_on": "sequence"}, {"negatives": "all"}], ids=["completion", "sequence", "all"])
def test_accumulation_gives_the_gradients_of_one_large_batch(family, options, tiny, tokenizer, tmp_path):
    """(3, 2) ends with a batch of a single prompt, which must not weigh as much as the batch of three."""
    rows = pairs("letters" if options.get("negatives") else "titles", prompts=4)
    expected, *others = (
        gradients_of_one_step(trainer_of(adapted(tiny, family), rows, tokenizer, settings(tmp_path, *sizes), **options))
        for sizes in [(4, 1), (2, 2), (1, 4), (3, 2)]
    )
    for found in others:
        assert_same_step(found, expected)


def test_gradient_checkpointing_changes_nothing(family, tiny, tokenizer, tmp_path):
    steps = []
    for checkpointing in (False, True):
        config = settings(tmp_path, 3, 2, gradient_checkpointing=checkpointing)
        steps.append(gradients_of_one_step(trainer_of(adapted(tiny, family), pairs("titles"), tokenizer, config, nll_on="sequence")))
    assert_same_step(*steps)


def test_how_completions_are_computed_is_said_at_the_start(tiny, tokenizer, tmp_path, capsys):
    for kind, line in [("letters", "completions of one token: read"), ("titles", "completions packed: a prompt and its")]:
        trainer_of(adapted(tiny, "llama"), pairs(kind), tokenizer, settings(tmp_path, 2, 1))
        assert line in capsys.readouterr().err


# ------------------------------------------------------------------ list-wise


def by_hand(model, rows, term) -> torch.Tensor:
    """Mean of `term(log-probabilities, winner, losers of its pool)` over the different (prompt, winner).

    Of the pool all lose but the winner itself and what wins against it.
    """
    terms = []
    won = {(tuple(row["prompt_ids"]), row["chosen_ids"][0], row["rejected_ids"][0]) for row in rows}
    for prompt, winner, pool in {(tuple(row["prompt_ids"]), row["chosen_ids"][0], tuple(row["pool_ids"])): None for row in rows}:
        logps = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        terms.append(term(logps, winner, [token for token in pool if token != winner and (prompt, token, winner) not in won]))
    return torch.stack(terms).mean()


def orpo_by_hand(logps, winner, losers):
    def log_odds(token):
        return logps[token] - torch.log(1 - logps[token].exp())

    return -logps[winner] - 0.3 * torch.stack([F.logsigmoid(log_odds(winner) - log_odds(loser)) for loser in losers]).mean()


def softmax_by_hand(logps, winner, losers):
    return F.cross_entropy(logps[[winner, *losers]], torch.tensor(0))


def simpo_by_hand(logps, winner, losers):
    return torch.stack([-torch.log(torch.sigmoid(0.3 * (logps[winner] - logps[loser]) - 0.8)) for loser in losers]).mean()


@pytest.mark.parametrize(
    ("loss", "term"), [("orpo", orpo_by_hand), ("softmax", softmax_by_hand), ("simpo", simpo_by_hand)], ids=["orpo", "softmax", "simpo"]
)
def test_the_whole_pool_as_losers_equals_a_loop(family, loss, term, tiny, tokenizer, tmp_path):
    rows = pairs()
    model = adapted(tiny, family)
    expected = by_hand(model, rows, term)
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = dict(zip(named, torch.autograd.grad(expected, list(named.values())), strict=True))
    trainer = trainer_of(adapted(tiny, family), rows, tokenizer, settings(tmp_path, 6, 1), loss=loss, negatives="all", gamma=0.8)
    found, log = gradients_of_one_step(trainer)
    assert log["loss"] == pytest.approx(expected.item(), abs=1e-5)
    for name in gradients:
        assert_close(found[name], gradients[name], atol=1e-5, rtol=1e-4)


def test_a_token_budget_holds_where_every_completion_has_a_row(tiny, tokenizer, tmp_path):
    """GPT-2 with an attention that shares no rows; the group with one letter is split as well when it stands beside others."""
    rows = [{"prompt_ids": [40 + at] * (4 + at), "chosen_ids": [5] * (1 + at % 3), "rejected_ids": [6]} for at in range(8)]
    found = []
    for budget in (None, 40):
        model = adapted(tiny, "gpt2")
        trainer = trainer_of(model, rows, tokenizer, settings(tmp_path, 8, 1), max_tokens_per_batch=budget)
        trainer.strategy = "concatenated"
        trainer.train_dataset = trainer._grouped(rows)
        seen: list[torch.Size] = []
        model.register_forward_pre_hook(lambda module, _, inputs, seen=seen: seen.append(inputs["input_ids"].shape), with_kwargs=True)
        found.append((gradients_of_one_step(trainer), seen))
    assert_same_step(found[1][0], found[0][0])
    assert len(found[1][1]) > 3
    assert all(count * longest <= 40 for count, longest in found[1][1])


def test_simpo_of_pairs_counts_every_pair(tiny, tokenizer, tmp_path):
    rows = pairs("titles")
    model = adapted(tiny, "llama")
    terms = []
    for row in rows:
        means = []
        for side in ("chosen_ids", "rejected_ids"):
            logps = model(input_ids=torch.tensor([row["prompt_ids"] + row[side]])).logits[0].log_softmax(-1)
            means.append(sum(logps[len(row["prompt_ids"]) - 1 + at, token] for at, token in enumerate(row[side])) / len(row[side]))
        terms.append(-F.logsigmoid(0.3 * (means[0] - means[1]) - 0.5).item())
    trainer = trainer_of(model, rows, tokenizer, settings(tmp_path, 2, 3), loss="simpo")
    _, log = gradients_of_one_step(trainer)
    assert log["loss"] == pytest.approx(np.mean(terms), abs=1e-5)


def test_a_pool_of_two_is_a_pair(tiny, tokenizer, tmp_path):
    """Where every winner has its one loser, list-wise and pair-wise are the same."""
    rows = [row | {"pool_ids": row["chosen_ids"] + row["rejected_ids"]} for row in pairs()]
    rows = list({tuple(row["prompt_ids"]): row for row in rows}.values())
    found, expected = (
        gradients_of_one_step(trainer_of(adapted(tiny, "llama"), rows, tokenizer, settings(tmp_path, 6, 1), negatives=negatives))
        for negatives in ("all", 1)
    )
    assert_same_step(found, expected)


def test_label_ids_are_the_pool_of_all_rows(tiny, tokenizer, tmp_path):
    without = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in pairs()]
    trainer = trainer_of(adapted(tiny, "llama"), without, tokenizer, settings(tmp_path, 6, 1), negatives="all", label_ids=LETTERS)
    assert all(sorted(group["completions"]) == [[letter] for letter in LETTERS] for group in trainer.train_dataset)
    assert all(len(losers) == 3 for group in trainer.train_dataset for losers in group["losers"][:1])  # later ones have lost to the first


@pytest.mark.parametrize("loss", ["orpo", "softmax"])
def test_train_orpo_takes_the_pool_from_the_candidates_shown(loss, tiny, tokenizer, tmp_path):
    answers = {f"({letter})": [token] for letter, token in zip("ABCD", LETTERS, strict=True)}
    rows = [
        {"prompt": "first one: ", "chosen": "(A)", "rejected": "(C)", "pool_items": [7, 3, 9]},
        {"prompt": "and the second: ", "chosen": "(D)", "rejected": "(A)", "pool_items": [5, 7, 3, 1]},
    ]
    same = [
        {
            "prompt_ids": tokenizer(row["prompt"]).input_ids,
            "chosen_ids": answers[row["chosen"]],
            "rejected_ids": answers[row["rejected"]],
            "pool_ids": LETTERS[:size],
        }
        for row, size in zip(rows, (3, 4), strict=True)
    ]
    model = adapted(tiny, "llama")
    expected = by_hand(model, same, orpo_by_hand if loss == "orpo" else softmax_by_hand).item()
    orpo = Orpo(batch=2, accumulation=1, beta=0.3, loss=loss, negatives="all")
    result = train_orpo(model, tokenizer, rows, orpo, tmp_path, encode=lambda prompt: tokenizer(prompt).input_ids, answers=answers)
    assert result.log[0]["loss"] == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------ rows


def test_text_rows_are_tokenised_as_in_trl(tiny, tokenizer, tmp_path):
    rows = [{"prompt": "which: ", "chosen": "A", "rejected": "Bc"}, {"prompt": "which: ", "chosen": "Cde", "rejected": "A"}]
    data = Dataset.from_list(rows)
    stock = ORPOTrainer(adapted(tiny, "gpt2"), settings(tmp_path, 2, 1), train_dataset=data, processing_class=tokenizer)
    for end_of_text in (False, True):
        ours = trainer_of(adapted(tiny, "gpt2"), rows, tokenizer, settings(tmp_path, 2, 1), end_of_text=end_of_text)
        (group,) = ours.train_dataset
        for row in range(2):
            for side, number in (("chosen", group["winners"][row]), ("rejected", group["losers"][row][0])):
                ids = group["prompt_ids"] + group["completions"][number] + ([] if end_of_text else [tokenizer.eos_token_id])
                assert ids == stock.train_dataset[row][f"{side}_input_ids"]


def test_conversations_are_text_rows_by_the_chat_template(tiny, tokenizer, tmp_path):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}.{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )

    def said(role, content):
        return [{"role": role, "content": content}]

    conversations = [{"prompt": said("user", "which"), "chosen": said("assistant", "Ab"), "rejected": said("assistant", "B")}]
    texts = [{"prompt": "user: which.assistant: ", "chosen": "Ab.", "rejected": "B."}]
    (found,) = trainer_of(adapted(tiny, "llama"), conversations, chat, settings(tmp_path, 1, 1)).train_dataset
    (expected,) = trainer_of(adapted(tiny, "llama"), texts, tokenizer, settings(tmp_path, 1, 1)).train_dataset
    assert found == expected


def test_stock_trl_and_ours_agree_on_text_rows(tiny, tokenizer, tmp_path):
    rows = [
        {"prompt": "which: ", "chosen": "Abc", "rejected": "B"},
        {"prompt": "which: ", "chosen": "Abc", "rejected": "Cd"},
        {"prompt": "now: ", "chosen": "A", "rejected": "Abcd"},
    ]
    data = Dataset.from_list(rows)
    stock = ORPOTrainer(adapted(tiny, "llama"), settings(tmp_path, 3, 1), train_dataset=data, processing_class=tokenizer)
    ours = trainer_of(adapted(tiny, "llama"), rows, tokenizer, settings(tmp_path, 3, 1), nll_on="sequence", end_of_text=True)
    assert_same_step(gradients_of_one_step(ours), gradients_of_one_step(stock))


def test_mixed_precision_which_is_trls_default(tiny, tokenizer, tmp_path):
    """Base weights in bfloat16 and hidden states that autocast hands out in float32."""
    model, plain = adapted(tiny, "llama"), adapted(tiny, "llama")
    for name, weight in model.named_parameters():
        if "lora" not in name:
            weight.data = weight.data.bfloat16()
    options = {"nll_on": "sequence"}
    mixed = trainer_of(model, pairs("titles"), tokenizer, settings(tmp_path, 6, 1, bf16=None), **options)
    assert mixed.args.bf16
    _, log = gradients_of_one_step(mixed)
    _, expected = gradients_of_one_step(trainer_of(plain, pairs("titles"), tokenizer, settings(tmp_path, 6, 1), **options))
    assert log["loss"] == pytest.approx(expected["loss"], rel=0.02)


@pytest.mark.parametrize("options", [{}, {"nll_on": "sequence"}, {"loss": "softmax", "negatives": "all"}], ids=["answer", "all", "softmax"])
@pytest.mark.parametrize("batch", [1, 4, 6])
def test_evaluation_gives_the_training_loss_of_the_same_rows_in_any_batches(family, options, batch, tiny, tokenizer, tmp_path):
    rows = Dataset.from_list(pairs("letters" if "loss" in options else "titles"))
    config = settings(tmp_path, 6, 1, per_device_eval_batch_size=batch)
    trainer = trainer_of(adapted(tiny, family), rows, tokenizer, config, eval_dataset=rows, **options)
    _, log = gradients_of_one_step(trainer)
    measured = trainer.evaluate()
    compared = {"loss", "nll_loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"}
    assert {name: measured[f"eval_{name}"] for name in compared} == pytest.approx({name: log[name] for name in compared}, abs=1e-5)


def test_other_rows_are_evaluated_as_the_data_sets_of_the_constructor(tiny, tokenizer, tmp_path):
    rows = Dataset.from_list(pairs("titles"))
    trainer = trainer_of(adapted(tiny, "llama"), rows, tokenizer, settings(tmp_path, 6, 1), eval_dataset=DatasetDict(same=rows))
    expected = trainer.evaluate()["eval_same_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == expected
    assert trainer.predict(rows).metrics["test_loss"] == expected


def test_conversations_are_evaluated_as_texts_that_the_chat_template_makes(tiny, tokenizer, tmp_path):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    said = [{"prompt": "[3] [4]", "chosen": "[21]", "rejected": "[22] [23]"}, {"prompt": "[5]", "chosen": "[22]", "rejected": "[21]"}]
    spoken = [
        {side: [{"role": "user" if side == "prompt" else "assistant", "content": text}] for side, text in row.items()} for row in said
    ]
    trainer = trainer_of(adapted(tiny, "llama"), said, chat, settings(tmp_path, 6, 1), eval_dataset=Dataset.from_list(spoken))
    expected = trainer.evaluate()["eval_loss"]
    for rows in (said, spoken, Dataset.from_list(spoken)):
        assert trainer.evaluate(rows)["eval_loss"] == expected


def test_nothing_to_evaluate_on(tiny, tokenizer, tmp_path):
    trainer = trainer_of(adapted(tiny, "llama"), pairs(), tokenizer, settings(tmp_path, 6, 1))
    with pytest.raises(UserError, match="give the trainer an eval_dataset"):
        trainer.evaluate()


def test_metrics_of_logits_are_refused(tiny, tokenizer, tmp_path):
    with pytest.raises(UserError, match="compute_metrics"):
        trainer_of(adapted(tiny, "llama"), pairs(), tokenizer, settings(tmp_path, 6, 1), compute_metrics=lambda prediction: {})


def test_a_collator_is_refused(tiny, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"data_collator: .* leave it out"):
        trainer_of(adapted(tiny, "llama"), pairs(), tokenizer, settings(tmp_path, 6, 1), data_collator=list)


def test_a_model_that_checkpoints_by_itself_is_not_continued_from_states(tiny, tokenizer, tmp_path):
    model = adapted(tiny, "mamba2")
    model.get_base_model().gradient_checkpointing_enable()
    trainer = trainer_of(model, pairs("titles"), tokenizer, settings(tmp_path, 6, 1))
    assert trainer.strategy == "concatenated"


def test_a_batch_size_that_is_searched_is_refused(tiny, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"auto_find_batch_size: .* set max_tokens_per_batch"):
        trainer_of(adapted(tiny, "llama"), pairs(), tokenizer, settings(tmp_path, 6, 1, auto_find_batch_size=True))


@pytest.mark.parametrize("kind", ["letters", "titles"])
def test_prompts_without_pairs_weigh_nothing(family, kind, tiny, tokenizer, tmp_path):
    trainer = trainer_of(adapted(tiny, family), pairs(kind), tokenizer, settings(tmp_path, 6, 1), nll_on="sequence")
    groups = trainer.train_dataset
    empty = {"prompt_ids": [50], "completions": [], "winners": [], "losers": [], "rows": [], "length": 1}

    def loss_and_gradients(some):
        trainer.model.zero_grad()
        batch = trainer.collate(some)
        loss, _ = trainer.window_loss(trainer.model, batch, trainer.batch_sizes(batch))
        loss.backward()
        return loss.item(), {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.requires_grad}

    expected, gradients = loss_and_gradients(groups)
    found, same = loss_and_gradients([empty, *groups[:3], empty, *groups[3:]])
    assert found == pytest.approx(expected, abs=1e-5)
    for name in gradients:
        assert_close(same[name], gradients[name], atol=1e-5, rtol=1e-4)
    nothing, zeros = loss_and_gradients([empty, empty])
    assert nothing == 0
    assert not any(gradient.any() for gradient in zeros.values())


def lora_dropout(model) -> set[float]:
    return {module.p for name, module in model.named_modules() if "lora_dropout.default" in name}


@pytest.mark.parametrize("disable_dropout", [True, False])
def test_lora_dropout_stays_on(disable_dropout, tiny, tokenizer, tmp_path):
    """TRL's default turns all of it off."""
    config = settings(tmp_path, 6, 1, disable_dropout=disable_dropout)
    trainer = trainer_of(adapted(tiny, "llama", dropout=0.5), pairs(), tokenizer, config)
    assert lora_dropout(trainer.model) == {0.5}


def test_the_stage_keeps_all_dropout(tiny, tokenizer, tmp_path):
    model = adapted(tiny, "gpt2", dropout=0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p == 0:
            module.p = 0.25
    rows = [{"prompt": "which", "chosen": "A", "rejected": "B"}]
    train_orpo(model, tokenizer, rows, Orpo(), tmp_path, encode=lambda text: [40, 41], answers={"A": [21], "B": [22]})
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25, 0.5}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_ids": [40] * 62, "chosen_ids": [21], "rejected_ids": [22, 23, 24]}, "row 1: 65 tokens, max_length is 64"),
        ({"prompt_ids": [], "chosen_ids": [21], "rejected_ids": [22]}, "row 1: the prompt is empty"),
        ({"prompt_ids": [40], "chosen_ids": [21], "rejected_ids": []}, "row 1: the rejected completion is 0 tokens"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(row, message, tiny, tokenizer, tmp_path):
    rows = [{"prompt_ids": [40, 41], "chosen_ids": [21], "rejected_ids": [22]}, row]
    with pytest.raises(UserError, match=message):
        trainer_of(adapted(tiny, "gpt2"), rows, tokenizer, settings(tmp_path, 2, 1))


def test_settings_that_do_not_go_together_are_refused(tiny, tokenizer, tmp_path):
    with pytest.raises(UserError, match="choose all"):
        trainer_of(adapted(tiny, "gpt2"), pairs(), tokenizer, settings(tmp_path, 2, 1), loss="softmax")


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(tiny, tokenizer, tmp_path):
    model = adapted(tiny, "llama")
    model.get_input_embeddings().weight.data[40] = float("nan")
    rows = [{"prompt_ids": [40, 41], "chosen_ids": [21], "rejected_ids": [22]}] * 2
    with pytest.raises(UserError, match=r"step 1, rows \[0, 1\]"):
        trainer_of(model, rows, tokenizer, settings(tmp_path, 2, 1)).train()


def test_no_pairs(tiny, tokenizer, tmp_path):
    with pytest.raises(UserError, match="no rows"):
        train_orpo(adapted(tiny, "gpt2"), tokenizer, [], Orpo(), tmp_path, encode=list, answers={})


def test_beta_zero_leaves_the_winners_nll(tiny, tokenizer, tmp_path):
    _, log = gradients_of_one_step(trainer_of(adapted(tiny, "llama"), pairs(), tokenizer, settings(tmp_path, 6, 1, beta=0.0)))
    assert log["loss"] == pytest.approx(log["nll_loss"])
    assert log["rewards/margins"] == 0
    assert 0 < log["rewards/accuracies"] < 1
