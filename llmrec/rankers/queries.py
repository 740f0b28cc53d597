"""Search queries that a language model writes after a prompt, the m most probable ones it finds (GPT4Rec, arXiv 2304.03879).

Beam search: of all continuations of a prompt's m open beams the m best go on. What ends among them is a query, and the search ends
when no open beam is more probable than the m-th best query, or after so many tokens, where open beams are queries too. It is what
`generate(num_beams=m, length_penalty=0.0, early_stopping=False)` of transformers finds: queries compete by their own
probability, all tokens counted, so a long title is no better than a short one that is as probable.

A prompt is computed once, not once per beam. Its keys and values, or in Mamba-2 its states, are repeated for the beams and
then follow them from step to step; a prompt whose search has ended leaves the batch. Prompts are padded on the left, as a state is
taken at the end of a row, with a mask and with positions that begin at each prompt's first token.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llmrec.errors import UserError
from llmrec.rankers.backbone import STATE_SPACE
from llmrec.rankers.completions import PACKED
from llmrec.rankers.letters import NotFinite


@dataclass(frozen=True)
class Query:
    """What was written.

    Attributes:
        ids: its tokens, without the end of text.
        logprob: the sum over its tokens, end of text included where the query came to one.
        ended: whether it came to one; else it was cut.
    """

    ids: list[int]
    logprob: float
    ended: bool = False

    @property
    def tokens(self) -> int:
        """How many were written."""
        return len(self.ids) + self.ended


@dataclass
class Beams:
    """The search after one prompt.

    Attributes:
        queries: how many are wanted.
        open: beams that go on, best first.
        found: the best queries so far, best first.
    """

    queries: int
    open: list[Query] = field(default_factory=lambda: [Query([], 0.0)])
    found: list[Query] = field(default_factory=list)

    def advance(self, continuations: Sequence[tuple[float, int, int]], end_ids: Collection[int], last: bool) -> list[int]:
        """Take a step.

        Args:
            continuations: (log-probability from the prompt on, beam, token), best first; at least one in each `queries` must be
                no end of text.
            end_ids: tokens that end a query.
            last: whether this is the last step, which ends all.

        Returns:
            The beam that each open beam comes from; empty when the search has ended.
        """
        open_now, origins = [], []
        for place, (logprob, beam, token) in enumerate(continuations):
            before = self.open[beam].ids
            if token not in end_ids and not last:
                open_now.append(Query([*before, token], logprob))
                origins.append(beam)
            elif place < self.queries:  # further down they would end in the place of an open beam that is better
                ended = token in end_ids
                self.found.append(Query(before if ended else [*before, token], logprob, ended))
        self.open = open_now[: self.queries]
        self.found = sorted(self.found, key=lambda query: -query.logprob)[: self.queries]
        over = last or (len(self.found) == self.queries and self.open[0].logprob <= self.found[-1].logprob)
        return [] if over else origins[: self.queries]


def beam_queries(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    queries: int,
    new_tokens: int,
    end_ids: Sequence[int],
    batch: int = 8,
    pad_id: int = 0,
) -> list[list[Query]]:
    """The most probable queries after each prompt, as beam search finds them.

    Args:
        model: a causal language model of transformers, with or without adapter. It is put into evaluation mode.
        rows: token ids of the prompts.
        queries: beams, and queries per prompt.
        new_tokens: most tokens of a query, end of text included. Prompt and query must fit the model's positions.
        end_ids: tokens that end a query.
        batch: prompts per forward pass, each with its beams; a family that is not known to bear padding gets one at a time.
        pad_id: any token id of the vocabulary.

    Returns:
        Of each prompt `queries` queries, the most probable first.

    Raises:
        UserError: a prompt is empty, or more queries are asked for than the vocabulary has beginnings.
        NotFinite: a log-probability is not finite; the message names the prompt.
    """
    _check(rows, queries, new_tokens, end_ids, model.config.vocab_size)
    found: list[list[Query]] = [[] for _ in rows]
    by_length = sorted(range(len(rows)), key=lambda at: -len(rows[at]))  # the largest batch first: out of memory at once or never
    together = batch if _bears_padding(model.config) else 1
    model.eval()
    for start in range(0, len(rows), together):
        numbers = by_length[start : start + together]
        with torch.inference_mode():
            for at, beams in zip(numbers, _search(model, rows, numbers, queries, new_tokens, set(end_ids), pad_id), strict=True):
                found[at] = beams.found
    return found


def _search(
    model: Any, rows: Sequence[Sequence[int]], numbers: Sequence[int], queries: int, new_tokens: int, end_ids: set[int], pad_id: int
) -> list[Beams]:
    """The searches after the prompts with these numbers, side by side."""
    searches = [Beams(queries) for _ in numbers]
    going = list(range(len(numbers)))  # searches that have not ended, in the order in which their beams lie in the batch
    reader = Reader(model, [rows[at] for at in numbers], pad_id)
    logits = reader.read_prompts()
    kept = _continuations(queries, end_ids)
    for step in range(new_tokens):
        totals = torch.tensor([[beam.logprob for beam in searches[at].open] for at in going], device=logits.device)
        scores = (logits.log_softmax(-1).unflatten(0, totals.shape) + totals[..., None]).flatten(1)
        best, places = (found.tolist() for found in scores.topk(kept))
        vocabulary = logits.shape[-1]
        still, origins = [], []
        for nth, at in enumerate(going):
            if not all(map(math.isfinite, best[nth])):
                raise NotFinite(numbers[at])
            from_beams = searches[at].advance(in_order(best[nth], places[nth], vocabulary), end_ids, last=step + 1 == new_tokens)
            if from_beams:
                still.append(at)
                origins += [nth * totals.shape[1] + beam for beam in from_beams]
        going = still
        if not going:
            break
        logits = reader.go_on(origins, [beam.ids[-1] for at in going for beam in searches[at].open])
    return searches


def in_order(logprobs: Sequence[float], places: Sequence[int], vocabulary: int) -> list[tuple[float, int, int]]:
    """(log-probability, beam, token) of the continuations that were found, best first, equals by beam and token.

    Which of equals are found, where there are more of them than are looked at, is up to the device.

    Args:
        logprobs: of each.
        places: beam x vocabulary + token.
        vocabulary: its size.
    """
    ordered = sorted(zip(logprobs, places, strict=True), key=lambda pair: (-pair[0], pair[1]))
    return [(logprob, *divmod(place, vocabulary)) for logprob, place in ordered]


class Reader:
    """A model that reads prompts, then beams token by token, and what it remembers of them.

    Args:
        model: a causal language model, in evaluation mode.
        prompts: token ids.
        pad_id: any token id of the vocabulary.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int):
        longest = max(map(len, prompts))
        missing = torch.tensor([longest - len(prompt) for prompt in prompts])
        self.model, self.prompts, self.pad_id = model, prompts, pad_id
        self.cache: Any = DynamicCache(config=model.config)
        self.is_padded = len({len(prompt) for prompt in prompts}) > 1
        self.mask = (torch.arange(longest) >= missing[:, None]).long().to(model.device)
        self.has_states = model.config.model_type in STATE_SPACE

    def read_prompts(self) -> Tensor:
        """Logits after each prompt, (prompts, vocabulary) float32."""
        longest = self.mask.shape[1]
        ids = torch.tensor([[self.pad_id] * (longest - len(prompt)) + list(prompt) for prompt in self.prompts])
        return self._read(ids, (self.mask.cumsum(1) - 1).clamp(min=0))

    def go_on(self, origins: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Logits after one more token.

        Args:
            origins: the row that each new row goes on from, as they lay before.
            tokens: its token.

        Returns:
            (rows, vocabulary) float32.
        """
        rows = torch.tensor(origins, device=self.mask.device)
        self.cache.reorder_cache(rows)
        self.mask = torch.cat([self.mask[rows], self.mask.new_ones(len(rows), 1)], dim=1)
        return self._read(torch.tensor(tokens)[:, None], self.mask.sum(1, keepdim=True) - 1)

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"cache_params" if self.has_states else "past_key_values": self.cache}
        if self.is_padded and not self.has_states:
            inputs |= {"attention_mask": self.mask, "position_ids": positions}
        elif self.is_padded and ids.shape == self.mask.shape:  # states have been through the padding once they are there
            inputs |= {"attention_mask": self.mask}
        return self.model(input_ids=ids.to(self.model.device), logits_to_keep=1, use_cache=True, **inputs).logits[:, -1].float()


def _bears_padding(config: Any) -> bool:
    if config.model_type in STATE_SPACE:
        return not config.use_bias  # a bias on in_proj would let padding into the convolution
    return config.model_type in PACKED


def _continuations(queries: int, end_ids: Collection[int]) -> int:
    """How many a step looks at: among them are `queries` that do not end, even if every beam can end in each way."""
    return max(2, 1 + len(end_ids)) * queries


def _check(rows: Sequence[Sequence[int]], queries: int, new_tokens: int, end_ids: Sequence[int], vocabulary: int) -> None:
    for number, row in enumerate(rows):
        if not row:
            raise UserError(f"prompt {number} is empty: give it at least one token")
    for name, value in (("queries", queries), ("new_tokens", new_tokens)):
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    if _continuations(queries, set(end_ids)) > vocabulary:
        raise UserError(f"{queries} queries are too many for a vocabulary of {vocabulary} tokens: take fewer")
