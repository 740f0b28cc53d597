"""Run one stage, or a stage and everything it rests on; say what a run would do.

Each stage of a chain has a process of its own: its memory is given back, its peak is its own, and it starts under the
process settings that suit it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import yaml

from llmrec import distributed, machine, process, resources, runs
from llmrec.config import Config
from llmrec.errors import StageFailed, UserError
from llmrec.runs import Run, say
from llmrec.stages import STAGES, forecast, inputs, run_folder, upstream


def one(stage: str, config: Config, *, force: bool = False) -> dict[str, Any]:
    """Run a stage unless it is up to date; of several processes each calls this.

    Returns:
        What the command prints as its last line.

    Raises:
        UserError: a mistake the user can mend.
    """
    from llmrec.cli import stage_function

    if distributed.world_size() > 1 and not STAGES[stage].shards(config):
        raise UserError(f"{stage} works in one process: run it without accelerate launch")
    distributed.join()
    with distributed.main_first():
        run = runs.plan(stage, config, inputs.fingerprints(stage, config))
    if run.up_to_date and not force:
        say(f"{run.folder}: up to date")
        return outcome(run, "up to date")
    if not force:
        runs.refuse_overwrite(run)
    if distributed.is_main():
        say(f"{stage}: {forecast.of(stage, config) or forecast.UNKNOWN} -> {run.folder}")
    if STAGES[stage].uses_base:
        with distributed.main_first():
            inputs.base_folder(config)  # dequantised by one of them
    # transformers renames its own settings; nothing a user of ours could do about it
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # peft looks on the hub for a grown vocabulary whenever the Trainer saves a checkpoint; ours never grows
    warnings.filterwarnings("ignore", message="Could not find a config file", category=UserWarning)
    with runs.working(run):
        stage_function(stage)(run)
    say(f"{run.folder}: made in {run.seconds:.0f} s, peak memory {machine.peak_memory_mb()} MB")
    return outcome(run, "made")


def launcher(accelerate: str | None, processes: int | None) -> list[str]:
    """What comes between `python` and `-m llmrec` where several processes share a stage; nothing where one does it.

    Args:
        accelerate: a file of recipes/accelerate by name, or a path.
        processes: how many, in place of what the file says.

    Raises:
        UserError: there is no such file, a number without a file, or a file for several machines.
    """
    if accelerate is None:
        if processes is not None:
            raise UserError("--processes needs --accelerate, e.g. --accelerate ddp (make: ACCELERATE=ddp)")
        return []
    path = resources.find("recipes/accelerate", accelerate)
    if (resources.read_yaml(path).get("num_machines") or 1) > 1:
        raise UserError(f"{path} is for several machines, which start one stage each by hand: the commands are in its header")
    count = [] if processes is None else ["--num_processes", str(processes)]
    return ["-m", "accelerate.commands.launch", "--config_file", str(path), *count]


def chain(stage: str, config: Config, *, force: bool = False, launcher: Sequence[str] = ()) -> dict[str, Any]:
    """Run the stages that `stage` rests on and then it, each in a process of its own; skip what is up to date.

    Args:
        stage: the last stage.
        config: all settings.
        force: make `stage` again, and the stages before it whose folders were made differently.
        launcher: of `launcher`, for the stages that several processes can share.

    Raises:
        UserError: a mistake the user can mend.
    """
    if distributed.launched():
        raise UserError("--chain starts processes of its own: leave accelerate launch away and give --accelerate and --processes")
    steps = [*upstream(stage, config), (stage, config)]
    made = []
    for name, its_config in steps:
        run = runs.plan(name, its_config, inputs.fingerprints(name, its_config))
        last = name == stage
        if run.up_to_date and not (force and last):
            continue
        if not force:
            runs.refuse_overwrite(run)
        _run_in_process(name, its_config, force=force, launcher=launcher if STAGES[name].shards(its_config) else ())
        made.append(str(run.folder))
    run = runs.plan(stage, config, inputs.fingerprints(stage, config))
    summary = run.folder / "summary.txt"
    if not made:
        say(f"nothing to do: {', '.join(name for name, _ in steps)} are up to date")
        if summary.exists():
            print(summary.read_text())
    return outcome(run, "made" if made else "up to date")


def dry_run(stage: str, config: Config, *, force: bool = False, chained: bool = False) -> dict[str, Any]:
    """Say what the command would do, without doing it."""
    steps = []
    stale = False
    for name, its_config in [*(upstream(stage, config) if chained else []), (stage, config)]:
        folder = run_folder(name, its_config)
        missing = inputs.missing(name, its_config)
        state = "would be made"
        if not stale and not missing:
            run = runs.plan(name, its_config, inputs.fingerprints(name, its_config))
            if run.made_from and not force:
                state = f"was made with {run.made_from}: give it another name, or --force"
            elif run.up_to_date and not (force and name == stage):
                state = "up to date"
        estimate = forecast.of(name, its_config)
        cost = f" ({estimate or forecast.UNKNOWN})" if state == "would be made" else ""
        say(f"{name:<9}{folder}: {state}{cost}{f'; fetches {missing}' if missing else ''}")
        stale = stale or state != "up to date"
        steps.append(
            {"stage": name, "folder": str(folder), "state": state} | (asdict(estimate) if estimate and state == "would be made" else {})
        )
    return {"command": stage, "status": "dry run", "steps": steps}


def outcome(run: Run, status: str) -> dict[str, Any]:
    """The JSON line of a stage command."""
    made = runs.read_stage(run.folder) or {}
    report = run.folder / "report.html"
    found = {"command": run.stage.name, "status": status, "folder": str(run.folder), "fingerprint": run.fingerprint}
    return (
        found
        | {"seconds": made.get("seconds"), "headline": made.get("headline", {})}
        | ({"report": str(report)} if report.exists() else {})
    )


def _run_in_process(stage: str, config: Config, *, force: bool, launcher: Sequence[str]) -> None:
    """Run a stage as the command a user would type, with all settings in one file."""
    values = asdict(config)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump({key: values[key] for key in STAGES[stage].options}, file)
        file.flush()
        command = [sys.executable, *launcher, "-m", "llmrec", stage, "--config", file.name, *(["--force"] if force else [])]
        # no module of the current folder shadows a library
        environment = {**process.SETTINGS, **os.environ, "PYTHONSAFEPATH": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=process.die_with_parent, check=False)
    *text, line = done.stdout.splitlines() or [""]
    if text:
        print("\n".join(text), flush=True)
    if done.returncode < 0:
        cause = signal.Signals(-done.returncode).name
        hint = " (out of memory? Try smaller batches)" if cause == "SIGKILL" else ""
        raise UserError(f"{stage} was ended by {cause}{hint}; the same command goes on from its last checkpoint")
    if done.returncode:
        raise StageFailed(done.returncode)
    json.loads(line)
