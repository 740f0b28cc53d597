"""What the ranker learns from: SFT rows and preference pairs, built from the training part alone.

    sft          history -> the next item is the answer, at several points of each user's training part
    preferences  one prompt per user: its history ends before the last two training items, its pool holds those two,
                 LightFM's losers and fillers. Pairs on it:
                   rating   the higher rated of the last two wins (arXiv 2408.05606, section 3.5.2, first part)
                   lightfm  the last item wins against an unseen item that LightFM picks (second part)

The paper takes the last items of the whole history, which under leave-one-out are the validation and test items. Here they
are the last of the training part, and these functions are given nothing else. Answers are letters of the pool, or titles where
the template asks for them: then there is no pool, and a pair whose titles read the same is left out. No torch: the stage hands
in the retriever's lists and LightFM's scores as functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import polars as pl

from llmrec.config import Pairs
from llmrec.data.sequences import Sequences
from llmrec.errors import UserError
from llmrec.losers import choose_losers, popularity_deciles
from llmrec.pair_statistics import PreferenceStatistics, SftStatistics, loser_statistics
from llmrec.progress import track
from llmrec.prompting import Refused, Writer

PoolFor = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(users, ends) -> (n, N) int32: the retriever's best items, best first, given each user's events before position `end` of
`train.items` and without the items of those events; 0 where there are fewer than N."""

ScoresFor = Callable[[np.ndarray], np.ndarray]
"""users -> (n, items) float32: LightFM's scores; column j is item j + 1."""

SFT_SCHEMA = pl.Schema(
    {
        "user": pl.Int32(),
        "group": pl.Int32(),
        "prompt": pl.String(),
        "completion": pl.String(),
        "target_item": pl.Int32(),
        "pool_items": pl.List(pl.Int32),
        "history_items": pl.List(pl.Int32),
    }
)
PREFERENCE_SCHEMA = pl.Schema(
    {
        "user": pl.Int32(),
        "group": pl.Int32(),
        "prompt": pl.String(),
        "chosen": pl.String(),
        "rejected": pl.String(),
        "chosen_item": pl.Int32(),
        "rejected_item": pl.Int32(),
        "pool_items": pl.List(pl.Int32),
        "history_items": pl.List(pl.Int32),
        "source": pl.String(),
    }
)

# What a stream of random numbers is for: [seed, purpose, user ...] keeps streams apart.
_ORDER, _PREFIXES, _SFT_POOL, _PREFERENCE_POOL = 1, 2, 3, 4
_SCORES_AT_ONCE = 50_000_000  # LightFM scores held in memory: 200 MB


def sft_rows(
    train: Sequences, writer: Writer, config: Pairs, seed: int, users: np.ndarray, pool_for: PoolFor | None
) -> tuple[pl.DataFrame, SftStatistics]:
    """Rows that teach the ranker to answer with the next item.

    Args:
        train: `Sequences.train_only()`.
        writer: writes the prompts, and says how many candidates they show.
        config: how many rows, and which pool.
        seed: which users, prefixes and items, and the order of the candidates.
        users: user numbers to take rows from. Every user gives one row before any gives a second.
        pool_for: the retriever, for `pool: retriever`; None for `pool: uniform`, and where prompts show no candidates.

    Returns:
        The `sft` table of docs/architecture.md, and what it is made of.

    Raises:
        UserError: not one row could be made.
    """
    _check_sources(config, pool_for, writer)
    cases = _prefixes(train, users, config.prefixes_per_user, seed)
    limit = len(cases) if config.sft_rows is None else min(config.sft_rows, len(cases))
    refused: Counter[str] = Counter()
    retrieved = 0
    rows: list[dict] = []
    for user, end, ranked, _ in track(_lookup(cases, pool_for, None, max(1, min(limit, 1024))), "SFT rows", total=limit):
        if len(rows) == limit:
            break
        history, target = train.history(user, end), int(train.items[end])
        rng = np.random.default_rng([seed, _SFT_POOL, user, len(history)])
        # what the user took later is no wrong answer, and a retriever trained on it ranks it high
        pool = _pool([target], ranked, train.train_part(user), writer.shown, train.item_count, rng)
        prompt = writer.write(history, pool)
        if isinstance(prompt, Refused):
            refused[prompt.reason] += 1
            continue
        retrieved += target in ranked[: len(pool)]
        rows.append(
            {
                "user": user,
                "group": len(rows),
                "prompt": prompt.text,
                "completion": writer.answer(target, pool),
                "target_item": target,
                "pool_items": prompt.pool_items,
                "history_items": prompt.history_items,
            }
        )
    if not rows:
        raise UserError(f"no SFT rows: no user has 3 training events and a prompt that fits ({_reasons(refused)})")
    table = pl.DataFrame(rows, schema=SFT_SCHEMA)
    share = None if pool_for is None else retrieved / len(rows)
    return table, SftStatistics(rows=table.height, users=table["user"].n_unique(), target_retrieved=share, refused=dict(refused))


def preference_rows(
    train: Sequences,
    writer: Writer,
    config: Pairs,
    seed: int,
    users: np.ndarray,
    pool_for: PoolFor | None,
    lightfm_scores: ScoresFor | None,
) -> tuple[pl.DataFrame, PreferenceStatistics]:
    """Preference pairs. All pairs of a user share one prompt, so that one forward pass serves them.

    Args:
        train: `Sequences.train_only()`.
        writer: writes the prompts, and says how many candidates they show.
        config: which pairs, and how many prompts.
        seed: which users and items, and the order of the candidates.
        users: user numbers to take prompts from.
        pool_for: the retriever, for `pool: retriever`; None for `pool: uniform`, and where prompts show no candidates.
        lightfm_scores: LightFM trained on the training part; None for `lightfm: none`.

    Returns:
        The `preferences` table of docs/architecture.md, and what it is made of. Reasons are counted over the users looked at:
        all of them, or until `config.prompts` is reached.

    Raises:
        UserError: the pool is too small for the losers, or not one pair could be made.
    """
    _check_sources(config, pool_for, writer)
    if (config.lightfm == "none") != (lightfm_scores is None):
        raise ValueError(f"pairs.lightfm is {config.lightfm}, but LightFM's scores are {'missing' if lightfm_scores is None else 'given'}")
    if lightfm_scores is not None and config.losers < 1:
        raise UserError(f"pairs.losers is {config.losers}: choose at least 1, or pairs.lightfm none")
    if lightfm_scores is not None and not writer.asks_for_title and config.losers > writer.shown - 2:
        raise UserError(f"pairs.losers is {config.losers}: choose 1 to {writer.shown - 2}, prompt.candidates less the last two items")
    users = np.random.default_rng([seed, _ORDER]).permutation(users)
    enough = np.diff(train.offsets)[users] >= 4
    skipped = Counter({"fewer than 4 training events": int((~enough).sum())})
    refused: Counter[str] = Counter()
    cases = [(int(user), int(train.offsets[user + 1]) - 2) for user in users[enough]]
    limit = len(cases) if config.prompts is None else min(config.prompts, len(cases))
    batch = max(1, min(limit, 1024, _SCORES_AT_ONCE // train.item_count))
    deciles = popularity_deciles(train)

    rows: list[dict] = []
    group = 0
    for user, end, ranked, scores in track(_lookup(cases, pool_for, lightfm_scores, batch), "preference pairs", total=limit):
        if group == limit:
            break
        rng = np.random.default_rng([seed, _PREFERENCE_POOL, user])
        before, last = int(train.items[end]), int(train.items[end + 1])
        seen = train.history(user, end + 2)
        pairs: list[tuple[int, int, str]] = []
        if config.rating:
            earlier, later = train.ratings[end], train.ratings[end + 1]
            if before == last:
                skipped["rating: the last two items are the same"] += 1
            elif np.isnan(earlier) or np.isnan(later):
                skipped["rating: a rating is missing"] += 1
            elif earlier == later:
                skipped["rating: equal ratings"] += 1
            else:
                pairs.append((before, last, "rating") if earlier > later else (last, before, "rating"))
        if config.lightfm != "none" and scores is not None:
            losers = choose_losers(config.lightfm, scores, seen, last, deciles, config.losers, rng)
            if not losers:
                skipped["lightfm: no unseen item"] += 1
            pairs += [(last, loser, "lightfm") for loser in losers]
        if writer.asks_for_title:
            differ = [pair for pair in pairs if writer.answer(pair[0], []) != writer.answer(pair[1], [])]
            if len(differ) < len(pairs):
                skipped["both titles read the same"] += len(pairs) - len(differ)
            pairs = differ
        if not pairs:
            continue

        shown = list(dict.fromkeys([before, last, *(loser for _, loser, _ in pairs)]))
        pool = _pool(shown, ranked, seen, writer.shown, train.item_count, rng)
        prompt = writer.write(train.history(user, end), pool)
        if isinstance(prompt, Refused):
            refused[prompt.reason] += 1
            continue
        for winner, loser, source in pairs:
            rows.append(
                {
                    "user": user,
                    "group": group,
                    "prompt": prompt.text,
                    "chosen": writer.answer(winner, pool),
                    "rejected": writer.answer(loser, pool),
                    "chosen_item": winner,
                    "rejected_item": loser,
                    "pool_items": prompt.pool_items,
                    "history_items": prompt.history_items,
                    "source": source,
                }
            )
        group += 1
    skipped = +skipped  # without zeros
    if not rows:
        raise UserError(
            f"no preference pairs ({_reasons(skipped + refused)}): turn on pairs.lightfm or pairs.rating, or raise prompt.budget"
        )
    table = pl.DataFrame(rows, schema=PREFERENCE_SCHEMA)
    return table, PreferenceStatistics(prompts=group, losers=loser_statistics(table), skipped=dict(skipped), refused=dict(refused))


def _check_sources(config: Pairs, pool_for: PoolFor | None, writer: Writer) -> None:
    if (config.pool == "uniform" or writer.asks_for_title) != (pool_for is None):
        raise ValueError(f"pairs.pool is {config.pool}, but the retriever is {'missing' if pool_for is None else 'given'}")


def _prefixes(train: Sequences, users: np.ndarray, per_user: int, seed: int) -> list[tuple[int, int]]:
    """(user, position of the target), with 2 events or more before it: the first of every user, then the second, ..."""
    order = np.random.default_rng([seed, _ORDER]).permutation(users)
    targets = []
    for user in order:
        rng = np.random.default_rng([seed, _PREFIXES, user])
        possible = np.arange(train.offsets[user] + 2, train.offsets[user + 1])
        targets.append(rng.permutation(possible)[:per_user])
    rounds = max((len(ends) for ends in targets), default=0)
    return [(int(user), int(ends[n])) for n in range(rounds) for user, ends in zip(order, targets, strict=True) if n < len(ends)]


def _lookup(
    cases: list[tuple[int, int]], pool_for: PoolFor | None, lightfm_scores: ScoresFor | None, batch: int
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray | None]]:
    """Yield (user, end, the retriever's list, LightFM's scores), asking for a batch of users at a time."""
    for start in range(0, len(cases), batch):
        some = cases[start : start + batch]
        users, ends = np.array([user for user, _ in some], dtype=np.int32), np.array([end for _, end in some], dtype=np.int64)
        lists = np.zeros((len(some), 0), dtype=np.int32) if pool_for is None else pool_for(users, ends)
        scores = [None] * len(some) if lightfm_scores is None else lightfm_scores(users)
        for (user, end), ranked, score in zip(some, lists, scores, strict=True):
            yield user, end, ranked, score


def _pool(shown: list[int], ranked: np.ndarray, seen: np.ndarray, size: int, item_count: int, rng: np.random.Generator) -> list[int]:
    """`shown` filled up to `size` with the retriever's best unseen items, then with uniform unseen ones; shuffled. Size 0 is no pool."""
    if not size:
        return []
    free = np.ones(item_count + 1, dtype=bool)
    free[0] = False
    free[seen] = False
    free[shown] = False
    best = ranked[free[ranked]][: size - len(shown)]
    free[best] = False
    others = np.flatnonzero(free)
    uniform = rng.choice(others, size=min(size - len(shown) - len(best), len(others)), replace=False)
    return rng.permutation(np.concatenate([shown, best, uniform]).astype(np.int64)).tolist()


def _reasons(counts: Counter[str]) -> str:
    return "; ".join(f"{reason}: {count}" for reason, count in counts.most_common()) or "no users"
