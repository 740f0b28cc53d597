"""Accelerated models against the same models of transformers as they are: outputs, gradients, caches, saves."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from llmrec.ssm import accelerate

KINDS = ["mamba", "mamba2"]
VARIANTS = [
    ("mamba", {}),
    ("mamba", {"use_bias": True, "use_conv_bias": False, "state_size": 8}),  # 8: our scans in torch, not as C++ kernels
    ("mamba2", {}),
    ("mamba2", {"n_groups": 2}),
    ("mamba2", {"n_groups": 2, "state_size": 8}),
    ("mamba2", {"use_bias": True, "use_conv_bias": False}),
    ("mamba2", {"time_step_limit": (0.4, 0.8), "residual_in_fp32": False}),
]


def random_model(kind, **changes):
    """Every weight is random, within a layer of about unit gain: states are far from zero, they decay, each bias counts."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "state_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "eos_token_id": None, "pad_token_id": 0}
    if kind == "mamba":
        model = MambaForCausalLM(MambaConfig(**{**sizes, **changes}))
    else:
        sizes |= {"head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8}
        model = Mamba2ForCausalLM(Mamba2Config(**{**sizes, **changes}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1 if "norm" in name else 0, 0.3 if weight.dim() == 1 else weight[0].numel() ** -0.5)
    return model.eval()


def both(kind, **changes):
    """The model as it is, and a copy of it accelerated."""
    theirs = random_model(kind, **changes)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    return ours, theirs


def mixers(model):
    return [module for module in model.modules() if isinstance(module, (modeling_mamba.MambaMixer, modeling_mamba2.Mamba2Mixer))]


def tokens(length, batch=3, seed=0):
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side, length=13, batch=3):
    """A mask: none, one third and two thirds of a row are padding."""
    if side is None:
        return None
    mask = torch.arange(length) >= length // 3 * torch.arange(batch)[:, None]
    return (mask if side == "left" else mask.flip(1)).long()


def assert_same(ours, theirs):
    """To 3e-5 of the largest entry: in what order float32 sums are taken, and so their last digits, is up to the processor."""
    assert_close(ours, theirs, atol=3e-5 * theirs.abs().max().item(), rtol=1e-5)


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert_same(ours[name], theirs[name])


def assert_same_cache(ours, theirs):
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert_same(a.conv_states[0], b.conv_states[0])
        assert_same(a.recurrent_states[0], b.recurrent_states[0])
        assert b.recurrent_states[0].abs().max() > 0.1  # so that the tolerance means something


def gradients(model, ids, mask=None):
    logits = model(ids, attention_mask=mask).logits
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)))
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_outputs_and_cache(kind, changes, side):
    models = both(kind, **changes)
    ids, mask = tokens(13), padding(side)
    with torch.no_grad():
        assert_same(*(model(ids, attention_mask=mask, use_cache=False).logits for model in models))
        ours, theirs = (model(ids, attention_mask=mask) for model in models)
    assert_same(ours.logits, theirs.logits)
    assert_same_cache(ours.cache_params, theirs.cache_params)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_gradients(kind, changes, side):
    ours, theirs = (gradients(model.train(), tokens(13), padding(side)) for model in both(kind, **changes))
    assert len(theirs) == len(list(random_model(kind, **changes).parameters()))
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_gradients_with_checkpointing(kind, changes):
    ours, theirs = both(kind, **changes)
    ours.gradient_checkpointing_enable()
    assert_same_gradients(gradients(ours.train(), tokens(13)), gradients(theirs.train(), tokens(13)))


@pytest.mark.parametrize("prompt", [1, 3, 13])  # the convolution is 4 wide
@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_decoding_and_continuation(kind, changes, prompt):
    models, caches = both(kind, **changes), [None, None]
    for seed, length in enumerate([prompt, 1, 1, 5, 1, 11, 1]):
        with torch.no_grad():
            outputs = [model(tokens(length, seed=seed), cache_params=cache) for model, cache in zip(models, caches, strict=True)]
        caches = [output.cache_params for output in outputs]
        assert_same(*(output.logits for output in outputs))
        assert_same_cache(*caches)


@pytest.mark.parametrize("kind", KINDS)
def test_cache_in_another_order_continued_with_padding(kind):
    models = both(kind)
    with torch.no_grad():
        caches = [model(tokens(13)).cache_params for model in models]
        for cache in caches:
            cache.reorder_cache(torch.tensor([2, 0, 0]))
        for length, mask in [(1, None), (6, padding("left", 6))]:
            calls = zip(models, caches, strict=True)
            assert_same(*(model(tokens(length), cache_params=cache, attention_mask=mask).logits for model, cache in calls))
    assert_same_cache(*caches)


@pytest.mark.parametrize("prompt", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_cache_that_records(kind, prompt):
    """After `activate_past_recording` the cache keeps all inputs of the convolution."""
    models = both(kind, **({"time_step_limit": (0.4, 0.8)} if kind == "mamba2" else {}))
    caches = [model(tokens(1)).cache_params for model in models]
    for cache in caches:
        cache.reset()
        for layer in cache.layers:
            layer.activate_past_recording()
    for length in (prompt, 1, 3, 1):
        with torch.no_grad():
            calls = zip(models, caches, strict=True)
            assert_same(*(model(tokens(length), cache_params=cache).logits for model, cache in calls))
        assert_same_cache(*caches)
    assert caches[0].layers[0].conv_states[0].shape[-1] == prompt + 5


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_generate(kind, beams):
    mask = padding("left")
    ours, theirs = (
        model.generate(tokens(13) * mask, attention_mask=mask, max_new_tokens=10, num_beams=beams, do_sample=False) for model in both(kind)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_writes_into_the_tensors_of_the_cache(kind):
    model, _ = both(kind)
    with torch.no_grad():
        cache = model(tokens(5)).cache_params
        before = [(layer.conv_states[0].data_ptr(), layer.recurrent_states[0].data_ptr()) for layer in cache.layers]
        model(tokens(1), cache_params=cache)
    assert before == [(layer.conv_states[0].data_ptr(), layer.recurrent_states[0].data_ptr()) for layer in cache.layers]


@pytest.mark.parametrize(("kind", "lengths"), [("mamba", [5, 1, 1]), ("mamba2", [5, 1, 1, 6, 1])])
def test_gradients_through_the_cache(kind, lengths):
    """Prompt and steps have the gradients of one pass over all positions (transformers cannot do this)."""
    ours, theirs = both(kind)
    ids = tokens(sum(lengths))
    parts, cache = [], None
    for piece in ids.split(lengths, 1):
        output = ours(piece, cache_params=cache, use_cache=True)
        cache = output.cache_params
        parts.append(output.logits)
    logits = torch.cat(parts, 1)
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)))
    assert_same_gradients({name: weight.grad for name, weight in ours.named_parameters()}, gradients(theirs, ids))


@pytest.mark.parametrize("residual_in_fp32", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype, residual_in_fp32):
    """Prompt and one step: no farther from float32 than transformers' own code but for chance, and the cache in the same types."""
    ours, theirs = (model.to(dtype) for model in both(kind, residual_in_fp32=residual_in_fp32))
    models = [copy.deepcopy(theirs).float(), ours, theirs]
    with torch.no_grad():
        first = [model(tokens(40)) for model in models]
        second = [model(tokens(1), cache_params=output.cache_params) for model, output in zip(models, first, strict=True)]
    for exact, ours, theirs in (first, second):
        assert (ours.logits - exact.logits).norm() <= 1.2 * (theirs.logits - exact.logits).norm()
        for a, b in zip(ours.cache_params.layers, theirs.cache_params.layers, strict=True):
            assert (a.conv_states[0].dtype, a.recurrent_states[0].dtype) == (b.conv_states[0].dtype, b.recurrent_states[0].dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    """The same: nearly as far from the gradients without it as they are with transformers' own code."""
    ours, theirs = (model.train() for model in both(kind))
    exact = gradients(copy.deepcopy(theirs), tokens(40))
    with torch.autocast("cpu", torch.bfloat16):
        errors = [
            sum((gradient - exact[name]).norm() for name, gradient in gradients(model, tokens(40)).items()) for model in (ours, theirs)
        ]
    assert 0 < errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_as_before(kind):
    grads = []
    for accelerated in (True, False):
        model = get_peft_model(random_model(kind), LoraConfig(r=4, target_modules=["in_proj"], init_lora_weights=False)).train()
        if accelerated:
            accelerate(model)
        grads.append(gradients(model, tokens(13)))
    assert len(grads[1]) == 4
    assert_same_gradients(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_code_no_longer_runs(kind, monkeypatch):
    model, _ = both(kind)

    def refuse(*args, **kwargs):
        raise AssertionError("reference code called")

    for module in (modeling_mamba, modeling_mamba2):
        for name in ("causal_conv1d_fn", "causal_conv1d_update"):
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", refuse)
    monkeypatch.setattr(modeling_mamba, "mamba_selective_state_update", refuse)
    monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", refuse)
    monkeypatch.setattr(modeling_mamba2, "mamba2_selective_state_update", refuse)
    model.generate(tokens(5), max_new_tokens=3)
    with pytest.raises(AssertionError, match="reference code called"):
        random_model(kind).generate(tokens(5), max_new_tokens=3)


@pytest.mark.parametrize("kind", KINDS)
def test_remove_restores_the_same_bits(kind):
    model = random_model(kind)
    plain, shown = model(tokens(13)).logits, repr(model)
    accelerated = accelerate(model)
    assert repr(model) != shown
    accelerated.remove()
    accelerated.remove()
    assert repr(model) == shown
    assert torch.equal(model(tokens(13)).logits, plain)
    with pytest.raises(KeyError), accelerate(model):
        raise KeyError
    assert repr(model) == shown


def test_accelerated_twice_is_accelerated_until_the_first_ends():
    model = random_model("mamba2")
    plain = repr(model)
    with accelerate(model):
        shown = repr(model)
        with accelerate(model):
            assert repr(model) == shown
        assert repr(model) == shown
    assert repr(model) == plain


@pytest.mark.parametrize("kind", KINDS)
def test_deep_copy_is_accelerated_and_on_its_own(kind):
    model, _ = both(kind)
    before = model(tokens(13)).logits
    twin = copy.deepcopy(model)
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)
    assert torch.equal(twin(tokens(13)).logits, before)
    assert repr(twin) == repr(model)
    gradients(twin, tokens(13))
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_saves_are_those_of_the_plain_model(kind, tmp_path):
    ours, theirs = both(kind)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
    for path in (tmp_path / "theirs").iterdir():
        assert path.read_bytes() == (tmp_path / "ours" / path.name).read_bytes()
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    assert b"llmrec" not in buffer.getvalue()
    buffer.seek(0)
    for loaded in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(ours))):
        assert repr(loaded) == repr(theirs)
        assert torch.equal(loaded(tokens(13)).logits, theirs(tokens(13)).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_mixers_elsewhere_keep_their_code(kind):
    """On the meta device our scan, which looks at values, would fail."""
    model, _ = both(kind)
    assert model.to("meta")(tokens(13).to("meta")).logits.shape == (3, 13, 50)


@pytest.mark.parametrize("kind", KINDS)
def test_another_activation_keeps_their_code(kind):
    ours, theirs = both(kind, hidden_act="gelu")
    assert torch.equal(ours(tokens(13)).logits, theirs(tokens(13)).logits)
    assert [type(mixer) for mixer in mixers(ours)] == [type(mixer) for mixer in mixers(theirs)]


def test_packed_sequences_are_refused_as_before():
    model, _ = both("mamba2")
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        mixers(model)[0](torch.zeros(1, 5, 32), seq_idx=torch.tensor([[0, 0, 0, 1, 1]]))


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Linear has neither MambaMixer nor Mamba2Mixer"):
        accelerate(torch.nn.Linear(2, 2))
