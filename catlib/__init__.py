"""catlib: fine-tune a vision-language model to name cat breeds, and measure whether that is worth it."""

import logging
import os
import warnings

# Before torch is loaded: its OpenMP threads otherwise spin while they wait for each other, and as soon as another process shares
# the cores, small matrices take ten times as long. A value that the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What no user can act on, in the terminal and in notebooks: an optional 4-bit kernel, and a name by which peft asks transformers.
logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated", category=FutureWarning)

__version__ = "0.1.0"
