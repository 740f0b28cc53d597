"""State-space layers in plain torch; knows nothing of recommendation."""

from llmrec.ssm.mamba2 import Mamba2
from llmrec.ssm.ssd import ssd
from llmrec.ssm.state import State

__all__ = ["Mamba2", "State", "ssd"]
