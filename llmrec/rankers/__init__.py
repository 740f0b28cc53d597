"""Language models that order candidates: load, tune, score."""

import logging

# peft imports bitsandbytes where it is installed, which then says that it would like a CPU kernel of the hub
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# transformers says which kernels of Mamba are missing, though on a CPU ours run in their place; of a GPU's `llmrec doctor` tells
logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
