"""GGUF weights as an ordinary checkpoint, once, so that everything else reads safetensors.

A registry copy of a base model may exist as a quantised GGUF file only. transformers reads it, but keeps the weights packed in
blocks or unpacks them anew at every start.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

from llmrec.errors import UserError


def dequantise(source: str | Path, folder: str | Path) -> Path:
    """Write the GGUF file `source` to `folder` as bfloat16 safetensors with its tokenizer. Done or absent, never half.

    The weights are those of the quantised file, not the publisher's; `weights.json` in the folder says so.

    Returns:
        `folder`.

    Raises:
        UserError: `source` is not a GGUF file of a supported architecture.
    """
    source, folder = Path(source), Path(folder)
    disable_progress_bar()  # a few seconds, once
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(
            f"{source}: cannot be read as GGUF weights ({' '.join(str(error).split())}); delete it and fetch it again"
        ) from error
    config = type(model.config).from_dict({k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    # A fresh model, because the loaded one still carries its quantiser, which save_pretrained would record.
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    origin = f"{source.stem.rpartition('.')[2]} dequantised from {source.name}"
    (beside / "weights.json").write_text(json.dumps({"weights": origin, "dtype": "bfloat16"}, indent=1) + "\n")
    beside.rename(folder)
    return folder
