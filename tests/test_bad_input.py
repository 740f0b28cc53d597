"""Every mistake of a user is one line that says what to do, exit code 2, and nothing half-written."""

import zipfile

import pytest

from llmrec.cli import main

GOOD = "user,item,rating,timestamp\n" + "".join(f"u{u},i{(u + n) % 7},{1 + n % 5},{1000 * u + n}\n" for u in range(9) for n in range(6))
TITLES = "item,title\n" + "".join(f"i{n},Film {n}\n" for n in range(7))
RECIPE = "source: {format: csv, interactions: ratings.csv, items: titles.csv}\nfilter: {core: 2}\n"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMREC_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMREC_DATA", raising=False)
    (tmp_path / "ratings.csv").write_text(GOOD)
    (tmp_path / "titles.csv").write_text(TITLES)
    (tmp_path / "shop.yaml").write_text(RECIPE)
    return tmp_path


def refused(capsys, *arguments):
    """Run a command that must be refused; the error line."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.splitlines()[-1]


def test_good_input_is_taken(shop, capsys):
    assert main(["prepare", "--dataset", "shop.yaml"]) == 0
    assert (shop / "runs/shop/prepare/stage.json").exists()


@pytest.mark.parametrize(
    ("ratings", "titles", "message"),
    [
        (GOOD.replace("rating", "stars", 1), TITLES, "rating"),
        (GOOD.replace("u3,i3,1,", "u3,i3,five,"), TITLES, "ratings.csv line 20"),
        (GOOD.replace("u3,i3,1,", "u3,i3,NaN,"), TITLES, "ratings.csv line 20"),
        (GOOD.replace("u3,i3,1,", ",i3,1,"), TITLES, "ratings.csv line 20"),
        (GOOD, TITLES.replace("Film 4", ""), "i4"),
        (GOOD, TITLES.replace("title", "name", 1), "title"),
        ("", TITLES, "ratings.csv"),
    ],
    ids=["missing column", "bad row", "NaN rating", "empty user", "untitled item", "missing title column", "empty file"],
)
def test_bad_tables(shop, capsys, ratings, titles, message):
    (shop / "ratings.csv").write_text(ratings)
    (shop / "titles.csv").write_text(titles)
    assert message in refused(capsys, "prepare", "--dataset", "shop.yaml")
    assert not list((shop / "runs").rglob("*.parquet"))


def test_a_truncated_zip(shop, capsys):
    archive = shop / "ml-1m.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("ml-1m/ratings.dat", "1::1::5::978300760\n" * 5000)
        file.writestr("ml-1m/movies.dat", "1::Toy Story (1995)::Animation\n")
    archive.write_bytes(archive.read_bytes()[:-60])
    error = refused(capsys, "prepare", "--dataset", "ml-1m", "--source.urls", f"[{archive.as_uri()}]", "--source.checksums", "[]")
    assert "ml-1m.zip" in error
    assert "put ratings.dat and movies.dat into" in error
    assert not (shop / "cache/datasets/ml-1m").exists()


def test_an_unwritable_run_folder(shop, capsys):
    (shop / "taken").write_text("a file")
    assert "--runs" in refused(capsys, "prepare", "--dataset", "shop.yaml", "--runs", "taken")


def test_too_few_users_for_the_filter(shop, capsys):
    assert "core" in refused(capsys, "prepare", "--dataset", "shop.yaml", "--filter.core", "50")
