"""What a stage will cost, roughly: said before it starts and by `--dry_run`.

Arithmetic over the speed of matrix products measured on this machine, with the share of it that each kind of work
reached on two CPU cores (2026-11-21). Good to a factor of two; the progress bars know better later.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.config import Config, Training
from llmrec.stages import inputs, run_folder

EPOCHS = 25  # where early stopping usually ends
FRAME_TOKENS, TITLE_TOKENS = 45, 8.2  # of SmolLM2's tokenizer: a prompt without titles, and a film's title without its year
BACKWARD = 1.6  # a backward pass over a forward pass, with LoRA
# Share of the measured matrix speed that the work reaches: a retriever's softmax, a language model's forward pass.
REACHED = {"softmax": 0.67, "language model": 0.69}
# A retriever's layer of width 64, whose time is not its products': it takes that of a softmax with so many products per event.
LAYER, MAMBA_LAYER = 110_000, 200_000
PROCESS_MB = 600  # Python, torch and transformers themselves


@dataclass(frozen=True)
class Forecast:
    """Seconds of work, MB of peak memory, MB of files."""

    seconds: float
    memory_mb: float
    disk_mb: float

    def __str__(self) -> str:
        duration = f"{self.seconds:.0f} s" if self.seconds < 90 else f"{self.seconds / 60:.0f} min"
        return f"about {duration}, {self.memory_mb / 1024:.1f} GB memory, {max(1, self.disk_mb):.0f} MB disk"


def of(stage: str, config: Config) -> Forecast:
    """The forecast of one stage, from what is known before it starts."""
    facts = _facts(config)
    events, users, items = facts["interactions"], facts["users"], facts["items"]
    if stage == "prepare":
        return Forecast(1 + events / 4e5, 250 + events / 2e3, events / 1.2e5)
    if stage == "retrieve":
        return _retrieve(config, events, users, items)
    prompts = min(config.pairs.prompts or users, config.limit_users or users)
    rows = min(
        config.pairs.sft_rows or users * config.pairs.prefixes_per_user, (config.limit_users or users) * config.pairs.prefixes_per_user
    )
    if stage == "pairs":
        return Forecast(8 + (prompts + rows) / 150, PROCESS_MB + 400, (prompts + rows) / 1500)
    forward = _prompt_seconds(config)
    weights = _weights_mb(config)
    if stage == "evaluate":
        tested = min(config.evaluation.test_users or users, config.limit_users or users)
        asked = tested + min(config.evaluation.valid_users or users, users // 4)
        memory = PROCESS_MB + 2 * weights + config.evaluation.batch * _tokens(config) / 40
        return Forecast(15 + 1.3 * asked * forward, memory, tested / 400)
    tuning, work = (config.sft, rows) if stage == "sft" else (config.orpo, prompts)
    memory = PROCESS_MB + 2 * weights + tuning.batch * _tokens(config) / (6 if tuning.gradient_checkpointing else 0.9)
    return Forecast(15 + (1 + BACKWARD) * work * tuning.epochs * forward, memory, 10)


def _retrieve(config: Config, events: int, users: int, items: int) -> Forecast:
    memory, disk = 700 + events / 4e3, users * config.retrieval.candidates / 8e4 + 1
    if config.retrieval.kind == "lightfm":
        return Forecast(4 + config.lightfm.epochs * events / 1e6, memory, disk)
    if config.retrieval.kind == "popularity":
        return Forecast(4 + users / 5e3, memory, disk)
    model, training = config.model, config.training
    positions, targets = _trained(training, events, users)
    compared = {"full_softmax": items, "bce": 2}.get(training.loss, training.negatives)
    layer = (LAYER if model.mixer.name in ("attention", "hstu", "gru", "lru") else MAMBA_LAYER) * (model.dim / 64) ** 2
    products = positions * model.layers * layer + targets * compared * model.dim
    epoch = 6 * products / (_speed("float32") * REACHED["softmax"])  # forward and twice that backward, two operations each
    return Forecast(8 + min(EPOCHS, training.epochs) * epoch, memory + training.batch * training.max_length / 12, disk)


def _trained(training: Training, events: int, users: int) -> tuple[float, float]:
    """Positions that an epoch computes, and those of them that are targets."""
    each = events / users
    if training.windows == "prefixes":
        rows = users * min(training.prefixes_per_user, each)
        return rows * min(training.max_length, each / 2), rows
    seen = users * min(training.max_length, each) if training.windows == "last" else float(events)
    return seen, seen


def _facts(config: Config) -> dict[str, Any]:
    """Sizes of the data: as prepared, or for want of better those of ml-100k."""
    folder = run_folder("prepare", config)
    if (folder / "metrics.json").exists():
        from llmrec.data.tables import load_statistics

        return load_statistics(folder)
    return {"interactions": 100_000, "users": 1_000, "items": 1_500}


def _tokens(config: Config) -> float:
    return min(config.prompt.budget, FRAME_TOKENS + TITLE_TOKENS * (config.prompt.history + config.prompt.candidates))


def _prompt_seconds(config: Config) -> float:
    """Seconds of one prompt's forward pass: two operations per weight and token."""
    from llmrec.rankers.backbone import resolve_dtype

    weights = _weights_mb(config) * 2**20 / 2
    dtype = str(resolve_dtype(config.base.dtype)).removeprefix("torch.")
    return 2 * weights * _tokens(config) / (_speed(dtype) * REACHED["language model"])


def _weights_mb(config: Config) -> float:
    """Size of the base model in 16 bits."""
    if inputs.missing("sft", config):
        return 270.0
    folder: Path = inputs.model(config).folder
    ordinary = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    quantised = sum(path.stat().st_size for path in folder.glob("*.gguf"))
    return (ordinary or quantised * 16 / 5.8) / 2**20


@functools.cache
def _speed(dtype: str) -> float:
    """Floating-point operations per second of a matrix product on the device that will do the work."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 768
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    a = torch.ones(size, size, dtype=kinds[dtype], device=device)
    times = []
    for _ in range(6):
        begun = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for the GPU
        times.append(time.perf_counter() - begun)
    return 2 * size**3 / min(times)
