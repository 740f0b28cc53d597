"""Several orders of the same candidates: the shared beginning is computed once, and that changes no score."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from llmrec.config import Base, Config, Evaluation, Lora, Prompting, Retrieval
from llmrec.data.sequences import TEST, TRAIN, VALID, Sequences
from llmrec.errors import UserError
from llmrec.prompting import PromptWriter
from llmrec.rankers.backbone import compile_layers, float_head, load_base, load_tokenizer, save_adapter, with_lora
from llmrec.rankers.letters import NotFinite, letter_logprobs
from llmrec.rankers.orders import letter_logprobs_of_orders, shared_tokens
from llmrec.runs import Run
from llmrec.stages import STAGES, run_folder, scoring
from llmrec.stages.scoring import Questions, questions_of, score
from llmrec.templates import load_template

LABELS = [11, 12, 13, 14]


def users(shared: list[int], orders: int = 3) -> list[list[list[int]]]:
    """Users with so many tokens in common between their prompts, and endings of different lengths."""
    generator = np.random.default_rng(0)
    asked = []
    for count in shared:
        start = generator.integers(30, 128, count).tolist()
        ends = [generator.integers(30, 128, length).tolist() for length in generator.integers(3, 9, orders)]
        asked.append([[*start, 15 + at, *end] for at, end in enumerate(ends)])  # 15, 16, ...: no two go on alike
    return asked


def one_by_one(model, asked: list[list[list[int]]]) -> np.ndarray:
    """A plain forward pass of each row by itself, (users, orders, letters)."""
    with torch.no_grad():
        return np.array(
            [[model(torch.tensor([row])).logits[0, -1].float().log_softmax(-1)[LABELS].numpy() for row in rows] for rows in asked]
        )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, 3, 4], [1, 2, 5, 4], [1, 2, 3, 9]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),  # each keeps its last token
        ([[1, 2], [1, 2, 3, 4], [1, 2, 3, 5]], 1),
        ([[1, 2], [3, 2]], 0),
        ([[7], [7]], 0),
        ([[5, 6, 7]], 2),
        ([[10, 9], [9, 10], [10, 8]], 0),
    ],
)
def test_shared_tokens(rows, expected):
    assert shared_tokens(rows) == expected


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_equals_one_plain_forward_pass_per_row(family, tiny, batch):
    """Alone, two users at a time with different shared beginnings, and all together."""
    model, asked = tiny(family), users([20, 1, 33, 12, 8])
    found = letter_logprobs_of_orders(model, asked, LABELS, batch=batch, pad_id=99)
    np.testing.assert_allclose(found, one_by_one(model, asked), atol=1e-5)


def test_with_an_adapter(family, tiny):
    model = with_lora(tiny(family), Lora(r=4, dropout=0.5), seed=3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    asked = users([9, 17])
    model.train()
    found = letter_logprobs_of_orders(model, asked, LABELS)
    np.testing.assert_allclose(found, one_by_one(model, asked), atol=1e-5)
    with model.disable_adapter():
        assert np.abs(found - one_by_one(model, asked)).max() > 1e-2


def test_a_beginning_longer_than_a_sliding_window():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=128, sliding_window=8, **sizes)).eval()
    asked = users([30, 21, 5])
    np.testing.assert_allclose(letter_logprobs_of_orders(model, asked, LABELS), one_by_one(model, asked), atol=1e-5)


def test_in_bfloat16_the_rankings_are_those_of_the_plain_path_up_to_rounding(family, tiny):
    """Differences stay under .05; candidates further apart than twice that keep their order."""
    model = tiny(family).bfloat16()
    float_head(model)
    asked = users([20, 33, 12, 8])
    found = letter_logprobs_of_orders(model, asked, LABELS).reshape(-1, len(LABELS))
    plain = letter_logprobs(model, [row for rows in asked for row in rows], LABELS)
    assert np.abs(found - plain).max() < 0.05
    apart = plain[:, :, None] - plain[:, None, :] > 0.1
    assert apart.sum() > 40
    assert (found[:, :, None] > found[:, None, :])[apart].all()


@pytest.mark.usefixtures("exact_widths")
@pytest.mark.parametrize(("batch", "expected"), [(3, [(1, 20), (3, 9), (1, 6), (3, 11)]), (6, [(2, 6), (6, 23)])])
def test_what_the_orders_share_is_computed_once(tiny, batch, expected):
    """Two users in a pass share 6 tokens each, those of the one who shares least."""
    model, seen = tiny("llama"), []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    starts = [[list(range(30, 50)), 9], [list(range(60, 66)), 11]]
    asked = [[start + [15 + order] * length for order in range(3)] for start, length in starts]
    letter_logprobs_of_orders(model, asked, LABELS, batch=batch)
    assert seen == expected


def test_only_last_positions_reach_the_head(tiny):
    model, seen = tiny("gpt2"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    letter_logprobs_of_orders(model, users([20]), LABELS)
    assert seen == [(1, 0, 128), (3, 1, 128)]  # what is shared needs states alone


def test_one_order_is_the_plain_path_bit_by_bit(tiny):
    rows = [[user[0]] for user in users([20, 5, 12])]
    found = letter_logprobs_of_orders(tiny("llama"), rows, LABELS, batch=2)
    np.testing.assert_array_equal(found[:, 0], letter_logprobs(tiny("llama"), [row for [row] in rows], LABELS, batch=2))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compiled_parts_go_on_from_states_as_plain_ones(family, tiny):
    asked = users([20, 33, 12, 8])
    expected = letter_logprobs_of_orders(tiny(family), asked, LABELS, batch=6)
    model = tiny(family)
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        compile_layers(model, training=False, states=True)
        found = letter_logprobs_of_orders(model, asked, LABELS, batch=6)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_nothing_in_common(tiny):
    asked = users([0, 6])
    np.testing.assert_allclose(letter_logprobs_of_orders(tiny("mamba2"), asked, LABELS), one_by_one(tiny("mamba2"), asked), atol=1e-5)


def test_no_users(tiny):
    assert letter_logprobs_of_orders(tiny("llama"), [], LABELS).shape == (0, 1, 4)


@pytest.mark.parametrize("shared", [[8, 9], [0, 0]])
def test_a_number_that_is_not_finite_names_its_prompt_among_all(shared, tiny):
    model, asked = tiny("llama"), users(shared)
    model.get_input_embeddings().weight.data[29] = float("nan")
    asked[1][2][-1] = 29
    with pytest.raises(NotFinite, match="prompt 5 "):  # the third of the second user
        letter_logprobs_of_orders(model, asked, LABELS)


# ------------------------------------------------------------------ in the stage evaluate

TITLES = ["", *(f"film {n}" for n in range(1, 10))]


@pytest.fixture
def ranked(tmp_path, saved_llama):
    """A config, a run, the data and a writer: four users, candidates retrieved for them, and an adapter."""
    base = Base(id=str(saved_llama), dtype="float32")
    config = Config(
        dataset="shop", runs=str(tmp_path / "runs"), base=base, retrieval=Retrieval(candidates=4), prompt=Prompting(candidates=4, history=3)
    )
    split = np.array([TRAIN, TRAIN, TRAIN, VALID, TEST] * 4, dtype=np.int8)
    items = np.array([1, 2, 3, 4, 5, 9, 8, 7, 6, 5, 2, 4, 6, 8, 1, 3, 1, 4, 2, 5], dtype=np.int32)
    sequences = Sequences(np.arange(0, 21, 5), items, np.full(20, np.nan, dtype=np.float32), split, 9)
    folder = run_folder("retrieve", config)
    folder.mkdir(parents=True)
    lists = [[5, 6, 7, 8], [1, 5, 3], [1, 3, 5, 9], [6, 7, 8, 9]]
    scores = [[-float(n) for n in range(len(listed))] for listed in lists]
    columns = {"user": [0, 1, 2, 3], "split": ["test"] * 4, "target": [5, 5, 1, 5], "items": lists, "scores": scores}
    pl.DataFrame(columns, schema_overrides={"user": pl.Int32, "target": pl.Int32, "items": pl.List(pl.Int32)}).write_parquet(
        folder / "candidates.parquet"
    )
    adapted = with_lora(load_base(saved_llama, base), config.lora, seed=0).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    save_adapter(adapted, run_folder("orpo", config), base)
    writer = PromptWriter(load_tokenizer(saved_llama), load_template(config.prompt.template), config.prompt, TITLES)
    return config, sequences, writer, adapted


def run_of(config: Config, tmp_path) -> Run:
    return Run(STAGES["evaluate"], config, tmp_path / "evaluate", tmp_path / "work", {}, {}, "", None)


def scores_of(config: Config, tmp_path, sequences, writer) -> tuple[Questions, np.ndarray]:
    run = run_of(config, tmp_path / f"orders{config.evaluation.orders}")
    asked = {"valid": questions_of(config, run, sequences, writer, "test"), "test": questions_of(config, run, sequences, writer, "test")}
    answers = score(run, ["orpo"], asked, writer, np.arange(0))
    assert answers.seconds > 0
    assert answers.asked["orpo", "test"].all()
    return asked["test"], answers.scores["orpo", "test"]


@pytest.mark.parametrize("orders", [1, 3])
def test_the_stage_scores_each_item_by_its_mean_over_the_orders(orders, ranked, tmp_path):
    config, sequences, writer, model = ranked
    config = replace(config, evaluation=Evaluation(orders=orders))
    questions, found = scores_of(config, tmp_path, sequences, writer)
    assert questions.order.shape == (4, orders, 4)
    for user, listed in enumerate(questions.items):
        items = [int(item) for item in listed if item]
        by_item = {item: [] for item in items}
        for shown in questions.order[user]:
            pool = [items[at] for at in shown[: len(items)]]
            assert sorted(pool) == sorted(items)
            row = writer.write(sequences.history(user, 5 * user + 4), pool).ids
            with torch.no_grad():
                logprobs = model(torch.tensor([row])).logits[0, -1].log_softmax(-1)
            for label, item in zip(writer.labels, pool, strict=False):
                by_item[item].append(float(logprobs[label]))
        np.testing.assert_allclose(found[user, : len(items)], [np.mean(by_item[item]) for item in items], atol=1e-5)
        assert (found[user, len(items) :] == -np.inf).all()


@pytest.mark.parametrize("orders", [1, 3])
def test_a_score_that_is_not_finite_names_system_and_user(orders, ranked, tmp_path, saved_llama, monkeypatch):
    """Of the users whose target was retrieved only the third has item 9; with blocks of one user he is the first of his own."""
    config, sequences, writer, _ = ranked
    config = replace(config, evaluation=Evaluation(orders=orders, ask="retrieved"))
    writer = PromptWriter(writer.tokenizer, writer.template, config.prompt, [*TITLES[:9], "film Q"])
    base = AutoModelForCausalLM.from_pretrained(saved_llama)
    base.get_input_embeddings().weight.data[writer.tokenizer.encode("Q")] = float("nan")
    base.save_pretrained(saved_llama)
    prepared = run_folder("prepare", config)
    prepared.mkdir(parents=True)
    pl.DataFrame({"user": range(4), "raw_id": list("abcd")}).write_parquet(prepared / "users.parquet")
    monkeypatch.setattr(scoring, "BLOCK", 1)
    with pytest.raises(UserError, match=r"^orpo gives user c \(test\) a score .* orpo\.learning_rate .*train_log\.jsonl"):
        scores_of(config, tmp_path, sequences, writer)


@pytest.fixture
def asked_with(ranked, tmp_path):
    """The questions of a run of other settings, with the same retriever."""
    config, sequences, writer, _ = ranked

    def ask(**settings) -> Questions:
        own = replace(config, **settings)
        if not run_folder("retrieve", own).exists():
            shutil.copytree(run_folder("retrieve", config), run_folder("retrieve", own))
        return questions_of(own, run_of(own, tmp_path), sequences, writer, "test")

    return ask


@pytest.mark.parametrize("limits", [{"evaluation": Evaluation(test_users=2)}, {"limit_users": 2}])
def test_all_seeds_ask_the_same_users(asked_with, limits):
    asked = {tuple(asked_with(seed=seed, **limits).users) for seed in range(8)}
    assert len(asked) == 1
    assert len(asked.pop()) == 2


def test_orders_are_drawn_by_seed_and_user_and_the_first_is_that_of_a_single_one(asked_with):
    def order(orders: int, seed: int = 0) -> np.ndarray:
        return asked_with(seed=seed, evaluation=Evaluation(orders=orders)).order

    several = order(6)
    np.testing.assert_array_equal(several, order(6))
    np.testing.assert_array_equal(several[:, :1], order(1))
    assert len({tuple(shown) for shown in several[0].tolist()}) > 3
    assert (several != order(6, seed=1)).any()


def test_finished_blocks_are_taken_up_again(ranked, tmp_path, monkeypatch):
    config, sequences, writer, _ = ranked
    config = replace(config, evaluation=Evaluation(orders=3))
    monkeypatch.setattr("llmrec.stages.scoring.BLOCK", 6)
    _, whole = scores_of(config, tmp_path / "a", sequences, writer)
    kept = sorted((tmp_path / "a").rglob("orpo.test.*.npy"))
    assert [path.name for path in kept] == ["orpo.test.0.npy", "orpo.test.2.npy"]  # two users of three prompts in each
    np.save(kept[0], np.full((2, 3, 4), -7, dtype=np.float32))
    _, again = scores_of(config, tmp_path / "a", sequences, writer)
    changed = (again == -7).any(1)
    assert changed.sum() == 2
    np.testing.assert_array_equal(again[~changed], whole[~changed])


@pytest.mark.parametrize(
    ("evaluation", "order", "message"),
    [(Evaluation(orders=0), "shuffled", "evaluation.orders is 0"), (Evaluation(orders=2), "retriever", "set prompt.order to shuffled")],
)
def test_orders_that_there_are_not(evaluation, order, message, ranked, tmp_path):
    config, sequences, writer, _ = ranked
    config = replace(config, evaluation=evaluation, prompt=replace(config.prompt, order=order))
    with pytest.raises(UserError, match=message):
        questions_of(config, run_of(config, tmp_path), sequences, writer, "test")


def test_families_whose_states_are_not_known_are_asked_the_plain_way():
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    asked = users([20, 12])
    plain = letter_logprobs(model, [row for rows in asked for row in rows], LABELS)
    assert (letter_logprobs_of_orders(model, asked, LABELS).reshape(plain.shape) == plain).all()
