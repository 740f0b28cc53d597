"""Training ends the same whether or not it is killed on the way, and follows settings and seed."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from llmrec.config import Base, Lora, Orpo, Tuning
from llmrec.errors import UserError
from llmrec.rankers.backbone import compile_layers, load_base, save_adapter, save_tuned_model, trainable, with_lora
from llmrec.rankers.orpo import train_orpo
from llmrec.rankers.sft import AnswerTrainer, collate, train_sft
from llmrec.rankers.sharded import put_together
from llmrec.rankers.training_log import Bar
from llmrec.rankers.tuning import arguments, last_complete_checkpoint, refuse_mixed_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "rankers.json"
LETTERS = {"A": 33, "B": 34, "C": 35}
ANSWERS = {letter: [token] for letter, token in LETTERS.items()}
TUNING = {"learning_rate": 1e-2, "warmup": 1, "epochs": 2, "batch": 2, "accumulation": 2, "save_steps": 2}


def encode(prompt: str) -> list[int]:
    return [40 + ord(character) % 80 for character in prompt]


def rows(count: int = 14) -> list[dict[str, str]]:
    """SFT rows and preference pairs in one, prompts of different lengths; two pairs share each prompt."""
    return [
        {
            "prompt": "which one of these " * (1 + at // 2 % 2) + str(at // 2),
            "completion": "ABC"[at % 3],
            "chosen": "ABC"[at % 3],
            "rejected": "ABC"[(at + 1 + at // 2 % 2) % 3],
        }
        for at in range(count)
    ]


def train(kind: str, base, tokenizer, folder: Path, dropout: float = 0.1, seed: int = 5, compiled: bool = False, **changes):
    model = with_lora(base, Lora(r=4, dropout=dropout), seed=seed)
    if compiled:
        compile_layers(model, training=True)
    if kind == "sft":
        tuning = Tuning(**TUNING | {"epochs": 3} | changes)  # four steps an epoch
        result = train_sft(model, rows(), tuning, folder, encode=encode, answers=ANSWERS, seed=seed)
    else:
        result = train_orpo(
            model, tokenizer, rows(28), Orpo(**TUNING | {"epochs": 3} | changes), folder, encode=encode, answers=ANSWERS, seed=seed
        )
    save_adapter(model, folder / "adapter", Base())
    return result, load_file(folder / "adapter" / "adapter_model.safetensors")


KILLED_RUN = """
import os, sys
from pathlib import Path

import torch

torch.set_num_threads(1)  # sums depend on it in their last bit
sys.path.insert(0, sys.argv[1])
import test_tuning
from llmrec.config import Base
from llmrec.rankers.backbone import load_base, load_tokenizer
from llmrec.rankers import tuning

class KillAfterStep(tuning.Bar):
    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control)
        if state.global_step == int(sys.argv[5]):
            os._exit(9)

tuning.Bar = KillAfterStep
test_tuning.train(sys.argv[2], load_base(sys.argv[3], Base(dtype="float32")), load_tokenizer(sys.argv[3]), Path(sys.argv[4]))
"""


@pytest.mark.parametrize(("kind", "killed_at"), [("sft", 7), ("orpo", 5)])
def test_a_killed_run_goes_on_to_the_same_adapter_and_log(kind, killed_at, saved_llama, tokenizer, tmp_path):
    """Killed inside the second epoch, between two checkpoints, the later of which is then cut off as well."""
    whole = tmp_path / "whole"
    expected_result, expected = train(kind, load_base(saved_llama, Base(dtype="float32")), tokenizer, whole)

    folder = tmp_path / "killed"
    arguments = [str(Path(__file__).parent), kind, str(saved_llama), str(folder), str(killed_at)]
    done = subprocess.run([sys.executable, "-c", KILLED_RUN, *arguments], capture_output=True, check=False)
    assert done.returncode == 9, done.stderr.decode()
    kept = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{step}" for step in range(2, killed_at, 2)][-2:]
    state = folder / kept[-1] / "trainer_state.json"
    state.write_text(state.read_text()[:100])

    result, found = train(kind, load_base(saved_llama, Base(dtype="float32")), tokenizer, folder)
    assert {name: torch.equal(weight, expected[name]) for name, weight in found.items()} == dict.fromkeys(expected, True)
    assert without_seconds(result.log) == without_seconds(expected_result.log)
    written = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert written == result.log
    assert [row["step"] for row in written] == list(range(1, result.steps + 1))


def test_a_checkpoint_at_the_end_of_an_epoch_resumes(saved_llama, tokenizer, tmp_path):
    """Four steps an epoch: step 4 is the last of the first."""
    _, expected = train("sft", load_base(saved_llama, Base(dtype="float32")), tokenizer, tmp_path / "whole", save_steps=4)
    folder = tmp_path / "cut"
    folder.mkdir()
    train("sft", load_base(saved_llama, Base(dtype="float32")), tokenizer, tmp_path / "source", save_steps=4)
    shutil.copytree(tmp_path / "source" / "checkpoint-8", folder / "checkpoint-8")
    _, found = train("sft", load_base(saved_llama, Base(dtype="float32")), tokenizer, folder, save_steps=4)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_layers_learn_the_same_and_resume(saved_llama, tokenizer, tmp_path):
    def trained(folder, compiled=True, dropout=0.1):
        base = load_base(saved_llama, Base(dtype="float32"))
        return train("orpo", base, tokenizer, tmp_path / folder, dropout=dropout, compiled=compiled, save_steps=4)

    (plain, _), (compiled, _) = trained("plain", False, 0.0), trained("compiled", True, 0.0)
    for mine, theirs in zip(without_seconds(compiled.log), without_seconds(plain.log), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)

    whole, expected = trained("whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "cut" / "checkpoint-8")
    resumed, found = trained("cut")
    assert without_seconds(resumed.log) == without_seconds(whole.log)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_cannot_be_compiled_is_said(saved_llama, tiny, monkeypatch):
    with pytest.raises(UserError, match="mamba2 have kernels of their own"):
        compile_layers(with_lora(tiny("mamba2"), Lora(r=4), seed=0), training=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="install g"):
        compile_layers(with_lora(tiny("llama"), Lora(r=4), seed=0), training=False)


def without_seconds(log):
    measured = {"seconds", "tokens_per_second", "peak_memory_mb"}
    return [{name: value for name, value in row.items() if name not in measured} for row in log]


def test_checkpoints_hold_the_adapter_but_not_the_base(saved_llama, tokenizer, tmp_path):
    train("orpo", load_base(saved_llama, Base(dtype="float32")), tokenizer, tmp_path)
    files = {path.name for path in tmp_path.glob("checkpoint-*/*")}
    assert "adapter_model.safetensors" in files
    assert not {"model.safetensors", "pytorch_model.bin"} & files
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_checkpoints_that_were_cut_off_are_passed_over(tmp_path):
    for step, state in [(9, '{"global_step": 9}'), (10, '{"global_st'), (20, None)]:
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-9"]
    assert last_complete_checkpoint(tmp_path / "nothing") is None


def test_log_and_result(saved_llama, tokenizer, tmp_path):
    result, _ = train("orpo", load_base(saved_llama, Base(dtype="float32")), tokenizer, tmp_path)
    assert result.steps == 12  # 14 prompts, four a step, three epochs
    assert {"loss", "learning_rate", "rewards/margins", "nll_loss", "log_odds_ratio", "seconds", "tokens", "step"} <= result.log[0].keys()
    epoch = sum(row["tokens"] for row in result.log[:4])
    assert epoch == sum(len(encode(row["prompt"])) for row in rows(28)[::2])
    assert result.tokens_per_second == pytest.approx(3 * epoch / result.seconds)
    assert result.peak_memory_mb == max(row["peak_memory_mb"] for row in result.log) > 0
    for row in result.log:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], rel=0.1, abs=100)
    assert result.kept_step == 12


def test_it_learns(saved_llama, tokenizer, tmp_path):
    for kind in ["sft", "orpo"]:
        base = load_base(saved_llama, Base(dtype="float32"))
        result, _ = train(kind, base, tokenizer, tmp_path / kind, dropout=0.0, epochs=8, learning_rate=3e-2)
        assert result.log[-1]["loss"] < 0.7 * result.log[0]["loss"]


def test_seeds_differ_and_repeat(saved_llama, tokenizer, tmp_path):
    runs = [
        train("sft", load_base(saved_llama, Base(dtype="float32")), tokenizer, tmp_path / str(at), seed=seed)[0]
        for at, seed in enumerate([5, 5, 6])
    ]
    losses = [[row["loss"] for row in run.log] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_gradient_checkpointing_changes_nothing(saved_llama, tokenizer, tmp_path):
    for kind in ["sft", "orpo"]:
        results = [
            train(kind, load_base(saved_llama, Base(dtype="float32")), tokenizer, tmp_path / f"{kind}{on}", gradient_checkpointing=on)[1]
            for on in (False, True)
        ]
        assert_close(results[0], results[1])


def test_sft_loss_is_the_mean_over_the_step(tiny, tmp_path):
    """Three rows as 3x1 and as 2x2, whose second batch has one row: the same gradients."""
    from transformers import TrainingArguments

    gradients = []
    for batch, accumulation in [(3, 1), (2, 2)]:
        model = with_lora(tiny("llama"), Lora(dropout=0.0), seed=0)
        tuning = Tuning(batch=batch, accumulation=accumulation, learning_rate=0.0, warmup=0, gradient_clip=0.0, weight_decay=0.0)
        data = [
            {"row": at, "prompt_ids": [40 + at] * (3 + at), "completion_ids": [33 + at], "length": 3 + at, "copies": 1} for at in range(3)
        ]
        trainer = AnswerTrainer(model, TrainingArguments(**arguments(tuning, tmp_path, 0)), train_dataset=data, data_collator=collate)
        found = {}
        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(
            lambda *_, model=model, found=found: found.update({n: w.grad.clone() for n, w in model.named_parameters() if w.requires_grad})
        )
        trainer.train()
        plain = with_lora(tiny("llama"), Lora(dropout=0.0), seed=0)
        losses = [-plain(torch.tensor([row["prompt_ids"]])).logits[0, -1].log_softmax(-1)[row["completion_ids"][0]] for row in data]
        torch.stack(losses).mean().backward()
        assert_close(found, {n: w.grad for n, w in plain.named_parameters() if w.requires_grad}, atol=1e-5, rtol=1e-4)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
        gradients.append(found)
    assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_unknown_completion_and_empty_prompt(saved_llama, tmp_path):
    model = with_lora(load_base(saved_llama, Base(dtype="float32")), Lora(), seed=0)
    with pytest.raises(UserError, match="row 1: the prompt is empty"):
        train_sft(
            model,
            [{"prompt": "x", "completion": "A"}, {"prompt": "", "completion": "A"}],
            Tuning(),
            tmp_path,
            encode=encode,
            answers=ANSWERS,
        )
    with pytest.raises(UserError, match="no rows"):
        train_sft(model, [], Tuning(), tmp_path, encode=encode, answers=ANSWERS)


# ------------------------------------------------------------------ the budget of a forward pass


@pytest.mark.parametrize("kind", ["sft", "orpo"])
def test_a_token_budget_bounds_the_passes_and_changes_no_number(kind, saved_llama, tokenizer, tmp_path):
    results, sizes = [], []
    for budget in (None, 64):
        base = load_base(saved_llama, Base(dtype="float32"))
        seen: list[torch.Size] = []
        base.register_forward_pre_hook(lambda module, _, inputs, seen=seen: seen.append(inputs["input_ids"].shape), with_kwargs=True)
        results.append(train(kind, base, tokenizer, tmp_path / str(budget), dropout=0.0, epochs=1, max_tokens_per_batch=budget))
        sizes.append(seen)
    (expected, weights), (found, same_weights) = results
    assert_close(same_weights, weights, atol=1e-4, rtol=1e-4)
    for row, other in zip(without_seconds(found.log), without_seconds(expected.log), strict=True):
        assert row == pytest.approx(other, abs=1e-4)
    assert max(rows for rows, _ in sizes[0]) == TUNING["batch"]
    assert all(rows * longest <= 64 or rows == 1 for rows, longest in sizes[1])
    assert max(rows for rows, _ in sizes[1]) > 1
    assert len(sizes[1]) > len(sizes[0])


def test_a_budget_may_take_more_rows_than_the_batch(saved_llama, tokenizer, tmp_path):
    base = load_base(saved_llama, Base(dtype="float32"))
    seen: list[int] = []
    base.register_forward_pre_hook(lambda module, _, inputs: seen.append(len(inputs["input_ids"])), with_kwargs=True)
    train("sft", base, tokenizer, tmp_path, epochs=1, max_tokens_per_batch=1000)
    assert seen == [4, 4, 4, 2]


def test_a_killed_run_with_a_budget_goes_on_to_the_same_adapter(saved_llama, tokenizer, tmp_path):
    """Dropout draws for every pass, so that the passes have to be the same ones, too."""
    _, expected = train("orpo", load_base(saved_llama, Base(dtype="float32")), tokenizer, tmp_path / "whole", max_tokens_per_batch=50)
    folder = tmp_path / "cut"
    folder.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-10", folder / "checkpoint-10")
    _, found = train("orpo", load_base(saved_llama, Base(dtype="float32")), tokenizer, folder, max_tokens_per_batch=50)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({name: 0}, f"{name} is 0: it must be at least 1") for name in
     ("batch", "accumulation", "save_steps", "max_tokens_per_batch", "eval_steps", "eval_users", "patience")]
    + [
        ({"epochs": 0}, "epochs is 0: it must be more than 0"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"warmup": -1}, "warmup is -1 steps"),
        ({"patience": 4}, "eval_steps is null, which never validates"),
        ({"report_to": "carrier pigeon"}, "report_to is carrier pigeon, which is not installed"),
    ],
)  # fmt: skip
def test_settings_that_make_no_training_are_refused(changes, message, saved_llama, tokenizer, tmp_path):
    with pytest.raises(UserError, match=message):
        train("sft", load_base(saved_llama, Base(dtype="float32")), tokenizer, tmp_path, **changes)


@pytest.mark.parametrize("kind", ["sft", "orpo"])
def test_the_log_grows_with_the_training(kind, saved_llama, tokenizer, tmp_path, monkeypatch):
    """What is there when it stops, and once more after it was taken up: one row per step, in order."""

    def crash(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr(Bar, "on_step_end", crash)
        with pytest.raises(KeyboardInterrupt):
            train(kind, load_base(saved_llama, Base(dtype="float32")), tokenizer, tmp_path)

    def logged():
        return [json.loads(line) for line in (tmp_path / "train_log.jsonl").open()]

    assert [row["step"] for row in logged()] == [1, 2, 3, 4]
    result, _ = train(kind, load_base(saved_llama, Base(dtype="float32")), tokenizer, tmp_path)
    assert logged() == result.log
    assert [row["step"] for row in logged()] == list(range(1, result.steps + 1))


def test_weights_of_two_kinds_are_refused_under_zero3(tiny):
    model = with_lora(tiny("llama"), Lora(r=4), seed=0)
    refuse_mixed_weights(model)
    model.base_model.model.lm_head.bfloat16()
    with pytest.raises(UserError, match="these are bfloat16 and float32: use fsdp2"):
        refuse_mixed_weights(model)


def test_one_set_of_arguments_serves_two_trainers(tiny, tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(**arguments(Tuning(batch=2, accumulation=3), tmp_path, 0))
    data = [{"row": at, "prompt_ids": [40 + at] * 3, "completion_ids": [33], "length": 3} for at in range(3)]
    for _ in range(2):
        trainer = AnswerTrainer(with_lora(tiny("llama"), Lora(), seed=0), args, train_dataset=data, data_collator=collate)
        assert trainer.prompts_per_step == 6


# ------------------------------------------------------------------ recorded losses


@pytest.mark.parametrize("kind", ["sft", "orpo"])
def test_losses_of_five_steps_are_the_recorded_ones(kind, saved_llama, tokenizer, tmp_path):
    """Made on the versions that the file names; a difference is a change of method, of data order or of a library."""
    recorded = json.loads(GOLDEN.read_text())
    result, _ = train(kind, load_base(saved_llama, Base(dtype="float32")), tokenizer, tmp_path, dropout=0.0)
    assert [row["loss"] for row in result.log[:5]] == pytest.approx(recorded[kind], abs=1e-4)


def test_a_tied_head_stays_the_embedding_when_split_weights_are_put_together(tiny, tmp_path):
    """All weights of a model whose head has no name of its own; what is saved is what was trained, head included."""
    model = trainable(copy.deepcopy(tiny("gpt2")), Lora(r=0), seed=0)
    assert model.config.tie_word_embeddings
    trained = {name: weight.detach() + 0.5 for name, weight in model.named_parameters()}
    put_together(model, trained)
    save_tuned_model(model, tmp_path, Base())
    again = load_base(tmp_path, Base(dtype="float32"))
    assert_close(again.get_input_embeddings().weight, trained["transformer.wte.weight"])
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert_close(dict(again.named_parameters()), trained)
