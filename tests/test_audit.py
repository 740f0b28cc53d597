"""A small pipeline put to the test: its audit says nothing of a clean run and finds each planted leak by its own check alone; what it
keeps of position bias adds up; and its retriever is asked whether order matters."""

import contextlib
import io
import json
import pkgutil
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from transformers import AutoTokenizer

from llmrec.cli import main, read_settings
from llmrec.data.sequences import TRAIN
from llmrec.data.tables import load_titles
from llmrec.errors import UserError
from llmrec.evaluation import metrics
from llmrec.prompting import Prompt
from llmrec.stages import execution, upstream
from llmrec.stages.audit_folders import chain_of
from llmrec.stages.pairs import prompt_writer

SMALL = [
    *("--retriever", "sasrec", "--model.dim", "16", "--model.inner", "32", "--model.mixer.d_state", "8", "--training.epochs", "3"),
    *("--training.batch", "8"),
    *("--lightfm.epochs", "2", "--lightfm.components", "8"),
]
RANKER = [
    *("--prompt.candidates", "8", "--prompt.history", "5", "--base.dtype", "float32", "--lora.r", "2", "--sft.batch", "4"),
    *("--orpo.batch", "4", "--pairs.sft_rows", "12", "--pairs.prompts", "8", "--evaluation.resamples", "200", "--evaluation.orders", "3"),
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A recipe: 25 users who each go up through 20 items, with stars."""
    folder = tmp_path_factory.mktemp("shop")
    draw, rows = random.Random(0), ["user,item,stars,when"]
    for user in range(25):
        first = draw.randrange(20)
        rows += [f"u{user},i{(first + step) % 20},{draw.randint(1, 5)},{1_700_000_000 + 60 * (8 * user + step)}" for step in range(8)]
    (folder / "ratings.csv").write_text("\n".join(rows) + "\n")
    (folder / "titles.csv").write_text("item,name\n" + "".join(f"i{n},Film number {n}\n" for n in range(20)))
    columns = "{user: user, item: item, rating: stars, timestamp: when, title: name}"
    source = f"format: csv, interactions: {folder}/ratings.csv, items: {folder}/titles.csv, columns: {columns}"
    (folder / "shop.yaml").write_text(f"source: {{{source}}}\nfilter: {{core: 2}}\n")
    return folder / "shop.yaml"


def make(stage, shop, runs, *extra):
    """The folder of a stage that was run in this process, with all it rests on."""
    config, _ = read_settings(stage, ["--dataset", str(shop), "--runs", str(runs), *SMALL, *extra])
    with contextlib.redirect_stdout(io.StringIO()):
        for name, its_config in [*upstream(stage, config), (stage, config)]:
            made = execution.one(name, its_config)
    return Path(made["folder"])


@pytest.fixture(scope="module")
def clean(shop, tiny_llama):
    """A finished evaluation of a ranker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_HOME", str(shop.parent / "cache"))
        yield make("evaluate", shop, shop.parent / "runs", *RANKER, "--base.id", str(tiny_llama))


@pytest.fixture
def copy(clean, tmp_path):
    """The run folders of the clean run, elsewhere and to be changed: stage -> folder."""
    runs = shutil.copytree(clean.parents[1], tmp_path / "shop")
    return {stage: runs / stage / clean.name for stage in ("pairs", "sft", "orpo", "evaluate")} | {"prepare": runs / "prepare"}


def audit(folder, capsys):
    """Exit code of `llmrec audit`, and the names of the checks that found a leak."""
    capsys.readouterr()
    code = main(["audit", str(folder)])
    *lines, last = capsys.readouterr().out.splitlines()
    outcome = json.loads(last)
    found = [verdict for verdict in outcome["verdicts"] if verdict["passed"] is False]
    assert outcome["leaks"] == len(found) == sum(line.startswith("LEAK") for line in lines)
    return code, [(verdict["run"].split("/")[0], verdict["name"]) for verdict in found], outcome


def test_a_clean_run_passes_every_check_of_everything_it_rests_on(clean, capsys):
    code, found, outcome = audit(clean, capsys)
    assert (code, found) == (0, [])
    passed = {(verdict["run"].split("/")[0], verdict["name"]) for verdict in outcome["verdicts"] if verdict["passed"]}
    assert {
        ("prepare", "time order"),
        ("retrieve", "future of positions"),
        ("retrieve", "after the end"),
        ("retrieve", "training part"),
        ("retrieve", "ranks of the model"),
        ("pairs", "answers of preferences"),
        ("pairs", "texts of sft"),
        ("sft", "verbaliser"),
        ("orpo", "verbaliser"),
        ("evaluate", "verbaliser"),
        ("evaluate", "ties of orpo"),
        ("evaluate", "metrics"),
    } <= passed


def test_a_bidirectional_model_trained_on_all_positions(shop, tmp_path, monkeypatch, capsys):
    """The trainer refuses this; who trains it all the same is found out by the weights."""
    monkeypatch.setattr("llmrec.retrievers.training.check", lambda model, training: None)
    monkeypatch.setattr("llmrec.ssm.native.library", lambda: None)  # compiling would take longer than this training
    hydra = ["--retriever", "hydra4rec", "--model.mixer.headdim", "8", "--training.windows", "all"]
    folder = make("retrieve", shop, tmp_path / "runs", *hydra)
    assert audit(folder, capsys)[:2] == (1, [("retrieve", "future of positions")])
    honest = make("retrieve", shop, tmp_path / "runs", *hydra[:4], "--retriever", "hydra4rec.prefixes", "--training.windows", "prefixes")
    assert audit(honest, capsys)[:2] == (0, [])


def with_held_out(real):
    """The same function, handed all events as training events."""
    return lambda sequences, *rest: real(replace(sequences, split=np.full_like(sequences.split, TRAIN)), *rest)


@pytest.mark.parametrize(
    ("retriever", "place"), [("sasrec", "windows.cut"), ("lightfm", "lightfm.training_matrix"), ("popularity", "popularity.Popularity.fit")]
)
def test_test_targets_in_the_training(retriever, place, shop, tmp_path, monkeypatch, capsys):
    """The code is honest again when the audit looks: the run itself says what it was trained on."""
    with monkeypatch.context() as patch:
        path = f"llmrec.retrievers.{place}"
        patch.setattr(path, with_held_out(pkgutil.resolve_name(path)))
        leaking = make("retrieve", shop, tmp_path / "runs", "--retriever", retriever)
    code, found, _ = audit(leaking, capsys)
    assert code == 1
    assert ("retrieve", "training part") in found
    assert {name for _, name in found} <= {"training part", "biases", "counts"}
    honest = make("retrieve", shop, tmp_path / "runs", "--retriever", f"{retriever}.honest")
    assert audit(honest, capsys)[:2] == (0, [])


def test_old_runs_that_did_not_record_what_they_did_are_not_called_ok(copy, clean, capsys):
    for folder, key in ((copy["evaluate"], "labels"), (copy["prepare"].parent / "retrieve/sasrec", "trained_on")):
        said = json.loads((folder / "metrics.json").read_text())
        said.pop(key, None)
        (folder / "metrics.json").write_text(json.dumps(said))
    code, found, outcome = audit(copy["evaluate"], capsys)
    assert (code, found) == (0, [])
    unknown = {verdict["name"]: verdict["detail"] for verdict in outcome["verdicts"] if verdict["passed"] is None}
    assert "may be in it" in unknown["training part"]
    assert "did not record by which tokens" in unknown["verbaliser"]


def test_an_evaluation_that_scored_by_other_tokens_than_were_trained(copy, tiny_llama, capsys):
    """As it says itself: letters as they stand in a prompt's row, and the same with two of them exchanged."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    row = pl.read_parquet(copy["pairs"] / "sft.parquet").row(0, named=True)
    letters = [row["completion"].replace(row["completion"].strip(), letter) for letter in "ABCDEFGH"]
    ids = [tokenizer(row["prompt"] + letter).input_ids[-1] for letter in letters]
    said = json.loads((copy["evaluate"] / "metrics.json").read_text())
    for order, leaks in ((ids, []), ([ids[1], ids[0], *ids[2:]], [("evaluate", "verbaliser")])):
        said["labels"] = dict(zip(letters, order, strict=True))
        (copy["evaluate"] / "metrics.json").write_text(json.dumps(said))
        assert audit(copy["evaluate"], capsys)[1] == leaks


def test_a_test_item_that_wins_a_pair(copy, capsys):
    """Consistently: the prompt shows it, the letter is its own."""
    evidence = copy["pairs"]
    made = chain_of(evidence)[evidence]
    table = pl.read_parquet(evidence / "preferences.parquet")
    row = table.row(0, named=True)
    events = pl.read_parquet(copy["prepare"] / "interactions.parquet")
    item = events.filter(user=row["user"], split="test")["item"].item()
    swapped = {row["chosen_item"]: item, item: row["chosen_item"]}
    pool = [swapped.get(shown, shown) for shown in row["pool_items"]]
    prompt = prompt_writer(made.config, load_titles(copy["prepare"])).write(row["history_items"], pool)
    assert isinstance(prompt, Prompt)
    row |= {"chosen_item": item, "pool_items": pool, "prompt": prompt.text}
    row["rejected_item"] = swapped.get(row["rejected_item"], row["rejected_item"])
    pl.concat([pl.DataFrame([row], schema=table.schema), table[1:]]).write_parquet(evidence / "preferences.parquet")
    code, found, outcome = audit(evidence, capsys)
    assert (code, found) == (1, [("pairs", "answers of preferences")])
    detail = next(verdict["detail"] for verdict in outcome["verdicts"] if verdict["passed"] is False)
    assert f"row 0: chosen_item {item} is user {row['user']}'s validation or test item" in detail


def test_a_letter_scored_by_a_token_that_was_not_trained(copy, capsys):
    """The tokenizer beside the adapter calls A what the base model's calls B."""
    path = copy["orpo"] / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    path.write_text(json.dumps(tokenizer))
    assert audit(copy["orpo"], capsys)[:2] == (1, [("orpo", "verbaliser")])


def test_ties_counted_for_the_target(copy, capsys):
    """All candidates of some users get one score and their targets rank 1; the metrics are what these ranks give."""
    folder = copy["evaluate"]
    rankings, per_user = pl.read_parquet(folder / "rankings.parquet"), pl.read_parquet(folder / "per_user.parquet")
    said = json.loads((folder / "metrics.json").read_text())
    tied = pl.col("user") < 5
    even = pl.col("ranker_scores").list.eval(pl.element() * 0)
    rankings.with_columns(pl.when(tied).then(even).otherwise(pl.col("ranker_scores"))).write_parquet(folder / "rankings.parquet")
    per_user = per_user.with_columns(orpo_rank=pl.when(tied & (pl.col("orpo_rank") > 0)).then(1).otherwise(pl.col("orpo_rank")))
    per_user.write_parquet(folder / "per_user.parquet")
    said["overall"]["orpo"] = metrics.summary(per_user["orpo_rank"].to_numpy())
    (folder / "metrics.json").write_text(json.dumps(said))
    assert audit(folder, capsys)[:2] == (1, [("evaluate", "ties of orpo")])


def test_mistakes_are_one_line_and_exit_code_2(clean, copy, tmp_path, capsys):
    capsys.readouterr()
    assert main(["audit", str(tmp_path)]) == 2
    stage = json.loads((copy["prepare"] / "stage.json").read_text())
    (copy["prepare"] / "stage.json").write_text(json.dumps(stage | {"content": "0" * 64}))
    assert main(["audit", str(copy["pairs"])]) == 2
    nothing, changed = capsys.readouterr().err.splitlines()
    assert "is no finished run" in nothing
    assert "was made again after" in changed


def test_position_bias_is_kept_and_adds_up(clean):
    """From what the stage wrote: letters of every prompt, an NDCG@10 for each order, and of their mean what the table has."""
    found = json.loads((clean / "metrics.json").read_text())
    bias = found["position_bias"]
    assert (bias["orders"], bias["users"], len(bias["ndcg@10_per_order"])) == (3, 25, 3)
    assert list(bias["letters"]) == list("ABCDEFGH")
    assert sum(bias["letters"].values()) == 3 * 25
    assert bias["ndcg@10_averaged"] == pytest.approx(found["overall"]["orpo"]["ndcg@10"])
    assert 0 <= bias["same_top"] <= 1
    assert found["latency"]["ranker_seconds_one_order"] > 0
    assert "position bias: NDCG@10 from" in (clean / "summary.txt").read_text()


def test_order_is_asked_of_the_trained_retriever(clean, shop, capsys):
    """As they are, the histories give the retriever's own metrics."""
    folder = make("order", shop, shop.parent / "runs", "--order.shuffles", "2")
    assert folder == clean.parents[1] / "order" / "sasrec"
    found = json.loads((folder / "metrics.json").read_text())
    retrieved = json.loads((clean.parents[1] / "retrieve" / "sasrec" / "metrics.json").read_text())
    assert found["variants"]["as it is"] == pytest.approx(retrieved["test"])
    assert found["protocol"] == retrieved["protocol"]
    assert {name: len(orders) for name, orders in found["per_order"].items()} == {
        "as it is": 1,
        "shuffled": 2,
        "last kept": 2,
        "reversed": 1,
    }
    assert len(found["comparisons"]) == 6
    assert (folder / "order.png").stat().st_size > 5_000
    assert found["verdict"] in (folder / "summary.txt").read_text()
    assert main(["audit", str(folder)]) == 0  # of what it rests on


def test_only_sequence_models_read_an_order(clean, shop):
    with pytest.raises(UserError, match="lightfm does not read histories in order"):
        make("order", shop, shop.parent / "runs", "--retriever", "lightfm")
    with pytest.raises(UserError, match=r"order\.shuffles is 0"):
        make("order", shop, shop.parent / "runs", "--order.shuffles", "0", "--variant", "none")
