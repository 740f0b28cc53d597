"""Run folders: complete or absent, with a fingerprint of what made them.

A stage works in `.<name>.partial` beside its folder and renames it when everything is written, so a kill at any
moment leaves the old folder, the new one, or none. Checkpoints live inside the partial folder, which is taken up
again when the fingerprint is the same. The fingerprint covers the settings that decide the result, the fingerprints
of what the stage reads (weights' hash included) and the stage's schema; the git revision is only recorded.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmrec import distributed
from llmrec.config import Config
from llmrec.errors import UserError
from llmrec.machine import cpu_name, git_revision, peak_memory_mb, versions
from llmrec.stages import BEFORE, STAGES, Stage, run_folder


def say(message: str) -> None:
    """Tell the person at the terminal (stderr: stdout is for tables and the JSON line)."""
    if distributed.is_main():
        print(message, file=sys.stderr, flush=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def read_stage(folder: Path) -> dict[str, Any] | None:
    """A finished folder's stage.json, or None."""
    path = folder / "stage.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete the folder {folder} and make it again") from error


def read_metrics(folder: Path) -> dict[str, Any]:
    """A finished folder's metrics.json.

    Raises:
        UserError: it is not there, or damaged.
    """
    path = folder / "metrics.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): make the run again with --force") from error


def identity(made: dict[str, Any]) -> str:
    """What a finished folder was made from and what came out, from its stage.json: what its readers record."""
    return f"{made['fingerprint']}:{made['content']}"


def fingerprint_of(folder: Path) -> str:
    """The fingerprint of a finished folder."""
    made = read_stage(folder)
    if made is None:
        raise UserError(f"{folder} is not there: make it first")
    return made["fingerprint"]


@dataclass
class Run:
    """One stage's run: where it writes, and whether there is anything to do.

    Attributes:
        folder: the finished folder.
        work: the partial folder to write into.
        inputs: folder of each stage it reads, and its fingerprint.
        fingerprint: sha256 of settings, inputs and schema.
        made_from: what the finished folder was made from that differs now; "" when it is up to date, None when there is none.
        headline: numbers worth a line in `llmrec runs`.
        origin: where outside inputs came from, for the record.
        seconds: how long the work took, known when it is finished.
    """

    stage: Stage
    config: Config
    folder: Path
    work: Path
    settings: dict[str, Any]
    inputs: dict[str, str]
    fingerprint: str
    made_from: str | None
    headline: dict[str, float] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def up_to_date(self) -> bool:
        """The folder is there and was made from the same."""
        return self.made_from == ""

    def input(self, stage: str, config: Config | None = None) -> Path:
        """Folder of an upstream stage."""
        return run_folder(stage, config or self.config)

    @property
    def checkpoints(self) -> Path:
        """Folder for checkpoints; it goes when the stage is finished."""
        path = self.work / "checkpoints"
        path.mkdir(parents=True, exist_ok=True)
        return path


def input_fingerprints(stage: Stage, config: Config) -> dict[str, str]:
    """Fingerprint of everything a stage reads: what each folder was made from, and what came out.

    Raises:
        UserError: when an upstream folder is missing or was made with other settings than these; it says what to do.
    """
    found = {}
    for name, its_config in stage.needs(config):
        folder = run_folder(name, its_config)
        made = read_stage(folder)
        if made is None:
            values = {"dataset": its_config.dataset, "retriever": its_config.retriever, "ranker": its_config.ranker}
            options = " ".join(f"--{key} {value}" for key, value in values.items() if key in STAGES[name].options)
            raise UserError(f"{folder} is not there: run `llmrec {name} {options}` first, or add --chain to make what is missing")
        changed = _changed(made["settings"], STAGES[name].decides(its_config))
        if changed:
            raise UserError(f"{folder} was made with {', '.join(changed)}: give the same settings here, or make it again with --force")
        found[str(folder)] = identity(made)
    return found


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    old, new = BEFORE | old, BEFORE | new  # what a fingerprint leaves out has a value, too
    return [f"{key}={old.get(key)} (now {new.get(key)})" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _differences(made: dict[str, Any], settings: dict[str, Any], inputs: dict[str, str]) -> str:
    old = made["inputs"]
    changed = _changed(made["settings"], settings)
    changed += [f"another {key}" for key in sorted({*old, *inputs}) if old.get(key) != inputs.get(key)]
    return ", ".join(changed) or "another version of this stage"


def plan(stage_name: str, config: Config, sources: dict[str, str]) -> Run:
    """Say where a stage's run goes and whether it is up to date; changes nothing.

    Args:
        stage_name: a key of `STAGES`.
        config: all settings.
        sources: fingerprints of what comes from outside (raw files, base weights).

    Raises:
        UserError: when an input is missing.
    """
    stage = STAGES[stage_name]
    folder = run_folder(stage_name, config)
    settings = stage.decides(config)
    inputs = input_fingerprints(stage, config) | sources
    semantic = json.dumps([stage.name, stage.schema, settings, sorted(inputs.values())], sort_keys=True)
    fingerprint = hashlib.sha256(semantic.encode()).hexdigest()
    made = read_stage(folder)
    made_from = None
    if made is not None:
        made_from = "" if made["fingerprint"] == fingerprint else _differences(made, settings, inputs)
    return Run(stage, config, folder, folder.with_name(f".{folder.name}.partial"), settings, inputs, fingerprint, made_from)


def refuse_overwrite(run: Run) -> None:
    """Stop when the finished folder was made differently.

    Raises:
        UserError: it names what differs, and how to keep both or to make it again.
    """
    if run.made_from:
        names = {"prepare": "a copy of the dataset recipe under another name", "retrieve": "--retriever NAME.variant"}
        name = names.get(run.stage.name, "--variant NAME (make: VARIANT=NAME)")
        raise UserError(
            f"{run.folder} was made with {run.made_from}. Keep it and name this one: {name}; or keep it with another --runs folder; "
            "or make it again: --force"
        )


@contextmanager
def working(run: Run) -> Iterator[Run]:
    """Make the partial folder, take it up again if it was begun from the same, and rename it when the block ends well.

    Of several processes rank 0 does this; the others enter the block when the folder is there and leave when it is finished.

    Raises:
        UserError: the folder cannot be written, the disk is full, or another process is at work in it.
    """
    if not distributed.is_main():
        distributed.barrier()
        yield run
        distributed.barrier()
        return
    begun = time.time()
    lock = None
    try:
        lock = _begin(run)
        distributed.barrier()
        yield run
        run.seconds = time.time() - begun
        _finish(run)
        distributed.barrier()
    except OSError as error:
        if lock is not None:
            _tidy(run)
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"no space left on the disk of {run.folder}: free some and run the command again, it goes on where it was"
            ) from error
        if lock is None or str(error.filename or "").startswith(str(run.work)):
            raise UserError(f"cannot write {run.folder}: {error.strerror}: {error.filename}. Choose another folder with --runs") from error
        raise
    except UserError:
        if lock is not None:
            _tidy(run)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _begin(run: Run) -> int:
    """Lock the partial folder and empty it unless it was begun from the same; the lock goes with the process."""
    run.work.mkdir(parents=True, exist_ok=True)
    lock = os.open(run.work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(f"another process is at work in {run.work}: wait for it, or stop it") from error
    begun = run.work / "fingerprint"
    if not (begun.is_file() and begun.read_text() == run.fingerprint):
        for path in run.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        begun.write_text(run.fingerprint)
    shutil.rmtree(_replaced(run), ignore_errors=True)
    return lock


def _tidy(run: Run) -> None:
    """After a mistake nothing half-written stays, but checkpoints do."""
    checkpoints = run.work / "checkpoints"
    if run.work.is_dir() and not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        shutil.rmtree(run.work, ignore_errors=True)


def _replaced(run: Run) -> Path:
    return run.folder.with_name(f".{run.folder.name}.old")


def _content(folder: Path) -> str:
    """Checksum of what a stage made: its tables and weights."""
    total = hashlib.sha256()
    for path in sorted([*folder.glob("*.parquet"), *folder.glob("*.safetensors")]):
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _finish(run: Run) -> None:
    stage = {
        "stage": run.stage.name,
        "status": "complete",
        "fingerprint": run.fingerprint,
        "content": _content(run.work),
        "settings": run.settings,
        "config": asdict(run.config),
        "inputs": run.inputs,
        "origin": run.origin,
        "headline": run.headline,
        "seed": run.config.seed,
        "seconds": round(run.seconds, 1),
        "peak_memory_mb": peak_memory_mb(),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": git_revision(),
        "versions": versions(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
    }
    write_json(run.work / "stage.json", stage)
    old = _replaced(run)
    if run.folder.exists():
        os.replace(run.folder, old)
    os.replace(run.work, run.folder)
    # Only now: a kill before the rename still finds its checkpoints.
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    (run.folder / "fingerprint").unlink()
    shutil.rmtree(old, ignore_errors=True)
