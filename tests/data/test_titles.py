"""Titles become readable, and stay so when treated twice."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmrec.data.titles import clean, readable, without_year

# Text that is likely to meet the rules: articles, brackets, entities, invisible characters.
PIECES = [
    "The",
    "A",
    "L'",
    "La",
    ", ",
    " ",
    "(",
    ")",
    "(1999)",
    "a.k.a. ",
    "&amp;",
    "&",
    "amp;",
    "＆",
    "\u200b",
    "\u202e",
    "\n",
    "é",
    "e\u0301",
    "1984",
]
titles = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=10).map("".join))


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)"),
        ("Misérables, Les (1995)", "Les Misérables (1995)"),
        ("Enfer, L' (1994)", "L'Enfer (1994)"),
        ("Boot, Das (1981)", "Das Boot (1981)"),
        ("Postino, Il (The Postman) (1994)", "Il Postino (The Postman) (1994)"),
        (
            "City of Lost Children, The (Cité des enfants perdus, La) (1995)",
            "The City of Lost Children (La Cité des enfants perdus) (1995)",
        ),
        ("Professional, The (a.k.a. Leon: The Professional) (1994)", "The Professional (a.k.a. Leon: The Professional) (1994)"),
        ("File (a.k.a. Odessa File, The) (1974)", "File (a.k.a. The Odessa File) (1974)"),
        ("Good, the Bad and the Ugly, The (1966)", "The Good, the Bad and the Ugly (1966)"),
        ("Bye Bye, Love (1995)", "Bye Bye, Love (1995)"),
        ("301, 302 (1995)", "301, 302 (1995)"),
        ("White Balloon, The (Badkonake Sefid ) (1995)", "The White Balloon (Badkonake Sefid) (1995)"),
    ],
)
def test_articles_come_first(title, expected):
    assert readable(title) == expected


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Tom &amp;amp; Jerry&#39;s", "Tom & Jerry's"),
        ("＆amp;", "&"),
        ("AT&T &copyright", "AT&T &copyright"),
        ("one\r\n\ttwo\u2028three", "one two three"),
        ("zero\u200bwidth \u202ereversed\u202c", "zero width reversed"),
        ("ﬁlm ①", "film 1"),
        (" \u0000 ", ""),
    ],
)
def test_clean(title, expected):
    assert clean(title) == expected


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("The Matrix (1999)", "The Matrix"),
        ("1984 (1984)", "1984"),
        ("Serial (1989-1993)", "Serial"),
        ("Open (2010-)", "Open"),
        ("(1999)", "(1999)"),
        ("Room 237", "Room 237"),
        ("Seven (Se7en) (1995)", "Seven (Se7en)"),
        ("Twice (1950) (1951)", "Twice"),
    ],
)
def test_without_year(title, expected):
    assert without_year(title) == expected


@example("Matrix , The")
@example("(0000)\n(0000)")
@given(titles)
def test_treating_twice_changes_nothing(title):
    for treat in (clean, readable, without_year):
        assert treat(treat(title)) == treat(title)
    assert readable(without_year(readable(title))) == without_year(readable(title))


@given(titles)
def test_a_clean_title_is_one_line_of_visible_text(title):
    for cleaned in (clean(title), readable(title)):
        assert not {unicodedata.category(character) for character in cleaned} & {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
        assert cleaned == " ".join(cleaned.split())
        assert unicodedata.is_normalized("NFKC", cleaned)


@given(titles)
def test_moving_articles_loses_no_letter(title):
    def letters(text):
        return sorted(character for character in text if character.isalnum())

    assert letters(readable(title)) == letters(clean(title))
