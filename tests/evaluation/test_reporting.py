"""Pages made from run folders: one evaluation, the same again with what was measured since, several runs."""

import json
import re
import shutil

import numpy as np

from llmrec import runs
from llmrec.cli import main
from llmrec.evaluation import order


def test_it_says_first_what_decides_and_last_what_was_run(finished):
    page = (finished / "report.html").read_text("utf-8")
    verdict = json.loads((finished / "metrics.json").read_text())["verdict"]
    order = [verdict[:30], 'id="results"', 'id="bound"', 'id="cost"', 'id="where"', 'id="training"', 'id="users"', 'id="run"']
    places = [page.index(part) for part in order]
    assert places == sorted(places)
    assert {name for name in re.findall(r'href="#([a-z]+)"', page) if f'id="{name}"' not in page} == set()


def test_pictures_stand_in_the_page_and_beside_it(finished):
    names = {path.stem for path in finished.glob("*.png")}
    assert names == {"metrics", "bound", "slices", "ranks", "calibration", "position", "fusion", "sft", "orpo", "data"}
    panels = {"metrics": 2, "slices": 2, "position": 2, "orpo": 5, "data": 2}
    page = (finished / "report.html").read_text("utf-8")
    assert page.count("<svg") == sum(panels.get(name, 1) for name in names)
    for words in ("HR@k", "By history length", "By popularity of the target", "Letters chosen", "Calibration", "Chosen weight"):
        assert words in page


def test_made_again_it_is_the_same(finished, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(finished), "--out", str(page)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"command": "report", "runs": [str(finished)], "report": str(page)}
    assert page.read_bytes() == (finished / "report.html").read_bytes()
    assert list(tmp_path.iterdir()) == [page]


def test_what_was_not_measured_is_left_out_and_what_was_measured_since_is_shown(finished, tmp_path):
    root = shutil.copytree(finished.parents[2], tmp_path / "runs")
    copy = root / finished.relative_to(finished.parents[2])
    facts = json.loads((copy / "metrics.json").read_text())
    del facts["calibration"], facts["position_bias"]
    facts["verdict"] = "A verdict of before."
    for comparison in facts["comparisons"]:  # as runs of before had them
        del comparison["p_holm"], comparison["p_permutation"]
    facts["verdict"] = "It helps."
    runs.write_json(copy / "metrics.json", facts)
    bench = root / "shop" / "bench" / "latency"
    bench.mkdir(parents=True)
    metrics = {"test_masked": {"hr@10": 0.5, "ndcg@10": 0.3, "mrr@10": 0.2}}
    model = {"kind": "ranker", "metrics": metrics, "users_evaluated": 40, "one": {"mean": 0.4, "ci95": [0.3, 0.5]}}
    models = dict.fromkeys(("a<b>", "c"), model)
    runs.write_json(bench / "metrics.json", {"models": models})
    runs.write_json(bench / "stage.json", {"made": "2026-01-02"})
    shuffled = root / "shop" / "order" / "popular"
    shuffled.mkdir(parents=True)
    ranks = np.arange(1, 41)
    table = order.table({how: [ranks] for how in (order.AS_IT_IS, *order.VARIANTS)}, np.arange(40), resamples=20)
    runs.write_json(shuffled / "metrics.json", table | {"verdict": "Order is <all>."})
    runs.write_json(shuffled / "stage.json", {"inputs": {"retrieve/popular": f"{'ab' * 32}:{'cd' * 32}"}})

    assert main(["report", str(copy), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "Order is &lt;all&gt;." in page
    assert "from the benchmark latency" in page
    assert "a&lt;b&gt;" in page
    for absent in ("Calibration", "osition bias", "Holm", "▲"):
        assert absent not in page


def test_a_run_whose_inputs_were_made_again_is_refused(finished, tmp_path, capsys):
    root = shutil.copytree(finished.parents[2], tmp_path / "runs")
    stage = root / "shop" / "orpo" / finished.name / "stage.json"
    stage.write_text(stage.read_text().replace('"fingerprint": "abab', '"fingerprint": "cdcd'))
    copy = str(root / finished.relative_to(finished.parents[2]))
    recorded = root / finished.relative_to(finished.parents[2]) / "stage.json"
    recorded.write_text(recorded.read_text().replace(str(finished.parents[2]), "/nowhere"))  # where it was moved from
    assert main(["report", copy]) == 2
    assert "was made again after" in capsys.readouterr().err
    shutil.rmtree(stage.parent)
    assert main(["report", copy]) == 2
    assert "which is not there: make it again" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "is no finished run" in capsys.readouterr().err


def test_several_runs_make_one_page_with_ways_to_their_own(evaluated, tmp_path, capsys):
    first = evaluated(name="javascript:alert(1)", root=tmp_path, reported=False)
    second = evaluated(name="b", dataset="other", root=tmp_path, reported=False)
    (first / "report.html").touch()
    assert main(["report", str(first), str(second)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["report"] == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    links = re.findall(r'<a href="([^#"][^"]*)"', page)
    assert links == ["shop/evaluate/javascript%3Aalert%281%29/report.html"]  # the other has no report of its own
    for run in (first, second):
        assert json.loads((run / "metrics.json").read_text())["verdict"][:40] in page
    assert page.count("<table>") >= 2  # of two data sets, so in two tables
    assert "not all measured alike" in page
