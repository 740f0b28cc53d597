"""QLoRA: a base in 4 bits trains, goes through disk, and merges into an ordinary model that answers the same."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, Mamba2Config

from llmrec.config import Base, Lora, Orpo, Tuning
from llmrec.errors import UserError
from llmrec.rankers.backbone import load_adapter, load_base, load_dequantised, save_adapter, save_merged, with_lora
from llmrec.rankers.footprint import weights_bytes
from llmrec.rankers.letters import letter_logprobs
from llmrec.rankers.orpo import train_orpo
from llmrec.rankers.sft import train_sft

LETTERS = {letter: 33 + at for at, letter in enumerate("ABCDE")}
ANSWERS = {letter: [token] for letter, token in LETTERS.items()}
LABELS = list(LETTERS.values())
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(vocab_size=128, n_positions=128, n_embd=64, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "mamba2": Mamba2Config(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, state_size=8, n_groups=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Folder of a family's random model; its head spread out, or all next tokens would be equally likely."""

    def make(family: str):
        path = tmp_path_factory.getbasetemp() / f"quantised-{family}"
        if not path.exists():
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(CONFIGS[family])
            model.get_output_embeddings().weight.data.normal_(std=0.05)
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return make


def nf4(dtype: str = "float32") -> Base:
    return Base(dtype=dtype, quantise="nf4")


def encode(prompt: str) -> list[int]:
    return [40 + ord(character) % 80 for character in prompt]


def prompts(count: int) -> list[list[int]]:
    draw = np.random.default_rng(4)
    return [draw.integers(1, 128, draw.integers(10, 60)).tolist() for _ in range(count)]


def random_adapter(model):
    """Both halves, because one of them starts at zero, which one depends on the layer."""
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.05)
    return model.eval()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def tuned(request, folder, tokenizer, tmp_path_factory):
    """SFT on the quantised base, its adapter saved and continued with ORPO: base, adapter folder, and the model as trained."""
    base, work = nf4(request.param), tmp_path_factory.mktemp("tuned")
    rows = [{"prompt": f"which of these {at}", "completion": "ABCDE"[at % 5]} for at in range(24)]
    pairs = [{"prompt": f"which of these {at}", "chosen": "ABCDE"[at % 5], "rejected": "ABCDE"[(at + 1) % 5]} for at in range(24)]
    how = {"batch": 4, "accumulation": 1, "warmup": 1, "epochs": 2, "learning_rate": 5e-3}

    model = with_lora(load_base(folder("llama"), base), Lora(), seed=0)
    sft = train_sft(model, rows, Tuning(**how), work / "sft", encode=encode, answers=ANSWERS)
    save_adapter(model, work / "sft", base)

    model = load_adapter(load_base(folder("llama"), base), work / "sft", trainable=True)
    orpo = train_orpo(model, tokenizer, pairs, Orpo(**how, gradient_checkpointing=True), work / "orpo", encode=encode, answers=ANSWERS)
    save_adapter(model, work / "orpo", base)
    return base, work / "orpo", model, sft, orpo


def test_it_learns_and_the_base_stays_in_4_bits(tuned):
    _, _, model, sft, orpo = tuned
    assert sft.log[-1]["loss"] < 0.9 * sft.log[0]["loss"]
    assert orpo.log[-1]["loss"] < orpo.log[0]["loss"]
    packed = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert {"k_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "base_layer"} == packed  # base_layer: under an adapter
    assert {weight.dtype for name, weight in model.named_parameters() if "lora_" in name} == {torch.float32}


def test_the_saved_adapter_reloads(tuned, folder):
    base, adapter, model, *_ = tuned
    again = load_adapter(load_base(folder("llama"), base), adapter)
    assert_close(letter_logprobs(again, prompts(8), LABELS), letter_logprobs(model, prompts(8), LABELS))
    assert "quantization_config" not in json.loads((adapter / "adapter_config.json").read_text())


def test_merged_it_is_an_ordinary_model_that_answers_the_same(tuned, folder, tmp_path):
    base, adapter, model, *_ = tuned
    save_merged(folder("llama"), base, adapter, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert merged.dtype == {"float32": torch.float32, "bfloat16": torch.bfloat16}[base.dtype]
    asked = prompts(200)
    expected, found = letter_logprobs(model, asked, LABELS), letter_logprobs(load_base(tmp_path, Base(dtype=base.dtype)), asked, LABELS)
    assert (expected.argmax(1) == found.argmax(1)).mean() >= 0.99
    assert np.abs(expected - found).max() <= 0.05
    with model.disable_adapter():  # what has to be there
        assert np.abs(letter_logprobs(model, asked, LABELS) - expected).max() > 0.5


def exact_logits(model):
    """Of some rows, in training mode: for evaluation bitsandbytes rounds the scales to bfloat16 on CPUs that multiply in it."""
    return torch.cat([model.train()(input_ids=torch.tensor([row])).logits[0, -1:] for row in prompts(5)]).detach()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dequantised_weights_are_what_the_4_bits_stand_for(family, folder):
    packed, plain = load_base(folder(family), nf4()), load_dequantised(folder(family), nf4())
    assert_close(exact_logits(plain), exact_logits(packed))
    assert (exact_logits(plain) - exact_logits(load_base(folder(family), Base(dtype="float32")))).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantise", ["none", "nf4"])
def test_merging_keeps_every_family(family, quantise, folder, tmp_path):
    base = Base(dtype="float32", quantise=quantise)
    model = random_adapter(with_lora(load_base(folder(family), base), Lora(dropout=0), seed=0))
    save_adapter(model, tmp_path / "adapter", base)
    save_merged(folder(family), base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(exact_logits(merged), exact_logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_layers_stays_on_that_one(target, folder, tmp_path):
    base = Base(dtype="float32")
    model = random_adapter(with_lora(load_base(folder("llama"), base), Lora(targets=[target], dropout=0), seed=0))
    save_adapter(model, tmp_path / "adapter", base)
    save_merged(folder("llama"), base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(exact_logits(merged), exact_logits(model), atol=1e-4, rtol=1e-4)
    assert (exact_logits(merged) - exact_logits(load_base(folder("llama"), base))).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_forecast_counts_the_bytes_of_4_bits(family, dtype, folder):
    """The oracle adds up what bitsandbytes holds."""
    model = load_base(folder(family), nf4(dtype))
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    assert weights_bytes(AutoConfig.from_pretrained(folder(family)), nf4(dtype)) == pytest.approx(held, rel=0.005)


def test_what_cannot_be_quantised_is_refused(folder, monkeypatch):
    with pytest.raises(UserError, match=r"kernels of mamba2 .* take none"):
        load_base(folder("mamba2"), nf4())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes: pip install 'llmrec\[quant\]'"):
        load_base(folder("llama"), nf4())
