"""`llmrec bench` on tiny finished models: what it writes, what it takes up again, what it refuses."""

import json
import random
import shutil

import numpy as np
import polars as pl
import pytest

from llmrec.cli import main
from llmrec.stages import bench_rankers

DATA = ["--dataset", "shop.yaml"]
SMALL = ["--model.dim", "16", "--model.inner", "16", "--training.epochs", "1", "--training.max_length", "6"]
SHAPES = {
    "gru4rec": [*SMALL, "--model.mixer.hidden", "16"],
    "sasrec": SMALL,
    "lightfm": ["--lightfm.epochs", "1", "--lightfm.components", "4"],
    "popularity": [],
}
RANKER = ["--retriever", "popularity", "--base.dtype", "float32", "--prompt.candidates", "6", "--prompt.history", "3", "--limit_users", "9"]
RANKER += [
    "--prompt.title_tokens",
    "6",
    "--prompt.budget",
    "400",
    "--pairs.sft_rows",
    "4",
    "--pairs.prompts",
    "4",
    "--pairs.lightfm",
    "none",
]
NAME = "popularity.llamarec-smollm2-135m"
NO_RANKERS = ["--bench.rankers", "none"]
QUICK = ["--bench.users", "12", "--bench.ranker_users", "5", "--bench.batch", "5", "--bench.ranker_batch", "2"]
COLUMNS = ["name", "way", "user", "users", "repeat", "seconds", "tokens", "outlier"]


@pytest.fixture(scope="module", autouse=True)
def finished(tmp_path_factory, tiny_llama):
    """25 users who each go up through 20 items; four retrievers, one evaluated ranker of letters, one that writes titles."""
    folder = tmp_path_factory.mktemp("shop")
    draw = random.Random(0)
    events = [(user, (draw.randrange(3) * user + step) % 20, draw.randint(1, 5)) for user in range(25) for step in range(8)]
    lines = [f"u{user},i{item},{stars},{1_700_000_000 + 60 * at}" for at, (user, item, stars) in enumerate(events)]
    (folder / "ratings.csv").write_text("\n".join(["user,item,rating,timestamp", *lines]) + "\n")
    (folder / "titles.csv").write_text("item,title\n" + "".join(f"i{n},Film {'abcdefghijklmnopqrst'[n]}\n" for n in range(20)))
    (folder / "shop.yaml").write_text(
        "source: {format: csv, interactions: ratings.csv, items: titles.csv}\nfilter: {core: 0, duplicates: keep}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LLMREC_HOME", str(folder / "cache"))
        patch.setenv("LLMREC_OFFLINE", "1")
        assert main(["prepare", *DATA]) == 0
        for name, shape in SHAPES.items():
            assert main(["retrieve", *DATA, "--retriever", name, *shape]) == 0
        tuned = [*DATA, "--base.id", str(tiny_llama), *RANKER]
        for stage in ("pairs", "orpo", "evaluate"):
            start = [] if stage == "pairs" else ["--orpo.start", "base"]
            assert main([stage, *tuned, *start, *(["--evaluation.resamples", "50"] if stage == "evaluate" else [])]) == 0
        for stage in ("pairs", "sft"):
            assert main([stage, *tuned, "--prompt.template", "gpt4rec", "--variant", "titles"]) == 0
        yield folder / "runs/shop"


def bench(*extra):
    return main(["bench", *DATA, *QUICK, *extra])


@pytest.fixture(scope="module")
def whole(finished):
    assert bench("--bench.lengths", "4,40") == 0
    folder = finished / "bench/all"
    return json.loads((folder / "metrics.json").read_text()), pl.read_parquet(folder / "latency.parquet"), folder


def test_every_finished_model_is_timed_beside_its_metrics(whole, finished):
    facts, _, folder = whole
    assert set(facts["models"]) == {*SHAPES, NAME, f"{NAME}.titles"}
    for name in SHAPES:
        made = json.loads((finished / "retrieve" / name / "metrics.json").read_text())
        found = facts["models"][name]
        assert found["parameters"] == made["parameters"]
        for split in ("test", "test_masked"):
            assert found["metrics"][split] == {key: made[split][key] for key in ("hr@10", "ndcg@10", "mrr@10")}
    evaluated = json.loads((finished / "evaluate" / NAME / "metrics.json").read_text())
    assert facts["models"][NAME]["metrics"]["test_masked"]["ndcg@10"] == evaluated["overall"]["orpo"]["ndcg@10"]
    assert facts["models"][NAME]["run"] == f"orpo/{NAME}"
    assert facts["models"][f"{NAME}.titles"]["metrics"] == {}
    assert facts["models"][f"{NAME}.titles"]["run"] == f"sft/{NAME}.titles"
    pictures = {"quality_latency.png", "latency_length.png", "memory_length.png"}
    assert {path.name for path in folder.iterdir()} == {"latency.parquet", "metrics.json", "stage.json", "summary.txt", *pictures}


def test_only_models_with_a_state_go_on_from_it(whole):
    facts, rows, _ = whole
    assert [name for name, found in facts["models"].items() if "step" in found] == ["gru4rec"]
    assert set(rows.filter(name="gru4rec")["way"]) == {"one", "batch", "step", "length 4", "length 4, step", "length 40", "length 40, step"}


def test_means_are_those_of_the_rows(whole):
    facts, rows, _ = whole
    assert rows.columns == COLUMNS
    assert (rows["seconds"] > 0).all()
    each = rows.filter(~pl.col("outlier")).with_columns(pl.col("seconds") / pl.col("users"))
    means = each.group_by("name", "way", "user").agg(pl.col("seconds").mean()).group_by("name", "way").agg(pl.col("seconds").mean())
    means = means.filter(~pl.col("way").str.starts_with("length"))  # their users have no number
    assert means.height == 4 * 2 + 1 + 2 + 3
    for name, way, mean in means.iter_rows():
        found = facts["models"][name][way]
        assert found["mean"] == pytest.approx(mean)
        assert found["ci95"][0] < mean < found["ci95"][1]
    one = rows.filter(name="sasrec", way="one")
    assert one["user"].n_unique() == 12
    assert set(one["repeat"]) == {0, 1, 2}
    assert rows.filter(name="sasrec", way="batch")["users"].to_list() == [5] * 2 * 3


def test_tokens_are_those_of_the_prompts(whole, finished, tiny_llama):
    """A prompt by hand, for every user who was timed."""
    from transformers import AutoTokenizer

    facts, rows, _ = whole
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    pairs = pl.read_parquet(finished / "pairs" / NAME / "sft.parquet")["prompt"]
    usual = np.mean([len(tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in pairs])
    one = rows.filter(name=NAME, way="one")
    assert one["tokens"].to_numpy() == pytest.approx(usual, rel=0.05)  # titles are one letter, so prompts are nearly equally long
    found = facts["models"][NAME]
    assert found["one"]["tokens_per_second"] == pytest.approx(one["tokens"].mean() / found["one"]["mean"])
    assert found["first_token"] == found["one"]
    written = facts["models"][f"{NAME}.titles"]
    assert written["first_token"]["mean"] < written["one"]["mean"]
    assert "tokens_per_second" not in written["first_token"]
    assert rows.filter(name=f"{NAME}.titles", way="one")["tokens"].max() <= 10 * 8  # ten queries, each of up to seven tokens and an end


def test_parameters_of_a_language_model_are_counted_with_its_adapter(whole, finished, tiny_llama):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), finished / "orpo" / NAME)
    total = sum(weight.numel() for weight in model.parameters())
    table = model.get_input_embeddings().weight.numel()
    assert whole[0]["models"][NAME]["parameters"] == {"total": total, "non_embedding": total - table}


def test_lengths_beyond_the_trained_positions_are_measured_with_random_weights(whole):
    lengths = whole[0]["lengths"]
    assert set(lengths) == {"gru4rec", "sasrec"}
    for name, rows in lengths.items():
        assert [row["length"] for row in rows] == [4, 40]
        assert all(row["mean"] > 0 for row in rows)
        assert all(("step" in row) == (name == "gru4rec") for row in rows)
        assert all(row["training_memory_mb"] is None or row["training_memory_mb"] >= 0 for row in rows)


def test_the_table_is_printed_and_a_second_run_prints_it_again(whole, capsys):
    assert bench("--bench.lengths", "4,40", "--chain") == 0
    captured = capsys.readouterr()
    *text, last = captured.out.splitlines()
    assert json.loads(last)["status"] == "up to date"
    assert "\n".join(text).strip() == (whole[2] / "summary.txt").read_text().strip()
    assert all(name in "\n".join(text) for name in SHAPES)
    assert main(["bench", *DATA, *QUICK, "--bench.lengths", "4,40", "--dry_run"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"][0]["state"] == "up to date"


def test_a_model_that_was_trained_since_is_named(whole, finished, capsys):
    assert main(["retrieve", *DATA, "--retriever", "popularity.again"]) == 0
    try:
        assert bench("--bench.lengths", "4,40") == 2
        assert "retrieve/popularity.again=None (now " in capsys.readouterr().err
    finally:
        shutil.rmtree(finished / "retrieve/popularity.again")


def test_a_killed_run_goes_on_with_the_next_model(finished, monkeypatch, capsys):
    def dies(*arguments):
        raise KeyboardInterrupt

    chosen = ["--variant", "killed", "--bench.retrievers", "popularity, lightfm", "--bench.rankers", NAME]
    with monkeypatch.context() as patch:
        patch.setattr(bench_rankers, "time_ranker", dies)
        assert bench(*chosen) == 130
    capsys.readouterr()
    assert bench(*chosen) == 0
    error = capsys.readouterr().err
    assert f"timing ranker {NAME}" in error
    assert "timing retriever" not in error
    facts = json.loads((finished / "bench/killed/metrics.json").read_text())
    assert list(facts["models"]) == ["popularity", "lightfm", NAME]
    assert "lengths" not in facts
    assert not (finished / "bench/killed/checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bench.retrievers", "nobody"], "there is no finished run 'nobody' on this data; there are: gru4rec, lightfm"),
        (["--bench.rankers", f"{NAME},x"], "bench.rankers: there is no finished run 'x'"),
        (["--bench.retrievers", "none", "--bench.rankers", "none"], "no finished model"),
        (["--bench.lengths", "50,many", *NO_RANKERS], "'many' is no length"),
        (["--bench.samples", "1", *NO_RANKERS], "bench.samples is 1: it must be at least 2"),
        (["--bench.users", "0", *NO_RANKERS], "bench.users is 0"),
    ],
)
def test_mistakes_are_a_line(arguments, message, capsys):
    assert bench("--variant", "wrong", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


def test_retrievers_of_other_data_are_left_out(finished, capsys):
    """Prepared anew with another filter, there is nothing finished."""
    try:
        assert main(["prepare", *DATA, "--filter.core", "2", "--force"]) == 0
        assert bench("--variant", "other", "--filter.core", "2", "--bench.rankers", "none") == 2
        assert "no finished model of this data" in capsys.readouterr().err
    finally:
        assert main(["prepare", *DATA, "--force"]) == 0


def test_weights_that_do_not_fit_are_named(finished, capsys):
    folder = finished / "retrieve/sasrec"
    kept = (folder / "model.safetensors").read_bytes()
    try:
        shutil.copy(finished / "retrieve/gru4rec/model.safetensors", folder / "model.safetensors")
        assert bench("--variant", "misfit", "--bench.retrievers", "sasrec", "--bench.rankers", "none") == 2
        assert "sasrec/model.safetensors is of another version" in capsys.readouterr().err
    finally:
        (folder / "model.safetensors").write_bytes(kept)
