"""The whole pipeline on one's own csv files and a tiny language model, by the commands a user types."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

QUICK = [
    *("--model.dim", "16", "--model.inner", "32"),
    *("--model.mixer.d_state", "8", "--training.epochs", "6", "--training.batch", "8"),
    *("--lightfm.epochs", "3", "--lightfm.components", "8", "--prompt.candidates", "10", "--prompt.history", "5"),
    *(
        "--base.dtype",
        "float32",
        "--sft.batch",
        "2",
        "--orpo.batch",
        "2",
        "--sft.save_steps",
        "3",
        "--orpo.save_steps",
        "3",
    ),
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tiny_llama):
    """A folder with 200 lines of ratings, titles, and a data set recipe; 25 users who each go up through 20 items."""
    folder = tmp_path_factory.mktemp("shop")
    draw = random.Random(0)
    ratings, minute = ["user,item,stars,when"], 0
    for user in range(25):
        first = draw.randrange(20)
        for step in range(8):
            minute += 1
            ratings.append(f"u{user},i{(first + step) % 20},{draw.randint(1, 5)},{1_700_000_000_000 + minute * 60_000}")
    assert len(ratings) == 201
    (folder / "ratings.csv").write_text("\n".join(ratings) + "\n")
    (folder / "titles.csv").write_text("item,name\n" + "".join(f"i{n},Film number {n} (19{n:02d})\n" for n in range(20)))
    (folder / "shop.yaml").write_text(
        "source:\n  format: csv\n  interactions: ratings.csv\n  items: titles.csv\n"
        "  timestamp_unit: ms\n  columns: {user: user, item: item, rating: stars, timestamp: when, title: name}\nfilter: {core: 2}\n"
    )
    return folder


def command(stage, shop, tiny_llama, runs, *extra):
    judged = ["--evaluation.resamples", "200"] if stage == "evaluate" else []
    arguments = ["--dataset", "shop.yaml", "--runs", runs, "--base.id", str(tiny_llama), *QUICK, *judged, *extra]
    return [sys.executable, "-m", "llmrec", stage, "--chain", *arguments]


def environment(shop):
    return {**os.environ, "LLMREC_HOME": str(shop / "cache"), "OMP_NUM_THREADS": "1", "LLMREC_OFFLINE": "1"}


def run(stage, shop, tiny_llama, runs, *extra):
    done = subprocess.run(command(stage, shop, tiny_llama, runs, *extra), cwd=shop, env=environment(shop), capture_output=True, text=True)
    return done


@pytest.fixture(scope="module")
def finished(shop, tiny_llama):
    done = run("evaluate", shop, tiny_llama, "whole")
    assert done.returncode == 0, done.stderr
    return done


def name(stage):
    return f"shop/{stage}/2mamba4rec.llamarec-smollm2-135m"


def test_it_ends_with_a_table_a_verdict_and_one_json_line(finished, shop):
    *text, last = finished.stdout.splitlines()
    outcome = json.loads(last)
    assert outcome["status"] == "made"
    assert (shop / outcome["report"]).stat().st_size > 10_000
    text = "\n".join(text)
    assert all(word in text for word in ("retriever", "sft", "orpo", "fused", "NDCG@10", "report.html"))


def test_the_run_folders_hold_what_the_contract_says(finished, shop):
    files = {
        "shop/prepare": ["interactions.parquet", "items.parquet", "users.parquet", "metrics.json"],
        "shop/retrieve/2mamba4rec": ["model.safetensors", "candidates.parquet", "per_user.parquet", "metrics.json"],
        "shop/retrieve/lightfm": ["model.safetensors", "candidates.parquet", "per_user.parquet", "metrics.json"],
        name("pairs"): ["sft.parquet", "preferences.parquet", "prompt.yaml", "README.md"],
        name("sft"): ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "prompt.yaml", "README.md", "train_log.jsonl"],
        name("orpo"): ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "prompt.yaml", "README.md", "train_log.jsonl"],
        name("evaluate"): ["rankings.parquet", "per_user.parquet", "metrics.json", "report.html", "summary.txt"],
    }
    for folder, expected in files.items():
        there = {path.name for path in (shop / "whole" / folder).iterdir()}
        assert {*expected, "stage.json"} <= there
        assert "checkpoints" not in there
    assert not list((shop / "whole").rglob("*.partial"))


def test_rankings_and_metrics_agree(finished, shop):
    folder = shop / "whole" / name("evaluate")
    metrics = json.loads((folder / "metrics.json").read_text())
    rankings = pl.read_parquet(folder / "rankings.parquet").filter(pl.col("split") == "test")
    assert rankings.height == 25
    for column, system in (("retriever_scores", "retriever"), ("ranker_scores", "orpo"), ("fused_scores", "fused")):
        gains = []
        for target, items, scores in rankings.select("target", "items", column).iter_rows():
            own = scores[items.index(target)] if target in items else np.inf
            rank = sum(score >= own for score in scores) if target in items else np.inf
            gains.append(1 / np.log2(rank + 1) if rank <= 10 else 0)
        assert metrics["overall"][system]["ndcg@10"] == pytest.approx(np.mean(gains), abs=1e-6)
    hit = rankings.select(pl.col("items").list.contains(pl.col("target")).mean()).item()
    assert metrics["bound"]["hr@10"] == pytest.approx(hit)
    assert metrics["protocol"]["users_evaluated"] == 25


def test_what_stands_beside_the_table_agrees_with_the_rankings(finished, shop):
    folder = shop / "whole" / name("evaluate")
    metrics = json.loads((folder / "metrics.json").read_text())
    events = pl.read_parquet(shop / "whole" / "shop/prepare/interactions.parquet")
    rankings = pl.read_parquet(folder / "rankings.parquet")
    test, valid = (rankings.filter(pl.col("split") == split) for split in ("test", "valid"))

    lists = [
        [items[n] for n in np.argsort([-s for s in scores], kind="stable")] for items, scores in test[["items", "ranker_scores"]].rows()
    ]
    assert metrics["beyond_accuracy"]["orpo"]["coverage@10"] == len({item for items in lists for item in items[:10]}) / 20
    users_with = dict(events.filter(pl.col("split") == "train").group_by("item").agg(pl.col("user").n_unique()).rows())
    popularity = np.mean([np.mean([users_with.get(item, 0) for item in items[:10]]) for items in lists])
    assert metrics["beyond_accuracy"]["orpo"]["popularity@10"] == pytest.approx(popularity)
    assert set(metrics["beyond_accuracy"]) == {"retriever", "orpo", "fused"}

    hits = test.filter(pl.col("items").list.contains(pl.col("target")))
    assert [metrics["calibration"][system]["users"] for system in ("sft", "orpo")] == [hits.height] * 2
    first = [items[int(np.argmax(scores))] == target for target, items, scores in hits[["target", "items", "ranker_scores"]].rows()]
    assert metrics["calibration"]["orpo"]["accuracy"] == pytest.approx(np.mean(first))

    rating = {(user, split): (item, stars) for user, item, stars, split in events[["user", "item", "rating", "split"]].rows()}
    won = []
    for user, items, scores in valid[["user", "items", "ranker_scores"]].rows():
        (a, stars_a), (b, stars_b) = rating[user, "valid"], rating[user, "test"]
        if stars_a != stars_b and b in items:
            difference = scores[items.index(a)] - scores[items.index(b)]
            won.append(0.5 if difference == 0 else (difference > 0) == (stars_a > stars_b))
    assert len(won) > 1
    pairwise = metrics["preference"]["pairwise"]
    assert {system: found["users"] for system, found in pairwise.items()} == dict.fromkeys(["retriever", "sft", "orpo"], len(won))
    assert pairwise["orpo"]["accuracy"] == pytest.approx(np.mean(won))
    gained = next(c for c in metrics["preference"]["comparisons"] if (c["b"], c["metric"]) == ("sft", "pairwise"))
    assert gained["difference"] == pytest.approx(pairwise["orpo"]["accuracy"] - pairwise["sft"]["accuracy"])
    assert metrics["preference"]["liked"]["users"] == sum(rating[user, "test"][1] >= 4 for user in test["user"])

    for system, found in metrics["ties"].items():
        optimistic, pessimistic = found["ndcg@10"]
        assert pessimistic == metrics["overall"][system]["ndcg@10"]
        assert pessimistic - 1e-12 <= found["expected_ndcg@10"] <= optimistic + 1e-12
    assert all(c["p_permutation"] <= c["p_holm"] <= 1 for c in metrics["comparisons"])


def test_asking_only_where_the_target_was_retrieved_changes_no_metric(finished, shop, tiny_llama):
    """By popularity, which misses targets: the other retriever finds all in this shop."""
    found = []
    for ask in ("all", "retrieved"):
        done = run("evaluate", shop, tiny_llama, "asked", "--retriever", "popularity", "--evaluation.ask", ask, "--force")
        assert done.returncode == 0, done.stderr
        folder = shop / json.loads(done.stdout.splitlines()[-1])["folder"]
        found.append((json.loads((folder / "metrics.json").read_text()), pl.read_parquet(folder / "rankings.parquet")))
    (every, all_asked), (some, some_asked) = found
    for key in ("overall", "hit_subset", "comparisons", "fusion", "ties", "calibration", "preference"):
        assert some[key] == every[key]
    assert some["beyond_accuracy"] == {"retriever": every["beyond_accuracy"]["retriever"]}  # the others rank few users' lists
    missed = ~pl.col("items").list.contains(pl.col("target"))
    assert some_asked.filter(missed)["ranker_scores"].to_list() == some_asked.filter(missed)["retriever_scores"].to_list()
    assert all_asked.filter(missed)["ranker_scores"].to_list() != some_asked.filter(missed)["ranker_scores"].to_list()
    assert all_asked.filter(~missed).equals(some_asked.filter(~missed))


def test_the_adapter_loads_with_plain_peft(finished, shop, tiny_llama):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(base, shop / "whole" / name("orpo"))
    assert model.peft_config["default"].base_model_name_or_path == str(tiny_llama)


def test_a_second_run_does_nothing(finished, shop, tiny_llama):
    before = {path: path.stat().st_mtime_ns for path in (shop / "whole").rglob("*") if path.is_file()}
    done = run("evaluate", shop, tiny_llama, "whole")
    assert done.returncode == 0
    assert "nothing to do" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "up to date"
    assert before == {path: path.stat().st_mtime_ns for path in (shop / "whole").rglob("*") if path.is_file()}


def test_a_dry_run_says_what_would_be_done_and_does_nothing(finished, shop, tiny_llama):
    done = run("evaluate", shop, tiny_llama, "elsewhere", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert [step["state"] for step in json.loads(done.stdout.splitlines()[-1])["steps"]] == ["would be made"] * 7
    assert not (shop / "elsewhere").exists()
    again = run("evaluate", shop, tiny_llama, "whole", "--dry_run", "--orpo.beta", "0.2")
    states = [step["state"] for step in json.loads(again.stdout.splitlines()[-1])["steps"]]
    assert states[:5] == ["up to date"] * 5
    assert "orpo.beta=0.05 (now 0.2)" in states[5]


def test_other_settings_need_a_name_or_force(finished, shop, tiny_llama):
    done = run("evaluate", shop, tiny_llama, "whole", "--sft.learning_rate", "0.5")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "sft.learning_rate=0.0003 (now 0.5)" in done.stderr
    assert "--variant" in done.stderr


def comparable(folder: Path):
    """Everything a pipeline wrote but seconds, memory and dates."""
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
    for path in folder.rglob("*.parquet"):
        found[path.relative_to(folder)] = pl.read_parquet(path).to_dicts()
    for path in folder.rglob("metrics.json"):
        content = json.loads(path.read_text())
        for key in ("latency", "train", "verdict", "seconds", "tokens_per_second", "peak_memory_mb"):
            content.pop(key, None)
        found[path.relative_to(folder)] = content
    return found


@pytest.mark.parametrize("seed", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_identical_results(finished, shop, tiny_llama, seed):
    draw, runs = random.Random(seed), f"killed{seed}"
    killed = 0
    for _ in range(6):
        process = subprocess.Popen(
            command("evaluate", shop, tiny_llama, runs),
            cwd=shop,
            env=environment(shop),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(draw.uniform(4, 14))
            break
        except subprocess.TimeoutExpired:
            if killed % 2:
                process.kill()  # the chain alone: the stage it runs must not go on as an orphan
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            time.sleep(0.1)
    assert killed >= 2
    done = run("evaluate", shop, tiny_llama, runs)
    assert done.returncode == 0, done.stderr
    whole, resumed = comparable(shop / "whole"), comparable(shop / runs)
    assert whole.keys() == resumed.keys()
    for path, content in whole.items():
        assert resumed[path] == content, path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt.budget", "20"], "budget"),
        (["--prompt.budget", "2049"], "reads 2048 tokens at most"),
        (["--base.id", "/no/such/model"], "missing base model"),
        (["--lora.targets", "[no_such_layer]"], "no_such_layer"),
    ],
)
def test_bad_settings_of_the_ranker_are_one_line(finished, shop, tiny_llama, arguments, message):
    runs = shop / "whole"
    done = run("evaluate", shop, tiny_llama, "whole", "--variant", "bad", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (runs / f"{name('sft')}.bad").exists()


def test_exported_and_merged_it_needs_no_peft(finished, shop, tiny_llama):
    """A folder that transformers reads alone, and that answers as base and adapter do."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run("export", shop, tiny_llama, "whole", "--merged")
    assert done.returncode == 0, done.stderr
    folder = shop / json.loads(done.stdout.splitlines()[-1])["folder"]
    assert folder == shop / "whole" / f"{name('export')}.merged"
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "prompt.yaml", "README.md", "stage.json"} <= files
    assert not [file for file in files if file.startswith("adapter")]
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "merged into it" in card
    assert "PeftModel" not in card

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), shop / "whole" / name("orpo"))
    merged = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("User history: (1) Film", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


def test_exported_alone_the_adapter_comes_with_all_it_needs(finished, shop, tiny_llama):
    done = run("export", shop, tiny_llama, "whole")
    assert done.returncode == 0, done.stderr
    folder, tuned = shop / "whole" / name("export"), shop / "whole" / name("orpo")
    for file in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "prompt.yaml", "README.md"):
        assert (folder / file).read_bytes() == (tuned / file).read_bytes()
    assert not (folder / "train_log.jsonl").exists()


@pytest.mark.slow
def test_exported_and_merged_from_4_bits_it_answers_as_base_and_adapter(finished, shop, tiny_llama, tmp_path):
    """What is merged into are the weights that the 4 bits stand for, not those of the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from llmrec.config import Base
    from llmrec.rankers.backbone import load_base, load_tokenizer, load_tuned
    from llmrec.rankers.letters import letter_logprobs

    tokenizer = load_tokenizer(tiny_llama)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}  # 64 weights share a scale
    wider = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes))
    wider.get_output_embeddings().weight.data.normal_(std=0.3)
    wider.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    settings = ["--variant", "nf4", "--base.quantise", "nf4", "--sft.learning_rate", "0.02", "--orpo.learning_rate", "0.01"]
    done = run("export", shop, tmp_path, "whole", "--merged", *settings)
    assert done.returncode == 0, done.stderr
    folder, tuned = shop / json.loads(done.stdout.splitlines()[-1])["folder"], shop / "whole" / f"{name('orpo')}.nf4"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    draw = np.random.default_rng(4)
    rows, letters = draw.integers(1, 300, (100, 30)).tolist(), [tokenizer.encode(letter)[-1] for letter in "ABCDEFGHIJ"]
    nf4 = Base(dtype="float32", quantise="nf4")
    adapted, merged = load_tuned(tmp_path, nf4, tuned), AutoModelForCausalLM.from_pretrained(folder)
    expected, found = (letter_logprobs(model, rows, letters) for model in (adapted, merged))
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.97  # scoring in 4 bits rounds the scales
    assert np.abs(found - expected).max() < 0.1
    for other in (load_base(tmp_path, nf4), load_tuned(tmp_path, Base(dtype="float32"), tuned)):  # what it must not be
        assert np.abs(letter_logprobs(other, rows, letters) - found).max() > 0.5
