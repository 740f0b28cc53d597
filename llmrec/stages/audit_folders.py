"""Finished run folders read back: with what settings a run was made, and the runs it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmrec.config import Config
from llmrec.data.sequences import Sequences
from llmrec.stages import finished


@dataclass(frozen=True)
class Made:
    """A finished run folder.

    Attributes:
        folder: where it is.
        stage: what made it.
        config: with what settings.
        inputs: the run folders it read.
    """

    folder: Path
    stage: str
    config: Config
    inputs: list[Path]

    @property
    def name(self) -> str:
        """`retrieve/2mamba4rec`, `prepare`."""
        return self.stage if self.stage == "prepare" else f"{self.stage}/{self.folder.name}"


@dataclass(frozen=True)
class Evidence:
    """What the checks of one audit share.

    Attributes:
        chain: the audited run and all it rests on, by folder, what is read before what reads it.
        sequences: the events of its data set.
        prepared: the folder they are in.
    """

    chain: dict[Path, Made]
    sequences: Sequences
    prepared: Path

    def input_of(self, made: Made, stage: str) -> Made:
        """The run of `stage` that `made` read."""
        return next(below for below in (self.chain[path] for path in made.inputs) if below.stage == stage)


def chain_of(folder: Path) -> dict[Path, Made]:
    """The run in `folder` and the runs it rests on, what is read before what reads it.

    Raises:
        UserError: a folder is missing, or is not what was read.
    """
    chain: dict[Path, Made] = {}
    _add(folder, chain)
    return chain


def _add(folder: Path, chain: dict[Path, Made]) -> None:
    inputs = finished.inputs_of(folder)
    for path in inputs:
        if path not in chain:
            _add(path, chain)
    dataset = finished.dataset_of(folder)
    config = finished.config_of(folder, Config(dataset=dataset.name, runs=str(dataset.parent)))
    chain[folder] = Made(folder, finished.stage_of(folder), config, inputs)
