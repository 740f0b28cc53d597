"""Every reader reads its format; what is wrong in a file is named by file and line."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import polars as pl
import pytest

from llmrec.config import Columns, Source
from llmrec.data import table_files
from llmrec.data.prepare import read_tables
from llmrec.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
AMAZON = Source(format="amazon-2023", interactions="Video_Games.csv", items="meta_Video_Games.jsonl")
OWN = Source(
    format="csv",
    interactions="visits.csv",
    items="things.csv",
    columns=Columns(user="who", item="what", rating="stars", timestamp="when", title="name"),
)
MOVIES = {
    "3": "Four Rooms (1995)",
    "7": "La Cité des enfants perdus (1995)",
    "50": "The Matrix (1999)",
    "172": "Seven (a.k.a. Se7en) (1995)",
}
SOURCES = {
    "ml-100k": Source(format="ml-100k"),
    "ml-100k-recbole": Source(format="ml-100k"),
    "ml-1m": Source(format="ml-1m"),
    "ml-latest-small": Source(format="ml-latest-small"),
    "amazon-2023": AMAZON,
    "csv": OWN,
}
INTERACTIONS = {
    "ml-100k": "u.data",
    "ml-100k-recbole": "ml-100k.inter",
    "ml-1m": "ratings.dat",
    "ml-latest-small": "ratings.csv",
    "amazon-2023": "Video_Games.csv",
    "csv": "visits.csv",
}


def replace_in(path, old: str, new: str) -> None:
    text = path.read_text(encoding="latin-1")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="latin-1")


@pytest.mark.parametrize("name", SOURCES)
def test_interactions_have_the_contract_columns_and_file_order(fixture_copy, name):
    interactions = read_tables(SOURCES[name], fixture_copy(name), "error").interactions
    assert dict(interactions.schema) == {
        "raw_user": pl.String,
        "raw_item": pl.String,
        "rating": pl.Float32,
        "timestamp": pl.Int64,
        "row": pl.Int64,
        "file": pl.String,
    }
    assert len(interactions) == 12
    has_header = name in ("ml-100k-recbole", "ml-latest-small", "amazon-2023", "csv")
    assert interactions["row"].to_list() == list(range(1 + has_header, 13 + has_header))
    assert interactions["file"].unique().to_list() == [INTERACTIONS[name]]
    assert interactions["timestamp"][0] // 1000 == 881250949  # milliseconds, whatever the file has


@pytest.mark.parametrize("name", ["ml-100k", "ml-100k-recbole", "ml-1m", "ml-latest-small"])
def test_the_four_movielens_formats_tell_the_same(fixture_copy, name):
    raw = read_tables(SOURCES[name], fixture_copy(name), "error")
    reference = read_tables(SOURCES["ml-1m"], FIXTURES / "ml-1m", "error")
    same = ["raw_user", "raw_item", "timestamp"]
    assert raw.interactions.select(same).equals(reference.interactions.select(same))
    assert dict(raw.items.select("raw_item", "title").iter_rows()) == MOVIES | {"200": "Nobody Saw It (1990)"}
    assert raw.items.filter(pl.col("raw_item") == "50")["text"].item() == "Action, Sci-Fi"


def test_a_timestamp_keeps_its_last_second(fixture_copy):
    folder = fixture_copy("ml-100k-recbole")
    replace_in(folder / "ml-100k.inter", "881250949", "881250951")  # two seconds that are one 32-bit float
    times = read_tables(SOURCES["ml-100k"], folder, "error").interactions["timestamp"]
    assert times[0] == 881250951000


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        (None, None, "5 fields instead of 4"),
        (2, "five", "rating 'five' is not a number"),
        (2, "nan", "rating 'nan' is not a number"),
        (2, "inf", "rating 'inf' is not a number"),
        (1, "", "the item is empty"),
        (0, " ", "the user is empty"),
        (3, "-5", "timestamp '-5' is before 1970"),
        (3, "noon", "timestamp 'noon' is not a number"),
    ],
)
def test_a_bad_row_is_named_or_dropped(fixture_copy, name, field, value, problem):
    folder = fixture_copy(name)
    path = folder / INTERACTIONS[name]
    lines = path.read_text(encoding="latin-1").splitlines()
    line = len(lines) - 3
    separator = {"ml-100k": "\t", "ml-100k-recbole": "\t", "ml-1m": "::"}.get(name, ",")
    fields = lines[line - 1].split(separator)
    if field is None:
        fields.append("surplus")
    else:
        fields[field] = value
    lines[line - 1] = separator.join(fields)
    path.write_text("\n".join(lines) + "\n", encoding="latin-1")

    with pytest.raises(UserError, match=re.escape(f"{path.name} line {line}: {problem}")) as caught:
        read_tables(SOURCES[name], folder, "error")
    assert "\n" not in str(caught.value)
    if not (name == "csv" and "fields" in problem):  # a ragged csv has no columns to trust
        raw = read_tables(SOURCES[name], folder, "drop")
        assert (len(raw.interactions), raw.bad_rows) == (11, 1)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("content", [b"", b"\n"])
def test_an_empty_file_is_named(fixture_copy, name, content):
    folder = fixture_copy(name)
    (folder / INTERACTIONS[name]).write_bytes(content)
    with pytest.raises(UserError, match=f"{INTERACTIONS[name]} is empty"):
        read_tables(SOURCES[name], folder, "error")


@pytest.mark.parametrize("name", SOURCES)
def test_undecodable_bytes_are_named(fixture_copy, name):
    folder = fixture_copy(name)
    path = folder / INTERACTIONS[name]
    lines = path.read_bytes().splitlines()
    lines[6] = b"\xe9" + lines[6]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=f"{path.name} line 7 is not UTF-8"):
        read_tables(SOURCES[name], folder, "error")


def test_blank_lines_and_windows_line_ends_are_harmless(fixture_copy):
    for name in ("ml-1m", "csv"):
        folder = fixture_copy(name)
        expected = read_tables(SOURCES[name], folder, "error").interactions
        path = folder / INTERACTIONS[name]
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
        assert read_tables(SOURCES[name], folder, "error").interactions.equals(expected)


def test_a_missing_file_is_named_with_what_is_there(fixture_copy):
    folder = fixture_copy("ml-1m")
    (folder / "movies.dat").unlink()
    with pytest.raises(UserError, match=r"movies\.dat not found \(there: ratings\.dat\)"):
        read_tables(SOURCES["ml-1m"], folder, "error")


class TestAmazon:
    def test_titles_of_duplicates_and_nulls(self, fixture_copy):
        items = read_tables(AMAZON, fixture_copy("amazon-2023"), "error").items
        assert items.filter(pl.col("raw_item") == "B00CITE")["title"].to_list() == ["", "City of Lost Children", "A later duplicate"]
        assert items["domain"].unique().to_list() == ["Video Games"]  # one of them is null in the file

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("header", [False, True])
    def test_plain_or_packed_with_or_without_header(self, fixture_copy, packed, header):
        folder = fixture_copy("amazon-2023")
        expected = read_tables(AMAZON, folder, "error")
        path = folder / "Video_Games.csv"
        if not header:
            path.write_text(path.read_text().split("\n", 1)[1])
        if packed:
            for file in (path, folder / "meta_Video_Games.jsonl"):
                (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
                file.unlink()
        raw = read_tables(AMAZON, folder, "error")
        assert raw.interactions.drop("row", "file").equals(expected.interactions.drop("row", "file"))
        assert raw.items.equals(expected.items)

    def test_truncated_gzip_is_named(self, fixture_copy):
        folder = fixture_copy("amazon-2023")
        for name in ("Video_Games.csv", "meta_Video_Games.jsonl"):
            content = (folder / name).read_bytes()
            (folder / name).unlink()
            (folder / f"{name}.gz").write_bytes(gzip.compress(content)[:-20])
            with pytest.raises(UserError, match=rf"{name}\.gz .*damaged or incomplete"):
                read_tables(AMAZON, folder, "error")
            (folder / f"{name}.gz").unlink()
            (folder / name).write_bytes(content)

    @pytest.mark.parametrize("line", ['{"parent_asin": "B', "[1]", "plain"])
    def test_a_malformed_meta_line_is_named(self, fixture_copy, line):
        folder = fixture_copy("amazon-2023")
        path = folder / "meta_Video_Games.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
        with pytest.raises(UserError, match=r"meta_Video_Games\.jsonl line 3: not a json object"):
            read_tables(AMAZON, folder, "error")

    def test_a_history_column_is_ignored(self, fixture_copy):
        folder = fixture_copy("amazon-2023")
        expected = read_tables(AMAZON, folder, "error").interactions
        path = folder / "Video_Games.csv"
        header, *rows = path.read_text().splitlines()
        path.write_text("\n".join([header + ",history", *(f"{row},B1 B2" for row in rows)]))
        assert read_tables(AMAZON, folder, "error").interactions.equals(expected)


class TestOwnTables:
    def test_parquet_equals_csv(self, fixture_copy):
        folder = fixture_copy("csv")
        expected = read_tables(OWN, folder, "error")
        for name in ("visits", "things"):
            pl.read_csv(folder / f"{name}.csv").write_parquet(folder / f"{name}.parquet")
        source = Source(format="parquet", interactions="visits.parquet", items="things.parquet", columns=OWN.columns)
        raw = read_tables(source, folder, "error")
        assert raw.interactions.drop("row", "file").equals(expected.interactions.drop("row", "file"))
        assert raw.items.equals(expected.items)

    def test_rating_and_time_may_be_missing(self, fixture_copy):
        folder = fixture_copy("csv")
        source = Source(
            format="csv",
            interactions="visits.csv",
            items="things.csv",
            columns=Columns(user="who", item="what", rating=None, timestamp=None, title="name"),
        )
        interactions = read_tables(source, folder, "error").interactions
        assert interactions["rating"].null_count() == interactions["timestamp"].null_count() == 12

    def test_a_glob_reads_files_in_the_order_of_their_names(self, fixture_copy):
        folder = fixture_copy("csv")
        (folder / "visits-2.csv").write_text("who,what,stars,when\n9,3,1,5\n")
        (folder / "visits.csv").rename(folder / "visits-1.csv")
        source = Source(format="csv", interactions="visits-*.csv", items="things.csv", columns=OWN.columns)
        interactions = read_tables(source, folder, "error").interactions
        assert interactions.row(-1, named=True) == {
            "raw_user": "9",
            "raw_item": "3",
            "rating": 1.0,
            "timestamp": 5000,
            "row": 2,
            "file": "visits-2.csv",
        }

    @pytest.mark.parametrize("text", ["2024-05-01T10:00:00.250Z", "2024-05-01 10:00:00.250", "2024-05-01T12:00:00.250+02:00"])
    def test_iso_times(self, fixture_copy, text):
        folder = fixture_copy("csv")
        (folder / "visits.csv").write_text(f"who,what,stars,when\n1,3,5,{text}\n")
        assert read_tables(OWN, folder, "error").interactions["timestamp"].to_list() == [1714557600250]

    def test_parquet_dates_and_milliseconds(self, fixture_copy):
        folder = fixture_copy("csv")
        visits = pl.DataFrame({"who": [1], "what": [3], "stars": [5.0], "when": [1714557600250]})
        source = Source(format="parquet", interactions="v.parquet", items="t.parquet", columns=OWN.columns, timestamp_unit="ms")
        pl.read_csv(folder / "things.csv").write_parquet(folder / "t.parquet")
        for when in (
            pl.col("when"),
            pl.from_epoch("when", time_unit="ms"),
            pl.from_epoch("when", time_unit="ms").dt.replace_time_zone("UTC"),
        ):
            visits.with_columns(when=when).write_parquet(folder / "v.parquet")
            assert read_tables(source, folder, "error").interactions["timestamp"].to_list() == [1714557600250]

    def test_a_missing_column_names_the_nearest(self, fixture_copy):
        folder = fixture_copy("csv")
        replace_in(folder / "visits.csv", "stars", "star")
        with pytest.raises(UserError, match=r"visits\.csv: no column 'stars' \(there: who, what, star, when; nearest: 'star'\)"):
            read_tables(OWN, folder, "error")

    def test_damaged_parquet_is_named(self, fixture_copy):
        folder = fixture_copy("csv")
        (folder / "v.parquet").write_bytes(b"PAR1 and then nothing")
        (folder / "t.parquet").write_bytes(b"PAR1")
        source = Source(format="parquet", interactions="v.parquet", items="t.parquet", columns=OWN.columns)
        with pytest.raises(UserError, match=r"v\.parquet cannot be read"):
            read_tables(source, folder, "error")

    def test_paths_that_are_not_set(self, tmp_path):
        with pytest.raises(UserError, match=r"source\.items is not set"):
            read_tables(Source(format="csv", interactions="visits.csv"), tmp_path, "error")


def test_milliseconds_read_as_seconds_are_noticed(tmp_path):
    (tmp_path / "r.csv").write_text("user,item,rating,timestamp\na,x,3,1700000000000\n")
    (tmp_path / "t.csv").write_text("item,title\nx,Film\n")
    source = Source(format="csv", interactions="r.csv", items="t.csv")
    with pytest.raises(UserError, match="timestamp_unit: ms"):
        table_files.read(tmp_path, source)
    source.timestamp_unit = "ms"
    assert table_files.read(tmp_path, source).interactions["timestamp"].to_list() == [1_700_000_000_000]
