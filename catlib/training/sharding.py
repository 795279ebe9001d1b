"""The frozen matrices in pieces, one on each process, put together layer by layer for the moment of their use.

torch's fully_shard (arXiv 2304.11277) on what is not trained; adapters stay whole on every process and are synchronized by DDP. So
optimizer states and checkpoints are the same as on one process, which accelerate's own FSDP would shard as well.
"""

import logging

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from catlib.vlm.models import VLM

log = logging.getLogger(__name__)


def shard(vlm: VLM, processes: int) -> None:
    """Keep one piece of each of the language model's frozen matrices in this process."""
    mesh = init_device_mesh(vlm.base.device.type, (processes,))
    language_model = vlm.base.get_submodule(vlm.family.language_model)
    lists = [list(module) for module in language_model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = max(lists, key=len)  # the decoder's: the longest list of modules
    for layer in layers:
        whole = {p for p in layer.parameters() if p.requires_grad or p.dim() < 2}
        # Always back to pieces: left whole after a validation, they would be cut by the main process alone, when it saves.
        fully_shard(layer, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    rest = set(language_model.parameters()) - {p for layer in layers for p in layer.parameters()}
    fully_shard(
        language_model, mesh=mesh, ignored_params=rest, reshard_after_forward=True
    )  # so that layers know their order
    log.info("the frozen matrices of %d layers lie in %d pieces", len(layers), processes)
