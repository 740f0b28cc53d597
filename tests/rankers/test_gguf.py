"""A GGUF file becomes an ordinary checkpoint with the same weights and tokens."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from llmrec.config import Base
from llmrec.errors import UserError
from llmrec.rankers.backbone import load_base, load_tokenizer
from llmrec.rankers.gguf import dequantise

HEADS, KV_HEADS = 4, 2
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rotary channels: pairs beside each other instead of halves."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def source(tmp_path, tokenizer):
    """A tied Llama quantised to Q4_1 as llama.cpp writes it, and the unquantised model."""
    torch.manual_seed(0)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    path = tmp_path / "gguf" / "tiny.Q4_1.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    writer.add_token_merges([" ".join(m) for m in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = tensor.float().numpy()
        name = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm").replace("model.layers", "blk")
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if "attn_q" in name or "attn_k" in name:
            weight = permuted(weight, HEADS if "attn_q" in name else KV_HEADS)
        kind = gguf.GGMLQuantizationType.Q4_1 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_weights_and_tokens_survive(source, tmp_path, tokenizer):
    path, model = source
    folder = dequantise(path, tmp_path / "out")
    loaded = load_base(folder, Base(dtype="float32"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected = model.state_dict()
    for name, weight in loaded.state_dict().items():
        scale = float(expected[name].abs().max())
        assert_close(weight, expected[name], atol=scale / 5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")  # 15 steps of Q4_1
    for text in ["which one: A", "0123 Heat", "<|end|>"]:
        assert load_tokenizer(folder)(text).input_ids == tokenizer(text).input_ids


def test_it_is_an_ordinary_checkpoint_that_tells_where_it_comes_from(source, tmp_path):
    folder = dequantise(source[0], tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert json.loads((folder / "weights.json").read_text()) == {"weights": "Q4_1 dequantised from tiny.Q4_1.gguf", "dtype": "bfloat16"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_a_file_that_is_no_gguf_leaves_nothing(tmp_path):
    path = tmp_path / "x" / "broken.Q4_1.gguf"
    path.parent.mkdir()
    path.write_bytes(b"not weights at all")
    with pytest.raises(UserError, match=r"broken\.Q4_1\.gguf: cannot be read as GGUF weights"):
        dequantise(path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
