"""Run folders: complete or absent, with a fingerprint of what made them.

A stage works in `.<name>.partial` beside its folder and renames it when everything is written, so a kill at any
moment leaves the old folder, the new one, or none. Checkpoints live inside the partial folder, which is taken up
again when the fingerprint is the same. The fingerprint covers the settings that decide the result, the fingerprints
of what the stage reads (weights' hash included) and the stage's schema; the git revision is only recorded.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from llmrec import __version__
from llmrec.config import Config
from llmrec.errors import UserError
from llmrec.stages import STAGES, Stage, run_folder

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "polars", "numpy", "rectools-lightfm")


def say(message: str) -> None:
    """Tell the person at the terminal (stderr: stdout is for tables and the JSON line)."""
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
    """Fingerprint of everything a stage reads.

    Raises:
        UserError: when an upstream folder is missing; it says which command makes it.
    """
    found = {}
    for name, its_config in stage.needs(config):
        folder = run_folder(name, its_config)
        made = read_stage(folder)
        if made is None:
            values = {"dataset": its_config.dataset, "retriever": its_config.retriever, "ranker": its_config.ranker}
            options = " ".join(f"--{key} {value}" for key, value in values.items() if key in STAGES[name].options)
            raise UserError(f"{folder} is not there: run `llmrec {name} {options}` first, or add --chain to make what is missing")
        found[str(folder)] = made["fingerprint"]
    return found


def _differences(made: dict[str, Any], settings: dict[str, Any], inputs: dict[str, str]) -> str:
    old, old_inputs = made["settings"], made["inputs"]
    changed = [f"{key}={old.get(key)} (now {settings.get(key)})" for key in sorted({*old, *settings}) if old.get(key) != settings.get(key)]
    changed += [f"another {key}" for key in sorted({*old_inputs, *inputs}) if old_inputs.get(key) != inputs.get(key)]
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
        name = "--retriever NAME.variant" if run.stage.name == "retrieve" else "--variant NAME (make: VARIANT=NAME)"
        raise UserError(f"{run.folder} was made with {run.made_from}. Keep it and name this one: {name}; or make it again: --force")


@contextmanager
def working(run: Run) -> Iterator[Run]:
    """Make the partial folder, take it up again if it was begun from the same, and rename it when the block ends well.

    Raises:
        UserError: when the folder cannot be written.
    """
    begun = time.time()
    try:
        _begin(run)
        yield run
        run.seconds = time.time() - begun
        _finish(run)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write {run.folder}: {error.strerror}: {error.filename}. Choose another folder with --runs") from error
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise UserError(
                f"no space left on the disk of {run.folder}: free some and run the command again, it goes on where it was"
            ) from error
        raise


def _begin(run: Run) -> None:
    begun = run.work / "fingerprint"
    if run.work.exists() and not (begun.is_file() and begun.read_text() == run.fingerprint):
        shutil.rmtree(run.work)
    run.work.mkdir(parents=True, exist_ok=True)
    begun.write_text(run.fingerprint)


def _finish(run: Run) -> None:
    stage = {
        "stage": run.stage.name,
        "status": "complete",
        "fingerprint": run.fingerprint,
        "settings": run.settings,
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
    old = run.folder.with_name(f".{run.folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if run.folder.exists():
        os.replace(run.folder, old)
    os.replace(run.work, run.folder)
    # Only now: a kill before the rename still finds its checkpoints.
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    (run.folder / "fingerprint").unlink()
    shutil.rmtree(old, ignore_errors=True)


def peak_memory_mb() -> int:
    """Largest resident size of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024))


def versions() -> dict[str, str]:
    """Versions of llmrec and the packages that decide results."""
    found = {"llmrec": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """The checkout's commit, with `+` when it has changes; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def cpu_name() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
