"""`llmrec runs` and `llmrec doctor`: what exists, and what this machine offers."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from llmrec import machine, runs

OPTIONAL = {
    "bitsandbytes": "4-bit base models: pip install 'llmrec[quant]'",
    "mamba_ssm": "Mamba kernels on a GPU: pip install 'llmrec[cuda]'",
    "causal_conv1d": "Mamba kernels on a GPU: pip install 'llmrec[cuda]'",
    "fla": "flash-linear-attention kernels on a GPU: pip install 'llmrec[cuda]'",
    "liger_kernel": "fused Llama kernels on a GPU: pip install 'llmrec[cuda]'",
    "trackio": "experiment tracking: pip install 'llmrec[track]'",
}


def list_runs(root: str) -> list[dict[str, Any]]:
    """Print the finished runs below `root` as a table, and return them for the JSON line."""
    from rich.console import Console
    from rich.table import Table

    found = []
    for path in sorted(Path(root).glob("*/*/**/stage.json")):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        made = runs.read_stage(path.parent)
        if made:
            keys = ("headline", "seconds", "peak_memory_mb", "made")
            found.append({"folder": str(path.parent)} | {key: made[key] for key in keys})
    if found:
        table = Table("run", "headline", "seconds", "peak MB", "made", box=None)
        for run in sorted(found, key=lambda run: run["made"]):
            headline = ", ".join(
                f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value:,}" for name, value in run["headline"].items()
            )
            table.add_row(run["folder"], headline, f"{run['seconds']:.0f}", str(run["peak_memory_mb"]), run["made"])
        Console(width=None if os.isatty(1) else 160).print(table)
    else:
        print(f"no finished runs in {root}: begin with `llmrec prepare`")
    return found


def doctor() -> dict[str, Any]:
    """Print what this machine offers and what is missing, and return it for the JSON line."""
    import torch

    from llmrec import assets
    from llmrec.rankers.backbone import best_dtype
    from llmrec.ssm import kernels

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cache = assets.cache_folder()
    present = sorted(f"{path.parent.name}/{path.name}" for path in cache.glob("*/*") if path.is_dir())
    missing = {name: remedy for name, remedy in OPTIONAL.items() if importlib.util.find_spec(name) is None}
    facts: dict[str, Any] = {
        "versions": machine.versions(),
        "cpu": machine.cpu_name(),
        "cores": os.cpu_count(),
        "memory_mb": memory,
        "gpus": gpus,
        "dtype": str(best_dtype()).removeprefix("torch."),
        "cache": {"folder": str(cache), "has": present},
        "data": os.environ.get("LLMREC_DATA"),
        "compiler": shutil.which("gcc") or shutil.which("cc"),
        "kernels": kernels.usable(),
        "missing": missing,
    }
    print("  ".join(f"{name} {version}" for name, version in machine.versions().items()))
    print(f"{facts['cpu']}, {facts['cores']} cores, {memory:,} MB memory, language models compute in {facts['dtype']}")
    print(f"GPUs: {', '.join(gpus) or 'none (everything runs on the CPU)'}")
    print(f"state-space kernels: {', '.join(f'{name} {found}' for name, found in facts['kernels'].items())}")
    print(f"cache: {cache} has {', '.join(present) or 'nothing yet'}; LLMREC_DATA: {facts['data'] or 'not set'}")
    for name, remedy in missing.items():
        print(f"not installed: {name:<15}{remedy}")
    return facts
