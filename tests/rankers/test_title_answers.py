"""SFT and ORPO on answers of several tokens, with an adapter and with all weights: the losses of plain forward passes."""

from __future__ import annotations

import shutil

import pytest
import torch

from llmrec.config import Base, Lora, Orpo, Tuning
from llmrec.errors import UserError
from llmrec.rankers.backbone import build_untrained, load_base, load_tokenizer, load_trainable, load_tuned, save_tuned_model, with_lora
from llmrec.rankers.orpo import train_orpo
from llmrec.rankers.sft import train_sft

ANSWERS = {" heat": [50, 61, 62, 0], " toy story": [51, 70, 71, 72, 73, 0], " up": [52, 0]}
ONE_STEP = {"epochs": 1, "warmup": 0, "batch": 2, "accumulation": 2, "learning_rate": 1e-2, "schedule": "constant"}
ROWS = [
    {"prompt": "a b c", "completion": " heat", "chosen": " heat", "rejected": " up"},
    {"prompt": "a b c d e", "completion": " toy story", "chosen": " toy story", "rejected": " heat"},
    {"prompt": "b", "completion": " up", "chosen": " up", "rejected": " toy story"},
]


def encode(prompt: str) -> list[int]:
    return [40 + ord(character) % 80 for character in prompt]


def logps(model, prompt: str, answer: list[int]) -> torch.Tensor:
    """Of each token of the answer, by one plain forward pass of prompt and answer."""
    before = encode(prompt)
    out = model(torch.tensor([before + answer])).logits[0].log_softmax(-1)
    return torch.stack([out[len(before) - 1 + at, token] for at, token in enumerate(answer)])


def test_sft_is_the_mean_over_all_tokens_of_the_steps_answers(tiny, family, tmp_path):
    """Three rows in passes of two and one; the prompts' own tokens are not trained on."""
    model = with_lora(tiny(family), Lora(dropout=0.0), seed=0)
    expected = -torch.cat([logps(model, row["prompt"], ANSWERS[row["completion"]]) for row in ROWS]).mean().item()
    result = train_sft(model, ROWS, Tuning(**ONE_STEP), tmp_path, encode=encode, answers=ANSWERS)
    assert result.log[0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert result.steps == 1


def test_orpo_compares_mean_log_probabilities_of_titles(tiny, family, tokenizer, tmp_path):
    model, beta = with_lora(tiny(family), Lora(dropout=0.0), seed=0), 0.3
    terms, nll = [], []
    for row in ROWS:
        chosen, rejected = (logps(model, row["prompt"], ANSWERS[row[side]]) for side in ("chosen", "rejected"))
        odds = [p.mean() - torch.log1p(-p.mean().exp()) for p in (chosen, rejected)]
        terms.append(-beta * torch.nn.functional.logsigmoid(odds[0] - odds[1]))
        nll.append(-chosen)
    expected = (torch.stack(terms).mean() + torch.cat(nll).mean()).item()
    result = train_orpo(model, tokenizer, ROWS, Orpo(**ONE_STEP, beta=beta), tmp_path, encode=encode, answers=ANSWERS)
    assert result.log[0]["loss"] == pytest.approx(expected, abs=1e-4)


def test_an_empty_answer_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="row 1: the completion is 0 tokens"):
        train_sft(tiny("gpt2"), ROWS, Tuning(), tmp_path, encode=encode, answers={**ANSWERS, " toy story": []})


def test_all_weights_are_tuned_saved_and_tuned_further(saved_llama, tokenizer, tmp_path):
    base = Base(dtype="float32")
    model = load_trainable(saved_llama, base, Lora(r=0), seed=0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    train_sft(model, ROWS, Tuning(**ONE_STEP), tmp_path / "sft", encode=encode, answers=ANSWERS)
    assert all(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    save_tuned_model(model, tmp_path / "kept", base)
    again = load_tuned(saved_llama, base, tmp_path / "kept", to_train=True)
    assert all(torch.equal(weight, dict(model.named_parameters())[name]) for name, weight in again.named_parameters())
    assert all(weight.requires_grad for weight in again.parameters())
    assert not any(weight.requires_grad for weight in load_tuned(saved_llama, base, tmp_path / "kept").parameters())
    first = train_orpo(again, tokenizer, ROWS, Orpo(**ONE_STEP), tmp_path / "orpo", encode=encode, answers=ANSWERS)
    assert first.steps == 1


def test_whole_tuning_goes_on_from_a_checkpoint_to_the_same_weights(saved_llama, tmp_path):
    """Two steps at once, and two of which the second starts from the first's checkpoint."""
    how = {**ONE_STEP, "accumulation": 1, "save_steps": 1}

    def weights(folder, epochs: float = 1.0):
        model = load_trainable(saved_llama, Base(dtype="float32"), Lora(r=0), seed=0)
        train_sft(model, ROWS, Tuning(**{**how, "epochs": epochs}), folder, encode=encode, answers=ANSWERS)
        return dict(model.named_parameters())

    whole = weights(tmp_path / "whole")

    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "cut" / "checkpoint-1")
    resumed = weights(tmp_path / "cut")
    assert all(torch.equal(weight, whole[name]) for name, weight in resumed.items())


@pytest.mark.parametrize(
    ("base", "lora", "message"),
    [
        (Base(quantise="nf4"), Lora(r=0), "set it to none"),
        (Base(scratch=True), Lora(r=8), "set lora.r to 0"),
        (Base(dtype="float32"), Lora(r=-1), "lora.r is -1"),
    ],
)
def test_what_cannot_be_tuned_is_refused(base, lora, message, saved_llama):
    with pytest.raises(UserError, match=message):
        load_trainable(saved_llama, base, lora, seed=0)


def test_an_untrained_model_has_its_shape_its_seed_and_the_tokenizer(saved_llama, tmp_path):
    shape = {"model_type": "mamba2", "vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16}
    shape |= {"state_size": 4, "n_groups": 1, "chunk_size": 8, "tie_word_embeddings": True}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_untrained(shape, saved_llama, tmp_path / name, seed)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "base") == ["a", "b", "c"]
    a, b, c = (load_base(tmp_path / name, Base(dtype="float32")).get_input_embeddings().weight for name in "abc")
    assert a.shape == (128, 16)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert load_tokenizer(tmp_path / "a").get_vocab() == load_tokenizer(saved_llama).get_vocab()
    with pytest.raises(UserError, match="vocab_size of 8"):
        build_untrained({**shape, "vocab_size": 8}, saved_llama, tmp_path / "d", 0)
