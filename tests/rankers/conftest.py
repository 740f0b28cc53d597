"""Tiny random language models of three families, and a byte-level tokenizer, all built here so that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, LlamaConfig, Mamba2Config, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCABULARY = 128
CONFIGS = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
    "mamba2": lambda: Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8
    ),
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Models this small spend their time waiting for threads otherwise."""
    torch.set_num_threads(1)


@pytest.fixture
def exact_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches as wide as their longest row, for tests of what stands where."""
    monkeypatch.setattr("llmrec.rankers.letters.MULTIPLE", 1)


@pytest.fixture(params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], PreTrainedModel]:
    """A family's random model in float32; the same weights at every call."""

    def build(family: str) -> PreTrainedModel:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
        # spread out, or all next tokens are equally likely
        model.get_output_embeddings().weight.data.normal_(std=0.3)
        return model

    return build


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte would be 256 ids; this one knows `VOCABULARY` of them, letters and space among them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    text = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .:\n"
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture
def saved_llama(tmp_path: Path, tiny: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder as `load_base` and `load_tokenizer` read it."""
    folder = tmp_path / "base"
    tiny("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
