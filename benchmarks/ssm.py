"""State-space layers beside attention, beside themselves without scan, and beside transformers and mambapy.

    python benchmarks/ssm.py                    # everything, JSON; some 15 minutes on 2 cores
    python benchmarks/ssm.py layers --plot docs/ssm.png
    LLMREC_NATIVE=0 python benchmarks/ssm.py layers     # the plain torch code

Sections: layers (cost against length), peers (at length 200), model (transformers' Mamba-2 of 130M shape), latency
(one user's next recommendation). Milliseconds are medians of interleaved runs, forward and backward; ratios are of one
run. mambapy is in the `bench` extra.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import medians, peak_megabytes, report, same_settings
from torch import Tensor, nn

from llmrec.ssm import Hydra, Mamba, Mamba2, accelerate, native
from llmrec.ssm.heads import group_norm

POSITIONS, DIM = 25_600, 64
LENGTHS = (50, 200, 1000, 4000, 16_000)
PUBLISHED = {"d_state": 128, "headdim": 4}  # arXiv 2408.05606
CPU = {"d_state": 32, "headdim": 32}


class WithoutScan(Mamba2):
    """Mamba-2's projections, gate and norm alone."""

    def forward(self, u: Tensor) -> Tensor:  # type: ignore[override]
        z, xBC, _ = self.in_proj(u).split([self.sizes[0], sum(self.sizes), self.heads], dim=-1)
        return self.out_proj(group_norm(xBC[..., : self.sizes[0]] * F.silu(z), self.norm, self.ngroups))


class Attention(nn.Module):
    """Causal self-attention with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, u: Tensor) -> Tensor:
        q, k, v = self.qkv(u).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def training_step(layer: nn.Module, length: int) -> Callable[[], None]:
    """Forward and backward of at least 25,600 positions."""
    u = torch.randn(-(-POSITIONS // length), length, DIM, requires_grad=True)
    ones = torch.ones_like(u)

    def step() -> None:
        out = layer(u)
        (out if isinstance(out, Tensor) else out[0]).backward(ones)

    return step


def layers(plot: str | None) -> dict[str, Any]:
    """Cost per 25,600 positions against the length, and the ratios that should hold."""
    rows = {}
    for length in LENGTHS:
        built = {
            "published": Mamba2(DIM, **PUBLISHED),
            "published_without_scan": WithoutScan(DIM, **PUBLISHED),
            "cpu": Mamba2(DIM, **CPU),
            "cpu_without_scan": WithoutScan(DIM, **CPU),
            "mamba1": Mamba(DIM),
            "hydra_cpu": Hydra(DIM, **CPU),
            "hydra_published": Hydra(DIM, **PUBLISHED),
            "attention": Attention(),
        }
        ms = medians({name: training_step(layer, length) for name, layer in built.items()})
        scale = POSITIONS / (-(-POSITIONS // length) * length)  # 16,000 does not divide 25,600
        ms = {name: round(value * scale, 1) for name, value in ms.items()}
        rows[length] = ms | {
            "published_ratio": round(ms["published"] / ms["published_without_scan"], 2),
            "cpu_ratio": round(ms["cpu"] / ms["cpu_without_scan"], 2),
            "mamba1_to_cpu": round(ms["mamba1"] / ms["cpu"], 2),
            "hydra_to_mamba2_cpu": round(ms["hydra_cpu"] / ms["cpu"], 2),
            "hydra_to_mamba2_published": round(ms["hydra_published"] / ms["published"], 2),
        }
    if plot:
        draw(rows, plot)
    return {"native": native.library() is not None, "ms_per_25600_positions": rows, "overtakes_attention_at": crossings(rows)}


def crossings(rows: dict[int, dict[str, float]]) -> dict[str, float | None]:
    """The length where each layer becomes cheaper than attention, on a straight line between the measured ones in log-log."""
    found: dict[str, float | None] = {}
    for name in ("published", "cpu", "mamba1"):
        gaps = [(torch.tensor(float(length)).log(), torch.tensor(ms[name] / ms["attention"]).log()) for length, ms in rows.items()]
        found[name] = None if gaps[-1][1] > 0 else float(LENGTHS[0])
        for (low, above), (high, below) in itertools.pairwise(gaps):
            if above > 0 >= below:
                found[name] = round(float((low + (high - low) * above / (above - below)).exp()))
    return found


def draw(rows: dict[int, dict[str, float]], path: str) -> None:
    """Milliseconds against length, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    names = {
        "attention": "attention",
        "published": "Mamba-2, d_state 128, headdim 4",
        "cpu": "Mamba-2, d_state 32, headdim 32",
        "mamba1": "Mamba-1, d_state 16",
        "cpu_without_scan": "d_state 32, headdim 32 without scan and convolution",
    }
    for name, label in names.items():
        axes.plot(list(rows), [row[name] for row in rows.values()], marker="o", label=label, linestyle=":" if "without" in name else "-")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="length",
        ylabel="ms for 25,600 positions, forward and backward",
        title=f"width {DIM}, {torch.get_num_threads()} CPU threads",
    )
    axes.set_xticks(list(rows), [f"{length:,}" for length in rows])
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def transformers_mixer(d_state: int, headdim: int, chunk: int) -> nn.Module:
    """One Mamba-2 mixer of transformers, on its torch code."""
    from transformers import Mamba2Config, Mamba2Model

    heads = 2 * DIM // headdim
    config = Mamba2Config(
        hidden_size=DIM,
        state_size=d_state,
        head_dim=headdim,
        num_heads=heads,
        expand=2,
        n_groups=1,
        chunk_size=chunk,
        num_hidden_layers=1,
        vocab_size=2,
    )
    return Mamba2Model(config).layers[0].mixer


def mambapy_block() -> nn.Module:
    """The Mamba-1 block of mambapy."""
    from mambapy.mamba import MambaBlock, MambaConfig

    return MambaBlock(MambaConfig(d_model=DIM, n_layers=1, d_state=16))


def ours(kind: str, sizes: dict[str, int]) -> nn.Module:
    """Our layer of that kind."""
    return {"mamba": Mamba, "mamba2": Mamba2}[kind](DIM, **sizes)


def step_of(build: Callable[..., nn.Module], arguments: tuple[Any, ...], length: int) -> Callable[[], None]:
    """A training step of a layer built in the process that measures it."""
    return training_step(build(*arguments), length)


def peers(length: int = 200) -> dict[str, Any]:
    """The mixer of transformers at its best chunk and mambapy's block beside ours: time and memory."""
    pairs: dict[str, tuple[tuple[Callable[..., nn.Module], tuple[Any, ...]], tuple[Callable[..., nn.Module], tuple[Any, ...]]]] = {}
    for name, sizes in (("published", PUBLISHED), ("d_state64_headdim32", {"d_state": 64, "headdim": 32})):
        chunks = {chunk: training_step(transformers_mixer(**sizes, chunk=chunk), length) for chunk in (8, 16, 32, 64, 128, 256)}
        once = {chunk: medians({"run": step}, rounds=1)["run"] for chunk, step in chunks.items()}
        best = min(once, key=once.__getitem__)
        pairs[f"transformers_{name}_chunk{best}"] = (transformers_mixer, (*sizes.values(), best)), (ours, ("mamba2", sizes))
    pairs["mambapy"] = (mambapy_block, ()), (ours, ("mamba", {"d_state": 16}))
    rows = {}
    for name, sides in pairs.items():
        ms = medians({side: step_of(*built, length) for side, built in zip(("peer", "ours"), sides, strict=True)}, rounds=5)
        memory = {f"{side}_mb": peak_megabytes(step_of, *built, length) for side, built in zip(("peer", "ours"), sides, strict=True)}
        rows[name] = ms | memory | {"times_faster": round(ms["peer"] / ms["ours"], 1)}
    rows["attention_ms"] = medians({"run": training_step(Attention(), length)})["run"]
    return {"length": length, **rows}


def language_model(fast: bool, chunk: int = 256) -> nn.Module:
    """The Mamba-2 of transformers in 130M shape with random weights; chunk 256 is what the published checkpoint has."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 768,
        "num_hidden_layers": 24,
        "state_size": 128,
        "head_dim": 64,
        "num_heads": 24,
        "n_groups": 1,
        "vocab_size": 50_288,
    }
    model = Mamba2ForCausalLM(Mamba2Config(**sizes, tie_word_embeddings=True, chunk_size=chunk))
    if fast:
        accelerate(model)
    return model


def language_model_step(fast: bool, chunk: int = 256, batch: int = 2, length: int = 512) -> Callable[[], None]:
    """Forward and backward of a batch of tokens."""
    model = language_model(fast, chunk)
    tokens = torch.randint(0, 50_000, (batch, length))

    def step() -> None:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()

    return step


def matrix_products(batch: int = 2, length: int = 512) -> Callable[[], None]:
    """The linear layers of that model and nothing else: what no scan can save."""
    shapes = [*24 * [(768, 3352), (1536, 768)], (768, 50_288)]
    layers = [(nn.Linear(*shape, bias=False), torch.randn(batch, length, shape[0], requires_grad=True)) for shape in shapes]

    def step() -> None:
        for layer, u in layers:
            out = layer(u)
            out.backward(out.detach())

    return step


def decoding(fast: bool, count: int = 20) -> Callable[[], None]:
    """Greedy tokens after a short prompt."""
    model = language_model(fast).eval()
    prompt = torch.randint(0, 50_000, (1, 16))
    return lambda: model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)


def model() -> dict[str, Any]:
    """The Mamba-2 of transformers in 130M shape, as it is and with `accelerate`."""
    sides: dict[str, tuple[bool, int]] = {"transformers": (False, 256), "transformers_chunk64": (False, 64), "accelerated": (True, 256)}
    steps = {name: language_model_step(*side) for name, side in sides.items()}
    training = medians(steps | {"matrix_products_alone": matrix_products()}, rounds=5)
    memory = {name: peak_megabytes(language_model_step, *side) for name, side in sides.items()}
    decode = medians({"transformers": decoding(False), "accelerated": decoding(True)}, rounds=5)
    return {
        "forward_backward_2x512_ms": training
        | {
            "times_faster": round(training["transformers"] / training["accelerated"], 2),
            "times_faster_if_all_else_cost_nothing": round(training["transformers"] / training["matrix_products_alone"], 2),
        },
        "peak_mb_over_weights": memory | {"share": round(memory["accelerated"] / memory["transformers"], 2)},
        "decode_tokens_per_s": {name: round(20_000 / value, 1) for name, value in decode.items()}
        | {"times_faster": round(decode["transformers"] / decode["accelerated"], 2)},
    }


@torch.inference_mode()
def latency(items: int = 1_000_000, count: int = 100) -> dict[str, Any]:
    """One user's new event: one step of the layer, then the exact top 100 of a million items, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    catalogue, hidden, u = torch.randn(items, DIM), torch.randn(1, DIM), torch.randn(1, DIM)
    scores = hidden @ catalogue.T
    functions: dict[str, Callable[[], object]] = {"scores_of_1M": lambda: hidden @ catalogue.T, "top_100": lambda: scores.topk(count)}
    for name, layer in {"mamba2_published": Mamba2(DIM, **PUBLISHED), "mamba2_cpu": Mamba2(DIM, **CPU), "mamba1": Mamba(DIM)}.items():
        functions[f"step_{name}"] = functools.partial(layer.step, layer.initial_state(1), u)
    functions["reread_200_mamba2_cpu"] = functools.partial(Mamba2(DIM, **CPU), torch.randn(1, 200, DIM))
    ms = medians(functions, rounds=51)
    torch.set_num_threads(threads)
    return {
        "items": items,
        "threads": 1,
        "ms": ms,
        "step_and_top_100_ms": round(ms["step_mamba2_cpu"] + ms["scores_of_1M"] + ms["top_100"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help="layers, peers, model, latency; all by default")
    parser.add_argument("--plot", help="draw cost against length into this file")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    same_settings()
    torch.set_num_threads(arguments.threads)
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "layers": lambda: layers(arguments.plot),
        "peers": peers,
        "model": model,
        "latency": latency,
    }
    report({name: sections[name]() for name in arguments.sections or sections})


if __name__ == "__main__":
    main()
