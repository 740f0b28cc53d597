"""Find recipes and prompts by name: in the checkout, or in the wheel, where both travel as package data."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from llmrec.errors import UserError

PACKAGE = Path(__file__).parent


def folder(kind: str) -> Path:
    """The folder of a kind of resource, e.g. "prompts" or "recipes/datasets"."""
    inside = PACKAGE / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def names(kind: str) -> list[str]:
    """The names that `find` knows for a kind."""
    return sorted(path.stem for path in folder(kind).glob("*.yaml"))


def find(kind: str, name: str) -> Path:
    """The yaml file called `name`, or the file that `name` is the path of.

    Raises:
        UserError: when there is neither; it lists the nearest names.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if Path(name).is_file():
            return Path(name)
        raise UserError(f"{name}: no such file. Give the path of a yaml file, or one of these names: {', '.join(names(kind))}")
    path = folder(kind) / f"{name}.yaml"
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, names(kind), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"unknown {kind.split('/')[-1].rstrip('s')} '{name}': {hint}There are {', '.join(names(kind))}; or give the path of a yaml file"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a yaml file.

    Raises:
        UserError: when the file is not yaml, or holds something else than a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a yaml file ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content
