"""Titles scored together against each of them alone after its prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MambaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from llmrec.errors import UserError
from llmrec.rankers.letters import NotFinite
from llmrec.rankers.titles import KEPT, title_logprobs
from llmrec.ssm import accelerate

PROMPTS = [[60, 61], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [70], [80, 81, 82, 83, 84]]
CANDIDATES = [[[5, 6, 7, 8], [5, 9], [10]], [[11, 12], [11, 12], [90, 91, 92, 93, 94, 95]], [], [[13, 14, 15]]]


def one_by_one(model) -> list[list[float]]:
    """Every candidate after its prompt, alone in a batch."""
    found = []
    for prompt, of_prompt in zip(PROMPTS, CANDIDATES, strict=True):
        of_row = []
        for candidate in of_prompt:
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([prompt + candidate])).logits[0].log_softmax(-1)
            of_row.append(np.mean([float(logps[len(prompt) - 1 + at, token]) for at, token in enumerate(candidate)]))
        found.append(of_row)
    return found


def assert_same(found: list[np.ndarray], expected: list[list[float]]) -> None:
    assert [len(of_prompt) for of_prompt in found] == [len(of_prompt) for of_prompt in expected]
    for of_prompt, wanted in zip(found, expected, strict=True):
        assert of_prompt.dtype == np.float32
        np.testing.assert_allclose(of_prompt, wanted, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_equals_one_by_one(family, tiny, batch):
    model = tiny(family)
    assert_same(title_logprobs(model, PROMPTS, CANDIDATES, batch=batch, pad_id=127), one_by_one(model))


def test_accelerated(tiny):
    model = tiny("mamba2")
    expected = one_by_one(model)
    with accelerate(model):
        assert_same(title_logprobs(model, PROMPTS, CANDIDATES), expected)


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_a_family_whose_candidates_share_nothing(batch):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    model.get_output_embeddings().weight.data.normal_(std=0.3)
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    found = title_logprobs(model, PROMPTS, CANDIDATES, batch=batch)
    assert max(rows) == min(batch, 7)
    assert_same(found, one_by_one(model))


@pytest.mark.usefixtures("exact_widths")
@pytest.mark.parametrize(("kind", "tokens"), [("gpt2", 19), ("llama", 19), ("mamba2", 11)])
def test_the_candidates_of_a_prompt_share_its_forward_pass(kind, tokens, tiny):
    """11 tokens of a prompt, and 8 of its candidates that predict others, in one row or after it."""
    model, read = tiny(kind), []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: read.append(tuple(inputs[0].shape)))
    title_logprobs(model, PROMPTS[1:2], [[[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]]])
    assert read[0] == (1, tokens)
    assert read[1:] == ([(3, 3)] if kind == "mamba2" else [])


def test_no_more_logits_exist_at_a_time_than_a_bound_however_large_the_batch(tiny):
    """Prompts with 20 candidates of 5 tokens, which share a row, have 81 logits each: 12 prompts are a pass."""
    model, shapes = tiny("llama"), []
    draw = np.random.default_rng(0)
    rows = draw.integers(1, 128, (30, 3)).tolist()
    candidates = draw.integers(1, 128, (30, 20, 5)).tolist()
    hook = model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
    found = title_logprobs(model, rows, candidates, batch=100)
    assert shapes == [(12, 81), (12, 81), (6, 81)]
    assert KEPT < 13 * 81
    hook.remove()
    np.testing.assert_allclose(found, title_logprobs(model, rows, candidates, batch=1), atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "candidates", "message"),
    [
        ([[1], []], [[[2]], [[3]]], "prompt 1 is empty"),
        ([[1], [2]], [[[2]], [[3], []]], "candidate 1 of prompt 1 has no tokens"),
    ],
)
def test_what_cannot_be_scored(rows, candidates, message, tiny):
    with pytest.raises(UserError, match=message):
        title_logprobs(tiny("llama"), rows, candidates)


def test_nothing_to_score(tiny):
    assert title_logprobs(tiny("llama"), [], []) == []
    assert [len(scores) for scores in title_logprobs(tiny("llama"), [[1], [2]], [[], []])] == [0, 0]


def test_a_number_that_is_not_finite_names_its_prompt(tiny):
    model = tiny("llama")
    model.get_input_embeddings().weight.data[82] = float("nan")
    with pytest.raises(NotFinite, match="prompt 3 "):
        title_logprobs(model, PROMPTS, CANDIDATES)
