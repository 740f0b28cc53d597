"""Beam search over a batch of prompts against transformers' own, prompt by prompt."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTNeoXConfig, Mamba2Config, MambaConfig, MistralConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from llmrec.config import Lora
from llmrec.errors import UserError
from llmrec.rankers.backbone import with_lora
from llmrec.rankers.queries import Beams, Query, beam_queries, in_order
from llmrec.ssm import accelerate

PROMPTS = [
    [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50],
    [60, 61],
    [70],
    [80, 81, 82, 83, 84],
    [90, 17, 33, 91, 12, 55, 19, 101, 7, 66, 23, 4, 88, 31, 59, 64, 77],
    [21, 22, 23],
]
"""Longer and shorter than Mamba-2's convolution and chunks; one of a single token."""


def by_transformers(model, prompts, queries: int, new_tokens: int, end_ids) -> list[list[tuple[list[int], float]]]:
    """`generate` for each prompt alone: no padding, no batch."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=queries,
            num_return_sequences=queries,
            max_new_tokens=new_tokens,
            do_sample=False,
            early_stopping=False,
            length_penalty=0.0,
            eos_token_id=list(end_ids),
            pad_token_id=127,
            bos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
        )
        written = out.beam_indices.ge(0).sum(1)  # each sequence's own length; what follows is padding
        of_prompt = []
        for row, length, score in zip(out.sequences, written, out.sequences_scores, strict=True):
            tokens = row[len(prompt) : len(prompt) + int(length)].tolist()
            of_prompt.append((tokens[:-1] if tokens[-1] in end_ids else tokens, float(score)))
        found.append(of_prompt)
    return found


def assert_same(found: list[list[Query]], expected) -> None:
    assert [[query.ids for query in of_prompt] for of_prompt in found] == [[ids for ids, _ in of_prompt] for of_prompt in expected]
    for of_prompt, wanted in zip(found, expected, strict=True):
        assert [query.logprob for query in of_prompt] == pytest.approx([score for _, score in wanted], abs=2e-5)


def likely_ends(model, count: int) -> list[int]:
    """Tokens with which queries end early, late or not at all."""
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    return logits.log_softmax(-1).mean(0).topk(count).indices.tolist()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("queries", "new_tokens", "ends"), [(4, 7, 1), (10, 5, 3), (3, 1, 1)])
def test_equals_generate_prompt_by_prompt(family, tiny, batch, queries, new_tokens, ends):
    model = tiny(family)
    end_ids = likely_ends(model, ends)
    found = beam_queries(model, PROMPTS, queries=queries, new_tokens=new_tokens, end_ids=end_ids, batch=batch, pad_id=127)
    assert_same(found, by_transformers(model, PROMPTS, queries, new_tokens, end_ids))
    if new_tokens > 1:
        assert len({len(query.ids) for of_prompt in found for query in of_prompt}) > 1  # some have ended, some were cut


def test_a_single_query_is_the_greedy_one(family, tiny):
    model = tiny(family)
    [end] = likely_ends(model, 1)
    for prompt, [query] in zip(PROMPTS, beam_queries(model, PROMPTS, queries=1, new_tokens=6, end_ids=[end]), strict=True):
        ids = torch.tensor([prompt])
        written = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0)[0, len(prompt) :].tolist()
        assert query.ids == written[: written.index(end) if end in written else None]


@pytest.mark.parametrize("kind", ["mamba2", "mamba"])
def test_accelerated_steps_find_the_same(kind, tiny):
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = tiny("mamba2") if kind == "mamba2" else random_model(config)
    ends = likely_ends(model, 1)
    expected = by_transformers(model, PROMPTS, 4, 7, ends)
    with accelerate(model):
        assert_same(beam_queries(model, PROMPTS, queries=4, new_tokens=7, end_ids=ends, batch=3), expected)


def random_model(config):
    """Whose next tokens are not all equally likely, and whose biases are not zero."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("in_proj.bias"):
            weight.data.normal_()
    model.get_output_embeddings().weight.data.normal_(std=0.3)
    return model


def other_families():
    """A state that padding would run into, a family that is not known here, and windows that slide over padding."""
    mamba2 = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "use_bias": True}
    attention = {"intermediate_size": 48, "num_attention_heads": 4}
    small = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
    return [
        pytest.param(Mamba2Config(**small, **mamba2), id="mamba2 with a bias"),
        pytest.param(GPTNeoXConfig(**small, **attention), id="gpt_neox"),
        pytest.param(MistralConfig(**small, **attention, num_key_value_heads=2, sliding_window=6), id="mistral"),
        pytest.param(MambaConfig(**small, state_size=4), id="mamba"),
    ]


@pytest.mark.parametrize("config", other_families())
def test_other_families(config):
    model = random_model(config)
    found = beam_queries(model, PROMPTS, queries=3, new_tokens=4, end_ids=[5], batch=8)
    assert_same(found, by_transformers(model, PROMPTS, 3, 4, [5]))


def test_an_adapter_takes_part(tiny):
    model = with_lora(tiny("llama").requires_grad_(False), Lora(r=4, dropout=0.5), seed=3)
    before = beam_queries(model, PROMPTS[:2], queries=3, new_tokens=4, end_ids=[5])
    torch.manual_seed(4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    model.train()  # the search is without dropout
    found = beam_queries(model, PROMPTS[:2], queries=3, new_tokens=4, end_ids=[5])
    assert found != before
    assert_same(found, by_transformers(model, PROMPTS[:2], 3, 4, [5]))


def test_each_prompt_is_read_once_and_gives_one_row_of_logits(tiny):
    model = tiny("gpt2")
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    beam_queries(model, PROMPTS[:2], queries=5, new_tokens=3, end_ids=[])
    assert seen == [(2, 1, 128), (10, 1, 128), (10, 1, 128)]


def test_a_prompt_whose_search_is_over_leaves_the_batch(tiny):
    model = tiny("llama")
    with torch.no_grad():
        logprobs = model(torch.tensor([PROMPTS[0]])).logits[0, -1].log_softmax(-1)
    end = int(logprobs.argmax())  # the first prompt ends with its first token
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    first, second = beam_queries(model, PROMPTS[:2], queries=1, new_tokens=4, end_ids=[end])
    assert first == [Query([], pytest.approx(float(logprobs.max()), abs=1e-5), ended=True)]
    assert len(second[0].ids) > 0
    assert rows[0] == 2
    assert set(rows[1:]) == {1}


def test_a_step_by_hand():
    """Two beams: the third of four continuations ends too far down to count, the fourth keeps the beams at two."""
    beams = Beams(2, open=[Query([7], -1.0), Query([8], -1.5)])
    assert beams.advance([(-1.2, 0, 0), (-1.6, 1, 4), (-1.7, 1, 0), (-2.0, 0, 3)], {0}, last=False) == [1, 0]
    assert beams.open == [Query([8, 4], -1.6), Query([7, 3], -2.0)]
    assert beams.found == [Query([7], -1.2, ended=True)]
    # one more ends, and the best open beam is no better than the second found: nothing can change any more
    assert beams.advance([(-1.65, 0, 0), (-1.65, 0, 5), (-2.5, 1, 1), (-2.6, 1, 2)], {0}, last=False) == []
    assert beams.found == [Query([7], -1.2, ended=True), Query([8, 4], -1.65, ended=True)]


def test_only_what_was_written_is_counted():
    """Two beams in the last step: one ends, the other is cut."""
    beams = Beams(2, open=[Query([7], -1.0), Query([8], -1.5)])
    beams.advance([(-1.2, 0, 0), (-1.6, 1, 4)], {0}, last=True)
    assert beams.found == [Query([7], -1.2, ended=True), Query([8, 4], -1.6, ended=False)]
    assert [query.tokens for query in beams.found] == [2, 2]


def test_the_better_of_equals_is_the_lower_beam_and_token():
    """What `_search` hands on, for two beams of three tokens that are all equally likely."""
    assert in_order([-1.0, -1.0, -0.5, -1.0], [4, 0, 5, 3], 3) == [(-0.5, 1, 2), (-1.0, 0, 0), (-1.0, 1, 0), (-1.0, 1, 1)]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1]], {"queries": 0}, "queries is 0"),
        ([[1]], {"new_tokens": 0}, "new_tokens is 0"),
        ([[1]], {"queries": 65}, "65 queries are too many for a vocabulary of 128"),
    ],
)
def test_what_cannot_be_searched(rows, settings, message, tiny):
    with pytest.raises(UserError, match=message):
        beam_queries(tiny("llama"), rows, **{"queries": 2, "new_tokens": 2, "end_ids": [5], **settings})


def test_no_prompts(tiny):
    assert beam_queries(tiny("llama"), [], queries=2, new_tokens=2, end_ids=[5]) == []


def test_a_number_that_is_not_finite_names_its_prompt(tiny):
    model = tiny("llama")
    model.get_input_embeddings().weight.data[61] = float("nan")
    with pytest.raises(UserError, match=r"prompt 1 has .* try base.dtype float32"):
        beam_queries(model, PROMPTS[:3], queries=2, new_tokens=2, end_ids=[5])
