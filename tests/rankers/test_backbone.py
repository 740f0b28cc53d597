"""Base models and adapters go through disk unchanged and load with plain peft."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from llmrec.config import Base, Lora
from llmrec.errors import UserError
from llmrec.rankers.backbone import (
    load_adapter,
    load_base,
    load_tokenizer,
    load_tuned,
    load_untrained,
    resolve_dtype,
    save_adapter,
    with_lora,
)

ROW = torch.tensor([[5, 6, 7, 8]])


def trained(model):
    """An adapter that does something: LoRA's second half starts at zero."""
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    return model


def test_adapter_loads_with_plain_peft_and_names_the_public_base(family, tiny, tmp_path):
    base = tiny(family)
    without = base(ROW).logits
    model = trained(with_lora(base, Lora(), seed=0)).eval()
    save_adapter(model, tmp_path, Base(id="public/name", revision="abc"))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["inference_mode"]) == ("public/name", "abc", True)

    plain = PeftModel.from_pretrained(tiny(family), tmp_path)
    assert_close(plain(ROW).logits, model(ROW).logits)
    assert not torch.allclose(plain(ROW).logits, without, atol=1e-3)
    assert not any(weight.requires_grad for weight in plain.parameters())


def test_a_continued_adapter_is_the_saved_one_and_trains(tiny, tmp_path):
    model = trained(with_lora(tiny("llama"), Lora(), seed=0)).eval()
    save_adapter(model, tmp_path, Base())
    continued = load_adapter(tiny("llama"), tmp_path, trainable=True)
    assert_close(continued.eval()(ROW).logits, model(ROW).logits)
    assert {name for name, weight in continued.named_parameters() if weight.requires_grad} == {
        name for name, _ in continued.named_parameters() if "lora_" in name
    }


def test_an_adapter_is_trained_in_float32_and_scores_in_the_dtype_of_its_base(saved_llama, tmp_path):
    base = Base(dtype="bfloat16")
    save_adapter(trained(with_lora(load_base(saved_llama, base), Lora(), seed=0)), tmp_path, base)

    def adapter(model):
        return {weight.dtype for name, weight in model.named_parameters() if "lora_" in name}

    scoring, training = load_tuned(saved_llama, base, tmp_path), load_tuned(saved_llama, base, tmp_path, to_train=True).eval()
    assert (adapter(scoring), adapter(training)) == ({torch.bfloat16}, {torch.float32})
    logprobs = [model(ROW).logits.log_softmax(-1) for model in (scoring, training)]
    assert_close(*logprobs, atol=0.05, rtol=0)
    assert (logprobs[1] - load_base(saved_llama, base)(ROW).logits.log_softmax(-1)).abs().max() > 0.1


def test_checkpoints_of_a_continued_adapter_ask_no_hub(saved_llama, tmp_path, monkeypatch):
    """What peft writes on the way names the base that lies here; what is kept in the end names the public one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # or peft would not try
    base = Base(id="public/name", dtype="float32")
    save_adapter(with_lora(load_base(saved_llama, base), Lora(), seed=0), tmp_path / "sft", base)
    continued = load_tuned(saved_llama, base, tmp_path / "sft", to_train=True)
    with warnings.catch_warnings(action="error"):
        continued.save_pretrained(tmp_path / "checkpoint")
    save_adapter(continued, tmp_path / "orpo", base)
    names = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"] for name in ("checkpoint", "orpo")
    ]
    assert names == [str(saved_llama), "public/name"]


def test_unload_gives_the_base_back(tiny, tmp_path):
    base = tiny("llama")
    before = base(ROW).logits
    save_adapter(trained(with_lora(tiny("llama"), Lora(), seed=0)), tmp_path, Base())
    assert_close(load_adapter(base, tmp_path).unload()(ROW).logits, before)


def test_the_seed_decides_a_fresh_adapter(tiny):
    first, again, other = (with_lora(tiny("llama"), Lora(), seed=seed).state_dict() for seed in (0, 0, 1))
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_default_targets_and_their_dtype(family, tiny):
    model = with_lora(tiny(family).to(torch.bfloat16), Lora(), seed=0)
    targets = {"gpt2": {"c_attn"}, "llama": {"q_proj", "v_proj"}, "mamba2": {"in_proj"}}[family]
    lora = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in lora} == targets
    assert {weight.dtype for weight in lora.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", ["q_proj", "k_porj"], "'k_porj' matches no module of llama; choose among .*k_proj"),
        ("gpt2", ["q_proj"], "'q_proj' matches no module of gpt2; choose among .*c_attn"),
        ("mamba2", ["out_proj"], "out_proj"),
    ],
)
def test_targets_that_cannot_be(family, targets, message, tiny):
    with pytest.raises(UserError, match=message):
        with_lora(tiny(family), Lora(targets=targets), seed=0)


def test_a_family_without_default_asks_for_targets(tiny):
    model = tiny("llama")
    model.config.model_type = "unheard_of"
    with pytest.raises(UserError, match=r"no default for model type 'unheard_of'; choose among its layers .*q_proj"):
        with_lora(model, Lora(), seed=0)


def test_base_is_frozen_and_scores_in_evaluation_mode(saved_llama, tiny):
    model = load_base(saved_llama, Base(dtype="float32"))
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert_close(model(ROW).logits, tiny("llama")(ROW).logits)


def test_logits_are_not_rounded_to_sixteen_bits(saved_llama):
    model = load_base(saved_llama, Base(dtype="bfloat16"))
    logits = model(ROW).logits
    assert model.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    rounded = AutoModelForCausalLM.from_pretrained(saved_llama, dtype=torch.bfloat16)(ROW).logits
    assert_close(logits, rounded.float(), atol=0.02, rtol=0.01)


def test_an_adapter_on_the_head_acts(saved_llama, tmp_path):
    model = trained(with_lora(load_base(saved_llama, Base(dtype="bfloat16")), Lora(targets=["lm_head"]), seed=0)).eval()
    with model.disable_adapter():
        without = model(ROW).logits
    assert (model(ROW).logits - without).abs().max() > 0.1


def test_pickled_weights_are_not_read(saved_llama):
    torch.save(load_file(saved_llama / "model.safetensors"), saved_llama / "pytorch_model.bin")
    (saved_llama / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_base(saved_llama, Base())


def test_a_tokenizer_without_padding_gets_some(saved_llama, tokenizer):
    tokenizer.pad_token = None
    try:
        tokenizer.save_pretrained(saved_llama)
    finally:
        tokenizer.pad_token = "<|end|>"
    assert load_tokenizer(saved_llama).pad_token_id == tokenizer.eos_token_id


def test_named_dtypes():
    assert resolve_dtype("float16") == torch.float16
    assert resolve_dtype("auto") in {torch.bfloat16, torch.float32}


def test_a_tokenizer_without_offsets_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"ByT5Tokenizer does not say .* tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_every_family_loads_with_the_attention_it_has(family, tiny, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    assert_close(load_base(tmp_path, Base(dtype="float32"))(ROW).logits, tiny(family)(ROW).logits)


def test_an_untrained_model_computes_as_the_one_it_is_the_floor_of(saved_llama):
    """In 16 bits the logits of both are float32, so that equally few of them tie."""
    base = Base(dtype="bfloat16")
    for model in (load_base(saved_llama, base), load_untrained(saved_llama, base, seed=0)):
        assert model.dtype == torch.bfloat16
        assert not model.training
        assert model(ROW).logits.dtype == torch.float32
