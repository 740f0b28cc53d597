"""Scores do not depend on padding or batch, and are what a plain forward pass gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmrec.rankers.letters import NotFinite, batches_of_letter_logprobs, letter_logprobs, pad

LABELS = [11, 12, 13, 14]


def some_rows(lengths: list[int]) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(1, 128, length).tolist() for length in lengths]


def test_equals_one_plain_forward_pass_per_row(family, tiny):
    model, rows = tiny(family), some_rows([5, 17, 9, 30, 1])
    with torch.no_grad():
        plain = [model(torch.tensor([row])).logits[0, -1].log_softmax(-1)[LABELS].numpy() for row in rows]
    np.testing.assert_allclose(letter_logprobs(model, rows, LABELS, batch=4), np.array(plain), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_batch_size_and_padding_id_do_not_matter(family, tiny, batch):
    model, rows = tiny(family), some_rows([5, 17, 9, 30, 3, 8, 8])
    expected = letter_logprobs(model, rows, LABELS, batch=3, pad_id=0)
    np.testing.assert_allclose(letter_logprobs(model, rows, LABELS, batch=batch, pad_id=99), expected, atol=1e-5)


def test_normalised_over_the_whole_vocabulary(tiny):
    everything = letter_logprobs(tiny("llama"), some_rows([6, 4]), range(128))
    np.testing.assert_allclose(np.exp(everything.astype(np.float64)).sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(letter_logprobs(tiny("llama"), some_rows([6, 4]), [7, 3]), everything[:, [7, 3]])


def test_only_last_positions_reach_the_head(tiny):
    model, seen = tiny("llama"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    letter_logprobs(model, some_rows([20, 30, 10]), LABELS, batch=2)
    assert seen == [(2, 1, 128), (1, 1, 128)]


def test_batches_come_longest_first_and_cover_every_row(tiny):
    numbers = [found.tolist() for found, _ in batches_of_letter_logprobs(tiny("gpt2"), some_rows([4, 9, 6]), LABELS, batch=2, pad_id=0)]
    assert numbers == [[1, 2], [0]]


def test_a_number_that_is_not_finite_names_its_row(tiny):
    model = tiny("llama")
    model.get_input_embeddings().weight.data[77] = float("nan")
    with pytest.raises(NotFinite, match="prompt 1 "):
        letter_logprobs(model, [[1, 2, 3], [5, 77], [8, 9]], LABELS)


def test_no_rows(tiny):
    assert letter_logprobs(tiny("llama"), [], LABELS).shape == (0, 4)


def test_dropout_is_off(tiny):
    model = tiny("gpt2")
    model.transformer.drop.p = 0.5
    model.train()
    rows = some_rows([7])
    np.testing.assert_array_equal(letter_logprobs(model, rows, LABELS), letter_logprobs(model, rows, LABELS))


@pytest.mark.parametrize(("longest", "width"), [(1, 16), (16, 16), (17, 32), (400, 400)])
def test_widths_are_few(longest, width):
    ids, lengths = pad([[3] * longest, [4]], 7)
    assert ids.shape == (2, width)
    assert lengths.tolist() == [longest, 1]
    assert ids[1].tolist() == [4] + [7] * (width - 1)
