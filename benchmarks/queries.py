"""Queries written by a Mamba-2 of 130M shape with random weights on a CPU: ours beside transformers' own code, in one run.

    python benchmarks/queries.py                    # JSON; some 4 minutes on 2 cores
    python benchmarks/queries.py --dtype float32
    python benchmarks/queries.py --tiny             # seconds: whether it runs

prefill: tokens of a prompt read per second. decode: tokens written per second after it, one beam. queries: users per second, each
with a prompt and ten beams. Medians of interleaved runs; transformers searches with `generate`, which reads a prompt once for
each beam. In 16 bits, which `auto` takes where the processor multiplies in them, ours has a float32 head, as our rankers do.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from measure import medians, report, same_settings
from transformers import Mamba2Config, Mamba2ForCausalLM

from llmrec.rankers.backbone import float_head, resolve_dtype
from llmrec.rankers.queries import beam_queries
from llmrec.ssm import accelerate

SHAPES = {
    "130m": {"hidden_size": 768, "num_hidden_layers": 24, "state_size": 128, "head_dim": 64, "num_heads": 24, "vocab_size": 50_288},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "head_dim": 16, "num_heads": 4, "vocab_size": 512},
}
PROMPT = {"130m": 512, "tiny": 24}
BEAMS = 10


def language_model(shape: str, dtype: torch.dtype, fast: bool) -> Any:
    """The same random weights on both sides; chunks of 256 are what the published checkpoint has."""
    torch.manual_seed(0)
    config = Mamba2Config(**SHAPES[shape], n_groups=1, tie_word_embeddings=True, chunk_size=256, pad_token_id=0)
    model = Mamba2ForCausalLM(config).to(dtype).eval()
    if fast:
        if dtype != torch.float32:
            float_head(model)
        accelerate(model)
    return model


@torch.inference_mode()
def read(model: Any, prompt: torch.Tensor) -> object:
    """A prompt up to the logits after it."""
    return model(prompt, use_cache=True, logits_to_keep=1)


def written_by_transformers(model: Any, prompt: torch.Tensor, beams: int, count: int) -> object:
    """Beam search of exactly so many tokens, or the greedy one."""
    settings = {"early_stopping": False, "length_penalty": 0.0} if beams > 1 else {}
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        **settings,
    )


def written_by_us(model: Any, prompt: torch.Tensor, beams: int, count: int) -> object:
    """The same."""
    return beam_queries(model, prompt.tolist(), queries=beams, new_tokens=count, end_ids=[])


def speeds(shape: str, dtype: torch.dtype, count: int, rounds: int) -> dict[str, Any]:
    """Tokens and users per second of both sides, and how many times as many ours are."""
    length = PROMPT[shape]
    prompt = torch.randint(0, SHAPES[shape]["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
    functions: dict[str, Callable[[], object]] = {}
    for side, write in (("transformers", written_by_transformers), ("ours", written_by_us)):
        model = language_model(shape, dtype, fast=side == "ours")
        functions |= {
            f"prefill_{side}": lambda model=model: read(model, prompt),
            f"first_{side}": lambda model=model, write=write: write(model, prompt, 1, 1),
            f"greedy_{side}": lambda model=model, write=write: write(model, prompt, 1, 1 + count),
            f"queries_{side}": lambda model=model, write=write: write(model, prompt, BEAMS, count),
        }
    ms = medians(functions, rounds)
    rows = {}
    for name, per_second in (
        ("prefill_tokens_per_s", lambda side: 1e3 * length / ms[f"prefill_{side}"]),
        ("decode_tokens_per_s", lambda side: 1e3 * count / (ms[f"greedy_{side}"] - ms[f"first_{side}"])),
        ("users_per_s", lambda side: 1e3 / ms[f"queries_{side}"]),
    ):
        theirs, ours = per_second("transformers"), per_second("ours")
        rows[name] = {"transformers": round(theirs, 2), "ours": round(ours, 2), "times_faster": round(ours / theirs, 2)}
    return {"shape": shape, "dtype": str(dtype), "prompt_tokens": length, "new_tokens": count, "beams": BEAMS, **rows, "ms": ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of two narrow layers")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=20, help="written after a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    same_settings()
    torch.set_num_threads(arguments.threads)
    shape, dtype = "tiny" if arguments.tiny else "130m", resolve_dtype(arguments.dtype)
    report({"queries": speeds(shape, dtype, arguments.tokens, arguments.rounds)})


if __name__ == "__main__":
    main()
