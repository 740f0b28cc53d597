"""A checkpoint in mamba-ssm's layout becomes a model of transformers that computes the same, and a base model like any other."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors import safe_open
from torch import Tensor, nn
from torch.testing import assert_close

from llmrec import assets
from llmrec.config import Base, Config
from llmrec.errors import UserError
from llmrec.rankers.backbone import load_base, load_tokenizer
from llmrec.rankers.mamba_checkpoints import convert, transformers_config
from llmrec.ssm import Mamba2
from llmrec.stages import inputs

PUBLISHED = {  # state-spaces/mamba2-130m, config.json
    "d_model": 768,
    "d_intermediate": 0,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
SMALL = PUBLISHED | {
    "d_model": 32,
    "n_layer": 2,
    "vocab_size": 125,  # 128 rows
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16, "ngroups": 2, "chunk_size": 8},
}


class Published(nn.Module):
    """mamba-ssm's model with our layers: names and layout are those of its checkpoints."""

    def __init__(self, config: dict):
        super().__init__()
        width, rows = config["d_model"], -(-config["vocab_size"] // config["pad_vocab_size_multiple"]) * config["pad_vocab_size_multiple"]
        sizes = {name: value for name, value in config["ssm_cfg"].items() if name != "layer"}

        def block() -> nn.Module:
            layer = nn.Module()
            layer.norm, layer.mixer = nn.RMSNorm(width, eps=1e-5), Mamba2(width, **sizes)
            return layer

        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(rows, width)
        self.backbone.layers = nn.ModuleList([block() for _ in range(config["n_layer"])])
        self.backbone.norm_f = nn.RMSNorm(width, eps=1e-5)
        self.lm_head = nn.Linear(width, rows, bias=False)
        for weight in self.parameters():  # norms, too, or a name put to the wrong one would go unseen
            if weight.ndim != 1 or bool((weight == 1).all()):
                weight.data += torch.randn_like(weight) * 0.3
        if config["tie_embeddings"]:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.backbone.embedding(ids)
        for layer in self.backbone.layers:
            hidden = hidden + layer.mixer(layer.norm(hidden))
        return F.linear(self.backbone.norm_f(hidden), self.lm_head.weight)


@pytest.fixture
def published(tmp_path) -> tuple[Path, Published]:
    torch.manual_seed(0)
    return written(tmp_path / "published", SMALL)


def written(folder: Path, config: dict) -> tuple[Path, Published]:
    model = Published(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder, model


@pytest.fixture
def neox(tmp_path, tokenizer) -> Path:
    """A tokenizer in the place of GPT-NeoX's."""
    tokenizer.save_pretrained(tmp_path / "neox")
    return tmp_path / "neox"


def test_names_of_the_fixture_are_those_of_the_published_file(published):
    mixer = ["A_log", "D", "conv1d.bias", "conv1d.weight", "dt_bias", "in_proj.weight", "norm.weight", "out_proj.weight"]
    layers = [f"backbone.layers.{n}.{name}" for n in range(2) for name in [*(f"mixer.{name}" for name in mixer), "norm.weight"]]
    names = torch.load(published[0] / "pytorch_model.bin", weights_only=True).keys()
    assert sorted(names) == sorted(["backbone.embedding.weight", *layers, "backbone.norm_f.weight", "lm_head.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_of_transformers_computes_the_same(tied, tmp_path, neox):
    torch.manual_seed(0)
    folder, model = written(tmp_path / "published", SMALL | {"tie_embeddings": tied})
    converted = load_base(convert(folder, neox, tmp_path / "out"), Base(dtype="float32"))
    ids = torch.randint(0, 125, (2, 21))
    with torch.no_grad():
        assert_close(converted(ids).logits, model(ids), atol=1e-4, rtol=1e-4)
    weights = converted.get_input_embeddings().weight, converted.get_output_embeddings().weight
    assert (weights[0] is weights[1]) == tied
    assert load_tokenizer(tmp_path / "out").decode(load_tokenizer(tmp_path / "out")("Dune").input_ids) == "Dune"


def test_settings_of_the_published_130m():
    config = transformers_config(PUBLISHED)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (50_288, 768, 24, True)
    assert (config.num_heads, config.head_dim, config.state_size, config.n_groups, config.chunk_size) == (24, 64, 128, 1, 256)
    assert (config.conv_kernel, config.expand, config.use_bias, config.use_conv_bias, config.residual_in_fp32) == (4, 2, False, True, True)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)


def test_16_bits_stay_16_bits_and_a_tied_head_is_stored_once(published, tmp_path, neox):
    folder, _ = published
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: weight.bfloat16() for name, weight in weights.items()}, folder / "pytorch_model.bin")
    out = convert(folder, neox, tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads((out / "weights.json").read_text()) == {
        "weights": "as published, in the format of transformers",
        "dtype": "bfloat16",
    }


class Code:
    """What a pickle could run."""

    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize("content", [pickle.dumps({"a": Code()}), b"", b"PK\x03\x04 no archive"], ids=["code", "nothing", "half"])
def test_a_file_with_anything_else_than_tensors_is_not_read(content, published, tmp_path, neox, capsys):
    folder, _ = published
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged, or holds something else than tensors"):
        convert(folder, neox, tmp_path / "out")
    torch.save({"a": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds something else than tensors"):
        convert(folder, neox, tmp_path / "out")
    assert "code was run" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_those_of_the_config(published, tmp_path, neox):
    folder, _ = published
    (folder / "config.json").write_text(json.dumps(SMALL | {"n_layer": 3}))
    with pytest.raises(UserError, match=r"backbone\.layers\.2\.mixer\.A_log is missing in pytorch_model\.bin and \(4,\) by config"):
        convert(folder, neox, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps(SMALL | {"vocab_size": 129}))
    with pytest.raises(UserError, match=r"backbone\.embeddings\.weight is \(128, 32\) in pytorch_model\.bin and \(144, 32\) by config"):
        convert(folder, neox, tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ssm_cfg": {}}, "of Mamba1 layers"),
        ({"attn_layer_idx": [3]}, "only plain Mamba2 ones"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, r"ssm_cfg\.rmsnorm"),
    ],
)
def test_other_layers_are_refused(changed, message):
    with pytest.raises(UserError, match=message):
        transformers_config(PUBLISHED | changed)


# ------------------------------------------------------------------ as base.id


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LLMREC_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMREC_DATA", raising=False)
    monkeypatch.setenv("LLMREC_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "home"


def config_for(model: str) -> Config:
    return Config(base=Base(id=model, dtype="float32"))


def in_hub_cache(tmp_path: Path, model: str, folder: Path) -> None:
    """As `snapshot_download` leaves it."""
    cached = tmp_path / "hub" / f"models--{model.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / ("a" * 40))


def test_from_the_hub_cache(published, neox, tmp_path, home):
    in_hub_cache(tmp_path, "state-spaces/mamba2-130m", published[0])
    in_hub_cache(tmp_path, assets.MAMBA_TOKENIZER, neox)
    config = config_for("state-spaces/mamba2-130m")
    assert inputs.fingerprints("sft", config).keys() == {"config.json", "pytorch_model.bin"}
    assert inputs.model_shape(config).hidden_size == 32
    folder = inputs.base_folder(config)
    assert folder.parent == home / "models"
    ids = torch.randint(0, 125, (1, 9))
    with torch.no_grad():
        assert_close(load_base(folder, config.base)(ids).logits, published[1](ids), atol=1e-4, rtol=1e-4)
    load_tokenizer(folder)
    changed = (folder / "model.safetensors").stat().st_mtime_ns
    assert inputs.base_folder(config) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == changed  # converted once
    assert "as published, in the format of transformers" in inputs.weights_origin(config)


def test_from_a_folder_with_its_own_tokenizer(published, tokenizer, home):
    tokenizer.save_pretrained(published[0])
    assert load_tokenizer(inputs.base_folder(config_for(str(published[0])))).decode([]) == ""


def test_from_the_data_folder(published, neox, tmp_path, home, monkeypatch):
    monkeypatch.setenv("LLMREC_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    published[0].rename(tmp_path / "data" / "state-spaces--mamba2-130m")
    neox.rename(tmp_path / "data" / "EleutherAI--gpt-neox-20b")
    load_tokenizer(inputs.base_folder(config_for("state-spaces/mamba2-130m")))


def test_without_the_tokenizer(published, home):
    with pytest.raises(UserError, match=f"missing tokenizer EleutherAI/gpt-neox-20b .* Put its tokenizer.json .* into {home}"):
        inputs.base_folder(config_for(str(published[0])))


def test_without_the_weights(published, home):
    (published[0] / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"has mamba-ssm's config\.json and no pytorch_model\.bin"):
        inputs.base_folder(config_for(str(published[0])))
