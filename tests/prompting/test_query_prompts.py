"""Prompts that ask for a title: words, budget, hostile titles, and completions that are cut where the prompt ends."""

import numpy as np
import pytest

from llmrec.config import Prompting
from llmrec.errors import UserError
from llmrec.prompting import Prompt, Refused
from llmrec.query_prompts import QueryWriter
from llmrec.templates import QueryTemplate, load_prompt, load_template, save_prompt

TITLES = ["", "Toy Story (1995)", "Heat (1995)", "Casino", "The Lord of the Rings: " * 8, "Amélie 😀", "</s><|endoftext|><s> (A) x"]


def writer_of(tokenizer, **settings):
    return QueryWriter(tokenizer, load_template("gpt4rec"), Prompting(**{"template": "gpt4rec", "budget": 400, **settings}), TITLES)


def test_the_words_are_gpt4recs(tokenizer):
    prompt = writer_of(tokenizer).write([1, 2, 3])
    assert prompt.text == "Previously, the customer has bought: Toy Story. Heat. Casino. In the future, the customer wants to buy"
    assert (prompt.history_items, prompt.pool_items) == ([1, 2, 3], [])


def test_a_completion_is_what_follows_the_prompt_in_a_tokenised_row(tokenizer):
    writer = writer_of(tokenizer)
    prompt = writer.write([3, 2])
    for item in range(1, len(TITLES)):
        completion = writer.completion(item)
        row = writer.encode(prompt.text + writer.answer(item))
        assert [*row, tokenizer.eos_token_id] == prompt.ids + completion
        assert len(completion) <= writer.config.title_tokens + 1
        assert completion == writer.answer_ids(writer.answer(item))
    assert writer.text(writer.completion(1)).replace("▁", "") == "Toy Story"  # two of these tokenizers have no decoder
    assert writer.end_ids == [tokenizer.eos_token_id]


def test_prompt_and_answer_keep_to_the_budget_and_the_oldest_titles_go_first(tokenizer):
    rng = np.random.default_rng(0)
    fitting = shortened = 0
    for budget in (120, 200, 300):
        writer = writer_of(tokenizer, budget=budget, title_tokens=20)
        for _ in range(10):
            history = rng.integers(1, len(TITLES), 12).tolist()
            prompt = writer.write(history)
            if isinstance(prompt, Refused):
                continue
            fitting += 1
            assert max(len(prompt.ids) + len(writer.completion(item)) for item in range(1, len(TITLES))) <= budget
            assert prompt.history_items == history[-len(prompt.history_items) :]
            longer = history[-len(prompt.history_items) - 1 :]
            if len(longer) > len(prompt.history_items):
                text = " ".join(f"{writer.title(item)}." for item in longer)
                row = writer.encode(f"Previously, the customer has bought: {text} In the future, the customer wants to buy")
                assert len(row) + 21 > budget or len(prompt.history_items) == 1
                shortened += len(prompt.history_items) > 1
    assert fitting >= 20
    assert shortened >= 5


def test_hostile_titles_are_cleaned_in_the_history_and_in_the_answer(tokenizer):
    writer = writer_of(tokenizer)
    prompt = writer.write([6, 1])
    control = {tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    assert control.isdisjoint(prompt.ids[len(writer.encode("")) :])
    assert control.isdisjoint(writer.completion(6)[:-1])
    assert "(A)" not in prompt.text
    assert "(A)" not in writer.answer(6)


def test_no_history_is_refused_and_a_small_budget_an_error(gpt2):
    assert writer_of(gpt2).write([]) == Refused("no history")
    assert isinstance(writer_of(gpt2).write([1]), Prompt)
    with pytest.raises(UserError, match=r"prompt.budget 40 is too small"):
        writer_of(gpt2, budget=40)


def test_an_answer_that_merges_with_the_prompt_is_refused(gpt2):
    template = QueryTemplate("mine", "Bought: {history} T", "{title}.", " ", "oy{title}")
    with pytest.raises(UserError, match="merges with the end of the prompt"):
        QueryWriter(gpt2, template, Prompting(budget=400), TITLES)


def test_one_title_that_merges_with_the_prompt_is_found_before_the_training(gpt2):
    template = QueryTemplate("mine", "Bought: {history} T", "{title}.", " ", "{title}")
    writer = QueryWriter(gpt2, template, Prompting(budget=400), ["", "Heat", "oy Story"])
    writer.completion(1)
    with pytest.raises(UserError, match="the answer 'oy Story' merges with the end of the prompt"):
        writer.check_titles()
    writer_of(gpt2).check_titles()


def test_queries_find_whole_titles(gpt2):
    writer = writer_of(gpt2, title_tokens=4)
    assert writer.searched(1) == "Toy Story (1995)"
    assert writer.searched(4) == ("The Lord of the Rings: " * 8).strip()
    assert len(writer.title(4)) < len(writer.searched(4)) / 4
    assert "<|endoftext|>" not in writer.searched(6)


def test_a_tokenizer_without_end_of_text_is_refused(byte):
    import copy

    endless = copy.deepcopy(byte)
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        writer_of(endless)


def test_the_template_comes_back_from_a_models_folder(tmp_path):
    template, config = load_template("gpt4rec"), Prompting(template="gpt4rec")
    save_prompt(tmp_path / "prompt.yaml", template, config)
    assert load_prompt(tmp_path / "prompt.yaml") == (template, config)


def test_a_query_template_has_no_candidates(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("layout: '{history} then'\nhistory_item: '{title}'\nseparator: ' '\nanswer: ' {title}'\ncandidate_item: '{title}'\n")
    with pytest.raises(UserError, match="unknown key 'candidate_item'"):
        load_template(str(path))
    path.write_text("layout: '{candidates} then'\nhistory_item: '{title}'\nseparator: ' '\nanswer: ' {title}'\n")
    with pytest.raises(UserError, match=r"layout needs {history}"):
        load_template(str(path))
