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
from llmrec.stages import inputs, run_folder, writes_titles

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmrec.rankers.footprint import Footprint

EPOCHS = 25  # where early stopping usually ends
QUERY_FRAME = 22  # a prompt that asks for a title, without titles
FRAME_TOKENS, TITLE_TOKENS = 45, 8.2  # of SmolLM2's tokenizer: a prompt without titles, and a film's title without its year
LONGEST = 1.4  # the longest prompts over the average one
BACKWARD = 1.6  # a backward pass over a forward pass, with LoRA
# Share of the measured matrix speed that the work reaches: a retriever's softmax, a language model's forward pass.
REACHED = {"softmax": 0.67, "language model": 0.54, "state space": 0.17}
# A retriever's layer of width 64, whose time is not its products': it takes that of a softmax with so many products per event.
LAYER, MAMBA_LAYER = 110_000, 200_000
USER = 2e-3  # seconds to call a retriever for one user, whatever it computes
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
    if stage == "order":
        return _order(config, users, items)
    if stage == "bench":
        return _bench(config, users, items)
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
    if stage == "sft":
        return _tune(config, shape, config.sft, rows, 1)
    return _tune(config, shape, config.orpo, prompts, _completions(config), sequence_nll)


def _tune(config: Config, shape: PreTrainedConfig, tuning: Tuning, prompts: int, completions: int, sequence_nll: bool = False) -> Forecast:
    from llmrec.rankers.completions import Strategy, row_size
    from llmrec.rankers.footprint import sharing, training_footprint

    own = _title(config) if writes_titles(config) else 1
    strategy: Strategy = "concatenated"  # as good as any for a single completion, and for letters
    if own > 1 and completions > 1:
        strategy = sharing(shape, config.base, tuning.gradient_checkpointing)
    answers = [own] * completions
    longest = _longest(config) - (own - 1)  # without the title that answers, which the tokens of a prompt have at its end
    width, copies = row_size(strategy, longest, answers, single=own == 1)
    found = training_footprint(
        shape,
        config.base,
        config.lora,
        rows=_prompts(tuning, width * copies),
        tokens=longest,
        completions=answers,
        strategy=strategy,
        checkpointing=tuning.gradient_checkpointing,
        sequence_nll=sequence_nll,
    )
    passes = 1 + BACKWARD + tuning.gradient_checkpointing  # which makes the forward pass twice
    read, copies = row_size(strategy, round(_tokens(config)) - (own - 1), answers, single=own == 1)
    kept = 3 * found.adapter if config.lora.r else 7 * found.weights  # the weights, and two checkpoints with AdamW's moments
    return _language_model(config, shape, found, passes * prompts * tuning.epochs * read * copies / _tokens(config), kept / MB + 5)


def _prompts(tuning: Tuning, tokens: int) -> int:
    """Prompts of a forward pass, which go through the model as so many tokens each."""
    if tuning.max_tokens_per_batch is None:
        return tuning.batch
    return min(tuning.batch * tuning.accumulation, max(1, tuning.max_tokens_per_batch // tokens))


def _completions(config: Config) -> int:
    """Different completions of a preference prompt, at most: the last item, the one before it, which has another rating, and LightFM's.

    Assumed is that every prompt has all its pairs. With equal ratings (a third of users on MovieLens) there is one completion less.
    """
    pairs = config.pairs
    return 1 + pairs.rating + (pairs.losers if pairs.lightfm != "none" else 0)


def _title(config: Config) -> int:
    """Tokens of a title that answers, and the end of text."""
    return min(round(TITLE_TOKENS), config.prompt.title_tokens) + 1


def _evaluate(config: Config, shape: PreTrainedConfig, users: int) -> Forecast:
    from llmrec.rankers.footprint import scoring_footprint

    tested = min(config.evaluation.test_users or users, config.limit_users or users)
    asked = tested // 4 if config.evaluation.ask == "retrieved" else tested
    asked += min(config.evaluation.valid_users or users, users // 4)  # a quarter or so of all targets are retrieved
    each = 1.3 * (1 + 0.5 * (config.evaluation.orders - 1))  # instruction and history once, which are half of a prompt
    passes = each * asked
    if writes_titles(config):  # titles of candidates after each prompt; then each of three models goes on with as many beams
        own, written = TITLE_TOKENS / _tokens(config), tested + min(config.queries.valid_users, users)
        passes = passes * (1 + config.prompt.candidates * own) + 3 * written * (1 + 2 * config.queries.count * own)
        found = _titles_or_queries(config, shape)
    else:
        found = scoring_footprint(shape, config.base, rows=config.evaluation.batch, tokens=_longest(config))
    return _language_model(config, shape, found, passes, tested / 400)


def _titles_or_queries(config: Config, shape: PreTrainedConfig) -> Footprint:
    """Of scoring the candidates' titles or of writing queries, whichever needs more."""
    from llmrec.rankers.title_footprint import queries_footprint, titles_footprint

    base, longest = config.base, _longest(config)
    batch, prompts, beams = (max(1, size) for size in (config.evaluation.batch, config.queries.batch, config.queries.count))
    scoring = titles_footprint(shape, base, batch=batch, tokens=longest, titles=config.prompt.candidates, title=_title(config))
    writing = queries_footprint(shape, base, batch=prompts, beams=beams, tokens=longest + config.prompt.title_tokens)
    return max(scoring, writing, key=lambda one: one.activations)


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


def _order(config: Config, users: int, items: int) -> Forecast:
    """One pass over the test users for each order."""
    layers = config.training.max_length * config.model.layers * MAMBA_LAYER * (config.model.dim / 64) ** 2
    seconds = 2 * users * (items * config.model.dim + layers) / (_speed("float32") * REACHED["softmax"])
    return Forecast(8 + 2 * (1 + config.order.shuffles) * seconds, 900, 1)


def _bench(config: Config, users: int, items: int) -> Forecast:
    """Each model alone, in batches and to warm up: about three passes over its users for each two that are asked for."""
    from llmrec.stages import finished
    from llmrec.stages.bench import models_of

    models, how = models_of(config), config.bench
    seconds, memory = 10.0, 700.0
    for folder in models.retrievers.values():
        own = finished.config_of(folder, config)
        products = float(items * own.model.dim)
        if own.retrieval.kind == "sequence":
            products += own.training.max_length * own.model.layers * MAMBA_LAYER * (own.model.dim / 64) ** 2
        each = USER + 2 * products / (_speed("float32") * REACHED["softmax"])
        seconds += 2 + 1.5 * how.repeats * min(how.users, users) * each
    for folder in models.rankers.values():
        own = finished.config_of(folder, config)
        evaluation = replace(own.evaluation, test_users=min(how.ranker_users, users), valid_users=1, ask="all", batch=how.ranker_batch)
        ranker = _ranker("evaluate", replace(own, evaluation=evaluation), users, 0, 0)
        if ranker is not None:
            seconds, memory = seconds + 1.5 * how.repeats * ranker.seconds, max(memory, ranker.memory_mb)
    return Forecast(seconds, memory, 1)


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
    """Of an average prompt; one that asks for a title shows no candidates, and the title that answers comes with it."""
    if writes_titles(config):
        return min(config.prompt.budget, QUERY_FRAME + (TITLE_TOKENS + 1) * (config.prompt.history + 1))
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
