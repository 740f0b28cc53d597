"""State-space layers in plain torch; knows nothing of recommendation."""

from llmrec.ssm.mamba2 import Mamba2, ssd

__all__ = ["Mamba2", "ssd"]
