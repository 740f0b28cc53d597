"""Log-probabilities of completions that share a prompt, with as little computed twice as the model allows.

Completions of one token are read from the logits after the prompt's last token, all of them from one forward pass. Longer ones
have tokens of their own to go through, and how they share the prompt depends on the model:

    packed        A prompt and all its completions are one row. A block mask lets each completion see the prompt and itself, and
                  its positions go on from the prompt's. For attention.
    continued     A pass over the prompts, then one over the completions, each from its prompt's states. For Mamba-2.
    concatenated  Prompt and completion, one row per completion: exact for every causal model, the prompt is computed each time.

A completion's last token is predicted but predicts nothing, so no row holds it. Only positions that predict a completion's
token go through the output layer. Rows are padded on the right, where a causal model never looks (see `letters`), except for
prompts that are continued: their states are taken at the end of the row, so they are padded on the left and masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PretrainedConfig

from llmrec.rankers.letters import pad, padded_width

Strategy = Literal["packed", "continued", "concatenated"]

PACKED = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Families whose attention takes a mask and positions from outside."""

NLL_CHUNK = 256
"""Positions for which the vocabulary-wide softmax is made at the same time."""


def choose(model: nn.Module, gradient_checkpointing: bool, split: bool = False) -> tuple[Strategy, str]:
    """How completions of several tokens share their prompt in this model, and why, in a few words.

    Args:
        model: a causal language model of transformers, with or without adapter.
        gradient_checkpointing: whether it trains with recomputed activations, by the trainer's settings or by its own.
        split: whether its weights are split over processes (FSDP, ZeRO-3), which have to call it equally often.
    """
    config: Any = model.config
    kind, attention = config.model_type, config._attn_implementation  # transformers has no public name for it
    if kind == "mamba2":
        if gradient_checkpointing:
            return "concatenated", "gradient checkpointing drops the states after the prompt"
        if split:
            return "concatenated", "a second pass, which not every batch has, would wait for weights of other processes"
        if config.use_bias:
            return "concatenated", "a bias on in_proj would let padding into the states"
        return "continued", "from the states after the prompt"
    if kind not in PACKED:
        return "concatenated", f"how {kind} could share a prompt is not known here"
    if attention not in ("sdpa", "eager"):
        return "concatenated", f"attention {attention} takes no block mask; sdpa does"
    if any(DynamicCache(config=config).is_sliding):
        return "concatenated", "a sliding window would be counted over all completions of the row"
    return "packed", "a prompt and its completions in one row"


def row_size(strategy: Strategy, prompt: int, completions: Sequence[int], single: bool) -> tuple[int, int]:
    """What a prompt goes through the model as: tokens of a row, and how many rows.

    Args:
        strategy: of `choose`.
        prompt: its tokens.
        completions: tokens of each of its completions.
        single: whether all completions of the batch are single tokens, which cost nothing.
    """
    if strategy == "concatenated" and not single:
        return prompt + max((length - 1 for length in completions), default=0), max(1, len(completions))
    return prompt + sum(length - 1 for length in completions), 1


def lay_out(
    strategy: Strategy, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], pad_id: int
) -> dict[str, Tensor]:
    """Token rows of a forward pass, and where in them everything stands.

    Args:
        strategy: of `choose`. Where all completions are single tokens it makes no difference.
        prompts: token ids of each prompt.
        completions: token ids of each prompt's completions; a prompt may have none.
        pad_id: any token id.

    Returns:
        input_ids: (rows, longest), longest as of `padded_width` wherever it is meant here.
        kept: positions that go through the output layer, (rows, most), beginning with the prompt's last.
        at, targets, completion: of each completion's token the place of its logits, counted through all that are kept; its id;
            the number of its completion, counted through all prompts. (tokens,)
        completion_lengths: (completions,).
        prompt_rows, starts, lengths: of each prompt a row it stands in, where it begins there, its number of tokens. (prompts,)
        Packed: `positions` and `segments`, (rows, longest), 0 in the prompt, n in its n-th completion.
        Continued: `mask` (rows, longest); `continuations` (completions of several tokens, longest), whose kept logits are counted
            after the rows'; `continues`, the row of each one's prompt.
    """
    single = all(len(completion) == 1 for of_prompt in completions for completion in of_prompt)
    if strategy == "continued" and not single:
        return _continued(prompts, completions, pad_id)
    rows: list[tuple[Sequence[int], Sequence[Sequence[int]]]] = []
    prompt_rows = []
    for prompt, of_prompt in zip(prompts, completions, strict=True):
        prompt_rows.append(len(rows))
        if strategy == "concatenated" and not single and of_prompt:
            rows += [(prompt, [completion]) for completion in of_prompt]
        else:
            rows.append((prompt, of_prompt))
    found = _in_rows(rows, pad_id)
    if strategy != "packed" or single:  # a plain causal mask is the same then, and faster
        del found["positions"], found["segments"]
    return found | {
        "completion_lengths": torch.tensor([len(completion) for of_prompt in completions for completion in of_prompt]),
        "prompt_rows": torch.tensor(prompt_rows),
        "starts": torch.zeros(len(prompts), dtype=torch.int64),
        "lengths": torch.tensor([len(prompt) for prompt in prompts]),
    }


def _in_rows(rows: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], pad_id: int) -> dict[str, Tensor]:
    """Each prompt followed by its completions, without their last tokens."""
    lines: list[list[int]] = []
    positions: list[list[int]] = []
    segments: list[list[int]] = []
    kept_from: list[int] = []
    places: list[tuple[int, int]] = []
    targets: list[int] = []
    numbers: list[int] = []
    number = 0
    for row, (prompt, of_row) in enumerate(rows):
        line, position, segment = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        last = len(prompt) - 1
        for nth, completion in enumerate(of_row, start=1):
            own = range(len(line), len(line) + len(completion) - 1)
            places += [(row, at - last) for at in (last, *own)]
            targets += completion
            numbers += [number] * len(completion)
            line += completion[:-1]
            position += range(len(prompt), len(prompt) + len(own))
            segment += [nth] * len(own)
            number += 1
        lines.append(line)
        positions.append(position)
        segments.append(segment)
        kept_from.append(last)
    ids, totals = pad(lines, pad_id)
    most = max(len(line) - last for line, last in zip(lines, kept_from, strict=True))
    kept = torch.tensor(kept_from)[:, None] + torch.arange(most)
    return {
        "input_ids": ids,
        "positions": pad(positions, 0)[0],
        "segments": pad(segments, 0)[0],
        "kept": torch.minimum(kept, totals[:, None] - 1),
        "at": torch.tensor([row * most + column for row, column in places], dtype=torch.int64),
        "targets": torch.tensor(targets, dtype=torch.int64),
        "completion": torch.tensor(numbers, dtype=torch.int64),
    }


def _continued(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], pad_id: int) -> dict[str, Tensor]:
    """Prompts padded on the left, and the tokens of their completions in rows of their own."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = padded_width(int(lengths.max()))
    starts = longest - lengths
    flat = [(row, completion) for row, of_prompt in enumerate(completions) for completion in of_prompt]
    several = [(number, row, completion) for number, (row, completion) in enumerate(flat) if len(completion) > 1]
    # A single token would take the step-by-step path of generation, which overwrites the states that the backward pass needs.
    width = max(2, *(len(completion) - 1 for _, _, completion in several))
    at = [row for row, _ in flat]
    targets = [completion[0] for _, completion in flat]
    numbers = list(range(len(flat)))
    for nth, (number, _, completion) in enumerate(several):
        at += [len(prompts) + nth * width + column for column in range(len(completion) - 1)]
        targets += completion[1:]
        numbers += [number] * (len(completion) - 1)
    return {
        "input_ids": torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]),
        "mask": (torch.arange(longest) >= starts[:, None]).long(),
        "kept": torch.full((len(prompts), 1), longest - 1),
        "continuations": torch.tensor([[*completion[:-1], *[pad_id] * (width - len(completion) + 1)] for _, _, completion in several]),
        "continues": torch.tensor([row for _, row, _ in several]),
        "at": torch.tensor(at),
        "targets": torch.tensor(targets),
        "completion": torch.tensor(numbers),
        "completion_lengths": torch.tensor([len(completion) for _, completion in flat]),
        "prompt_rows": torch.arange(len(prompts)),
        "starts": starts,
        "lengths": lengths,
    }


def kept_logits(
    model: nn.Module, config: PretrainedConfig, batch: dict[str, Any], hidden_states: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits at the positions that are kept, in the order that `at` counts.

    Args:
        model: as it trains, wrapped or not; what comes out of its own forward pass takes part in what wraps it.
        config: the model's.
        batch: of `lay_out`.
        hidden_states: whether to return them, for `prompt_nll`.

    Returns:
        (kept, vocabulary), and what the output layer would read, (rows, longest, width), or None.
    """
    inputs = {"input_ids": batch["input_ids"], "logits_to_keep": batch["kept"], "output_hidden_states": hidden_states, "use_cache": False}
    if "segments" in batch:
        inputs |= {"attention_mask": block_mask(batch["segments"], config), "position_ids": batch["positions"]}
    if "continuations" in batch:
        states = States(config=config)
        inputs |= {"attention_mask": batch["mask"], "cache_params": states, "use_cache": True}
    out = model(**inputs)
    logits = out.logits.flatten(0, 1)
    if "continuations" in batch:
        states.reorder_cache(batch["continues"])
        own = model(input_ids=batch["continuations"], cache_params=states, use_cache=True).logits
        logits = torch.cat([logits, own.flatten(0, 1)])
    return logits, out.hidden_states[-1] if hidden_states else None


def completion_logps(
    model: nn.Module, config: PretrainedConfig, batch: dict[str, Any], hidden_states: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each completion after its prompt, the sum over its tokens.

    Args:
        model: of `kept_logits`, as are the others.
        config: the model's.
        batch: of `lay_out`.
        hidden_states: whether to return them, for `prompt_nll`.

    Returns:
        (completions,) float32, and what the output layer would read, (rows, longest, width), or None.
    """
    logits, hidden = kept_logits(model, config, batch, hidden_states)
    # chunk by chunk, or there would be all of the logits twice
    normalisers = torch.cat([part.float().logsumexp(-1) for part in logits.split(NLL_CHUNK)])
    logps = logits[batch["at"], batch["targets"]].float() - normalisers[batch["at"]]
    sums = logps.new_zeros(len(batch["completion_lengths"])).index_add(0, batch["completion"], logps)
    return sums, hidden


def prompt_nll(hidden: Tensor, head: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Summed NLL of each prompt's own tokens but the first, (prompts,) float32.

    The vocabulary-wide softmax is made for `NLL_CHUNK` positions at a time.

    Args:
        hidden: of `completion_logps`.
        head: the output layer; logits are its output as it is (`scaled_logits`).
        batch: of `lay_out`.
    """
    starts, lengths = batch["starts"], batch["lengths"]
    places = torch.arange(hidden.shape[1], device=hidden.device)
    predicts = (places >= starts[:, None]) & (places < (starts + lengths - 1)[:, None])
    prompt, place = predicts.nonzero(as_tuple=True)
    row = batch["prompt_rows"][prompt]
    read, targets = hidden[row, place], batch["input_ids"][row, place + 1]

    frozen = not any(weight.requires_grad for weight in head.parameters())
    total = hidden.new_zeros(len(lengths), dtype=torch.float32)
    for start in range(0, len(targets), NLL_CHUNK):
        part = slice(start, start + NLL_CHUNK)
        if frozen:
            losses = FrozenHeadNll.apply(read[part], targets[part], head)
        else:  # its weights need their own gradients, from logits that are made again
            losses = checkpoint(_nll, read[part], targets[part], head, use_reentrant=False)
        total = total.index_add(0, prompt[part], losses)
    return total


def scaled_logits(config: Any) -> str:
    """The setting by which a model changes its logits after the head, as Gemma 2 and Cohere do; "" for most models."""
    settings = config.to_dict()
    known = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    return next((name for name in known if settings.get(name) not in (None, 1, 1.0)), "")


def _nll(read: Tensor, targets: Tensor, head: Any) -> Tensor:
    own = read.to(head.weight.dtype)  # under mixed precision hidden states come out of the model in float32
    return F.cross_entropy(head(own).float(), targets, reduction="none")


class FrozenHeadNll(torch.autograd.Function):
    """NLL of targets after a frozen output layer, (positions,) float32, which keeps no logits.

    The gradient is made while the logits are there, as a position's loss depends on its own hidden state alone; the backward pass
    only scales it.
    """

    @staticmethod
    def forward(ctx: Any, read: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
        """Losses, and for the backward pass their gradients."""
        if not ctx.needs_input_grad[0]:
            return _nll(read, targets, head)
        with torch.enable_grad():
            inputs = read.detach().requires_grad_()
            losses = _nll(inputs, targets, head)
            (gradients,) = torch.autograd.grad(losses.sum(), inputs)
        ctx.save_for_backward(gradients)
        return losses.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        """The gradients, each times that of its loss."""
        (gradients,) = ctx.saved_tensors
        return gradients * upstream[0][:, None].to(gradients.dtype), None, None


def block_mask(segments: Tensor, config: Any) -> Tensor:
    """Who may look at whom in packed rows, (rows, 1, longest, longest): at the prompt and at its own completion, up to itself.

    Args:
        segments: of `lay_out`.
        config: the model's; its eager attention adds the mask to the scores, where the fast one takes true and false.
    """
    places = torch.arange(segments.shape[1], device=segments.device)
    same = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    mask = (same & (places[None, :] <= places[:, None]))[:, None]
    if config._attn_implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)


class States(DynamicCache):
    """transformers' cache with new recurrent states beside the old ones, not written over them.

    A scan kernel keeps the states that it began with for its backward pass.
    """

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Take the states after a layer's scan."""
        layer: Any = self.layers[layer_idx]
        layer.recurrent_states[state_idx], layer.is_recurrent_states_initialized[state_idx] = recurrent_states, True
        return recurrent_states
