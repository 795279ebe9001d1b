"""The language model's frozen matrices in pieces over several processes, by torch's FSDP or DeepSpeed's ZeRO-3."""

import logging
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from catlib.vlm.models import VLM

log = logging.getLogger(__name__)
Sharding = Literal["", "fsdp", "zero3"]


def cut_layers(vlm: VLM, sharding: Sharding, processes: int) -> None:
    """Keep one piece of each of the language model's frozen matrices in this process, put together layer by layer for its use.

    What is trained stays whole on every process: checkpoints, validation and hand-written gradients are those of one process.
    Under `zero3` DeepSpeed cuts when it prepares the model (see `keep_whole`).
    """
    if sharding == "fsdp" and processes == 1:
        return
    language_model = vlm.base.get_submodule(vlm.family.language_model)
    lists = [list(module) for module in language_model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = max(lists, key=len)  # the decoder's: the longest list of modules
    for module in language_model.modules():
        if (state := getattr(module._parameters.get("weight"), "quant_state", None)) is not None:
            # Plain packed bytes, which can be cut; torch would keep the first piece's shape and statistics for the whole.
            module.quant_state, module.weight = state, torch.nn.Parameter(module.weight.data, requires_grad=False)
            setattr(module.weight, "quant_state", state)  # noqa: B010 (else bitsandbytes' layer makes a Params4bit of it again)
    if sharding == "zero3":
        from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

        for layer in layers:  # all of its matrices come and go together: a fused layer reads those of its siblings
            set_z3_leaf_module(layer, True)
    else:
        _fully_shard(language_model, layers, processes)
    log.info("the frozen matrices of %d layers lie in %d pieces", len(layers), processes)


def _fully_shard(language_model: torch.nn.Module, layers: list[torch.nn.Module], processes: int) -> None:
    """torch's fully_shard (arXiv 2304.11277) on what is not trained; adapters are synchronized by DDP. So optimizer states and
    checkpoints are those of one process, which accelerate's own FSDP would shard as well.
    """
    mesh = init_device_mesh(next(language_model.parameters()).device.type, (processes,))
    for layer in layers:
        whole = {p for p in layer.parameters() if p.requires_grad or p.dim() < 2}
        # Always back to pieces: left whole after a validation, they would be cut by the main process alone, when it saves.
        fully_shard(layer, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    rest = set(language_model.parameters()) - {p for layer in layers for p in layer.parameters()}
    fully_shard(
        language_model, mesh=mesh, ignored_params=rest, reshard_after_forward=True
    )  # so that layers know their order


def keep_whole(engine: Any) -> None:
    """Put together, for good, what ZeRO-3 (arXiv 1910.02054) has cut beside the layers' frozen matrices: what is trained, whose
    gradients and optimizer states remain in pieces, embeddings, output layer, tower and projector.
    """
    from deepspeed.utils import get_z3_leaf_modules

    layers = get_z3_leaf_modules(engine.module)
    cut = {p for layer in layers for p in layer.parameters() if not p.requires_grad and len(p.ds_shape) > 1}
    whole = [p for p in engine.module.parameters() if p not in cut]
    for parameter in engine.module.parameters():  # after a step, and after each use
        parameter.ds_persist = parameter.is_external_param = parameter not in cut
    engine.optimizer.persistent_parameters[:] = whole
    whole[0].all_gather(whole)
