"""Language models that order candidates: load, tune, score."""

import logging

# peft imports bitsandbytes where it is installed, which then says that it would like a CPU kernel of the hub
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
