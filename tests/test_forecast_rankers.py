"""Forecasts of the language model's stages against measured peaks, and the recipes' headers against their forecasts."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import tempfile
import traceback
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, Mamba2Config, PreTrainedTokenizerFast

from llmrec import resources
from llmrec.cli import main, read_settings
from llmrec.config import Base, Lora, Orpo, Tuning
from llmrec.rankers import backbone
from llmrec.rankers.backbone import compile_layers, load_base, with_lora
from llmrec.rankers.footprint import scoring_footprint, sharing, training_footprint
from llmrec.rankers.letters import letter_logprobs
from llmrec.rankers.orpo import train_orpo
from llmrec.rankers.queries import beam_queries
from llmrec.rankers.sft import train_sft
from llmrec.rankers.title_footprint import queries_footprint, titles_footprint
from llmrec.rankers.titles import title_logprobs
from llmrec.stages import forecast, inputs

LLAMA = LlamaConfig(
    vocab_size=8192, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
)
GPT2 = GPT2Config(vocab_size=8192, n_positions=1024, n_embd=256, n_layer=4, n_head=4)
MAMBA2 = Mamba2Config(
    vocab_size=8192, hidden_size=128, num_hidden_layers=2, num_heads=8, head_dim=32, state_size=32, n_groups=1, chunk_size=64
)
SMALL = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
ROWS, TOKENS, STEPS = 8, 400, 2
TITLES, TITLE, BEAMS = 20, 9, 10
TITLED = "titled orpo"
"""ORPO on two titles of a prompt."""


def work(stage: str, base: Base, tuning: Tuning, folder: str, rows: int, tokens: int = TOKENS) -> None:
    """What a stage does with the model in `folder`."""
    model = load_base(folder, base)
    if stage == "evaluate":
        letter_logprobs(model, [[7] * tokens] * rows * STEPS, [1, 2], batch=rows)
        return
    if stage == "titles":
        title_logprobs(model, [[7] * tokens] * rows * STEPS, [[[1] * TITLE] * TITLES] * rows * STEPS, batch=rows)
        return
    if stage == "queries":
        beam_queries(model, [[7] * tokens] * rows * STEPS, queries=BEAMS, new_tokens=TITLE, end_ids=[], batch=rows)
        return
    model, checkpoints = with_lora(model, Lora(), seed=0), tempfile.mkdtemp(dir=folder)
    if base.compile:
        compile_layers(model, training=True)
    encode, answers = (lambda prompt: [7] * (tokens - 1) + [int(prompt)]), {"A": [1], "B": [2]}
    if stage == TITLED:
        answers = {answer: ids * TITLE for answer, ids in answers.items()}
    if stage == "sft":
        asked = [{"prompt": str(at), "completion": "A"} for at in range(rows * STEPS)]
        train_sft(model, asked, tuning, checkpoints, encode=encode, answers=answers)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"<end>": 0}, [])), pad_token="<end>", eos_token="<end>")
        pairs = [{"prompt": str(at), "chosen": "A", "rejected": "B"} for at in range(rows * STEPS)]
        train_orpo(model, tokenizer, pairs, tuning, checkpoints, encode=encode, answers=answers)


def peak_of_work(stage: str, base: Base, tuning: Tuning, folder: str, rows: int) -> int:
    """Bytes that `work` adds to this process. Freed memory goes back to the system, so that the mark shows what was held at a time."""

    def status(key: str) -> int:
        return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)).split()[1]) * 1024

    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 64 << 10)  # M_MMAP_THRESHOLD
    with tempfile.TemporaryDirectory() as small:  # what the libraries make once
        AutoModelForCausalLM.from_config(SMALL).save_pretrained(small)
        work(stage, base, tuning, small, 1, 8)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    work(stage, base, tuning, folder, rows)
    return status("VmHWM") - before


def in_a_fork(*arguments) -> int:
    """`peak_of_work` in a child of this process, which need not import anything."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, str(peak_of_work(*arguments)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    return int(os.read(read, 100))


def measured_peak(*arguments) -> int:
    """The smaller of two measurements of little memory: whatever disturbs a peak raises it."""
    return min(in_a_fork(*arguments) for _ in range(2))


def forecast_of(config, stage: str, base: Base, tuning: Tuning, rows: int = ROWS) -> float:
    if stage == "evaluate":
        return sum(scoring_footprint(config, base, rows=rows, tokens=TOKENS).held().values())
    if stage == "titles":
        return sum(titles_footprint(config, base, batch=rows, tokens=TOKENS, titles=TITLES, title=TITLE).held().values())
    if stage == "queries":
        return sum(queries_footprint(config, base, batch=rows, beams=BEAMS, tokens=TOKENS + TITLE).held().values())
    sequence_nll = isinstance(tuning, Orpo) and tuning.nll_on == "sequence"
    checkpointing = tuning.gradient_checkpointing
    how = {"rows": rows, "tokens": TOKENS, "checkpointing": checkpointing, "sequence_nll": sequence_nll}
    if stage == TITLED:
        how |= {"completions": [TITLE] * 2, "strategy": sharing(config, base, checkpointing)}
    found = training_footprint(config, base, Lora(), **how)
    return sum(found.held().values())


def of(kind: type[Tuning], **changes) -> Tuning:
    return kind(batch=ROWS, accumulation=1, epochs=1, warmup=1, save_steps=100, **changes)


CASES = {
    "mamba2-titles-concatenated": (MAMBA2, TITLED, Base(dtype="float32"), of(Orpo, gradient_checkpointing=True)),
    "llama-titles-packed": (LLAMA, TITLED, Base(dtype="float32"), of(Orpo)),
    "mamba2-titles-continued": (MAMBA2, TITLED, Base(dtype="float32"), of(Orpo)),
    "llama": (LLAMA, "orpo", Base(dtype="float32"), of(Orpo)),
    "llama-checkpointing-sequence": (LLAMA, "orpo", Base(dtype="float32"), of(Orpo, gradient_checkpointing=True, nll_on="sequence")),
    "gpt2": (GPT2, "sft", Base(dtype="float32"), of(Tuning)),
    "mamba2": (MAMBA2, "sft", Base(dtype="float32"), of(Tuning)),
    "llama-bfloat16": (LLAMA, "sft", Base(dtype="bfloat16"), of(Tuning)),
    "llama-nf4": (LLAMA, "orpo", Base(dtype="bfloat16", quantise="nf4"), of(Orpo)),
    "llama-sequence": (LLAMA, "orpo", Base(dtype="float32"), of(Orpo, nll_on="sequence")),
}
FAST = ("llama", "llama-checkpointing-sequence", "mamba2-titles-concatenated")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
@pytest.mark.parametrize(
    "case",
    [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_training_memory_is_within_15_percent(case, tmp_path, monkeypatch):
    config, stage, base, tuning = CASES[case]
    monkeypatch.setattr(backbone, "accelerate", lambda model: None)  # Mamba's own layers, as on a GPU; ours need less: see below
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    measured = in_a_fork(stage, base, tuning, str(tmp_path), ROWS)
    assert forecast_of(config, stage, base, tuning) == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_accelerated_layers_need_no_more_than_the_forecast(tmp_path):
    config, stage, base, tuning = CASES["mamba2"]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert in_a_fork(stage, base, tuning, str(tmp_path), ROWS) < 1.15 * forecast_of(config, stage, base, tuning)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_compiled_layers_need_no_more_than_the_forecast(tmp_path):
    """And not much less: the compiler also saves on what the forecast counts."""
    base = Base(dtype="float32", compile=True)
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path)
    measured = in_a_fork("orpo", base, of(Orpo), str(tmp_path), ROWS)
    assert 0.95 * measured < forecast_of(LLAMA, "orpo", base, of(Orpo)) < 1.4 * measured


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_scoring_memory_is_within_15_percent(tmp_path):
    base, rows = Base(dtype="float32"), 32
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path)
    measured = measured_peak("evaluate", base, Tuning(), str(tmp_path), rows)
    assert forecast_of(LLAMA, "evaluate", base, Tuning(), rows) == pytest.approx(measured, rel=0.15)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
@pytest.mark.parametrize("stage", ["titles", "queries"])
@pytest.mark.parametrize("config", [pytest.param(LLAMA, id="llama"), pytest.param(GPT2, marks=pytest.mark.slow, id="gpt2")])
def test_memory_of_titles_and_queries_is_within_15_percent(config, stage, tmp_path):
    base = Base(dtype="float32")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    measured = measured_peak(stage, base, Tuning(), str(tmp_path), ROWS)
    assert forecast_of(config, stage, base, Tuning()) == pytest.approx(measured, rel=0.15)


def footprint(config=LLAMA, rows=2, tokens=64, dtype="float32", quantise="none", **how):
    return training_footprint(config, Base(dtype=dtype, quantise=quantise), Lora(), rows=rows, tokens=tokens, **how)


def test_weights_adapter_and_optimiser_are_counted_exactly():
    found = footprint(dtype="bfloat16")
    layer = 256 * (256 + 2 * 128 + 256 + 3 * 688)  # q, k and v, o, and the feed-forward part
    assert found.products == 4 * layer
    embedding, norms, rotary = 8192 * 256, 256 * (2 * 4 + 1), 2 * 32 * 4
    assert found.weights == pytest.approx(2 * (4 * layer + embedding + norms) + 4 * embedding, abs=2 * rotary)  # the head in float32
    adapter = 4 * 4 * 8 * (256 + 256 + 256 + 128)  # q and v of each layer, both halves in float32
    assert (found.adapter, found.optimiser) == (adapter, 3 * adapter)


def test_activations_grow_with_rows_and_tokens_and_checkpointing_saves_most_of_them():
    one = footprint()
    assert footprint(rows=4).activations == pytest.approx(2 * one.activations, rel=0.01)
    assert footprint(tokens=128).activations == pytest.approx(2 * one.activations, rel=0.05)
    assert footprint(checkpointing=True).activations < one.activations / 5
    assert footprint(tokens=256, sequence_nll=True).logits > footprint(tokens=256).logits + 2 * 4 * 256 * 8192


def test_no_weights_are_needed_and_none_are_made():
    """Seven billion parameters on a machine that could not hold them."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    found = footprint(config, dtype="bfloat16", quantise="nf4", checkpointing=True)
    assert found.products == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert 3.3e9 < found.weights - 6 * 32000 * 4096 < 3.5e9


RANKERS = resources.names("recipes/rankers")


def ranker_config(name, *options):
    recipe = re.search(r"--recipe (\w+)", resources.find("recipes/rankers", name).read_text())
    return read_settings("orpo", ["--ranker", name, "--recipe", recipe[1] if recipe else "quick", "--dataset", "ml-1m", *options])[0]


@pytest.fixture
def ml_1m(monkeypatch):
    """MovieLens 1M as prepared, on a CPU of 100 GFLOP/s."""
    monkeypatch.setattr(forecast, "_facts", lambda config: {"interactions": 999_611, "users": 6_040, "items": 3_416})
    monkeypatch.setattr(forecast, "_speed", lambda dtype: 1e11)


@pytest.mark.parametrize("name", RANKERS)
def test_a_recipes_header_says_what_its_dry_run_says(name, ml_1m, monkeypatch):
    header = resources.find("recipes/rankers", name).read_text().split("base:")[0].replace("\n#", "")
    said = dict(re.findall(r"(weights|adapter|optimiser|activations|logits) ([\d,]+)", header))
    monkeypatch.setattr(inputs.assets, "find_model", lambda *_: None)  # from the recipe alone
    found = forecast.of("orpo", ranker_config(name, "--base.dtype", "bfloat16"))
    assert said.keys() == found.holds_mb.keys() - {"allocator", "process"}, "the header lacks the forecast of --dry_run"
    for part, size in said.items():
        assert float(size.replace(",", "")) == pytest.approx(found.holds_mb[part], rel=0.02, abs=1), part
    operations = re.search(r"([\d.]+e\+\d+) operations", header)
    assert float(operations[1]) == pytest.approx(found.operations, rel=0.05)


def titled(monkeypatch, shape, *options):
    """The forecast of ORPO on titles, recipe quick: 4 prompts in a pass."""
    monkeypatch.setattr(inputs, "model_shape", lambda config: shape)
    return forecast.of("orpo", ranker_config("mamrec-mamba2-tiny", *options))


def test_titles_that_cannot_share_their_prompt_take_it_along_each_time(ml_1m, monkeypatch):
    """Rows and operations grow with the completions of a prompt: the rating pair's two, and each of LightFM's losers."""

    def of_pairs(*options):
        return titled(monkeypatch, MAMBA2, "--orpo.gradient_checkpointing", "true", *options)

    two, three, four = of_pairs("--pairs.rating", "false"), of_pairs(), of_pairs("--pairs.losers", "2")
    assert three.operations == pytest.approx(1.5 * two.operations)
    assert four.operations == pytest.approx(2 * two.operations)
    assert of_pairs("--pairs.lightfm", "none").operations == two.operations
    assert four.holds_mb["activations"] == pytest.approx(2 * two.holds_mb["activations"], rel=0.05)
    one_prompt = of_pairs("--orpo.max_tokens_per_batch", "1000")  # three rows of 172 tokens, and no room for three more
    assert one_prompt.holds_mb["activations"] == pytest.approx(three.holds_mb["activations"] / 4, rel=0.05)


@pytest.mark.parametrize("shape", [LLAMA, MAMBA2], ids=["packed", "continued"])
def test_titles_that_share_their_prompt_add_their_own_tokens_alone(shape, ml_1m, monkeypatch):
    three, four, seven = (titled(monkeypatch, shape, "--pairs.losers", losers) for losers in "125")
    one_more = four.operations - three.operations
    assert 0 < one_more < 0.1 * three.operations
    assert seven.operations - three.operations == pytest.approx(4 * one_more)
    assert three.holds_mb["activations"] < four.holds_mb["activations"] < 1.2 * three.holds_mb["activations"]


def test_the_papers_setting():
    config = ranker_config("llamarec-llama2-7b-qlora")
    assert (config.base.quantise, config.base.dtype) == ("nf4", "bfloat16")
    assert (config.lora.r, config.lora.alpha, config.lora.dropout, config.lora.targets) == (8, 32, 0.05, ["q_proj", "v_proj"])
    orpo = config.orpo
    assert (orpo.learning_rate, orpo.beta, orpo.schedule, orpo.warmup, orpo.epochs, orpo.accumulation) == (
        5e-6,
        0.05,
        "inverse_sqrt",
        100,
        5,
        1,
    )


def test_a_rankers_own_training_wins_over_how_much_is_trained():
    quick = read_settings("orpo", ["--ranker", "llamarec-llama2-7b-qlora", "--recipe", "quick"])[0]
    assert (quick.orpo.learning_rate, quick.pairs.prompts) == (5e-6, 400)
    assert read_settings("orpo", ["--ranker", "llamarec-llama2-7b-qlora", "--orpo.learning_rate", "1e-3"])[0].orpo.learning_rate == 1e-3


def test_the_shape_is_the_models_own_where_it_is_here(tiny_llama, tmp_path, ml_1m):
    config = read_settings("orpo", ["--base.id", str(tiny_llama), "--runs", str(tmp_path)])[0]
    assert inputs.model_shape(config).hidden_size == AutoConfig.from_pretrained(tiny_llama).hidden_size == 32
    assert forecast.of("orpo", config).holds_mb["weights"] < 1


def test_without_model_shape_and_hub_there_is_no_forecast_and_it_says_so(ml_1m, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LLMREC_OFFLINE", "1")
    arguments = ["--base.id", "nobody/nothing", "--base.shape", "null", "--runs", str(tmp_path)]
    assert forecast.of("orpo", read_settings("orpo", arguments)[0]) is None
    assert main(["orpo", "--dry_run", *arguments]) == 0
    output = capsys.readouterr()
    assert "no forecast: config.json of the base model is not here" in output.err
    assert json.loads(output.out.splitlines()[-1])["steps"][0]["state"] == "would be made"


@pytest.mark.parametrize("shape", ["{hidden_size: 8}", "{model_type: nonsense}"])
def test_a_shape_that_is_none_is_refused_in_a_line(shape, ml_1m, tmp_path, capsys):
    arguments = ["--base.id", "nobody/nothing", "--base.shape", shape, "--runs", str(tmp_path)]
    assert main(["orpo", "--dry_run", *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("llmrec orpo: base.shape: ")


@pytest.mark.parametrize("options", [[], ["--merged"]])
def test_export_has_a_forecast(options, ml_1m):
    config = read_settings("export", ["--ranker", "llamarec-llama2-7b-qlora", *options])[0]
    assert config.merged == bool(options)
    found = forecast.of("export", config)
    assert found.disk_mb == (pytest.approx(13_000, rel=0.1) if options else 10)
