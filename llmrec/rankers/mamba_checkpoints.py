"""Mamba-2 checkpoints as the authors publish them (state-spaces/mamba2-130m and its larger sisters), for transformers.

They are in the layout of mamba-ssm: config.json with the arguments of its classes, and the tensors in pytorch_model.bin. That is
a pickle, which could run code when it is read; torch's `weights_only` reader builds tensors and refuses everything else. The
tokenizer is that of GPT-NeoX and lies elsewhere.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, Mamba2Config, Mamba2ForCausalLM

from llmrec.errors import UserError

# What mamba-ssm takes where ssm_cfg says nothing (mamba_ssm/modules/mamba2.py), under transformers' names.
SIZES = {
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
    "ngroups": ("n_groups", 1),
    "chunk_size": ("chunk_size", 256),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
}
END_OF_TEXT = 0
"""Of the tokenizer of GPT-NeoX, which begins, ends and pads with it."""


def transformers_config(published: Mapping[str, Any]) -> Mamba2Config:
    """What transformers calls the settings of mamba-ssm.

    Args:
        published: content of config.json. The vocabulary is rounded up to `pad_vocab_size_multiple`, as the embedding is.

    Raises:
        UserError: the layers are not those of Mamba-2 alone, or have settings that transformers' Mamba-2 does not know.
    """
    layer = dict(published["ssm_cfg"])
    kind = layer.pop("layer", "Mamba1")
    if kind != "Mamba2" or published.get("attn_layer_idx") or published.get("d_intermediate") or not published.get("rms_norm", True):
        raise UserError(
            f"a mamba-ssm checkpoint of {kind} layers: only plain Mamba2 ones with RMS norm are converted; take state-spaces/mamba2-*"
        )
    unknown = sorted(layer.keys() - SIZES.keys())
    if unknown:
        raise UserError(f"ssm_cfg.{unknown[0]} of the mamba-ssm checkpoint is not known here: convert it to transformers' format yourself")
    sizes = {theirs: layer.get(name, default) for name, (theirs, default) in SIZES.items()}
    width, multiple = published["d_model"], published.get("pad_vocab_size_multiple", 8)
    return Mamba2Config(
        hidden_size=width,
        num_hidden_layers=published["n_layer"],
        num_heads=width * sizes["expand"] // sizes["head_dim"],
        vocab_size=-(-published["vocab_size"] // multiple) * multiple,
        residual_in_fp32=published.get("residual_in_fp32", True),
        tie_word_embeddings=published.get("tie_embeddings", True),
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        **sizes,
    )


def convert(source: str | Path, tokenizer: str | Path, folder: str | Path) -> Path:
    """Write a mamba-ssm checkpoint to `folder` as transformers reads it, with its tokenizer. Done or absent, never half.

    Args:
        source: folder with config.json and pytorch_model.bin. The weights keep their dtype.
        tokenizer: folder of the tokenizer.
        folder: where to.

    Returns:
        `folder`.

    Raises:
        UserError: something else than tensors is in the file, or they are not those that config.json speaks of.
    """
    source, folder = Path(source), Path(folder)
    config = transformers_config(json.loads((source / "config.json").read_text(encoding="utf-8")))
    weights = _renamed(_tensors(source / "pytorch_model.bin"), config)
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in Mamba2ForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != expected:
        name = sorted(dict(found.items() ^ expected.items()))[0]
        raise UserError(
            f"{source}: {name} is {found.get(name, 'missing')} in pytorch_model.bin and {expected.get(name, 'missing')} by config.json; "
            "fetch both again"
        )
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    config.architectures = ["Mamba2ForCausalLM"]
    config.save_pretrained(beside)
    save_file(weights, beside / "model.safetensors", {"format": "pt"})
    AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(beside)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    note = {"weights": "as published, in the format of transformers", "dtype": dtype}
    (beside / "weights.json").write_text(json.dumps(note, indent=1) + "\n")
    beside.rename(folder)
    return folder


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is damaged, or holds something else than tensors, which is not read: fetch it again") from error
    if not isinstance(found, dict) or not all(isinstance(weight, Tensor) for weight in found.values()):
        raise UserError(f"{path} holds something else than tensors by name: fetch it again")
    return found


def _renamed(weights: Mapping[str, Tensor], config: Mamba2Config) -> dict[str, Tensor]:
    """Under transformers' names; a tied output layer is not stored twice."""
    embedding = {"backbone.embedding.weight": "backbone.embeddings.weight"}
    return {
        embedding.get(name, name): weight.contiguous()
        for name, weight in weights.items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
