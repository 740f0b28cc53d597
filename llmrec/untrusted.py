"""Item titles come from strangers: clean them so that they cannot steer the prompt they are printed in.

A cleaned title is one line. It cannot become a control token of the tokenizer, open a section of the prompt or pass for
another numbered or lettered item. What it says stays readable: a model can still be talked to in plain words, but not in ours.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# Controls, formats (zero-width, bidi overrides, tags), lone surrogates, private use, line and paragraph separators.
_INVISIBLE_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
# Letters and marks that print nothing: fillers, the grapheme joiner, variation selectors. U+2581 is sentencepiece's space.
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u2581\u3164\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_SPACES = re.compile(r"\s+")
_SECTION = re.compile(r"#{2,}")  # "### Response:"
_TAG = re.compile(r"<(?=[^\s<>][^<>]*>)")  # <s> </s> <|im_start|> <<SYS>> <0x0A>, known to this tokenizer or not
_MARKER = re.compile(r"(?<!\w)\(\s*([^\W_]|\d{1,2})\s*\)")  # (A) (7) (12); but not (500), (1999) or platform(s)
_CHAT_MARKS = ("[INST]", "[/INST]")


def safe_title(title: str, special_tokens: Iterable[str] = ()) -> str:
    """Clean a title; cleaning twice changes nothing more.

    Unicode is normalised (NFKC); invisible characters and line breaks become spaces, runs of them one; `<s>` is written
    `< s>`, `(A)` `[A]` and `###` `#`; any special token that is left loses its first character.

    Args:
        title: the title as the data set has it.
        special_tokens: strings that the tokenizer at hand reads as one control token.

    Returns:
        The cleaned title, "untitled" where nothing is left.
    """
    special = _special_pattern(special_tokens)
    before = None
    while title != before:  # breaking one thing up may put another together
        before = title
        title = unicodedata.normalize("NFKC", title)
        title = "".join(" " if unicodedata.category(c) in _INVISIBLE_CATEGORIES else c for c in title)
        title = _SPACES.sub(" ", _INVISIBLE.sub(" ", title)).strip()
        title = _SECTION.sub("#", title)
        title = _TAG.sub("< ", title)
        title = _MARKER.sub(r"[\1]", title)
        title = special.sub(lambda match: match[0][1:], title)
    return title or "untitled"


def _special_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest first. Some tokenizers list runs of spaces; those are harmless here."""
    visible = {token for token in (*tokens, *_CHAT_MARKS) if token.strip()}
    return re.compile("|".join(re.escape(token) for token in sorted(visible, key=len, reverse=True)))
