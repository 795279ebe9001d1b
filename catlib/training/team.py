"""Several processes at one training run: each takes a share of a step's photos, and all step by the same gradient.

Only adapters are trained, a hundredth of the model, so their gradients are added up in one message a step; nothing is sent while
the passes run. Launched with an FSDP configuration of accelerate, the language model's frozen matrices lie in pieces, one on each
process, and are put together layer by layer for the moment of their use (torch's fully_shard, arXiv 2304.11277).
"""

import logging
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, patch_environment
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from catlib.errors import InputError
from catlib.settings import TrainSettings
from catlib.vlm.models import VLM

log = logging.getLogger(__name__)
T = TypeVar("T")


class Team:
    """The processes of a run; one alone is a team as well. `main` writes files and talks to trackers."""

    def __init__(self, settings: TrainSettings) -> None:
        if "ACCELERATE_USE_DEEPSPEED" in os.environ:
            raise InputError(
                "catlib train was launched with a DeepSpeed configuration, which it does not support: configs/accelerate/fsdp.yaml keeps "
                "the frozen weights in pieces as ZeRO-3 does, configs/accelerate/ddp.yaml whole"
            )
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "") == "true"
        if self.sharded and settings.mode == "qlora":
            raise InputError(
                "FSDP cannot keep 4-bit weights in pieces; launch mode qlora with configs/accelerate/ddp.yaml"
            )
        with patch_environment(ACCELERATE_USE_FSDP="false"):  # sharding is done here, on frozen weights only
            self.accelerator = Accelerator(cpu=settings.device == "cpu", mixed_precision="no")
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.sharded = self.sharded and self.size > 1
        self.seed = settings.seed

    def turns(self, batches: Sequence[T]) -> list[tuple[T, float]]:
        """This process's share of the batches, with the weight of each.

        Where weights lie in pieces, all must make as many passes: who has fewer batches repeats the first with weight 0.
        """
        own = [(batch, 1.0) for batch in batches[self.rank :: self.size]]
        missing = -(-len(batches) // self.size) - len(own)
        return own + [(batches[0], 0.0)] * missing if self.sharded else own

    def cut(self, items: Sequence[T], most: int) -> list[Sequence[T]]:
        """Batches of at most `most` items, smaller ones where some process would have none."""
        size = max(1, min(most, -(-len(items) // self.size)))
        return [items[i : i + size] for i in range(0, len(items), size)]

    def sum(self, *values: float) -> list[float]:
        """Each value added up over the processes."""
        if self.size == 1:
            return list(values)
        return self.accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        ).tolist()

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add up the gradients over the processes, in one message; a process without a share adds nothing."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
        distributed.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))

    def from_main(self, value: T) -> T:
        """The main process's value, so that all decide alike."""
        return broadcast_object_list([value])[0] if self.size > 1 else value

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()

    def draw_apart(self, step: int) -> None:
        """Give each process but the main one its own random numbers for a step, the same when it is resumed."""
        if not self.main:
            torch.manual_seed((self.seed * 1_000_003 + step) * 1_009 + self.rank)

    def shard(self, vlm: VLM) -> None:
        """Keep one piece of each of the language model's frozen matrices here; layer by layer, so that only one is ever whole."""
        if not self.sharded:
            return
        mesh = init_device_mesh(vlm.base.device.type, (self.size,))
        language_model = vlm.base.get_submodule(vlm.family.language_model)
        layers = _layers(language_model)
        for layer in layers:
            whole = {p for p in layer.parameters() if p.requires_grad or p.dim() < 2}
            # Always back to pieces: left whole after a validation, they would be cut by the main process alone, when it saves.
            fully_shard(layer, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
        rest = set(language_model.parameters()) - {p for layer in layers for p in layer.parameters()}
        fully_shard(
            language_model, mesh=mesh, ignored_params=rest, reshard_after_forward=True
        )  # so that layers know their order
        log.info("the frozen matrices of %d layers lie in %d pieces", len(layers), self.size)


def _layers(language_model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers: the longest list of modules."""
    lists: list[Any] = [module for module in language_model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=len))
