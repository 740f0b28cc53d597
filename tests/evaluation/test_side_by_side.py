"""Runs side by side: what may be compared, seeds aggregated, tests corrected, in every form; on run folders as the stages write them."""

import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import polars as pl
import pytest

from llmrec import measured, runs
from llmrec.cli import main
from llmrec.config import Config
from llmrec.errors import UserError
from llmrec.evaluation import metrics, protocol
from llmrec.evaluation.printed_tables import impossible, read
from llmrec.evaluation.side_by_side import over_all_seeds, table
from llmrec.evaluation.table_formats import render

USERS = 200


def ranks_of(skill, seed):
    """Ranks of a system's targets; all systems share what makes a user easy."""
    easy = np.random.default_rng(0).random(USERS) * 30
    noise = np.random.default_rng(1000 * skill + seed).integers(0, 6, USERS)
    return np.maximum(1, easy - skill + noise).astype(np.int32)


def card(config, users=USERS, candidates="all 50 items", masked=False):
    return protocol.card(
        config,
        data_fingerprint="0123456789abcdef",
        ambiguous_targets=0,
        users_evaluated=users,
        candidate_set=candidates,
        history_masked=masked,
    )


def finish(folder, stage, config, settings, facts, per_user):
    folder.mkdir(parents=True)
    runs.write_json(folder / "metrics.json", facts)
    per_user.write_parquet(folder / "per_user.parquet")
    made = {"stage": stage, "seed": config.seed, "settings": settings, "config": asdict(config)}
    runs.write_json(folder / "stage.json", made | {"fingerprint": "f", "inputs": {}})
    return folder


def retrieved(root, name, skill, seed=0, **of_card):
    config = Config(retriever=name, seed=seed)
    rank = ranks_of(skill, seed)
    per_user = pl.DataFrame({"user": np.arange(USERS, dtype=np.int32), "split": ["test"] * USERS, "rank": rank})
    valid = per_user.with_columns(split=pl.lit("valid"), rank=pl.lit(1, pl.Int32))
    means = {"valid": metrics.summary(rank), "test": metrics.summary(rank), "test_masked": metrics.summary(rank - rank // 4)}
    facts = {"protocol": asdict(card(config, **of_card)), **means}
    folder = root / "retrieve" / (name + (f".seed{seed}" if seed else ""))
    finish(folder, "retrieve", config, {"model.dim": skill, "seed": seed}, facts, pl.concat([valid, per_user]))
    per_user.with_columns(target_rank_masked=pl.col("rank") - pl.col("rank") // 4).write_parquet(folder / "candidates.parquet")
    return folder


def evaluated(root, ranker, seed=0):
    config = Config(retriever="gru", ranker=ranker, seed=seed)
    ranks = {"retriever": ranks_of(5, 0), "orpo": ranks_of(15, seed), "fused": ranks_of(12, seed)}
    ranks = {name: np.where(ranks["retriever"] <= 20, np.minimum(rank, 20), 0).astype(np.int32) for name, rank in ranks.items()}
    columns = {"user": np.arange(USERS), "split": ["test"] * USERS, "rank": ranks["fused"]}
    per_user = pl.DataFrame(columns | {f"{name}_rank": ranks[name] for name in ("retriever", "orpo")})
    of_card = asdict(card(config, candidates="the retriever's top 20", masked=True))
    facts = {"protocol": of_card, "overall": {name: metrics.summary(rank) for name, rank in ranks.items()}}
    folder = root / "evaluate" / (f"gru.{ranker}" + (f".seed{seed}" if seed else ""))
    return finish(folder, "evaluate", config, {}, facts, per_user)


@pytest.fixture
def seeds(tmp_path):
    """A weak retriever with three seeds and a strong one with two."""
    weak = [retrieved(tmp_path, "weak", 2, seed) for seed in range(3)]
    return weak + [retrieved(tmp_path, "strong", 12, seed) for seed in range(2)]


def rows_of(folders):
    return over_all_seeds([system for folder in folders for system in measured.read(folder)])


def test_seeds_become_one_row(seeds):
    weak, strong = rows_of(seeds)
    assert (weak.name, weak.seeds, strong.name, strong.seeds) == ("weak", [0, 1, 2], "strong", [0, 1])
    of_seeds = [float((ranks_of(2, seed) <= 10).mean()) for seed in range(3)]
    assert weak.values["hr@10"].mean == pytest.approx(np.mean(of_seeds))
    assert weak.values["hr@10"].deviation == pytest.approx(np.std(of_seeds, ddof=1))


def test_other_settings_are_another_row(tmp_path):
    here, there = retrieved(tmp_path / "a", "gru", 2), retrieved(tmp_path / "b", "gru", 3)
    first, second = rows_of([here, there])
    assert {first.name, second.name} == {f"gru ({here})", f"gru ({there})"}


def test_the_same_run_counts_once(seeds, tmp_path):
    copy = tmp_path / "copies" / "weak"
    shutil.copytree(seeds[0], copy)
    assert [row.seeds for row in rows_of([seeds[0], seeds[0], copy])] == [[0]]
    spoilt = json.loads((copy / "metrics.json").read_text())
    spoilt["test"]["hr@10"] += 0.1
    runs.write_json(copy / "metrics.json", spoilt)
    with pytest.raises(UserError, match="same settings and seed and different results"):
        rows_of([seeds[0], copy])


def test_differences_are_those_of_the_users_averaged_over_seeds(seeds):
    found = table(rows_of(seeds))
    assert found.against == "weak"
    assert [(c["a"], c["metric"]) for c in found.comparisons] == [("strong", name) for name in ("hr@10", "ndcg@10", "mrr@10")]
    mrr = {
        name: np.mean([np.where(ranks_of(skill, s) <= 10, 1 / ranks_of(skill, s), 0) for s in range(n)], axis=0)
        for name, skill, n in (("weak", 2, 3), ("strong", 12, 2))
    }
    last = found.comparisons[-1]
    assert last["difference"] == pytest.approx((mrr["strong"] - mrr["weak"]).mean())
    low, high = last["ci95"]
    assert low < last["difference"] < high
    assert last["p_holm"] < 0.05


def test_users_with_several_cases_count_once(tmp_path):
    """User 0 is asked a thousand times and user 1 once: each is half of the mean."""
    folders = [retrieved(tmp_path, name, skill) for name, skill in (("a", 1), ("b", 2))]
    for folder, ranks in zip(folders, ([1] * 1000 + [2], [2] * 1000 + [1]), strict=True):
        pl.DataFrame({"user": [0] * 1000 + [1], "split": ["test"] * 1001, "rank": ranks}).write_parquet(folder / "per_user.parquet")
    (comparison,) = table(rows_of(folders), ["mrr@10"]).comparisons
    assert comparison["difference"] == pytest.approx(0)


def test_unlike_protocols_are_refused_and_what_differs_is_named(tmp_path):
    folders = [retrieved(tmp_path, "a", 1), retrieved(tmp_path, "b", 2, candidates="100 sampled items", masked=True)]
    with pytest.raises(UserError) as refusal:
        table(rows_of(folders))
    message = str(refusal.value)
    assert "candidate_set: all 50 items / 100 sampled items; history_masked: no / yes" in message
    assert all(str(folder) in message for folder in folders)
    assert "--mix" in message
    assert "seed" not in message
    assert "dataset" not in message


def test_mixed_protocols_become_columns_and_are_not_tested(tmp_path):
    rows = rows_of([retrieved(tmp_path, "a", 1), retrieved(tmp_path, "b", 2, masked=True), retrieved(tmp_path, "c", 9)])
    mixed = table(rows, mix=True)
    assert mixed.differing == ("history_masked",)
    assert "history_masked" not in mixed.shared
    assert {c["a"] for c in mixed.comparisons} == {"c"}
    lines = render(mixed, "markdown").splitlines()
    assert lines[0].startswith("|  | history_masked | HR@10")
    assert [line.split("|")[2].strip() for line in lines[2:5]] == ["no", "yes", "no"]


def test_a_field_that_an_older_card_lacks_is_a_difference(tmp_path):
    folders = [retrieved(tmp_path, "a", 1), retrieved(tmp_path, "b", 2)]
    facts = json.loads((folders[1] / "metrics.json").read_text())
    del facts["protocol"]["ties_in_score"]
    runs.write_json(folders[1] / "metrics.json", facts)
    with pytest.raises(UserError, match="ties_in_score: against the target / not recorded"):
        table(rows_of(folders))


def test_a_card_older_than_a_field_means_its_default(tmp_path):
    folders = [retrieved(tmp_path, "a", 1), retrieved(tmp_path, "b", 2)]
    facts = json.loads((folders[1] / "metrics.json").read_text())
    del facts["protocol"]["split_kind"]
    runs.write_json(folders[1] / "metrics.json", facts)
    assert table(rows_of(folders)).shared["split_kind"] == "leave_one_out"


def test_rankings_without_the_history_are_compared_among_each_other(tmp_path):
    folders = [retrieved(tmp_path, "a", 1), retrieved(tmp_path, "b", 9)]
    found = table(over_all_seeds([system for folder in folders for system in measured.read(folder, "masked")]), ["hr@10"])
    assert found.shared["history_masked"] is True
    ours, theirs = (ranks_of(skill, 0) - ranks_of(skill, 0) // 4 <= 10 for skill in (9, 1))
    assert found.rows[0].values["hr@10"].mean == pytest.approx(theirs.mean())
    assert found.comparisons[0]["difference"] == pytest.approx(ours.mean() - theirs.mean())


def test_sampled_negatives_have_their_own_card_and_no_tests(tmp_path):
    folders = [retrieved(tmp_path, "a", 1), retrieved(tmp_path, "b", 9)]
    with pytest.raises(UserError, match="not measured against sampled negatives"):
        measured.read(folders[0], "legacy")
    for folder in folders:
        facts = json.loads((folder / "metrics.json").read_text())
        own_card = facts["protocol"] | {"candidate_set": "1 + 100 uniform negatives"}
        runs.write_json(folder / "metrics.json", facts | {"legacy": {"protocol": own_card, "test": {"hr@10": 0.9}}})
    found = table(over_all_seeds([system for folder in folders for system in measured.read(folder, "legacy")]), ["hr@10"])
    assert (found.shared["candidate_set"], found.comparisons) == ("1 + 100 uniform negatives", ())
    with pytest.raises(UserError, match="has no legacy ranking"):
        measured.read(evaluated(tmp_path, "small"), "legacy")


def of_other_users(folder):
    """The run, had it asked as many others."""
    path = folder / "per_user.parquet"
    pl.read_parquet(path).with_columns(pl.col("user") + 1).write_parquet(path)
    return folder


def test_runs_that_asked_other_users_are_refused(tmp_path):
    """Their cards are the same: as many users, drawn from the same data."""
    folders = [retrieved(tmp_path, "a", 1), of_other_users(retrieved(tmp_path, "b", 2)), retrieved(tmp_path, "c", 9)]
    with pytest.raises(UserError, match=r"users_asked: \w{12} / \w{12}"):
        table(rows_of(folders))
    mixed = table(rows_of(folders), mix=True)
    assert mixed.differing == ("users_asked",)
    assert {c["a"] for c in mixed.comparisons} == {"c"}


def test_seeds_that_asked_other_users_are_no_row_together(tmp_path):
    folders = [retrieved(tmp_path, "a", 1), retrieved(tmp_path, "a", 1, seed=1), of_other_users(retrieved(tmp_path, "a", 1, seed=2))]
    assert [row.seeds for row in rows_of(folders)] == [[0, 1], [2]]
    with pytest.raises(UserError, match="users_asked"):
        table(rows_of(folders))


def test_users_that_nobody_knows_are_not_tested(tmp_path):
    folders = [retrieved(tmp_path, "a", 1), retrieved(tmp_path, "c", 3)]
    (folders[0] / "per_user.parquet").unlink()
    found = table(rows_of(folders))
    assert found.comparisons == ()
    assert "users_asked" in found.shared
    assert "no tests" in render(found)


def test_systems_of_evaluate_are_rows_and_share_their_retriever(tmp_path):
    folders = [evaluated(tmp_path, "small"), evaluated(tmp_path, "large")]
    rows = rows_of(folders)
    names = ["gru: retriever", "gru.small: orpo", "gru.small: fused", "gru.large: orpo", "gru.large: fused"]
    assert [row.name for row in rows] == names
    found = table(rows, ["hr@10"])
    for row in rows[1:]:
        means = [metrics.summary(system.ranks)["hr@10"] for system in (row.runs[0], rows[0].runs[0])]
        assert found.comparison(row, "hr@10")["difference"] == pytest.approx(means[0] - means[1])


def test_stars_mark_what_stands_after_the_correction(seeds, tmp_path):
    found = table(rows_of([*seeds, retrieved(tmp_path, "twin", 2, 7)]), ["ndcg@10"])
    weak, strong, twin = (line for line in render(found).splitlines()[1:4])
    assert "*" in strong
    assert "*" not in weak + twin
    assert strong.split()[:5] == ["strong", "2", f"{found.rows[1].values['ndcg@10'].mean:.4f}", "±", strong.split()[4]]
    assert "paired permutation test over users" in render(found)


def test_csv_has_all_digits_and_passes_the_table_checker(seeds, tmp_path):
    found = table(rows_of(seeds), ["hr@5", "hr@10", "ndcg@10", "mrr@10"])
    text = render(found, "csv")
    weak, strong = csv.DictReader(io.StringIO(text))
    assert float(weak["hr@10"]) == found.rows[0].values["hr@10"].mean
    assert float(strong["mrr@10 difference"]) == found.comparisons[-1]["difference"]
    assert float(strong["mrr@10 p_permutation"]) == found.comparisons[-1]["p_permutation"]
    assert float(strong["mrr@10 p_permutation"]) <= float(strong["mrr@10 p_holm"])  # what is corrected stands beside its correction
    assert "mrr@10 p" not in strong
    assert (weak["mrr@10 p_holm"], weak["seeds"], weak["candidate_set"]) == ("", "0 1 2", "all 50 items")
    path = tmp_path / "table.csv"
    path.write_text(text)
    checked = read(path)
    assert [len(row.cells) for row in checked.rows] == [4, 4]
    assert impossible(checked.rows) == []


def test_latex_and_markdown_escape_names(tmp_path):
    rows = rows_of([retrieved(tmp_path, "a_b|50%", 1)])
    assert r"a\_b|50\% & 0." in render(table(rows), "latex")
    assert r"| a_b\|50% | 0." in render(table(rows), "markdown")
    latex = render(table(rows), "latex").splitlines()
    body = [line for line in latex if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {3}
    assert r"\begin{tabular}{lrrr}" in latex


@pytest.mark.parametrize("damage", ["missing", "stage", "json"])
def test_folders_that_are_no_measured_runs_are_refused(tmp_path, damage):
    folder = retrieved(tmp_path, "a", 1)
    if damage == "missing":
        (folder / "stage.json").unlink()
    elif damage == "stage":
        runs.write_json(folder / "stage.json", json.loads((folder / "stage.json").read_text()) | {"stage": "pairs"})
    else:
        (folder / "metrics.json").write_text("{")
    messages = {"missing": "is no finished run", "stage": "is a run of pairs", "json": "metrics.json cannot be read"}
    with pytest.raises(UserError, match=messages[damage]):
        measured.read(folder)


def compare(capsys, *arguments):
    code = main(["compare", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_the_table_and_json(seeds, capsys):
    code, out, _ = compare(capsys, *seeds, "--metrics", "HR@10, mrr@5", "--ranking", "headline")
    assert code == 0
    *text, last = out.splitlines()
    assert text[0].split() == ["seeds", "HR@10", "MRR@5"]
    found = json.loads(last)
    assert (found["command"], found["against"], len(found["rows"]), len(found["comparisons"])) == ("compare", "weak", 2, 2)
    assert found["rows"][0]["seeds"] == [0, 1, 2]
    assert set(found["rows"][0]["metrics"]) == {"hr@10", "mrr@5"}
    assert (found["protocol"]["users_evaluated"], found["protocol"]["history_masked"]) == (USERS, False)


def test_the_command_compares_against_any_run_or_system(seeds, tmp_path, capsys):
    _, out, _ = compare(capsys, *seeds[:3], "--against", seeds[3])
    assert json.loads(out.splitlines()[-1])["against"] == "strong"
    folder = evaluated(tmp_path, "small")
    _, out, _ = compare(capsys, folder, "--against", f"{folder}:orpo")
    assert json.loads(out.splitlines()[-1])["against"] == "gru.small: orpo"
    code, _, error = compare(capsys, folder, "--against", f"{folder}:sft")
    assert code == 2
    assert "has no system 'sft': it has gru: retriever, gru.small: orpo, gru.small: fused" in error


def test_the_command_writes_a_file(seeds, tmp_path, capsys):
    out_file = tmp_path / "table.tex"
    code, out, _ = compare(capsys, *seeds, "--format", "latex", "--out", out_file)
    assert code == 0
    assert out.count("\n") == 1
    assert out_file.read_text().endswith("\\end{tabular}\n")
    assert compare(capsys, *seeds, "--out", tmp_path / "no" / "where.tex")[0] == 2


def test_mistakes_are_one_line_and_exit_code_2(seeds, tmp_path, capsys):
    mistakes = [
        ([seeds[0], tmp_path / "none"], "is no finished run"),
        ([seeds[0], "--metrics", "hr@7"], "has no metric 'hr@7' of weak: it has hr@1"),
        ([seeds[0], "--format", "word"], "format"),
        ([seeds[0], "--mixx"], "did you mean 'mix'?"),
        ([], "required"),
    ]
    for arguments, message in mistakes:
        code, out, error = compare(capsys, *arguments)
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert message in error


def test_both_commands_start_without_models_and_plots():
    code = "import sys; from llmrec import inspection; from llmrec.stages import compare; from llmrec.evaluation import printed_tables; "
    code += "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
