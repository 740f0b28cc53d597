"""A Mamba-2 base on a CPU computes with llmrec.ssm, in training and in generation, and what is saved of it is what transformers saves."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from llmrec.config import Base, Lora
from llmrec.rankers.backbone import load_adapter, load_base, save_adapter, save_merged, with_lora
from llmrec.rankers.queries import beam_queries
from llmrec.ssm import accelerate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="transformers' own kernels run on a GPU")
IDS = torch.tensor([[40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51]])
BASE = Base(id="tiny/mamba2", dtype="float32")


@pytest.fixture
def folder(tmp_path, tiny):
    tiny("mamba2").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(model):
    """A LoRA adapter that changes something."""
    model = with_lora(model, Lora(r=4, dropout=0.0), seed=3)
    torch.manual_seed(4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    return model


@pytest.fixture
def calls(monkeypatch):
    """How often each of our ways through a Mamba-2 layer was taken."""
    module = accelerate.__globals__
    counted = {"ssd": 0, "_ssd_step": 0}

    def counting(name, original):
        def call(*args, **settings):
            counted[name] += 1
            return original(*args, **settings)

        return call

    for name in counted:
        monkeypatch.setitem(module, name, counting(name, module[name]))
    return counted


def test_training_and_its_gradients(folder, calls):
    plain = adapted(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)).train()
    ours = adapted(load_base(folder, BASE)).train()
    losses = [model(input_ids=IDS, labels=IDS).loss for model in (plain, ours)]
    assert calls == {"ssd": 2, "_ssd_step": 0}  # two layers, of one of the models
    assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    theirs = {name: weight.grad for name, weight in plain.named_parameters() if weight.requires_grad}
    mine = {name: weight.grad for name, weight in ours.named_parameters() if weight.requires_grad}
    assert theirs.keys() == mine.keys()
    assert any(weight.abs().max() > 1e-3 for weight in theirs.values())
    for name, gradient in theirs.items():
        assert_close(mine[name], gradient, atol=1e-5, rtol=1e-4)


def test_queries_are_written_step_by_step(folder, calls):
    beam_queries(load_base(folder, BASE), IDS.tolist(), queries=3, new_tokens=5, end_ids=[])
    assert calls == {"ssd": 2, "_ssd_step": 8}  # the prompt, then four more tokens, in two layers


def test_what_is_saved_is_the_plain_model(folder, tmp_path):
    load_base(folder, BASE).save_pretrained(tmp_path / "again")
    weights, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again")]
    assert configs[0] == configs[1]


def test_an_adapter_of_it_fits_the_plain_model(folder, tmp_path):
    ours = adapted(load_base(folder, BASE)).eval()
    save_adapter(ours, tmp_path / "adapter", BASE)
    plain = load_adapter(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "adapter").eval()
    save_merged(folder, BASE, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = ours(input_ids=IDS).logits
        for other in (plain, merged):
            assert_close(other(input_ids=IDS).logits, logits, atol=1e-5, rtol=1e-5)
