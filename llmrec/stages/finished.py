"""What has been made already: finished run folders, and the settings that made one, whatever the recipes say today."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from llmrec import runs
from llmrec.config import Config
from llmrec.errors import UserError
from llmrec.stages import dataset_name

RUN = re.compile(r"[0-9a-f]{64}:[0-9a-f]{64}")
"""How a stage records that it read a run folder (`runs.identity`). Files from outside have one checksum."""


def folder_of(stage: str, name: str, config: Config) -> Path:
    """The run folder of that name, beside those that `config` writes."""
    return Path(config.runs) / dataset_name(config) / stage / name


def names(stage: str, config: Config) -> list[str]:
    """Finished run folders of a stage, in alphabetical order."""
    root = Path(config.runs) / dataset_name(config) / stage
    return sorted(path.parent.name for path in root.glob("*/stage.json") if not path.parent.name.startswith("."))


def identity(folder: Path) -> str | None:
    """What a finished folder was made from and what came out, as its readers record it; None where it is not finished."""
    made = runs.read_stage(folder)
    return None if made is None else runs.identity(made)


def stage_of(folder: Path) -> str:
    """What made a run folder, by its place."""
    return "prepare" if folder.name == "prepare" else folder.parent.name


def dataset_of(folder: Path) -> Path:
    """The folder of a data set's runs, above that of a run."""
    return folder.parent if stage_of(folder) == "prepare" else folder.parent.parent


def inputs_of(folder: Path) -> list[Path]:
    """The run folders that a finished run read, where they lie today.

    A folder that was moved remembers its old place: its inputs lie in the same data set's folder as itself, or where they were.

    Raises:
        UserError: one of them is not there any more, or was made again since.
    """
    folder = folder.resolve()
    made = runs.read_stage(folder)
    if made is None:
        raise UserError(f"{folder} is no finished run: it has no stage.json; `llmrec runs` lists what there is")
    found: dict[Path, None] = {}
    for recorded, read in made["inputs"].items():
        if not RUN.fullmatch(read):
            continue  # a file from outside
        old = Path(recorded)
        beside = dataset_of(folder) / old.relative_to(dataset_of(old))
        path = beside if (beside / "stage.json").is_file() else old.resolve()
        now = identity(path)
        if now is None:
            raise UserError(f"{folder} was made from {path}, which is not there: make it again, then this run")
        if now != read:
            raise UserError(f"{path} was made again after {folder} had read it, so these are not its data: make this run again, too")
        found[path] = None
    return list(found)


def reads(folder: Path, source: Path) -> bool:
    """Whether a finished folder was made from what the finished folder `source` holds now."""
    made = runs.read_stage(folder)
    return made is not None and identity(source) in made["inputs"].values()


def config_of(folder: Path, config: Config) -> Config:
    """The settings that made a finished folder.

    Args:
        folder: a run folder.
        config: says where the runs lie and what their data set is called: a folder that was moved remembers its old place.

    Raises:
        UserError: the folder is not finished, or has settings that this version does not know.
    """
    made = runs.read_stage(folder)
    if made is None:
        raise UserError(f"{folder} is not there: make it first")
    parser = _parser()
    try:
        found = parser.instantiate(parser.parse_object(made["config"]))
    except ArgumentError as error:
        raise UserError(f"{folder} was made by another version of llmrec ({error}): make it again with --force") from error
    return replace(Config(**vars(found)), runs=config.runs, dataset=config.dataset)


@functools.cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, as_group=False)
    return parser
