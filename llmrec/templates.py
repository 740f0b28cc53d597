"""Prompt templates: the YAML files of prompts/, and the prompt.yaml that lies beside a trained model.

There are two families. Where the answer is a `{letter}`, the prompt shows lettered candidates and the model picks one (LlamaRec).
Where it is a `{title}`, the prompt shows the history alone and the model writes the title it expects next, which is a search query
for the catalogue (GPT4Rec, MamRec).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from llmrec import resources
from llmrec.config import Prompting
from llmrec.errors import UserError


@dataclass(frozen=True)
class Template:
    """Words and layout of a prompt that shows lettered candidates.

    Attributes:
        name: how messages and cards call it.
        instruction: the task in words.
        layout: the whole prompt with {instruction}, {history} and {candidates}; the answer follows at once.
        history_item: one title of history, with {number} (from 1) and {title}.
        candidate_item: one candidate, with {letter} and {title}.
        separator: stands between items.
        answer: the completion, with {letter}; one token in the row.
    """

    name: str
    instruction: str
    layout: str
    history_item: str
    candidate_item: str
    separator: str
    answer: str


@dataclass(frozen=True)
class QueryTemplate:
    """Words and layout of a prompt that asks for a title.

    Attributes:
        name: how messages and cards call it.
        layout: the whole prompt with {history}; the answer follows at once.
        history_item: one title of history, with {title}.
        separator: stands between items.
        answer: the completion, with {title}; end of text follows it.
    """

    name: str
    layout: str
    history_item: str
    separator: str
    answer: str


# Each placeholder exactly once; the other texts have none.
_PLACEHOLDERS: dict[type, dict[str, tuple[str, ...]]] = {
    Template: {
        "layout": ("instruction", "history", "candidates"),
        "history_item": ("number", "title"),
        "candidate_item": ("letter", "title"),
        "answer": ("letter",),
    },
    QueryTemplate: {"layout": ("history",), "history_item": ("title",), "answer": ("title",)},
}


def load_template(name_or_path: str) -> Template | QueryTemplate:
    """Read a template: a name of prompts/, or the path of a yaml file.

    Raises:
        UserError: there is no such template, or a key or placeholder is unknown or missing.
    """
    path = resources.find("prompts", name_or_path)
    return _template(path, {"name": path.stem, **resources.read_yaml(path)})


def save_prompt(path: Path, template: Template | QueryTemplate, config: Prompting) -> None:
    """Write the prompt.yaml of a model: everything needed to write the prompts it was trained on."""
    text = yaml.safe_dump(
        {"template": dataclasses.asdict(template), "prompt": dataclasses.asdict(config)}, sort_keys=False, allow_unicode=True
    )
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def load_prompt(path: Path) -> tuple[Template | QueryTemplate, Prompting]:
    """Read the prompt.yaml that `save_prompt` wrote.

    Raises:
        UserError: the file is missing or is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; a trained model has its prompt.yaml beside the adapter")
    content = resources.read_yaml(path)
    _check_keys(path, content, ["template", "prompt"])
    _check_keys(path, content["prompt"], [field.name for field in dataclasses.fields(Prompting)])
    return _template(path, content["template"]), Prompting(**content["prompt"])


def _template(path: Path, content: Any) -> Template | QueryTemplate:
    kind = QueryTemplate if isinstance(content, dict) and "{title}" in str(content.get("answer")) else Template
    _check_keys(path, content, [field.name for field in dataclasses.fields(kind)])
    for key, text in content.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: {key} is {text!r}: put a text in quotes")
        expected = sorted(_PLACEHOLDERS[kind].get(key, ()))
        if expected and _placeholders(path, key, text) != expected:
            raise UserError(f"{path}: {key} needs {', '.join('{' + name + '}' for name in expected)}, each once and nothing else in braces")
    return kind(**content)


def _placeholders(path: Path, key: str, text: str) -> list[str]:
    try:
        return sorted(name for _, name, _, _ in Formatter().parse(text) if name is not None)
    except ValueError as error:
        raise UserError(f"{path}: {key} has an unpaired brace ({error}); write {{{{ for a brace") from error


def _check_keys(path: Path, content: Any, expected: list[str]) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines with the keys {', '.join(expected)}")
    for key in content:
        if key not in expected:
            nearest = get_close_matches(str(key), expected, n=1) or expected
            raise UserError(f"{path}: unknown key {key!r} (did you mean {' or '.join(nearest)}?)")
    missing = [key for key in expected if key not in content]
    if missing:
        raise UserError(f"{path}: the key {missing[0]!r} is missing")
