"""Prompts that ask for a title: the history becomes a text that the title of the next item goes on with (GPT4Rec).

What the model writes there is a search query. Training, generation and the scoring of candidates' titles go through the same
`Writer.encode` as prompts with letters do, so a query is written after exactly the tokens that were trained, and a title is
cleaned and cut in one place whether it stands in the history or in a completion. The catalogue that queries search has whole titles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmrec.config import Prompting
from llmrec.errors import UserError
from llmrec.prompting import Prompt, Refused, Writer
from llmrec.templates import QueryTemplate
from llmrec.untrusted import safe_title

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class QueryWriter(Writer):
    """Writes the prompts that ask for a title, and the titles that answer them.

    Attributes:
        end_ids: the tokens that end a query: end of text.

    Args:
        tokenizer: any fast tokenizer of transformers.
        template: words and layout.
        config: sizes and budget.
        titles: titles by item id; element 0 is padding.

    Raises:
        UserError: a setting is out of range, the budget cannot hold even an empty prompt, the tokenizer has no end of text, or it
            merges titles with the end of the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: QueryTemplate, config: Prompting, titles: Sequence[str]):
        super().__init__(tokenizer, template, config, titles, shown=0, answer_tokens=config.title_tokens + 1)
        if config.candidates < 2:
            raise UserError(f"prompt.candidates is {config.candidates}: choose at least 2 to rank")
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token, which ends a query: choose another base model"
            )
        self.template = template
        self.end_ids = [int(tokenizer.eos_token_id)]
        self._answers: dict[int, str] = {}
        self._completions: dict[int, list[int]] = {}
        self._stem = template.layout.format(history="")
        self._stem_ids = self.encode(self._stem)
        self._check_budget()
        self.answer_ids(template.answer.format(title="A"))

    def write(self, history: Sequence[int] | np.ndarray, pool: Sequence[int] | np.ndarray = ()) -> Prompt | Refused:
        """The prompt with as much of the latest history as leaves room for a title in the budget.

        When not even one title of history fits, it is cut shorter (`prompting.SHORTER_TITLES`).

        Args:
            history: items, oldest first.
            pool: not shown.
        """
        return self._fitted(history, [])

    def answer(self, item: int, pool: Sequence[int] | np.ndarray = ()) -> str:
        """The text with which the title of `item` follows a prompt; at most `config.title_tokens` tokens of it."""
        if item not in self._answers:
            cap = self.config.title_tokens
            text = self.template.answer.format(title=self._title(item, cap)[0])
            while cap > 1 and len(self.answer_ids(text)) > self._answer_tokens:  # behind a space the same title may be more tokens
                cap -= 1
                text = self.template.answer.format(title=self._title(item, cap)[0])
            self._answers[item] = text
        return self._answers[item]

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an answer as it follows a prompt, end of text included.

        Raises:
            UserError: the tokenizer merges it with the end of the prompt.
        """
        row, start = self.encode(self._stem + text), len(self._stem_ids)
        if row[:start] != self._stem_ids:
            raise UserError(
                f"template {self.template.name}: the answer {text!r} merges with the end of the prompt, tokenizer "
                f"{self.tokenizer.name_or_path!r}; end the layout with a word, begin the answer with a space, or choose another base model"
            )
        return row[start:] + self.end_ids

    def completion(self, item: int) -> list[int]:
        """Token ids of the title of `item` as it follows a prompt, end of text included."""
        if item not in self._completions:
            self._completions[item] = self.answer_ids(self.answer(item))
        return self._completions[item]

    def check_titles(self) -> None:
        """See that every title can follow a prompt, which is better said before a training than after it.

        Raises:
            UserError: the tokenizer merges one with the end of the prompt.
        """
        for item in range(1, len(self.titles)):
            self.completion(item)

    def searched(self, item: int) -> str:
        """The title of `item` as queries find it: cleaned, and whole, with the words and the year that prompts have no room for."""
        return safe_title(self.titles[item], self._special_tokens)

    def text(self, ids: Sequence[int]) -> str:
        """What the model wrote, on one line."""
        return " ".join(str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).split())

    def _layout(self, history: Sequence[str], candidates: Sequence[str]) -> str:
        titles = (self.template.history_item.format(title=title) for title in history)
        return self.template.layout.format(history=self.template.separator.join(titles))
