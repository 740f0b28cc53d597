"""State-space layers in plain torch; knows nothing of recommendation."""

from llmrec.ssm.accelerate import accelerate
from llmrec.ssm.hydra import Hydra
from llmrec.ssm.latent import LatentMamba
from llmrec.ssm.mamba2 import Mamba2
from llmrec.ssm.ssd import ssd
from llmrec.ssm.state import State

__all__ = ["Hydra", "LatentMamba", "Mamba2", "State", "accelerate", "ssd"]
