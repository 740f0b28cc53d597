"""From files to the three tables: contract, numbering, statistics, and the published counts of MovieLens 1M."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from llmrec.config import Columns, Filter, Source, Split
from llmrec.data.prepare import numbered, prepare_tables
from llmrec.data.sequences import Sequences

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = (Filter(core=0), Split(minimum_events=3))


def test_the_contract():
    prepared = prepare_tables(Source(format="ml-1m"), *SMALL, FIXTURES / "ml-1m")
    schema = {"user": pl.Int32, "item": pl.Int32, "rating": pl.Float32, "timestamp": pl.Int64, "split": pl.String}
    assert dict(prepared.interactions.schema) == schema
    assert dict(prepared.items.schema) == {
        "item": pl.Int32,
        "raw_id": pl.String,
        "title": pl.String,
        "domain": pl.String,
        "text": pl.String,
    }
    assert dict(prepared.users.schema) == {"user": pl.Int32, "raw_id": pl.String}
    assert prepared.users.rows() == [(0, "1"), (1, "2"), (2, "10")]  # by value, not by letter
    assert prepared.items["item"].to_list() == [1, 2, 3, 4]  # film 200 has no ratings
    assert prepared.items["title"][2] == "The Matrix (1999)"
    user_2 = prepared.interactions.filter(pl.col("user") == 1)
    assert user_2["item"].to_list() == [2, 1, 3, 4]  # films 7, 3, then 50 and 172 in the same second: order of the file
    assert user_2["split"].to_list() == ["train", "train", "valid", "test"]


def test_statistics():
    facts = prepare_tables(Source(format="ml-1m"), *SMALL, FIXTURES / "ml-1m").statistics
    assert (facts["users"], facts["items"], facts["interactions"], facts["density"]) == (3, 4, 12, 1.0)
    assert facts["history_length"] == {"p0": 4, "p25": 4, "p50": 4, "p75": 4, "p95": 4, "p100": 4, "mean": 4.0}
    assert facts["ratings"] == {"1.0": 1, "2.0": 1, "3.0": 3, "4.0": 4, "5.0": 3}
    assert facts["ambiguous_targets"] == {"test": 2, "valid": 2}
    assert facts["dropped"] == {"bad_rows": 0, "untitled": 0, "duplicates": 0, "low_rating": 0, "core": 0}
    assert (facts["first_event"], facts["last_event"]) == (
        "1997-11-07T07:18:36+00:00",
        "1998-04-04T19:22:22+00:00",
    )  # date -u -d @878887116


def test_amazon_titles_are_cleaned_and_the_first_real_one_counts():
    source = Source(format="amazon-2023", interactions="Video_Games.csv", items="meta_Video_Games.jsonl")
    prepared = prepare_tables(source, Filter(untitled="drop", core=0), SMALL[1], FIXTURES / "amazon-2023")
    assert prepared.items["title"].to_list() == ["City of Lost Children", "Four Rooms & a Key", "Matrix, The"]
    assert prepared.statistics["dropped"]["untitled"] == 3


def test_the_order_of_the_files_rows_changes_no_number(tmp_path):
    source = Source(format="ml-1m")
    expected = prepare_tables(source, SMALL[0], Split(minimum_events=3, ties="item_id"), FIXTURES / "ml-1m")
    for name in ("ratings.dat", "movies.dat"):
        lines = (FIXTURES / "ml-1m" / name).read_bytes().splitlines()
        (tmp_path / name).write_bytes(b"\n".join(reversed(lines)))
    again = prepare_tables(source, SMALL[0], Split(minimum_events=3, ties="item_id"), tmp_path)
    assert again.interactions.equals(expected.interactions)
    assert again.items.equals(expected.items)
    assert again.users.equals(expected.users)


def test_own_data_without_rating_and_time_becomes_sequences(tmp_path):
    (tmp_path / "clicks.csv").write_text("user,item\n" + "".join(f"u{u},i{i}\n" for u in (2, 1) for i in (3, 1, 2)))
    (tmp_path / "items.csv").write_text("item,title\ni1,One\ni2,Two\ni3,Three\n")
    columns = Columns(rating=None, timestamp=None)
    prepared = prepare_tables(Source(format="csv", interactions="clicks.csv", items="items.csv", columns=columns), *SMALL, tmp_path)
    sequences = Sequences.from_table(prepared.interactions, len(prepared.items), len(prepared.users))
    assert sequences.items.tolist() == [3, 1, 2, 3, 1, 2]
    assert prepared.statistics["first_event"] is None
    assert prepared.statistics["ratings"] == {}


@pytest.mark.parametrize(
    ("ids", "expected"), [(["10", "9", "1"], ["1", "9", "10"]), (["10", "9", "x"], ["10", "9", "x"]), (["2", "02", "1"], ["1", "02", "2"])]
)
def test_integers_are_numbered_by_value_and_others_by_letter(ids, expected):
    table = numbered(pl.Series("raw_item", ids), "item", first=1)
    assert table["raw_item"].to_list() == expected
    assert table["item"].to_list() == [1, 2, 3]


def test_no_torch_is_imported():
    code = "import sys, llmrec.data.prepare, llmrec.assets; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


ML_1M = Path(os.environ.get("LLMREC_DATA", "")) / "ml-1m"


@pytest.mark.skipif(not (ML_1M / "ratings.dat").is_file(), reason="needs $LLMREC_DATA/ml-1m")
def test_movielens_1m_has_recboles_counts():
    facts = prepare_tables(Source(format="ml-1m"), Filter(), Split(), ML_1M).statistics
    assert (facts["users"], facts["items"], facts["interactions"]) == (6040, 3416, 999611)
