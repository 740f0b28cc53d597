"""The pretrained language model and its LoRA adapter: load, continue, save.

Adapters are ordinary peft folders: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(id), folder)` reads them.
Weights are safetensors only and no code from a model's repository is run.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from llmrec.config import Base, Lora
from llmrec.errors import UserError

DEFAULT_TARGETS = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],  # LlamaRec's choice
    "mistral": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "mamba2": ["in_proj"],  # peft refuses out_proj and conv1d: the fused kernel reads their weights past the adapter
}


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
    """The tokenizer in `folder`. Where it has no padding token, end of text pads: padding is masked, so any id will do."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(folder: str | Path, base: Base) -> PreTrainedModel:
    """The frozen language model in `folder`, on the GPU where there is one, in evaluation mode.

    In 16 bits its head still computes in float32 (`float_head`).

    Args:
        folder: config.json and *.safetensors.
        base: its dtype and attention implementation.
    """
    disable_progress_bar()  # it flickers by in a second
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=resolve_dtype(base.dtype),
        attn_implementation=base.attention,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model.requires_grad_(False)
    if model.dtype != torch.float32:
        float_head(model)
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]
    return model.eval()


def float_head(model: PreTrainedModel) -> None:
    """Give `model` a float32 output layer, no longer tied to the embedding.

    A bfloat16 logit between 16 and 32 is a multiple of 1/8, so half of twenty candidates would tie. Only last
    positions go through the head, where float32 costs next to nothing but the layer's memory.
    """
    head = model.get_output_embeddings()
    wide = copy.deepcopy(head).float().requires_grad_(False)
    wide.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    model.set_output_embeddings(wide)


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


def load_adapter(model: PreTrainedModel, folder: str | Path, trainable: bool = False) -> PeftModel:
    """`model` with the saved adapter of `folder` on it; `trainable` to go on training it (ORPO after SFT)."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


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


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding, Conv1D))
