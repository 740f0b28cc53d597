"""Reading tables as people print them, and the published tables whose rows cannot be true."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from llmrec.cli import main
from llmrec.errors import UserError
from llmrec.evaluation.printed_tables import impossible, read

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published_tables.csv"
SSM, SSM_EARLIER = "arXiv 2408.05606", "arXiv 2408.05606, earlier version"
README, HYDRA = "alokamgnaneswarasai/MambaRec README", "arXiv 2504.07398"
BEAUTY, GAMES, ML = "Amazon Reviews '23 Beauty and Personal care", "Amazon Reviews '23 Video Games", "MovieLens-1M"

# each worked out by hand from the closed forms at one cut-off (HR, MRR -> NDCG) or between two (rise of HR -> rise of NDCG)
IMPOSSIBLE = {
    SSM: {
        BEAUTY: ["GPT4Rec", "2Mamba4Rec", "LlamaRec"],
        GAMES: ["MamRec", "GPT4Rec", "2Mamba4Rec", "LlamaRec"],
        ML: ["MamRec", "GPT4Rec"],
    },
    SSM_EARLIER: {BEAUTY: ["Mamba4Rec"], GAMES: ["CACD"]},
    README: {
        "KuaiRand (2k)": ["MoEMaTrRec"],
        "KuaiRand (5k)": ["GRU4Rec", "MambaRec"],
        "LFM-1b (0.25k)": ["GRU4Rec", "SASRec", "RecMamba", "MambaRec"],
        "LFM-1b (0.5k)": ["SASRec", "RecMamba", "MambaRec"],
        "LFM-1b (1k)": ["GRU4Rec", "RecMamba", "MoEMaTrRec"],
        "LFM-1b (2k)": ["MambaRec", "MoEMaTrRec"],
        "LFM-1b (5k)": ["MambaRec", "MoEMaTrRec"],
    },
    HYDRA: {"Movies & TV": ["HLLM-1B"], "Books": ["LEARN-7B*"], "Toys & Games": ["SASRec (single domain)"]},
}
# rows that the earlier version prints with the very numbers of the later one
REPEATED = {SSM_EARLIER: {BEAUTY: ["GPT4Rec", "LlamaRec"], GAMES: ["MamRec", "GPT4Rec", "LlamaRec"], ML: ["MamRec", "GPT4Rec"]}}


def keys(*nested):
    return {
        (paper, data, model) for papers in nested for paper, tables in papers.items() for data, models in tables.items() for model in models
    }


def key(row):
    paper, *_, data, model = row.names
    return paper, data, model


@pytest.fixture(scope="module")
def published():
    return read(PUBLISHED)


@pytest.fixture(scope="module")
def judged(published):
    return {key(row): contradiction for row, contradiction in impossible(published.rows)}


def test_the_published_tables_are_all_there(published):
    papers = [key(row)[0] for row in published.rows]
    assert {paper: papers.count(paper) for paper in papers} == {SSM: 21, SSM_EARLIER: 22, README: 35, HYDRA: 49}
    assert published.unit == "percent or fraction as the column unit says"
    assert published.skipped == ()


def test_impossible_published_rows_are_found_and_no_other(judged):
    assert len(keys(IMPOSSIBLE)) == 31
    assert set(judged) == keys(IMPOSSIBLE, REPEATED)


def test_consistent_published_rows_pass(judged):
    consistent = {SSM: {data: ["SASRec", "Mamba4Rec", "Hydra4Rec"] for data in (BEAUTY, GAMES, ML)}}
    assert not keys(consistent, {SSM: {ML: ["2Mamba4Rec"], BEAUTY: ["MamRec"]}}) & set(judged)


def at_one_cut_off(hr, ndcg, mrr, k=10, half=0.0005):
    """By how much NDCG misses what HR and MRR allow, the rounding of all three included."""
    points = [(1 / r, 1 / math.log2(r + 1)) for r in range(1, k + 1)]

    def chord(x):
        return points[-1][1] + (1 - points[-1][1]) * (x - 1 / k) / (1 - 1 / k)

    def broken(x):
        (right, top), (left, bottom) = next(pair for pair in pairwise(points) if pair[1][0] <= x)
        return bottom + (top - bottom) * (x - left) / (right - left)

    corners = [(hr + a * half, mrr + b * half) for a in (-1, 1) for b in (-1, 1)]
    least, most = min(h * chord(m / h) for h, m in corners), max(h * broken(m / h) for h, m in corners)
    return max(least - ndcg - half, ndcg - half - most)


def test_rows_with_three_metrics_agree_with_the_closed_form(published, judged):
    """HR x chord is linear in HR and MRR, HR x broken line grows with both: the extremes over the rounding lie at its corners."""
    for row in published.rows:
        printed = {cell.name: float(cell.value) for cell in row.cells}
        if set(printed) == {"hr@10", "ndcg@10", "mrr@10"}:
            assert (at_one_cut_off(printed["hr@10"], printed["ndcg@10"], printed["mrr@10"]) > 0) == (key(row) in judged), row


def write(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def values(path, unit=None):
    return [{cell.name: (str(cell.value), cell.percent) for cell in row.cells} for row in read(path, unit).rows]


@pytest.mark.parametrize(
    "text",
    [
        "model,HR@10,NDCG@10\nA,0.12,0.05\nB,,0.04\n",
        "model;HR@10;NDCG@10\nA;0.12;0.05\nB;-;0.04\n",
        "model\tHR@10\tNDCG@10\r\nA\t0.12\t0.05\r\n\r\nB\t—\t0.04\r\n",
        "\ufeffmodel,HR@10,NDCG@10\nA,**0.12**,<b>0.05</b>\nB,n/a,0.04*\n",
        "model,HR@10,NDCG@10\nA,\\textbf{0.12},$0.05 \\pm 0.01$\nB,NaN,0.04 ± 0.002\n",
        "| model | HR@10 | NDCG@10 |\n| --- | ---: | --- |\n| A | 0.12 (0.01) | 0.05 |\n| B | | 0.04 |\n",
    ],
)
def test_tables_as_people_write_them(tmp_path, text):
    path = write(tmp_path, text)
    assert values(path) == [{"HR@10": ("0.12", False), "NDCG@10": ("0.05", False)}, {"NDCG@10": ("0.04", False)}]
    assert [row.names for row in read(path).rows] == [("A",), ("B",)]


def test_columns_are_known_by_name(tmp_path):
    path = write(tmp_path, "model,year,Recall @ 5,Hit@10,HT@20,r@50,N@5,mrr@5,MAP@10,coverage\nA,2023,.1,.2,.3,.4,.05,.04,.1,.9\n")
    table = read(path)
    assert table.columns == ("Recall @ 5", "Hit@10", "HT@20", "r@50", "N@5", "mrr@5")
    assert [(cell.metric, cell.k) for cell in table.rows[0].cells] == [("hr", k) for k in (5, 10, 20, 50)] + [("ndcg", 5), ("mrr", 5)]
    assert table.skipped == ("MAP@10",)
    assert table.rows[0].names == ("A",)  # a column of numbers names nothing


def test_the_unit_is_given_or_guessed(tmp_path):
    assert values(write(tmp_path, "model,hr@10\nA,0.5\n")) == [{"hr@10": ("0.5", False)}]
    above = write(tmp_path, "model,hr@10\nA,0.5\nB,12.3\n")
    assert values(above) == [{"hr@10": ("0.5", True)}, {"hr@10": ("12.3", True)}]
    assert "as some are above 1" in read(above).unit
    assert values(above, "fraction") == [{"hr@10": ("0.5", False)}, {"hr@10": ("12.3", False)}]
    assert values(write(tmp_path, "model,hr@10\nA,85.4%\nB,0.7\n")) == [{"hr@10": ("85.4", True)}, {"hr@10": ("0.7", False)}]
    assert values(write(tmp_path, "model,hr@10 (%)\nA,0.9\n")) == [{"hr@10 (%)": ("0.9", True)}]
    by_row = write(tmp_path, "model,hr@10,Unit\nA,0.5,percent\nB,0.5,fraction\n")
    assert values(by_row) == [{"hr@10": ("0.5", True)}, {"hr@10": ("0.5", False)}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,score\nA,1\n", r"table.csv: no column is a metric .*model, score.*name them hr@10"),
        ("model,hr@10\nA,many\n", r"table.csv line 2, column 'hr@10': 'many' is not a number"),
        ('model,hr@10\nA,0.1\nB,"0,12"\n', r"line 3, column 'hr@10': '0,12' is not a number: write it like 0.093"),
        ("model,hr@10\nA,inf\n", "'inf' is not a number"),
        ("model,hr@10\nA,1e400\n", "'1e400' is not a number"),
        ("model,hr@10\nA,0.1,0.2\n", r"line 2: 3 fields where the header has 2"),
        ("model,hr@10,hr@10\nA,0.1,0.2\n", "column 'hr@10' is there twice"),
        ("model,hr@10,unit\nA,0.1,permille\n", "line 2, column 'unit': 'permille' is neither percent nor fraction"),
        ("model,hr@0\nA,0.1\n", "column 'hr@0': the cut-off must lie between 1 and"),
        ("model,hr@10\n", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, text))


def test_files_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"model,hr@10\n\xff\xfe,0.1\n")
    with pytest.raises(UserError, match="cannot be read as a csv file"):
        read(path)
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "none.csv")
    with pytest.raises(UserError, match="Is a directory"):
        read(tmp_path)


def test_the_command_names_impossible_rows_and_exits_with_1(tmp_path, capsys):
    path = write(tmp_path, "data,model,HR@10,NDCG@10,MRR@10\nBeauty,GPT4Rec [x],0.030,0.025,0.015\nML,2Mamba4Rec,.340,.193,.148\n")
    assert main(["check-table", str(path)]) == 1
    out = capsys.readouterr().out
    assert "Beauty, GPT4Rec [x]" in out
    *_, last = out.splitlines()
    found = json.loads(last)
    assert (found["command"], found["rows"], len(found["impossible"])) == ("check-table", 2, 1)
    (row,) = found["impossible"]
    assert (row["line"], row["row"], row["column"]) == (2, ["Beauty", "GPT4Rec [x]"], "NDCG@10")
    assert row["reason"] == "NDCG@10 0.025 is above 0.0195, the most that HR@10 0.030 and MRR@10 0.015 allow"
    assert row["reason"] in " ".join(out.split())
    assert row["cells"] == {"HR@10": "0.030", "NDCG@10": "0.025", "MRR@10": "0.015"}


def test_the_command_exits_with_0_when_all_is_possible_and_2_for_a_mistake(tmp_path, capsys):
    path = write(tmp_path, "model,HR@10,NDCG@10,MRR@10\n2Mamba4Rec,.340,.193,.148\n")
    assert main(["check-table", str(path)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["impossible"] == []
    assert main(["check-table", str(tmp_path / "none.csv")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["check-table", str(path), "--unit", "permille"]) == 2
    assert main(["check-table"]) == 2
