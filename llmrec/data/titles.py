"""Titles as people write them: "Matrix, The (1999)" becomes "The Matrix (1999)", without entities, controls or line breaks."""

from __future__ import annotations

import html
import re
import unicodedata

# Articles that catalogues put behind the title. L' joins without a space.
_ARTICLE = "The|A|An|Le|La|Les|L'|Un|Une|Das|Der|Die|Den|Det|Ein|Eine|El|Los|Las|Il|Lo|Gli|O|Os"
_BEHIND = re.compile(rf"(.+?), ?({_ARTICLE})", re.IGNORECASE)
_IN_FRONT = re.compile(rf"(?:{_ARTICLE})(?:\s|(?<='))", re.IGNORECASE)
_PARENTHESES = re.compile(r"(\([^()]*\))")
_ALIAS = re.compile(r"(a\.?k\.?a\.? )(.*)", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[A-Za-z][A-Za-z0-9]*);")
_YEAR = re.compile(r"(?: ?\(\d{4}(?:[-–]\d{0,4})?\))+\Z")
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def clean(title: str) -> str:
    """One line of visible text: entities unescaped, NFKC, invisible characters to spaces, spaces collapsed. Idempotent.

    Zero-width characters become spaces rather than nothing, so that no new word appears where two halves meet.
    """
    before = None
    while title != before:  # "&amp;amp;", and "＆amp;" only becomes an entity under NFKC
        before = title
        title = _ENTITY.sub(lambda entity: html.unescape(entity[0]), title)
        title = unicodedata.normalize("NFKC", title)
        title = "".join(" " if unicodedata.category(character) in _INVISIBLE else character for character in title)
        title = " ".join(title.split())
    return title


def readable(title: str) -> str:
    """A film title with its article in front, in every language of MovieLens, alternative titles included. Idempotent.

    "City of Lost Children, The (Cité des enfants perdus, La) (1995)" becomes
    "The City of Lost Children (La Cité des enfants perdus) (1995)"; "(a.k.a. Odessa File, The)" keeps its a.k.a.
    """
    parts = _PARENTHESES.split(clean(title))
    return "".join(f"({_alias(part[1:-1].strip())})" if _PARENTHESES.fullmatch(part) else _article_first(part) for part in parts)


def without_year(title: str) -> str:
    """The title without the "(1999)" or "(1989-1993)" at its end; a title that is nothing else stays. Idempotent."""
    return _YEAR.sub("", title) or title


def _alias(title: str) -> str:
    alias = _ALIAS.fullmatch(title)
    return alias[1] + _article_first(alias[2]) if alias else _article_first(title)


def _article_first(title: str) -> str:
    name = title.strip()
    behind = _BEHIND.fullmatch(name)
    if behind is None or _IN_FRONT.match(name):
        return title
    joint = "" if behind[2].endswith("'") else " "
    return title.replace(name, behind[2] + joint + behind[1].rstrip())
