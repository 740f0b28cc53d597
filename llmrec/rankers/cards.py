"""The model card of a tuned adapter, or of a model it was merged into: README.md in the model hub's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrec.config import Base

METHODS = {
    ("sft", "letter"): "supervised fine-tuning on the letter of the next item (LlamaRec, arXiv 2311.02089)",
    ("sft", "title"): "supervised fine-tuning on the title of the next item (GPT4Rec, arXiv 2304.03879)",
    ("orpo", "letter"): "ORPO on pairs of letters (arXiv 2403.07691), one forward pass per prompt",
    ("orpo", "title"): "ORPO on pairs of titles (arXiv 2403.07691), one forward pass per prompt",
}
TASKS = {
    "letter": "It answers a prompt that lists a user's history and lettered candidates with the letter of the item it expects next.",
    "title": "It goes on with a prompt that lists a user's history with the title it expects next, a search query for the catalogue.",
}
USES = {
    "letter": "Candidates are ordered by the log-probability of their letters after the prompt's last token: "
    "`llmrec.rankers.letters.letter_logprobs`. Nothing is generated.",
    "title": "Queries are written by beam search, `llmrec.rankers.queries.beam_queries`, and BM25 finds items by their titles. "
    "Given candidates are ordered by the mean log-probability of their titles' tokens, `llmrec.rankers.titles.title_logprobs`.",
}


def model_card(
    *,
    stage: str,
    base: Base,
    weights: str,
    data: str,
    data_licence: str | None,
    rows: Mapping[str, Mapping[str, Any]],
    lora: Mapping[str, Any],
    tuning: Mapping[str, Any],
    prompt: str,
    result: Mapping[str, Any],
    titles: bool = False,
    merged: bool = False,
) -> str:
    """The card's Markdown.

    Args:
        stage: "sft" or "orpo".
        base: the base model as published.
        weights: which copy of its weights was tuned, in one line; a quantised copy is not the publisher's.
        data: the data set and where the candidates come from.
        data_licence: what the publisher of the data allows; None where nothing is known.
        rows: facts of the training rows, "sft" and "preferences" (metrics.json of `pairs`).
        lora: settings of the adapter.
        tuning: settings of the optimisation.
        prompt: name of the prompt template.
        result: steps, seconds, tokens_per_second, peak_memory_mb and `final`, the last row of the log; where there was a validation
            also `validation`, its steps and values, and `kept_step`.
        titles: the answers are titles.
        merged: the folder is a whole model, with the adapter in its weights.
    """
    answer = "title" if titles else "letter"
    adapter = bool(lora["r"])
    counted = rows["sft" if stage == "sft" else "preferences"]
    final = {name: value for name, value in result["final"].items() if name not in {"step", "epoch", "seconds", "tokens"}}
    settings = {**({f"lora {name}": value for name, value in lora.items()} if adapter else {}), **tuning}
    library = "peft" if adapter and not merged else "transformers"
    tags = "lora, recommendation" if adapter else "recommendation"
    header = ["---", f"base_model: {base.id}", f"library_name: {library}", "pipeline_tag: text-generation", f"tags: [{tags}]"]
    if base.licence:
        header.append(f"license: {base.licence.lower()}")
    lines = [
        *header,
        "---",
        f"# Ranker of recommendation candidates ({stage})",
        "",
        _what(base, adapter, merged),
        f"tuned by {METHODS[stage, answer]}.",
        TASKS[answer],
        "",
        "| | |",
        "|---|---|",
        f"| weights tuned | {_cell(weights)} |",
        f"| licence of the base model | {_cell(base.licence or 'unknown')} |",
        f"| data | {_cell(data)} |",
        f"| licence of the data | {_cell(data_licence or 'unknown; ask the publisher of the data before you pass this on')} |",
        *(f"| {name} | {value} |" for name, value in counted.items() if isinstance(value, int)),
        "",
        "## Use",
        "",
        "```python",
        *(_load_adapter(base) if library == "peft" else _load_whole()),
        "```",
        "",
        f"The prompt is in `prompt.yaml` (template `{prompt}`). {USES[answer]}",
        "",
        "## Training",
        "",
        f"{result['steps']} steps, {result['seconds']:g} s, {result['tokens_per_second']:,} prompt tokens/s, "
        f"peak memory {result['peak_memory_mb']:,} MB.",
        "",
        "| setting | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in settings.items()),
        "",
        "| at the last step | |",
        "|---|---:|",
        *(f"| {name} | {value:.5g} |" for name, value in final.items()),
        "",
        *_validation(result),
        f"What the {'adapter' if adapter else 'model'} is worth is measured by the stage `evaluate`, not by these numbers.",
    ]
    return "\n".join(lines) + "\n"


def _what(base: Base, adapter: bool, merged: bool) -> str:
    if not adapter:
        return f"{base.id} with all of its weights,"
    return f"{base.id} with a LoRA adapter merged into it," if merged else f"A LoRA adapter of {base.id},"


def _validation(result: Mapping[str, Any]) -> list[str]:
    if not result.get("validation"):
        return []
    return [
        "| validated after step | NDCG@10 among the candidates |",
        "|---:|---:|",
        *(f"| {row['step']} | {row['ndcg@10']:.4f} |" for row in result["validation"]),
        "",
        f"This is the adapter after step {result['kept_step']}.",
        "",
    ]


def _load_adapter(base: Base) -> list[str]:
    revision = f', revision="{base.revision}"' if base.revision else ""
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base.id}"{revision})',
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
    ]


def _load_whole() -> list[str]:
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
    ]


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
