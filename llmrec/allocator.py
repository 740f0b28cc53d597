"""Start Python under glibc settings that keep freed memory in the process.

glibc's default gives large freed blocks back to the kernel, which faults them in again at every training step: on CPU
that costs a third of the time and more. The variables are read only when a process starts, hence the restart.
"""

from __future__ import annotations

import os
import sys

SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_TOP_PAD_": str(64 << 20)}


def restart() -> None:
    """Start this `llmrec` command again under `SETTINGS`, unless it has any of them already or the system is not Linux."""
    if sys.platform == "linux" and SETTINGS.keys().isdisjoint(os.environ):
        os.environ.update(SETTINGS)
        os.execv(sys.executable, [sys.executable, "-m", "llmrec", *sys.argv[1:]])
