"""The gradient of one optimizer step: passes over its samples in micro-batches, within the memory that there is."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from catlib.data.records import Sample
from catlib.errors import CatlibError
from catlib.training.lanes import lanes_for
from catlib.training.loss import AnswerLoss
from catlib.training.run import Run
from catlib.training.team import Team
from catlib.vlm.batches import Batch

log = logging.getLogger(__name__)
T = TypeVar("T")
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")  # CUDA's and the CPU allocator's words


class Passes:
    """Forward and backward passes of a run; `micro_batch` shrinks when the device's memory does not do for it."""

    def __init__(self, run: Run, team: Team, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.collate, self.vlm, self.team, self.parameters = run.collate, run.vlm, team, parameters
        self.batch_size = self.micro_batch = run.settings.batch_size
        self.effective_batch = (
            self.batch_size * run.settings.gradient_accumulation
        )  # whatever the number of processes: they share it
        self.loss = AnswerLoss(run.vlm)
        self.lanes = lanes_for(run.vlm, run.settings, team.sharded)
        # Three times the loss of guessing among all tokens: no longer bad luck but a broken run.
        self.most = 3 * math.log(run.vlm.base.config.get_text_config().vocab_size)

    def add_gradients(self, samples: Sequence[Sample], step: int) -> tuple[float, int]:
        """Put into `.grad` the gradient of the mean loss over all supervised tokens of a step, however it is cut up.

        Each process of the team takes its share. Returns (summed loss, tokens) of this one. Raises CatlibError for a loss that is
        no number or explodes, and when not even one sample fits.
        """
        return self.within_memory(lambda: self._add_gradients(samples, step))

    def prefetch(self, samples: Sequence[Sample]) -> None:
        """Have this process's share of a coming step's photos made ready."""
        for share, _ in self.team.turns(self.team.cut(samples, self.batch_size)) if samples else []:
            self.collate.prefetch(share)

    def autocast(self) -> Any:
        """bf16 arithmetic over a bf16 base with float32 adapters; plain float32 otherwise."""
        low = self.vlm.base.get_input_embeddings().weight.dtype is torch.bfloat16
        return torch.autocast(self.vlm.base.device.type, dtype=torch.bfloat16, enabled=low)

    def within_memory(self, work: Callable[[], T]) -> T:
        """`work()`, again with half the micro-batch whenever the device runs out of memory."""
        while True:
            try:
                return work()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                self._step_down(error)

    def _add_gradients(self, samples: Sequence[Sample], step: int) -> tuple[float, int]:
        self._forget()
        self.team.draw_apart(step)
        step_tokens = sum(len(self.collate.answer_ids(sample)) for sample in samples)
        summed, tokens = 0.0, 0
        for share, weight in self.team.turns(self.team.cut(samples, self.batch_size)):
            for i in range(0, len(share), self.micro_batch):
                for value, n in self._pass(share[i : i + self.micro_batch], weight / step_tokens, step):
                    summed, tokens = summed + weight * value, tokens + int(weight) * n
        return summed, tokens

    def _pass(self, samples: Sequence[Sample], scale: float, step: int) -> list[tuple[float, int]]:
        """(summed loss, tokens) of each lane's part of a micro-batch; adds `scale` times the losses' gradients to `.grad`."""
        batches = [self.collate(part).to(self.vlm.base.device) for part in self.lanes.cut(samples)]
        if len(batches) == 1:
            loss, value, n = self._loss(batches[0], step)
            (loss * scale).backward()
            return [(value, n)]

        def work(batch: Batch) -> tuple[float, int, tuple[torch.Tensor | None, ...]]:
            loss, value, n = self._loss(batch, step)
            return value, n, torch.autograd.grad(loss * scale, self.parameters, allow_unused=True)

        results = self.lanes.run(work, batches)
        for *_, gradients in results:  # in order, whichever lane was first: a sum of floats depends on it
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return [(value, n) for value, n, _ in results]

    def _loss(self, batch: Batch, step: int) -> tuple[torch.Tensor, float, int]:
        """(summed loss, its value, supervised tokens)."""
        with self.autocast():
            loss, n = self.loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value) or value / n > self.most:
            raise CatlibError(
                f"step {step + 1}: loss {value / n:.3g} in the samples {', '.join(batch.sample_ids)}; training stopped. "
                "Lower lr, or look at these photos and answers"
            )
        return loss, value, n

    def _step_down(self, error: Exception) -> None:
        """Halve the micro-batch after running out of memory; the effective batch stays. Weights were not touched yet."""
        if self.micro_batch == 1 or self.team.sharded:
            raise CatlibError(
                f"out of memory at a micro-batch of {self.micro_batch}: set gradient_checkpointing, mode qlora, or a smaller "
                f"batch_size ({str(error).splitlines()[0]})"
            ) from error
        self.micro_batch = max(1, self.micro_batch // 2)
        self._forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(
            "out of memory: going on with micro-batches of %d, the effective batch stays %d",
            self.micro_batch,
            self.effective_batch,
        )

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _out_of_memory(error: Exception) -> bool:
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in words for sign in OUT_OF_MEMORY)
