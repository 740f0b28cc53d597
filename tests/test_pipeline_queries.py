"""The whole pipeline with a ranker that writes titles: its rows, its training, its queries and what they find."""

import json
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from llmrec.bm25 import TitleIndex
from llmrec.cli import main

DATA = ["--dataset", "shop.yaml"]
RETRIEVE = [*DATA, *("--retriever", "popularity"), *("--lightfm.epochs", "2", "--lightfm.components", "4")]
RANKER = [
    *RETRIEVE,
    *("--prompt.template", "gpt4rec", "--prompt.candidates", "6", "--prompt.history", "3", "--prompt.title_tokens", "6"),
    *("--prompt.budget", "400", "--base.dtype", "float32", "--pairs.sft_rows", "12", "--pairs.prompts", "8", "--limit_users", "12"),
]
EVALUATE = [
    *RANKER,
    *("--evaluation.resamples", "100", "--queries.count", "3", "--queries.valid_users", "5", "--queries.k1", "[1.5]"),
    *("--queries.b", "[0.0, 0.75]"),
]
SETTINGS = {"prepare": DATA, "retrieve": RETRIEVE, "pairs": RANKER, "sft": RANKER, "orpo": RANKER, "evaluate": EVALUATE}
NAME = "popularity.llamarec-smollm2-135m"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """25 users who each go up through 20 items."""
    folder = tmp_path_factory.mktemp("shop")
    draw = random.Random(0)
    lines, minute = ["user,item,stars,when"], 0
    for user in range(25):
        first = draw.randrange(20)
        for step in range(8):
            minute += 1
            lines.append(f"u{user},i{(first + step) % 20},{draw.randint(1, 5)},{1_700_000_000 + minute * 60}")
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
    (folder / "titles.csv").write_text(
        "item,name\n" + "".join(f"i{n},Film {'abcdefghijklmnopqrst'[n]} (19{n // 2:02d})\n" for n in range(20))
    )
    (folder / "shop.yaml").write_text(
        "source:\n  format: csv\n  interactions: ratings.csv\n  items: titles.csv\n"
        "  columns: {user: user, item: item, rating: stars, timestamp: when, title: name}\nfilter: {core: 2}\n"
    )
    return folder


@pytest.fixture(scope="module", autouse=True)
def there(shop):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop)
        patch.setenv("LLMREC_HOME", str(shop / "cache"))
        patch.setenv("LLMREC_OFFLINE", "1")
        yield


def run(stage, base, *extra):
    known = SETTINGS[stage] if stage in ("prepare", "retrieve") else ["--base.id", str(base), *SETTINGS[stage]]
    assert main([stage, *known, *extra]) == 0


@pytest.fixture(scope="module")
def finished(shop, tiny_llama, there):
    run("prepare", tiny_llama)
    run("retrieve", tiny_llama, "--retriever", "lightfm")
    for stage in list(SETTINGS)[1:]:
        run(stage, tiny_llama)
    return shop / "runs/shop"


def test_rows_are_titles(finished):
    sft = pl.read_parquet(finished / "pairs" / NAME / "sft.parquet")
    assert sft.height == 12
    assert sft["completion"].str.contains(r"^ Film [a-t]$").all()
    preferences = pl.read_parquet(finished / "pairs" / NAME / "preferences.parquet")
    assert set(preferences["source"]) == {"rating", "lightfm"}
    assert preferences["rejected"].str.contains(r"^ Film [a-t]$").all()
    card = (finished / "pairs" / NAME / "README.md").read_text()
    assert "Prompts show the history alone, and answers are titles" in card


def test_the_model_card_says_what_it_writes(finished):
    card = (finished / "orpo" / NAME / "README.md").read_text()
    assert "ORPO on pairs of titles" in card
    assert "letter" not in card


def test_candidates_are_ranked_by_their_titles(finished, tiny_llama):
    """Scores of one user, each title forwarded after the prompt on its own."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rankings = pl.read_parquet(finished / "evaluate" / NAME / "rankings.parquet").filter(split="test")
    assert rankings.height == 12
    row = rankings.row(0, named=True)
    titles = pl.read_parquet(finished / "prepare" / "items.parquet").sort("item")["title"].to_list()
    names = {item: titles[item - 1].split(" (")[0] for item in range(1, 21)}
    events = pl.read_parquet(finished / "prepare" / "interactions.parquet").filter(user=row["user"])["item"].to_list()
    history = " ".join(f"{names[item]}." for item in events[:-1][-3:])
    prompt = f"Previously, the customer has bought: {history} In the future, the customer wants to buy"

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), finished / "orpo" / NAME).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "orpo" / NAME)
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    for item, score in zip(row["items"], row["ranker_scores"], strict=True):
        ids = [*tokenizer(f"{prompt} {names[item]}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [logps[at - 1, ids[at]].item() for at in range(len(before), len(ids))]
        assert score == pytest.approx(np.mean(own), abs=1e-4)


def test_queries_lie_beside_the_rankings_and_find_what_is_said(finished):
    folder = finished / "evaluate" / NAME
    queries = pl.read_parquet(folder / "queries.parquet")
    facts = json.loads((folder / "metrics.json").read_text())["catalogue"]
    assert set(queries["system"]) == {"random", "sft", "orpo"}
    assert (queries.group_by("system").len()["len"] == 12).all()
    titles = ["", *pl.read_parquet(finished / "prepare" / "items.parquet").sort("item")["title"]]
    events = pl.read_parquet(finished / "prepare" / "interactions.parquet")
    popularity = np.bincount(events.filter(split="train")["item"].to_numpy(), minlength=21)
    for system in ("random", "sft", "orpo"):
        index = TitleIndex(titles, popularity, facts["bm25"][system]["k1"], facts["bm25"][system]["b"])
        hits = []
        for row in queries.filter(system=system).to_dicts():
            seen = events.filter(user=row["user"])["item"].to_list()[:-1]
            assert len(row["queries"]) == 3
            assert row["logprobs"] == sorted(row["logprobs"], reverse=True)
            assert row["items"] == index.recommend(row["queries"], 10, seen)
            assert not {*row["items"]} & {*seen}
            hits.append(row["target"] in row["items"])
        assert facts["overall"][system]["hr@10"] == pytest.approx(np.mean(hits))
    assert list(facts["overall"]) == ["popularity", "last title", "retriever", "random", "sft", "orpo"]
    popular = sorted(range(1, 21), key=lambda item: (-popularity[item], item))
    found = []
    for user, target in queries.filter(system="orpo").select("user", "target").rows():
        seen = events.filter(user=user)["item"].to_list()[:-1]
        found.append(target in [item for item in popular if item not in seen][:5])
    assert facts["overall"]["popularity"]["hr@5"] == pytest.approx(np.mean(found))
    assert set(facts["bm25"]) == {"last title", "random", "sft", "orpo", "valid_users"}
    assert facts["bm25"]["orpo"]["recall"] == max(row["recall"] for row in facts["bm25"]["orpo"]["tried"])
    assert {row["b"] for row in facts["bm25"]["orpo"]["tried"]} == {0.0, 0.75}
    assert set(facts["tokens_per_second"]) == {"random", "sft", "orpo"}
    assert facts["refused"] == {"test": 0, "valid": 0}


def test_the_last_title_finds_by_all_its_words_its_year_among_them(finished):
    """Every two films have a year in common, which prompts do not show."""
    facts = json.loads((finished / "evaluate" / NAME / "metrics.json").read_text())["catalogue"]
    whole = ["", *pl.read_parquet(finished / "prepare" / "items.parquet").sort("item")["title"]]
    events = pl.read_parquet(finished / "prepare" / "interactions.parquet")
    popularity = np.bincount(events.filter(split="train")["item"].to_numpy(), minlength=21)
    users = pl.read_parquet(finished / "evaluate" / NAME / "queries.parquet").filter(system="orpo")["user"]
    tuned = facts["bm25"]["last title"]
    shares = []
    for titles in (whole, [title.split(" (")[0] for title in whole]):
        index, hits = TitleIndex(titles, popularity, tuned["k1"], tuned["b"]), []
        for user in users:
            *seen, target = events.filter(user=user)["item"].to_list()
            hits.append(target in index.recommend([titles[seen[-1]]], 5, seen))
        shares.append(np.mean(hits))
    assert facts["overall"]["last title"]["hr@5"] == pytest.approx(shares[0])
    assert shares[0] > shares[1]


def test_the_retriever_has_the_lists_that_it_wrote_not_the_pool_of_the_ranker(finished):
    """Its hits among 10 and 20 of 20 items, where the ranker is shown 6, are those of the ranks that retrieve measured."""
    folder = finished / "evaluate" / NAME
    overall = json.loads((folder / "metrics.json").read_text())["catalogue"]["overall"]["retriever"]
    users = pl.read_parquet(folder / "queries.parquet").filter(system="orpo")["user"]
    ranks = pl.read_parquet(finished / "retrieve/popularity/candidates.parquet").filter(
        pl.col("split") == "test", pl.col("user").is_in(users)
    )
    ranks = ranks["target_rank_masked"].to_numpy()
    assert len(ranks) == 12
    assert ((ranks > 6) & (ranks <= 10)).any()
    for k in (5, 10, 20):
        assert overall[f"hr@{k}"] == pytest.approx(np.mean((ranks > 0) & (ranks <= k)))


@pytest.mark.parametrize(
    ("own", "repeats", "filtered", "differ"),
    [
        (None, False, True, False),
        (None, True, False, False),
        (True, True, True, True),
        (False, False, False, True),
        (True, False, True, False),
    ],
)
def test_history_is_left_out_as_the_retriever_does_it_or_the_difference_is_said(own, repeats, filtered, differ, capsys):
    from llmrec.config import Config, Queries, Retrieval
    from llmrec.stages.querying import check_settings, filters_history

    config = Config(queries=Queries(filter_history=own), retrieval=Retrieval(repeats=repeats))
    assert filters_history(config) == filtered
    check_settings(config)
    assert ("only one of them may recommend what a user has taken before" in capsys.readouterr().err) == differ


def test_a_retriever_that_kept_too_few_is_a_line():
    from llmrec.config import Config, Retrieval
    from llmrec.errors import UserError
    from llmrec.stages.querying import check_settings

    with pytest.raises(UserError, match=r"retrieval\.candidates is 19: .* shows the retriever's best 20"):
        check_settings(Config(retrieval=Retrieval(candidates=19)))


def test_table_and_report_show_both(finished):
    folder = finished / "evaluate" / NAME
    summary = (folder / "summary.txt").read_text()
    assert all(
        word in summary for word in ("retriever", "fused", "The whole catalogue of 20 items", "last title", "random", "DIV@10", "COV@10")
    )
    html = (folder / "report.html").read_text()
    assert "Recommended from the whole catalogue" in html
    assert "Queries for user" in html


def test_written_queries_are_taken_up_again_after_a_kill(finished, tiny_llama, monkeypatch):
    """Killed between two blocks of the untrained model's, the stage writes none of them again."""
    from llmrec.rankers import queries as library
    from llmrec.stages import writing

    calls = []

    def dies(model, rows, **how):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, rows, **how)

    real = library.beam_queries
    monkeypatch.setattr(library, "beam_queries", dies)
    monkeypatch.setattr(writing, "BLOCK", 5)
    folder = finished / "evaluate"
    before = pl.read_parquet(folder / NAME / "queries.parquet")
    words = ["evaluate", "--base.id", str(tiny_llama), *SETTINGS["evaluate"], "--force"]
    assert main(words) == 130
    kept = folder / f".{NAME}.partial" / "checkpoints"
    assert sorted(path.name for path in kept.glob("*.json")) == ["random.test.0.json", "random.test.5.json"]
    for path in kept.glob("*.json"):
        block = json.loads(path.read_text())
        block["queries"][0][0] = "kept"  # nobody would write this again
        path.write_text(json.dumps(block))
    monkeypatch.setattr(library, "beam_queries", real)
    assert main(words) == 0
    after = pl.read_parquet(folder / NAME / "queries.parquet")
    assert [row[0] for row in after.filter(system="random")["queries"]].count("kept") == 2
    columns = ["user", "system", "target", "queries", "items"]  # log-probabilities are rounded in other batches
    tuned = pl.col("system") != "random"
    assert after.filter(tuned).select(columns).equals(before.filter(tuned).select(columns))


def test_all_weights_can_be_tuned(finished, tiny_llama):
    """Without an adapter: SFT, ORPO and evaluation on an ordinary model, which transformers reads alone."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = ["--variant", "whole", "--lora.r", "0"]
    run("pairs", tiny_llama, "--variant", "whole")
    for stage in ("sft", "orpo"):
        run(stage, tiny_llama, *whole)
    run("evaluate", tiny_llama, *whole, "--queries.filter_history", "false")
    folder = finished / "orpo" / f"{NAME}.whole"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("adapter*"))
    tuned, base = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(tiny_llama)
    moved = [name for name, weight in tuned.named_parameters() if not torch.equal(weight, base.get_parameter(name))]
    assert len(moved) > 0.9 * len(list(tuned.parameters()))
    assert_history_may_be_found(finished, finished / "evaluate" / f"{NAME}.whole")
    assert "library_name: transformers" in Path(folder / "README.md").read_text()


def assert_history_may_be_found(finished: Path, folder: Path) -> None:
    """With queries.filter_history false and a retriever that leaves it out."""
    facts = json.loads((folder / "metrics.json").read_text())["catalogue"]
    assert facts["history_masked"] == {"queries": False, "retriever": True}
    events = pl.read_parquet(finished / "prepare" / "interactions.parquet")
    rows = pl.read_parquet(folder / "queries.parquet").filter(system="orpo").to_dicts()
    again = [set(row["items"]) & set(events.filter(user=row["user"])["item"].to_list()[:-1]) for row in rows]
    assert any(again)


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("orpo", ["--orpo.negatives", "all"], "shows no pool"),
        ("sft", ["--sft.eval_steps", "2"], "set it to null"),
        ("evaluate", ["--queries.count", "0"], "queries.count is 0"),
        ("evaluate", ["--evaluation.orders", "2"], "show no candidates"),
    ],
)
def test_settings_that_do_not_go_with_titles_are_a_line(finished, tiny_llama, stage, arguments, message, capsys):
    known = ["--base.id", str(tiny_llama), *SETTINGS[stage]]
    assert main([stage, *known, *arguments, "--force"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line


SCRATCH = [
    *("--variant", "scratch", "--base.scratch", "true", "--base.dtype", "bfloat16", "--base.shape"),
    "{model_type: mamba2, vocab_size: 400, hidden_size: 32, num_hidden_layers: 2, num_heads: 4, head_dim: 16, state_size: 8, n_groups: 1, "
    "chunk_size: 16, tie_word_embeddings: true}",
]


def test_a_state_space_model_from_random_weights(finished, tiny_llama):
    """Trained whole in float32 with activations made again, asked in bfloat16: scores near those of transformers' own in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sft = ["--lora.r", "0", "--sft.gradient_checkpointing", "true", "--sft.learning_rate", "0.01"]
    orpo = [*sft, "--orpo.gradient_checkpointing", "true", "--orpo.learning_rate", "0.01", "--orpo.warmup", "0"]
    run("pairs", tiny_llama, *SCRATCH)
    run("sft", tiny_llama, *SCRATCH, *sft)
    run("orpo", tiny_llama, *SCRATCH, *orpo)
    run("evaluate", tiny_llama, *SCRATCH, *orpo, "--evaluation.ask", "retrieved")
    folders = {stage: finished / stage / f"{NAME}.scratch" for stage in ("pairs", "sft", "orpo", "evaluate")}
    models = [AutoModelForCausalLM.from_pretrained(folders[stage]).eval() for stage in ("sft", "orpo")]
    assert all(model.dtype == torch.float32 for model in models)
    assert not torch.equal(*(model.backbone.layers[0].mixer.in_proj.weight for model in models))
    tokenizer = AutoTokenizer.from_pretrained(folders["orpo"])
    titles = pl.read_parquet(finished / "prepare" / "items.parquet").sort("item")["title"].to_list()
    names = {item: titles[item - 1].split(" (")[0] for item in range(1, 21)}
    rankings = pl.read_parquet(folders["evaluate"] / "rankings.parquet").filter(pl.col("split") == "test")
    asked = rankings.filter(pl.col("items").list.contains(pl.col("target")))
    assert 0 < asked.height < rankings.height
    row = asked.row(0, named=True)
    events = pl.read_parquet(finished / "prepare" / "interactions.parquet").filter(user=row["user"])["item"].to_list()
    shown = " ".join(f"{names[item]}." for item in events[:-1][-3:])
    prompt = f"Previously, the customer has bought: {shown} In the future, the customer wants to buy"
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    for item, score in zip(row["items"], row["ranker_scores"], strict=True):
        ids = [*tokenizer(f"{prompt} {names[item]}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logps = models[1](torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [logps[at - 1, ids[at]].item() for at in range(len(before), len(ids))]
        assert score == pytest.approx(np.mean(own), abs=0.03)
    rest = rankings.join(asked, on="user", how="anti")
    assert rest["ranker_scores"].to_list() == rest["retriever_scores"].to_list()
    queries = pl.read_parquet(folders["evaluate"] / "queries.parquet")
    assert (queries.group_by("system").len()["len"] == 12).all()
    assert queries["queries"].list.len().unique().to_list() == [3]
    assert queries.filter(system="orpo")["queries"].to_list() != queries.filter(system="sft")["queries"].to_list()


def test_a_model_from_scratch_is_made_once_for_its_shape_and_seed(tiny_llama, there):
    from transformers import AutoConfig, AutoTokenizer

    from llmrec.cli import read_settings
    from llmrec.errors import UserError
    from llmrec.stages import STAGES, inputs

    sizes = "hidden_size: 16, num_hidden_layers: 1, num_heads: 2, head_dim: 16, state_size: 4, n_groups: 1"
    shape = f"{{model_type: mamba2, vocab_size: 400, {sizes}}}"

    def settings(*extra):
        return read_settings("sft", ["--base.id", str(tiny_llama), "--base.scratch", "true", "--base.shape", shape, *extra])[0]

    folder = inputs.base_folder(settings())
    assert folder == inputs.base_folder(settings())
    assert folder != inputs.base_folder(settings("--seed", "1"))
    assert AutoConfig.from_pretrained(folder).model_type == inputs.model_shape(settings()).model_type == "mamba2"
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(tiny_llama).get_vocab()
    assert "random weights of seed 0" in inputs.weights_origin(settings())
    wider = settings("--base.shape", shape.replace("hidden_size: 16", "hidden_size: 32").replace("num_heads: 2", "num_heads: 4"))
    assert STAGES["sft"].decides(wider) != STAGES["sft"].decides(settings())
    with pytest.raises(UserError, match=r"base\.scratch needs base.shape"):
        inputs.base_folder(settings("--base.shape", "null"))


def test_of_two_runs_at_once_one_makes_the_base(tmp_path):
    import threading
    import time

    from llmrec.stages.inputs import made_once

    def make():
        time.sleep(0.2)
        (tmp_path / "models/base").mkdir()  # a second time it would be an error
        made.append(1)

    made: list[int] = []
    runs = [threading.Thread(target=made_once, args=(tmp_path / "models/base", make)) for _ in range(2)]
    for run_ in runs:
        run_.start()
    for run_ in runs:
        run_.join()
    assert made == [1]
