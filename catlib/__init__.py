"""catlib: fine-tune a vision-language model to name cat breeds, and measure whether that is worth it."""

import os

# Before torch is loaded: its OpenMP threads otherwise spin while they wait for each other, and as soon as another process shares
# the cores, small matrices take ten times as long. A value that the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
