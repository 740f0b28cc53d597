"""NDCG@10 while tuning: its value, the adapter that is kept, when the training stops, and a run that is taken up again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmrec.config import Base, Lora, Tuning
from llmrec.rankers.backbone import load_base, save_adapter, with_lora
from llmrec.rankers.sft import train_sft
from llmrec.rankers.validation import METRIC, ValidationPrompts, validated

LETTERS = {"A": 33, "B": 34, "C": 35, "D": 36}
ANSWERS = {letter: [token] for letter, token in LETTERS.items()}


def encode(prompt):
    return [40 + ord(character) % 80 for character in prompt]


def questions(count=9, right=lambda at: at % 4):
    """Prompts with four candidates each, a third of them with three; candidates have numbers of their own."""
    items = np.array([[at + 10, at + 20, at + 30, 0 if at % 3 == 2 and right(at) < 3 else at + 40] for at in range(count)])
    targets = np.array([items[at, right(at)] for at in range(count)])
    rows = [encode("which one of these " + "so " * (at % 4) + str(at)) for at in range(count)]
    return ValidationPrompts(rows, items, targets, list(LETTERS.values()), batch=2)


def test_the_value_is_that_of_a_loop_over_the_prompts(tiny):
    model, asked, gains = tiny("llama"), questions(), []
    for row, items, target in zip(asked.rows, asked.items, asked.targets, strict=True):
        logits = model(torch.tensor([row])).logits[0, -1]
        scores = {item: logits[label].item() for item, label in zip(items, asked.labels, strict=True) if item}
        rank = sum(score >= scores[target] for score in scores.values())
        gains.append(1 / np.log2(rank + 1))
    assert asked.ndcg(model) == pytest.approx(np.mean(gains))
    assert 0.4 < asked.ndcg(model) < 1


def tune(saved_llama, folder, prompts, learning_rate=1e-2, answers="ABCD", **settings):
    """SFT of 12 steps on nine prompts whose answers `questions` asks for; the right letter follows from the prompt."""
    rows = [{"prompt": "which one of these " + "so " * (at % 4) + str(at), "completion": answers[at % 4]} for at in range(12)]
    model = with_lora(load_base(saved_llama, Base(dtype="float32")), Lora(r=4, dropout=0.1), seed=5)
    how = {"warmup": 0, "schedule": "constant", "epochs": 4, "batch": 2, "accumulation": 2, "save_steps": 2} | settings
    tuning = Tuning(learning_rate=learning_rate, **how)
    result = train_sft(model, rows, tuning, folder, encode=encode, answers=ANSWERS, seed=1, prompts=prompts)
    save_adapter(model, folder / "adapter", Base())
    return result, load_file(folder / "adapter" / "adapter_model.safetensors"), model


def test_values_stand_in_the_log_and_the_best_adapter_is_kept(saved_llama, tmp_path):
    asked = questions()
    result, _, model = tune(saved_llama, tmp_path, asked, eval_steps=3, learning_rate=5e-2)
    written = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert written == result.log
    values = {row["step"]: row[METRIC] for row in written if METRIC in row}
    assert list(values) == [3, 6, 9, 12]
    assert validated(written) == list(values.items())
    assert result.kept_step == max(values, key=lambda step: (values[step], -step))
    assert asked.ndcg(model) == pytest.approx(values[result.kept_step])
    assert values[result.kept_step] > asked.ndcg(with_lora(load_base(saved_llama, Base(dtype="float32")), Lora(), seed=0))


def test_validation_changes_nothing_of_the_training(saved_llama, tmp_path):
    with_values, _, _ = tune(saved_llama, tmp_path / "with", questions(), eval_steps=1)
    without, _, _ = tune(saved_llama, tmp_path / "without", None)
    assert [row["loss"] for row in with_values.log] == [row["loss"] for row in without.log]
    assert all(row["seconds"] > 0.003 for row in with_values.log)  # of a validated step only the validation is left out


def test_the_last_step_is_validated_too(saved_llama, tmp_path):
    result, _, _ = tune(saved_llama, tmp_path, questions(), eval_steps=7)
    assert [row["step"] for row in result.log if METRIC in row] == [7, 12]


def test_training_the_wrong_answers_stops_and_goes_back(saved_llama, tmp_path):
    """The questions' answers are what the model says at step 1; from there on it is led away."""
    begin = with_lora(load_base(saved_llama, Base(dtype="float32")), Lora(r=4), seed=5)
    said = [int(begin(torch.tensor([row])).logits[0, -1, list(LETTERS.values())].argmax()) for row in questions().rows]
    asked = questions(right=lambda at: said[at])
    away = "".join("ABCD"[(said[at] + 1) % 4] for at in range(4))
    result, _, model = tune(saved_llama, tmp_path, asked, answers=away, eval_steps=1, patience=3, learning_rate=3e-2)
    values = [row[METRIC] for row in result.log]
    assert result.steps < 12
    assert len(values) == result.steps == result.kept_step + 3
    assert max(values) == values[result.kept_step - 1] == pytest.approx(asked.ndcg(model))
    assert max(values[result.kept_step :]) <= values[result.kept_step - 1]


@pytest.mark.parametrize("patience", [None, 2])
def test_a_run_taken_up_again_decides_as_if_it_had_never_stopped(patience, saved_llama, tmp_path):
    """From the checkpoint before the last, with best adapters of then and of later in the folder."""
    settings = {"eval_steps": 1, "patience": patience, "learning_rate": 5e-2}
    expected, weights, _ = tune(saved_llama, tmp_path / "whole", questions(), **settings)
    folder = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", folder, ignore=shutil.ignore_patterns("adapter", "train_log.jsonl"))
    *_, last = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    found, same, _ = tune(saved_llama, folder, questions(), **settings)
    assert (found.steps, found.kept_step) == (expected.steps, expected.kept_step)
    assert [(row["loss"], row[METRIC]) for row in found.log] == [(row["loss"], row[METRIC]) for row in expected.log]
    assert all(torch.equal(same[name], weights[name]) for name in weights)
