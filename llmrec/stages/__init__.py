"""The stages of the pipeline as a table: what decides each one's result, where it writes, what it needs first.

No torch here: the plan is read to find out that there is nothing to do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmrec.config import Config, Retrieval, Tuning
from llmrec.templates import QueryTemplate, load_template

# later ones win: a ranker may say how it must be trained
RECIPES = {"dataset": "recipes/datasets", "retriever": "recipes/retrievers", "recipe": "recipes/orpo", "ranker": "recipes/rankers"}
# settings that change no result; keep_states adds a file, which `_retrieve` sees to; scratch and shape see `_base`;
# max_tokens_per_batch changes which random numbers of the dropout fall on which row, as the number of processes does
NOT_SEMANTIC = {
    "save_steps",
    "report_to",
    "licence",
    "wheel",
    "urls",
    "checksums",
    "files_of",
    "keep_states",
    "shape",
    "scratch",
    "max_tokens_per_batch",
}
# settings that are younger than finished runs, at the values that were the rule before: these decide what they always did, and stay
# out of the fingerprint, so that old runs remain up to date. A default may change later; what stands here may not
BEFORE: dict[str, Any] = {
    "split.kind": "leave_one_out",
    "split.target": "last",
    "split.valid_quantile": 0.8,
    "split.test_quantile": 0.9,
    "retrieval.legacy": None,
    "evaluation.liked": 4,
}

DATA = ("dataset", "runs", "seed", "source", "filter", "split")
RETRIEVER = (*DATA, "retriever", "retrieval", "model", "training", "lightfm", "evaluation")
RANKER = (*RETRIEVER, "ranker", "recipe", "variant", "limit_users", "base", "prompt", "pairs")


def dataset_name(config: Config) -> str:
    """`ml-100k` for the recipe of that name, the file's stem for a path."""
    return Path(config.dataset).stem if config.dataset.endswith((".yaml", ".yml")) else config.dataset


def retriever_name(config: Config) -> str:
    """Name of the retriever's run folder."""
    stem = Path(config.retriever).stem if config.retriever.endswith((".yaml", ".yml")) else config.retriever
    return stem + (f".seed{config.seed}" if config.seed else "")


def ranker_name(config: Config) -> str:
    """NAME of the contract: RETRIEVER.RANKER[.VARIANT][.seedN]."""
    retriever = retriever_name(replace(config, seed=0))
    ranker = Path(config.ranker).stem if config.ranker.endswith((".yaml", ".yml")) else config.ranker
    parts = [retriever, ranker, config.variant, f"seed{config.seed}" if config.seed else None]
    return ".".join(part for part in parts if part)


def recipe_files_of(config: Config, options: tuple[str, ...]) -> dict[str, str]:
    """The recipes that a command with these options reads: kind of recipe -> name or path."""
    chosen = {}
    for option, kind in RECIPES.items():
        if option in options:
            value = str(asdict(config)[option])
            is_path = value.endswith((".yaml", ".yml"))
            chosen[kind] = value if is_path or option != "retriever" else value.split(".")[0]
    return chosen


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: the command and the folder.
        options: the fields of `Config` that the command accepts.
        decides: gives the settings that its result depends on.
        folder: gives the name of its run folder, or None where a stage has one folder per data set.
        needs: gives the stages it reads, each with the config that made it.
        uses_base: whether the base model's weights are an input.
        shards: tells whether several processes can share the work.
        schema: raised when the stage's output changes for the same settings.
    """

    name: str
    options: tuple[str, ...]
    decides: Callable[[Config], dict[str, Any]]
    folder: Callable[[Config], str | None]
    needs: Callable[[Config], list[tuple[str, Config]]]
    uses_base: bool = False
    shards: Callable[[Config], bool] = lambda config: False
    schema: int = 1


def _settings(config: Config, *keys: str) -> dict[str, Any]:
    """The semantic settings under `keys`, flattened to dotted names."""

    def flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, below in value.items():
                if key not in NOT_SEMANTIC:
                    yield from flatten(below, f"{name}.{key}" if name else key)
        else:
            # a recipe's "1" and the 1.0 it becomes are one setting
            yield name, int(value) if isinstance(value, float) and value.is_integer() else value

    values = asdict(config)
    found = flatten({key: values[key] for key in keys}, "")
    return {name: value for name, value in found if name not in BEFORE or value != BEFORE[name]}


def _prepare(config: Config) -> dict[str, Any]:
    settings = _settings(config, "source", "filter", "split")
    return settings | ({"seed": config.seed} if config.split.ties == "random" else {})


def _template(config: Config) -> dict[str, Any]:
    """The words of the prompt: a template may be edited under the same name."""
    return {f"template.{key}": value for key, value in asdict(load_template(config.prompt.template)).items()}


def writes_titles(config: Config) -> bool:
    """Whether the ranker answers with titles, which are search queries, rather than with letters."""
    return isinstance(load_template(config.prompt.template), QueryTemplate)


def _base(config: Config) -> dict[str, Any]:
    """The base model's settings; a shape decides only what begins with random weights."""
    scratch = {"base.scratch": json.dumps(config.base.shape, sort_keys=True)} if config.base.scratch else {}
    return _settings(config, "base") | scratch


def _evaluate(config: Config) -> dict[str, Any]:
    sections = ["prompt", "evaluation", "limit_users", "seed", *(["queries"] if writes_titles(config) else [])]
    return _base(config) | _settings(config, *sections) | _template(config)


def _retrieve(config: Config) -> dict[str, Any]:
    sections = {"sequence": ("model", "training"), "lightfm": ("lightfm",), "popularity": ()}[config.retrieval.kind]
    # evaluation.liked stays out: it is written beside what it decides, and nobody should train again for another threshold
    draws = sections or config.retrieval.legacy
    settings = _settings(config, "retrieval", *sections, *(["seed"] if draws else []))
    return settings | ({"retrieval.keep_states": True} if config.retrieval.keep_states else {})


def _bench(config: Config) -> dict[str, Any]:
    """The settings, and what the models are that they ask for."""
    from llmrec.stages.bench import models_of

    return _settings(config, "bench", "seed") | models_of(config).fingerprints(config)


def _bench_name(config: Config) -> str:
    return (config.variant or "all") + (f".seed{config.seed}" if config.seed else "")


def lightfm_config(config: Config) -> Config:
    """The config of the LightFM run that supplies the losers of the preference pairs."""
    own = config.retrieval.kind == "lightfm"
    retrieval = Retrieval(kind="lightfm", candidates=config.retrieval.candidates, repeats=config.retrieval.repeats)
    return config if own else replace(config, retriever="lightfm", retrieval=retrieval)


def _before_pairs(config: Config) -> list[tuple[str, Config]]:
    need = [("prepare", config), ("retrieve", config)]
    if config.pairs.lightfm != "none" and config.retrieval.kind != "lightfm":
        need.append(("retrieve", lightfm_config(config)))
    return need


def _before_evaluate(config: Config) -> list[tuple[str, Config]]:
    return [("prepare", config), ("retrieve", config), ("pairs", config), *_adapters(config)]


def _adapters(config: Config) -> list[tuple[str, Config]]:
    return [("sft", config), ("orpo", config)] if config.orpo.start == "sft" else [("orpo", config)]


def _validation(config: Config, tuning: Tuning) -> list[tuple[str, Config]]:
    """Where validation prompts come from."""
    return [("prepare", config), ("retrieve", config)] if tuning.eval_steps is not None else []


STAGES = {
    stage.name: stage
    for stage in (
        Stage("prepare", DATA, _prepare, lambda c: None, lambda c: []),
        Stage(
            "retrieve",
            RETRIEVER,
            _retrieve,
            retriever_name,
            lambda c: [("prepare", c)],
            shards=lambda c: c.retrieval.kind == "sequence",
        ),
        Stage(
            "pairs",
            RANKER,
            lambda c: _settings(c, "prompt", "pairs", "limit_users", "seed") | _template(c),
            ranker_name,
            _before_pairs,
            uses_base=True,
        ),
        Stage(
            "sft",
            (*RANKER, "lora", "sft"),
            lambda c: _base(c) | _settings(c, "lora", "sft", "seed"),
            ranker_name,
            lambda c: [("pairs", c), *_validation(c, c.sft)],
            uses_base=True,
            shards=lambda c: True,
        ),
        Stage(
            "orpo",
            (*RANKER, "lora", "sft", "orpo"),
            lambda c: _base(c) | _settings(c, "lora", "orpo", "seed"),
            ranker_name,
            lambda c: [("pairs", c), *([("sft", c)] if c.orpo.start == "sft" else []), *_validation(c, c.orpo)],
            uses_base=True,
            shards=lambda c: True,
        ),
        Stage(
            "evaluate",
            (*RANKER, "lora", "sft", "orpo", "queries"),
            _evaluate,
            ranker_name,
            _before_evaluate,
            uses_base=True,
            shards=lambda c: True,
        ),
        Stage(
            "export",
            (*RANKER, "lora", "sft", "orpo", "merged"),
            lambda c: _base(c) | _settings(c, "merged"),
            lambda c: ranker_name(c) + (".merged" if c.merged else ""),
            lambda c: [("orpo", c)],
            uses_base=True,
        ),
        Stage(
            "order",
            (*RETRIEVER, "variant", "order"),
            lambda c: _settings(c, "order", "seed"),
            lambda c: ".".join(filter(None, [retriever_name(c), c.variant])),
            lambda c: [("prepare", c), ("retrieve", c)],
        ),
        Stage("bench", (*DATA, "variant", "bench"), _bench, _bench_name, lambda c: [("prepare", c)]),
    )
}


def run_folder(stage: str, config: Config) -> Path:
    """`runs/<dataset>/<stage>[/<name>]`."""
    path = Path(config.runs) / dataset_name(config) / stage
    name = STAGES[stage].folder(config)
    return path / name if name else path


def upstream(stage: str, config: Config) -> list[tuple[str, Config]]:
    """All stages that `stage` rests on, each once, in the order in which they have to run."""
    found: dict[Path, tuple[str, Config]] = {}
    for name, its_config in STAGES[stage].needs(config):
        for below in upstream(name, its_config):
            found.setdefault(run_folder(*below), below)
        found.setdefault(run_folder(name, its_config), (name, its_config))
    return list(found.values())
