"""Peak memory of this process: the GPU's where there is one, else the resident set."""

import resource
import sys

import torch


class Meter:
    """Peak memory in GB (10^9 bytes) since it was made, on a GPU; on the CPU since the process began."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def peak_gb(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kibibytes on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
