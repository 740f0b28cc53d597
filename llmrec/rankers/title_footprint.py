"""Memory of a ranker that writes titles: of scoring the candidates' titles and of writing queries, rehearsed as in `footprint`."""

from __future__ import annotations

from transformers import PreTrainedConfig

from llmrec.config import Base
from llmrec.rankers.completions import choose, completion_logps, lay_out
from llmrec.rankers.footprint import Footprint, hollow, without_gradients
from llmrec.rankers.queries import Reader
from llmrec.rankers.titles import batches


def titles_footprint(config: PreTrainedConfig, base: Base, *, batch: int, tokens: int, titles: int, title: int) -> Footprint:
    """What a forward pass of `title_logprobs` needs.

    Args:
        config: of the base model.
        base: its dtype, quantisation and attention.
        batch: rows of the pass, at most.
        tokens: of a prompt.
        titles: candidates of a prompt.
        title: tokens of each of them.
    """
    model = hollow(config, base)
    strategy, _ = choose(model, gradient_checkpointing=False)
    rows, candidates = [[0] * tokens] * batch, [[[0] * title] * titles] * batch
    parts = next(batches(strategy, rows, candidates, batch))
    laid_out = lay_out(strategy, [rows[at] for at, _ in parts], [candidates[at][which] for at, which in parts], pad_id=0)
    whole = laid_out | {"mask": None}  # prompts of one length need none, which fake tensors cannot tell by its content
    return without_gradients(model, base, lambda: completion_logps(model, model.config, whole))


def queries_footprint(config: PreTrainedConfig, base: Base, *, batch: int, beams: int, tokens: int) -> Footprint:
    """What a step of `beam_queries` needs, after the prompts were read.

    Args:
        config: of the base model.
        base: its dtype, quantisation and attention.
        batch: prompts.
        beams: of each prompt.
        tokens: of a prompt with what was written after it.
    """
    model = hollow(config, base)

    def step() -> None:
        reader = Reader(model, [[0] * tokens] * batch, pad_id=0)
        reader.read_prompts()
        logits = reader.go_on([at for at in range(batch) for _ in range(beams)], [0] * batch * beams)
        (logits.log_softmax(-1) + 0.0).topk(beams)  # with the beams' own log-probabilities

    return without_gradients(model, base, step)
