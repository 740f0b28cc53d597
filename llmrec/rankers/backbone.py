"""The pretrained language model and what is tuned of it, a LoRA adapter or all weights (`lora.r` 0): load, go on, save, merge.

A model that was tuned whole is an ordinary checkpoint of transformers. Adapters are ordinary peft folders:
`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(id), folder)` reads them. Weights are safetensors only and no code
from a model's repository is run.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from llmrec.config import Base, Lora
from llmrec.errors import UserError
from llmrec.ssm import accelerate

TunedModel = PeftModel | PreTrainedModel
"""With an adapter, or tuned whole."""

DEFAULT_TARGETS = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],  # LlamaRec's choice
    "mistral": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "mamba2": ["in_proj"],  # peft refuses out_proj and conv1d: the fused kernel reads their weights past the adapter
}

STATE_SPACE = ("mamba", "mamba2", "falcon_mamba")
"""Families whose fused kernels take the weights of out_proj themselves."""


def best_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies in it (CUDA from Ampere on; CPUs with AMX or AVX512-BF16), else float32.

    CPUs without such instructions compute bfloat16 through float32, which is slower than float32 itself.
    """
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()  # torch has no public query
    return torch.bfloat16 if fast else torch.float32


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype of `Base.dtype`: "auto" is `best_dtype()`."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return best_dtype() if name == "auto" else named[name]


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`. Where it has no padding token, end of text pads: padding is masked, so any id will do.

    Raises:
        UserError: it is written in Python, as that of ByT5.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.is_fast:  # titles are cut where its tokens begin, which only those of the tokenizers library tell
        kind = type(tokenizer).__name__
        raise UserError(f"{folder}: {kind} does not say where its tokens stand in a text; choose a base model with a tokenizer.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(folder: str | Path, base: Base) -> PreTrainedModel:
    """The frozen language model in `folder`, on the GPU where there is one, in evaluation mode.

    In 16 bits its head still computes in float32 (`float_head`). On a CPU Mamba and Mamba-2 run on our convolution and scans, forward,
    backward and step by step (`llmrec.ssm.accelerate`); what is saved of them is the same.

    Args:
        folder: config.json and *.safetensors.
        base: its dtype, quantisation and attention implementation.

    Raises:
        UserError: the model cannot be quantised, or bitsandbytes is missing.
    """
    return _ready(_read(folder, base, **({"quantization_config": _nf4(folder, base)} if base.quantise == "nf4" else {})))


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with a float32 head, where it is fastest, in evaluation mode; in place."""
    if model.dtype != torch.float32:
        float_head(model)
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]
    elif model.config.model_type in ("mamba", "mamba2"):
        accelerate(model)
    return model.eval()


def build_untrained(shape: dict[str, Any], tokenizer: str | Path, folder: Path, seed: int) -> None:
    """Write a model with random weights, as its family begins its training, in float32; whole or not at all.

    Args:
        shape: what config.json says, model_type among it.
        tokenizer: a folder with one, which is copied.
        folder: where to.
        seed: of the weights.

    Raises:
        UserError: the tokenizer has more tokens than the model.
    """
    words = load_tokenizer(tokenizer)
    config = AutoConfig.for_model(**shape)
    if len(words) > config.vocab_size:
        raise UserError(f"base.shape has a vocab_size of {config.vocab_size}, but the tokenizer has {len(words)} tokens: give it that many")
    set_seed(seed)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(beside)
    words.save_pretrained(beside)
    os.replace(beside, folder)


def load_untrained(folder: str | Path, base: Base, seed: int) -> PreTrainedModel:
    """A model of the same shape with random weights, as its family begins its training: a floor for what training bought.

    It computes as that of `load_base` does, but is never quantised: its weights are of `base.dtype` where those are of 4 bits.
    """
    set_seed(seed)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=resolve_dtype(base.dtype), attn_implementation=base.attention)
    return _ready(model)


def load_dequantised(folder: str | Path, base: Base) -> PreTrainedModel:
    """The model of `load_base` with ordinary layers, as it is published: each weight is what its 4 bits stand for.

    Merging into these is exact up to rounding; merged into 4 bits, an adapter would be rounded to 16 levels.
    """
    plain = _read(folder, base)
    if base.quantise == "nf4":
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Params4bit

        for name, packed in load_base(folder, base).named_parameters():
            if isinstance(packed, Params4bit):
                weight, layer = dequantize_4bit(packed.data, packed.quant_state), plain.get_submodule(name.removesuffix(".weight"))
                plain.get_parameter(name).copy_(weight.T if isinstance(layer, Conv1D) else weight)
    return plain


def _read(folder: str | Path, base: Base, **how: Any) -> PreTrainedModel:
    disable_progress_bar()  # it flickers by in a second
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=resolve_dtype(base.dtype),
        attn_implementation=base.attention,
        use_safetensors=True,
        trust_remote_code=False,
        **how,
    )
    return model.requires_grad_(False)


def _nf4(folder: str | Path, base: Base) -> BitsAndBytesConfig:
    """How QLoRA quantises (arXiv 2305.14314, section 3). The head stays as it is."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("base.quantise nf4 needs bitsandbytes: pip install 'llmrec[quant]'")
    kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
    if kind in STATE_SPACE:
        raise UserError(f"base.quantise nf4: the kernels of {kind} read weights past their layers, where 4 bits cannot be read: take none")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=resolve_dtype(base.dtype),
    )


def float_head(model: PreTrainedModel) -> None:
    """Give `model` a float32 output layer, no longer tied to the embedding.

    A bfloat16 logit between 16 and 32 is a multiple of 1/8, so half of twenty candidates would tie. Only last
    positions go through the head, where float32 costs next to nothing but the layer's memory.
    """
    head = model.get_output_embeddings()
    wide = copy.deepcopy(head).float().requires_grad_(False)
    wide.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    model.set_output_embeddings(wide)


def load_trainable(folder: str | Path, base: Base, lora: Lora, seed: int) -> TunedModel:
    """The model in `folder`, ready to be tuned; see `trainable`. Tuned whole it is in float32, as 16 bits would round AdamW's steps away.

    Raises:
        UserError: of `load_base` and `trainable`, weights in 4 bits that shall be tuned whole, or an adapter on random weights.
    """
    if base.scratch and lora.r:
        raise UserError(f"base.scratch begins with random weights, which an adapter of rank {lora.r} cannot make up for: set lora.r to 0")
    if lora.r == 0 and base.quantise != "none":
        raise UserError(f"lora.r is 0, which tunes all weights, and base.quantise is {base.quantise}: set it to none, or lora.r to 8")
    return trainable(load_base(folder, replace(base, dtype="float32") if lora.r == 0 else base), lora, seed)


def trainable(model: PreTrainedModel, lora: Lora, seed: int) -> TunedModel:
    """`model` with a fresh adapter (`with_lora`), or with rank 0 the model itself, all of its weights trainable.

    Raises:
        UserError: of `with_lora`, or a negative rank.
    """
    if lora.r < 0:
        raise UserError(f"lora.r is {lora.r}: choose a rank of at least 1, or 0 to tune all weights")
    return with_lora(model, lora, seed) if lora.r else model.requires_grad_(True)


def load_tuned(folder: str | Path, base: Base, tuned: str | Path, to_train: bool = False) -> TunedModel:
    """A tuned model: its adapter on the base in `folder`, or the whole model that `tuned` holds.

    Args:
        folder: of the base model.
        base: its dtype, quantisation and attention.
        tuned: what `save_tuned_model` wrote.
        to_train: to go on training it (ORPO after SFT), with the adapter in float32; otherwise it is in the dtype of the base, which is
            faster.
    """
    if (Path(tuned) / "adapter_config.json").exists():
        return load_adapter(load_base(folder, base), tuned, to_train, float32=to_train)
    model = load_base(tuned, replace(base, dtype="float32") if to_train else base)
    return model.requires_grad_(to_train)


def with_lora(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """`model` with a fresh trainable LoRA adapter in float32.

    Args:
        model: the frozen base.
        lora: rank, scale, dropout and targets; null targets take `DEFAULT_TARGETS`.
        seed: of the adapter's random half.

    Raises:
        UserError: a target matches no module, or the family has no default. peft itself skips a target silently as
            long as another one matches.
    """
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _adaptable(module)})
    targets = lora.targets or DEFAULT_TARGETS.get(model.config.model_type)
    if targets is None:
        raise UserError(f"lora.targets: no default for model type '{model.config.model_type}'; choose among its layers {', '.join(linear)}")
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(f"lora.targets: '{target}' matches no module of {model.config.model_type}; choose among {', '.join(linear)}")
    set_seed(seed)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=model.config.model_type == "gpt2",  # its Conv1D stores the transposed weight
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # a module that exists but cannot carry LoRA
        raise UserError(f"lora.targets {targets}: {error}; choose among {', '.join(linear)}") from error


def load_adapter(model: PreTrainedModel, folder: str | Path, trainable: bool = False, *, float32: bool = True) -> PeftModel:
    """`model` with the saved adapter of `folder` on it.

    Args:
        model: the base.
        folder: of the adapter.
        trainable: to go on training it (ORPO after SFT).
        float32: the adapter in float32, as it was trained and is merged; otherwise in the dtype of `model`, which spares scoring the
            way from one to the other and back.
    """
    tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, autocast_adapter_dtype=float32)
    # in place of the public id, which peft would look up in the hub at every checkpoint
    tuned.peft_config["default"].base_model_name_or_path = model.name_or_path
    return tuned


def compile_layers(model: TunedModel, *, training: bool, states: bool = False) -> None:
    """Let torch.compile make one fast forward and backward pass for all layers, whatever the lengths; in place.

    In training on a CPU attention is computed as it is written in transformers: compiled, that is faster than the ready-made kernel
    whose backward pass it spares. Scoring keeps the kernel.

    Args:
        model: a base with its adapter, or tuned whole.
        training: what comes next.
        states: a pass goes on from the states of an earlier one. With a cache the attention of each layer is code of its own for the
            compiler, so the parts around it are compiled.

    Raises:
        UserError: a state-space model, or no compiler.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.config.model_type in STATE_SPACE:
        raise UserError(f"base.compile: the layers of {base.config.model_type} have kernels of their own; set it to false")
    if not torch.cuda.is_available():
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            raise UserError("base.compile needs a C++ compiler: install g++, or name yours in CXX, or set it to false")
        if training:
            base.set_attn_implementation("eager")
    for module in base.modules():
        if isinstance(module, GradientCheckpointingLayer):  # transformers' name for a layer of the stack
            around_attention = [part for name, part in module.named_children() if "attn" not in name]
            for part in around_attention if states else [module]:
                part.compile(dynamic=True)


def save_tuned_model(model: TunedModel, folder: str | Path, base: Base) -> None:
    """Write an adapter (`save_adapter`), or a whole model as transformers reads it: config.json and *.safetensors."""
    if isinstance(model, PeftModel):
        save_adapter(model, folder, base)
    else:
        model.save_pretrained(folder)


def save_adapter(model: PeftModel, folder: str | Path, base: Base) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which names the public base model.

    Args:
        model: the tuned model.
        folder: where to; made if need be.
        base: its id and revision are what the adapter says it belongs to, rather than a cache folder of this machine.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path, config.revision, config.inference_mode = base.id, base.revision, True
    # "auto" would ask the hub whether the vocabulary has grown
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(str(folder))


def save_merged(folder: str | Path, base: Base, adapter: str | Path, target: str | Path) -> None:
    """Write a model with its adapter merged into the weights: an ordinary checkpoint, in the dtype of `base`.

    A base in 4 bits is merged in the weights that its 4 bits stand for (`load_dequantised`).

    Args:
        folder: of the base model.
        base: its dtype and quantisation.
        adapter: folder of the adapter.
        target: where to: config.json and *.safetensors.
    """
    model = load_dequantised(folder, base)
    head = model.get_output_embeddings()
    tuned = load_adapter(model, adapter)
    if isinstance(tuned.get_output_embeddings(), LoraLayer) or isinstance(tuned.get_input_embeddings(), LoraLayer):
        head.weight = nn.Parameter(head.weight.clone())  # what is merged into one must not reach the other through a tied weight
        model.config.tie_word_embeddings = False
    tuned.merge_and_unload().save_pretrained(target)


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding, Conv1D))
