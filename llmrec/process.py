"""Start Python under the settings that training and scoring on a CPU need; they are read only when a process starts.

- glibc gives large freed blocks back to the kernel, which faults them in again at every training step. Keeping them
  saves a third of the time and more on small models.
- OpenMP's threads spin while they wait for each other. With anything else on the machine, the spinning one keeps the
  other from its core: beside one busy process an epoch of SASRec on ml-100k took 10 s with sleeping threads and more
  than 100 s with spinning ones (2 cores, 2026-11-21).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "OMP_WAIT_POLICY": "PASSIVE",
}


def restart() -> None:
    """Start this `llmrec` command again under `SETTINGS`, unless it has any of them already or the system is not Linux."""
    if sys.platform == "linux" and SETTINGS.keys().isdisjoint(os.environ):
        os.environ.update(SETTINGS)
        # -P: no module of the current folder shadows a library
        os.execv(sys.executable, [sys.executable, "-P", "-m", "llmrec", *sys.argv[1:]])


def die_with_parent() -> None:
    """For a child, before or as it starts: be killed when the parent is, so that no orphan works on unseen (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
