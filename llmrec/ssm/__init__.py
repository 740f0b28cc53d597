"""State-space layers without anything to compile, and on kernels where there are any; knows nothing of recommendation.

Every layer maps (batch, length, d_model) to the same. The causal ones, `LRU`, `Mamba`, `Mamba2` and `LatentMamba`, also
carry a state from call to call and take single steps.
"""

from llmrec.ssm.accelerate import Accelerated, accelerate
from llmrec.ssm.hydra import Hydra
from llmrec.ssm.latent import LatentMamba
from llmrec.ssm.lru import LRU, LRUState
from llmrec.ssm.mamba import Mamba
from llmrec.ssm.mamba2 import Mamba2
from llmrec.ssm.scan import selective_scan
from llmrec.ssm.ssd import ssd
from llmrec.ssm.state import State

__all__ = ["LRU", "Accelerated", "Hydra", "LRUState", "LatentMamba", "Mamba", "Mamba2", "State", "accelerate", "selective_scan", "ssd"]
