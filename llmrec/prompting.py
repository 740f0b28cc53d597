"""Prompts: a user's history and a pool of candidates become text and token ids that fit the budget.

`Writer` is what both families of templates share, `PromptWriter` writes the prompts with lettered candidates; those that ask for a
title are in `llmrec.query_prompts`. `Writer.encode` is the only function that makes token rows: training, scoring and comparing all
go through it, so that a row is scored by exactly the tokens that were trained. Titles are untrusted (see `llmrec.untrusted`): they
are cleaned, and control tokens are not parsed from text. No torch and no transformers here; the tokenizer is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import TYPE_CHECKING

import numpy as np

from llmrec.config import Prompting
from llmrec.data.titles import without_year
from llmrec.errors import UserError
from llmrec.templates import QueryTemplate, Template
from llmrec.untrusted import safe_title

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTER_TITLES = (24, 16, 8, 4)
"""Tokens a title is cut to, one after the other, when a prompt with a single title of history is still too long."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that fits.

    Attributes:
        text: what `Writer.encode` turns into `ids`.
        ids: token ids, BOS included where the tokenizer uses one.
        history_items: the items shown as history, oldest first.
        pool_items: the candidates in display order, the first is A; none where the prompt asks for a title.
    """

    text: str
    ids: list[int]
    history_items: list[int]
    pool_items: list[int]


@dataclass(frozen=True)
class Refused:
    """There is no prompt for this user, and why (a few fixed phrases, so that they can be counted)."""

    reason: str


class Writer:
    """What the writers of both families share: titles as prompts show them, tokens, and the longest history that fits.

    A subclass says with `_layout` what the prompt looks like.

    Attributes:
        shown: how many candidates a prompt shows; 0 where it asks for a title.

    Args:
        tokenizer: any fast tokenizer of transformers.
        template: words and layout.
        config: sizes and budget.
        titles: titles by item id; element 0 is padding.
        shown: how many candidates a prompt shows.
        answer_tokens: room that the budget keeps for the answer.

    Raises:
        UserError: a setting is out of range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template | QueryTemplate,
        config: Prompting,
        titles: Sequence[str],
        *,
        shown: int,
        answer_tokens: int,
    ):
        if not 1 <= config.history <= 99:
            raise UserError(f"prompt.history is {config.history}: choose 1 to 99 titles")
        if config.title_tokens < 1:
            raise UserError(f"prompt.title_tokens is {config.title_tokens}: a title needs at least one token")
        self.tokenizer, self.config, self.titles = tokenizer, config, titles
        self.shown, self._name, self._answer_tokens = shown, template.name, answer_tokens

        added = {token: index for token, index in tokenizer.get_added_vocab().items() if token.strip()}
        self._special_tokens = list(added)
        # An unknown character is no attack; but GPT-2 calls its end of text "unknown" too, and that must not appear.
        self._control_ids = (set(added.values()) - {tokenizer.unk_token_id}) | {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self._bos = [tokenizer.bos_token_id] if tokenizer("A").input_ids[:1] == [tokenizer.bos_token_id] else []
        self._caps = [config.title_tokens, *(cap for cap in SHORTER_TITLES if cap < config.title_tokens)]
        self._cut: dict[tuple[int, int], tuple[str, int]] = {}
        self._frames: dict[tuple[int, int], int] = {}

    @property
    def asks_for_title(self) -> bool:
        """Whether prompts show no candidates, and a title answers them."""
        return self.shown == 0

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt: BOS where the tokenizer uses one, and never another control token.

        Raises:
            UserError: the text holds a control token that the tokenizer cannot be kept from reading.
        """
        # split_special_tokens: "</s>" in a title is four characters, not the end of the sequence
        ids = self.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        if not self._control_ids.isdisjoint(ids):
            found = sorted({str(self.tokenizer.convert_ids_to_tokens(i)) for i in self._control_ids.intersection(ids)})
            raise UserError(f"a prompt of template {self._name} holds control tokens ({', '.join(found)}): take them out of the template")
        return self._bos + ids

    def write(self, history: Sequence[int] | np.ndarray, pool: Sequence[int] | np.ndarray) -> Prompt | Refused:
        """The prompt of a history and the candidates it shows."""
        raise NotImplementedError

    def answer(self, item: int, pool: Sequence[int] | np.ndarray) -> str:
        """The text that answers the prompt with `item`."""
        raise NotImplementedError

    def title(self, item: int) -> str:
        """The title as prompts show it: cleaned, without the year if so configured, cut to `config.title_tokens`."""
        return self._title(item, self.config.title_tokens)[0]

    def _title(self, item: int, cap: int) -> tuple[str, int]:
        """Title cut to `cap` tokens between two characters, and its number of tokens."""
        if (item, cap) not in self._cut:
            title = safe_title(self.titles[item], self._special_tokens)
            if self.config.years == "drop":
                title = without_year(title)
            encoded = self.tokenizer(title, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False)
            starts = [start for start, _ in encoded.offset_mapping]
            # The first token that is dropped may begin inside a character (bytes of an emoji); its offset is the character's.
            cut = title[: starts[cap]].rstrip() if len(starts) > cap else title
            self._cut[item, cap] = (cut or title[0], min(len(starts), cap))
        return self._cut[item, cap]

    def _layout(self, history: Sequence[str], candidates: Sequence[str]) -> str:
        """The prompt with these titles."""
        raise NotImplementedError

    def _fitted(self, history: Sequence[int] | np.ndarray, pool: Sequence[int] | np.ndarray) -> Prompt | Refused:
        """The prompt with the longest history that fits, with shorter titles where none does."""
        if not len(history):
            return Refused("no history")
        items, candidates = [int(i) for i in history[-self.config.history :]], [int(i) for i in pool]
        for cap in self._caps:
            prompt = self._longest(items, candidates, cap)
            if prompt is not None:
                return prompt
        return Refused(
            f"over the budget of {self.config.budget} tokens even with one title of history and titles of {self._caps[-1]} tokens"
        )

    def _render(self, items: list[int], candidates: list[int], cap: int) -> Prompt:
        text = self._layout([self._title(i, cap)[0] for i in items], [self._title(i, cap)[0] for i in candidates])
        return Prompt(text, self.encode(text), items, candidates)

    def _longest(self, items: list[int], candidates: list[int], cap: int) -> Prompt | None:
        """The prompt with the longest history that fits, None when no history does. Tokenises once where all of it fits."""

        def fitting(keep: int) -> Prompt | None:
            prompt = self._render(items[-keep:], candidates, cap)
            return prompt if len(prompt.ids) + self._answer_tokens <= self.config.budget else None

        keep = self._guess(items, candidates, cap)
        prompt = fitting(keep)
        while prompt is None and keep > 1:
            keep -= 1
            prompt = fitting(keep)
        while prompt is not None and keep < len(items):
            keep += 1
            longer = fitting(keep)
            if longer is None:
                break
            prompt = longer
        return prompt

    def _frame(self, history: int, candidates: int) -> int:
        """Tokens of a prompt whose titles are empty."""
        if (history, candidates) not in self._frames:
            self._frames[history, candidates] = len(self.encode(self._layout([""] * history, [""] * candidates)))
        return self._frames[history, candidates]

    def _guess(self, items: list[int], candidates: list[int], cap: int) -> int:
        """How many titles of history fit, by cached token counts: near the truth without tokenising."""
        room = self.config.budget - self._answer_tokens - sum(self._title(i, cap)[1] for i in candidates)
        for keep in range(len(items), 1, -1):
            if self._frame(keep, len(candidates)) + sum(self._title(i, cap)[1] for i in items[-keep:]) <= room:
                return keep
        return 1

    def _check_budget(self) -> None:
        """Raise UserError where the budget cannot hold even a prompt without titles."""
        frame = self._frame(1, self.shown) + self._answer_tokens
        if frame > self.config.budget:
            enough = frame + (self.shown + 1) * self._caps[-1]
            raise UserError(f"prompt.budget {self.config.budget} is too small for a prompt without any title: use at least {enough}")


class PromptWriter(Writer):
    """Writes the prompts with lettered candidates of one tokenizer, template and catalogue.

    Attributes:
        answers: the text that answers the first candidate, the second, ...: what stands in the training rows.
        labels: the token id of each answer, found at the end of a tokenised row (LlamaRec's own verbalizer encodes the bare
            letter, which Llama-2 turns into another token than the one that was trained).

    Args:
        tokenizer: any fast tokenizer of transformers.
        template: words and layout.
        config: sizes and budget.
        titles: titles by item id; element 0 is padding.

    Raises:
        UserError: a setting is out of range, the budget cannot hold even an empty prompt, or an answer is not one token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, config: Prompting, titles: Sequence[str]):
        if not 2 <= config.candidates <= len(ascii_uppercase):
            raise UserError(f"prompt.candidates is {config.candidates}: each candidate is a letter, so choose 2 to {len(ascii_uppercase)}")
        super().__init__(tokenizer, template, config, titles, shown=config.candidates, answer_tokens=1)
        self.template = template
        self._check_budget()
        self.answers = [template.answer.format(letter=letter) for letter in ascii_uppercase[: config.candidates]]
        self.labels = self._find_labels()

    def write(self, history: Sequence[int] | np.ndarray, pool: Sequence[int] | np.ndarray) -> Prompt | Refused:
        """The prompt with as much of the latest history as the budget holds.

        When not even one title of history fits, all titles are cut shorter (`SHORTER_TITLES`) and the longest history that
        fits then is taken. Candidates are never left out.

        Args:
            history: items, oldest first.
            pool: candidates in display order, at most `config.candidates`.
        """
        if not 1 <= len(pool) <= self.config.candidates:
            raise ValueError(f"a pool of {len(pool)} candidates, but prompt.candidates is {self.config.candidates}")
        return self._fitted(history, pool)

    def answer(self, item: int, pool: Sequence[int] | np.ndarray) -> str:
        """The letter of `item` where the prompt shows `pool`."""
        return self.answers[list(pool).index(item)]

    def _layout(self, history: Sequence[str], candidates: Sequence[str]) -> str:
        template = self.template
        numbered = (template.history_item.format(number=n, title=title) for n, title in enumerate(history, start=1))
        lettered = (template.candidate_item.format(letter=a, title=title) for a, title in zip(ascii_uppercase, candidates, strict=False))
        return template.layout.format(
            instruction=template.instruction, history=template.separator.join(numbered), candidates=template.separator.join(lettered)
        )

    def _find_labels(self) -> list[int]:
        """Ids of the answers, read where training reads them: after a real prompt."""
        pool = list(range(1, len(self.titles)))[: self.config.candidates]
        prompt = self._render(pool[:1], pool, self.config.title_tokens)
        labels: list[int] = []
        for answer in self.answers:
            row = self.encode(prompt.text + answer)
            own = row[len(prompt.ids) :]
            if row[: len(prompt.ids)] != prompt.ids:
                wrong = "merges it with the end of the prompt"
            elif len(own) != 1:
                wrong = f"makes {len(own)} tokens of it"
            elif own[0] in labels:
                wrong = f"makes the token of it that {self.answers[labels.index(own[0])]!r} has"
            else:
                labels += own
                continue
            raise UserError(
                f"template {self.template.name}: the answer {answer!r} is not one token of its own after the prompt, tokenizer "
                f"{self.tokenizer.name_or_path!r} {wrong}; choose a template whose layout ends with a newline and whose answer is "
                "'{letter}', or one that ends with a word and answers ' {letter}', or another base model"
            )
        return labels


def shuffled(pool: Sequence[int] | np.ndarray, seed: int, user: int, number: int = 0) -> list[int]:
    """The pool in an order that depends on seed and user alone (and on the order it comes in); `number` gives the user others."""
    entropy = [seed, user, number] if number else [seed, user]
    return [int(item) for item in np.random.default_rng(entropy).permutation(np.asarray(pool))]
