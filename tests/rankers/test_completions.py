"""Completions that share their prompt's forward pass against each of them in a row of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from llmrec.config import Lora
from llmrec.rankers.backbone import with_lora
from llmrec.rankers.completions import block_mask, choose, completion_logps, lay_out, prompt_nll, row_size, scaled_logits

PROMPTS = [[40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [60, 61], [70], [80, 81, 82, 83, 84]]
"""Longer and shorter than Mamba-2's convolution and chunks; one of a single token."""
LETTERS = [[[5], [6], [7]], [[5]], [], [[8], [5]]]
TITLES = [[[5, 6, 7, 8], [5, 9], [10]], [[11, 12]], [], [[13, 14, 15], [16, 17, 18, 19]]]
SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CASES = [
    ("gpt2", "sdpa", "packed"),
    ("gpt2", "eager", "packed"),
    ("llama", "sdpa", "packed"),
    ("llama", "eager", "packed"),
    ("mistral", "sdpa", "packed"),
    ("qwen2", "sdpa", "packed"),
    ("qwen3", "sdpa", "packed"),
    ("mamba2", "eager", "continued"),
    ("mamba", "eager", "concatenated"),
]


def small(tiny, kind: str):
    """The families of the other tests, and more that are packed or not."""
    configs = {
        "mistral": MistralConfig(**SMALL, sliding_window=None),
        "qwen2": Qwen2Config(**SMALL),
        "qwen3": Qwen3Config(**SMALL, head_dim=8),
        "mamba": MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4),
    }
    if kind not in configs:
        return tiny(kind)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(configs[kind]).eval()


def adapted(tiny, kind: str, attention: str = "eager"):
    model = small(tiny, kind)
    model.set_attn_implementation(attention)
    targets = {"mamba": ["in_proj"]}.get(kind)
    model = with_lora(model.requires_grad_(False), Lora(r=4, dropout=0.0, targets=targets), seed=3)
    torch.manual_seed(4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.05)
    return model


def one_by_one(model, completions) -> tuple[Tensor, Tensor]:
    """Every completion after its prompt, alone in a batch; and the NLL of the prompts' own tokens."""
    found, nlls = [], []
    for prompt, of_prompt in zip(PROMPTS, completions, strict=True):
        alone = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        nlls.append(-sum((alone[at, token] for at, token in enumerate(prompt[1:])), torch.zeros(())))
        for completion in of_prompt:
            logps = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            found.append(sum(logps[len(prompt) - 1 + at, token] for at, token in enumerate(completion)))
    return torch.stack(found), torch.stack(nlls)


def gradients(model, values: Tensor) -> list[Tensor]:
    """Of a sum in which no two values weigh the same."""
    weights = torch.linspace(-1, 2, len(values))
    return list(torch.autograd.grad(values @ weights, [weight for weight in model.parameters() if weight.requires_grad], retain_graph=True))


@pytest.mark.parametrize(("kind", "attention", "strategy"), CASES)
@pytest.mark.parametrize("completions", [LETTERS, TITLES], ids=["letters", "titles"])
def test_values_and_gradients_equal_one_row_per_completion(kind, attention, strategy, completions, tiny):
    model = adapted(tiny, kind, attention)
    assert choose(model, gradient_checkpointing=False)[0] == strategy
    oracle = one_by_one(model, completions)
    expected = [gradients(model, values) for values in oracle]
    for way in dict.fromkeys([strategy, "concatenated"]):
        batch = lay_out(way, PROMPTS, completions, pad_id=0)
        logps, hidden = completion_logps(model, model.config, batch, hidden_states=True)
        nll = prompt_nll(hidden, model.get_output_embeddings(), batch)
        assert_close(logps, oracle[0], atol=1e-5, rtol=1e-5)
        assert_close(nll, oracle[1], atol=1e-4, rtol=1e-5)
        for values, wanted in zip((logps, nll), expected, strict=True):
            for mine, theirs in zip(gradients(model, values), wanted, strict=True):
                assert_close(mine, theirs, atol=3e-5, rtol=1e-4)  # float32 sums, in an order that depends on the processor


def test_a_head_that_learns_gets_its_own_gradients(tiny):
    model = adapted(tiny, "llama")
    model.get_output_embeddings().weight.requires_grad_()
    batch = lay_out("packed", PROMPTS, LETTERS, pad_id=0)
    _, hidden = completion_logps(model, model.config, batch, hidden_states=True)
    nll = prompt_nll(hidden, model.get_output_embeddings(), batch)
    for mine, theirs in zip(gradients(model, nll), gradients(model, one_by_one(model, LETTERS)[1]), strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "strategy"), [("llama", "packed"), ("mamba2", "continued"), ("llama", "concatenated")])
def test_completions_do_not_know_of_each_other(kind, strategy, tiny):
    """A completion's log-probability is the same whatever stands beside it, in its row or in the batch."""
    model = adapted(tiny, kind)
    with torch.no_grad():
        together, _ = completion_logps(model, model.config, lay_out(strategy, PROMPTS[:1], [TITLES[0]], 0))
        other, _ = completion_logps(
            model, model.config, lay_out(strategy, PROMPTS[:2], [[[90, 91, 92, 93, 94], TITLES[0][1]], [[9, 9]]], 0)
        )
    assert other[1].item() == pytest.approx(together[1].item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mamba2"])
def test_prompts_without_any_completion_give_nothing_with_a_graph(kind, tiny):
    model = adapted(tiny, kind)
    batch = lay_out(choose(model, False)[0], PROMPTS, [[]] * len(PROMPTS), pad_id=0)
    found, _ = completion_logps(model, model.config, batch)
    assert found.shape == (0,)
    found.sum().backward()
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in model.parameters() if weight.requires_grad)


def test_block_mask_by_hand(tiny):
    """A prompt of two tokens, a completion with two tokens of its own, one with one, and padding."""
    mask = block_mask(torch.tensor([[0, 0, 1, 1, 2, 0]]), tiny("llama").config)
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
    ]
    assert mask[0, 0, :5].int().tolist() == expected


@pytest.mark.usefixtures("exact_widths")
def test_positions_go_on_from_the_prompt_in_every_completion():
    batch = lay_out("packed", [[40, 41, 42]], [[[1, 2, 3], [4, 5], [6]]], pad_id=0)
    assert batch["input_ids"].tolist() == [[40, 41, 42, 1, 2, 4]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 1, 2]]


@pytest.mark.usefixtures("exact_widths")
@pytest.mark.parametrize("completions", [LETTERS, TITLES], ids=["letters", "titles"])
@pytest.mark.parametrize("strategy", ["packed", "continued", "concatenated"])
def test_row_sizes_are_those_of_the_rows(strategy, completions):
    for prompt, of_prompt in zip(PROMPTS, completions, strict=True):
        batch = lay_out(strategy, [prompt], [of_prompt], pad_id=127)
        sizes = [len(completion) for completion in of_prompt]
        length, copies = row_size(strategy, len(prompt), sizes, single=all(size == 1 for size in sizes))
        if strategy == "continued" and "continuations" in batch:  # its two passes, without padding
            assert (length, copies) == (sum(int((batch[name] != 127).sum()) for name in ("input_ids", "continuations")), 1)
        else:
            assert (copies, length) == batch["input_ids"].shape


def test_models_that_change_their_logits_after_the_head():
    assert scaled_logits(Gemma2Config(final_logit_softcapping=30.0)) == "final_logit_softcapping"
    assert scaled_logits(CohereConfig()) == "logit_scale"
    assert scaled_logits(LlamaConfig()) == scaled_logits(GPT2Config()) == scaled_logits(Mamba2Config()) == ""


def test_only_positions_that_predict_a_completion_go_through_the_output_layer(tiny):
    model = adapted(tiny, "llama")
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    completion_logps(model, model.config, lay_out("packed", PROMPTS, TITLES, pad_id=0))
    completion_logps(model, model.config, lay_out("packed", PROMPTS, LETTERS, pad_id=0))
    assert seen == [(4, 1 + 2 + 3, 32), (4, 1, 32)]  # the last of the prompt and the completions' own, of the largest row


@pytest.mark.parametrize(
    ("config", "attention", "checkpointing", "strategy", "why"),
    [
        (LlamaConfig(**SMALL), "sdpa", True, "packed", "one row"),
        (LlamaConfig(**SMALL), "flex_attention", False, "concatenated", "flex_attention takes no block mask"),
        (MistralConfig(**SMALL, sliding_window=8), "sdpa", False, "concatenated", "sliding window"),
        (Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1), "sdpa", False, "concatenated", "sliding"),
        (GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}), "sdpa", False, "concatenated", "gpt_neox"),
        (Mamba2Config(vocab_size=64, hidden_size=32, num_heads=4, head_dim=16, num_hidden_layers=1), "sdpa", True, "concatenated", "drops"),
        (
            Mamba2Config(vocab_size=64, hidden_size=32, num_heads=4, head_dim=16, num_hidden_layers=1, use_bias=True),
            "sdpa",
            False,
            "concatenated",
            "bias",
        ),
    ],
)
def test_what_is_chosen_and_why(config, attention, checkpointing, strategy, why):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.config._attn_implementation = attention
    chosen, reason = choose(model, checkpointing)
    assert chosen == strategy
    assert why in reason


@pytest.mark.parametrize(("model", "strategy"), [("mamba2", "concatenated"), ("llama", "packed")])
def test_split_weights_are_gathered_equally_often_everywhere(model, strategy, tiny):
    """A second pass, which not every batch has, would wait for another process's weights for ever."""
    assert choose(tiny(model), False, split=True)[0] == strategy
