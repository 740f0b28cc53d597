"""What a stage will cost, roughly: said before it starts and by `--dry_run`.

Arithmetic over the speed of matrix products measured on this machine, with the share of it that each kind of work
reached on two CPU cores (2026-11-21). Good to a factor of two; the progress bars know better later.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmrec.config import Config, Training, Tuning
from llmrec.stages import inputs, run_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmrec.rankers.footprint import Footprint

EPOCHS = 25  # where early stopping usually ends
FRAME_TOKENS, TITLE_TOKENS = 45, 8.2  # of SmolLM2's tokenizer: a prompt without titles, and a film's title without its year
LONGEST = 1.4  # the longest prompts over the average one
BACKWARD = 1.6  # a backward pass over a forward pass, with LoRA
# Share of the measured matrix speed that the work reaches: a retriever's softmax, a language model's forward pass.
REACHED = {"softmax": 0.67, "language model": 0.54, "state space": 0.17}
# A retriever's layer of width 64, whose time is not its products': it takes that of a softmax with so many products per event.
LAYER, MAMBA_LAYER = 110_000, 200_000
GAPS = 0.3  # what the allocator of the CPU keeps of freed memory (llmrec.process), over activations and logits
PROCESS_MB = 600  # Python, torch and transformers themselves
MB = 2**20
UNKNOWN = "no forecast: config.json of the base model is not here, the hub does not answer, and base.shape is not set"


@dataclass(frozen=True)
class Forecast:
    """What a stage will cost.

    Attributes:
        seconds: of work.
        memory_mb: at the peak: of the GPU where there is one, else of the process.
        disk_mb: of files.
        holds_mb: what the memory of a language model holds, by name.
        operations: floating-point operations of the language model, for a forecast of the time on another machine.
    """

    seconds: float
    memory_mb: float
    disk_mb: float
    holds_mb: dict[str, float] = field(default_factory=dict)
    operations: float = 0.0

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size:,.0f}" for name, size in self.holds_mb.items())
        memory = f"{self.memory_mb / 1024:.1f} GB memory" + (f" ({parts} MB)" if parts else "")
        work = f", {self.operations:.1e} operations" if self.operations else ""
        return f"about {_duration(self.seconds)}, {memory}, {max(1, self.disk_mb):,.0f} MB disk{work}"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def of(stage: str, config: Config) -> Forecast | None:
    """The forecast of one stage, from what is known before it starts; None where nothing says how large the base model is (`UNKNOWN`)."""
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
    return _ranker(stage, config, users, prompts, rows)


def _ranker(stage: str, config: Config, users: int, prompts: int, rows: int) -> Forecast | None:
    """Of a stage that uses the language model, from its configuration alone: no weights are read."""
    shape = inputs.model_shape(config)
    if shape is None:
        return None
    if stage == "export":
        return _export(config, shape)
    if stage == "evaluate":
        return _evaluate(config, shape, users)
    sequence_nll = stage == "orpo" and config.orpo.nll_on == "sequence"
    return _tune(config, shape, config.sft, rows) if stage == "sft" else _tune(config, shape, config.orpo, prompts, sequence_nll)


def _tune(config: Config, shape: PreTrainedConfig, tuning: Tuning, rows: int, sequence_nll: bool = False) -> Forecast:
    from llmrec.rankers.footprint import training_footprint

    found = training_footprint(
        shape,
        config.base,
        config.lora,
        rows=_rows(tuning, _longest(config)),
        tokens=_longest(config),
        checkpointing=tuning.gradient_checkpointing,
        sequence_nll=sequence_nll,
    )
    passes = 1 + BACKWARD + tuning.gradient_checkpointing  # which makes the forward pass twice
    return _language_model(config, shape, found, passes * rows * tuning.epochs, 3 * found.adapter / MB + 5)


def _rows(tuning: Tuning, longest: int) -> int:
    """Prompts of a forward pass."""
    if tuning.max_tokens_per_batch is None:
        return tuning.batch
    return min(tuning.batch * tuning.accumulation, max(1, tuning.max_tokens_per_batch // longest))


def _evaluate(config: Config, shape: PreTrainedConfig, users: int) -> Forecast:
    from llmrec.rankers.footprint import scoring_footprint

    tested = min(config.evaluation.test_users or users, config.limit_users or users)
    asked = tested // 4 if config.evaluation.ask == "retrieved" else tested
    asked += min(config.evaluation.valid_users or users, users // 4)  # a quarter or so of all targets are retrieved
    each = 1.3 * (1 + 0.5 * (config.evaluation.orders - 1))  # instruction and history once, which are half of a prompt
    found = scoring_footprint(shape, config.base, rows=config.evaluation.batch, tokens=_longest(config))
    return _language_model(config, shape, found, each * asked, tested / 400)


def _export(config: Config, shape: PreTrainedConfig) -> Forecast:
    """Merging into weights that were quantised holds them twice: as they are used, and as they are written."""
    from llmrec.rankers.footprint import weights_bytes

    if not config.merged:
        return Forecast(2, 200, 10)
    plain = weights_bytes(shape, replace(config.base, quantise="none")) / MB
    packed = weights_bytes(shape, config.base) / MB if config.base.quantise == "nf4" else 0.0
    return Forecast(20 + plain / 200, plain + packed + PROCESS_MB, plain, {"weights": plain + packed, "process": PROCESS_MB})


def _language_model(config: Config, shape: PreTrainedConfig, found: Footprint, passes: float, disk: float) -> Forecast:
    """A forecast from the work, in forward passes of one prompt, and the footprint in bytes."""
    import torch

    operations = 2 * found.products * _tokens(config) * passes
    holds = {name: size / MB for name, size in found.held().items()}
    if not torch.cuda.is_available():
        holds |= {"allocator": GAPS * (found.activations + found.logits) / MB, "process": PROCESS_MB}
    return Forecast(15 + operations / _reached(config, shape.model_type), sum(holds.values()), disk, holds, operations)


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
    """Of an average prompt."""
    return min(config.prompt.budget, FRAME_TOKENS + TITLE_TOKENS * (config.prompt.history + config.prompt.candidates))


def _longest(config: Config) -> int:
    """Tokens of the longest prompt."""
    return round(min(config.prompt.budget, LONGEST * _tokens(config)))


def _reached(config: Config, family: str) -> float:
    """Operations per second of the base model's forward pass."""
    from llmrec.rankers.backbone import resolve_dtype

    dtype = str(resolve_dtype(config.base.dtype)).removeprefix("torch.")
    return _speed(dtype) * REACHED["state space" if family.startswith("mamba") else "language model"]


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
