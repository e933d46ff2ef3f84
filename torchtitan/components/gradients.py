"""The norm of the gradients of all ranks, clipping by it, and what happens when it is not finite."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from torchtitan.components.optimizer import AnyOptimizer, OptimizerInBackward
from torchtitan.distributed.utils import gather_objects
from torchtitan.models.llama3.parallel_model import ParallelModel
from torchtitan.tools.errors import UserError
from torchtitan.tools.torch_private import norms


@dataclass
class GradNorm:
    """Norms of the gradients of a step, before clipping.

    Attributes:
        total: over all parameters of all ranks, a scalar on this rank's device.
        of_each: of each parameter of this rank's part of the model, [N].
        names: of these N parameters.
    """

    total: torch.Tensor
    of_each: torch.Tensor
    names: list[str]


@torch.no_grad()
def clip_grad_norm(model: ParallelModel, max_norm: float) -> GradNorm:
    """Finish the gradients of a step, and scale them so that their norm over all ranks is at most ``max_norm``."""
    if model.pipeline is not None:
        model.pipeline.sum_tied_gradients()
    # The head of a pipeline's last stage, if tied, is the first stage's embedding over again.
    gradients = {
        name: parameter.grad
        for part in model.parts
        for name, parameter in part.named_parameters()
        if parameter.grad is not None and not part.is_copy(name)
    }
    norm = total_norm(model, dict(zip(gradients, norms(list(gradients.values())), strict=True)))
    torch.nn.utils.clip_grads_with_norm_([p for _, p in model.weights()], max_norm, norm.total, foreach=True)
    return norm


@torch.no_grad()
def total_norm(model: ParallelModel, own: dict[str, torch.Tensor]) -> GradNorm:
    """The norm of the gradients of all ranks from the norms of each one of this rank, by name."""
    of_each = torch.stack(list(own.values()))
    if isinstance(of_each, DTensor):
        of_each = of_each.full_tensor()
    total = torch.linalg.vector_norm(of_each)
    if model.pipeline is not None:
        squared = total**2
        dist.all_reduce(squared, group=model.pipeline.group)
        total = squared.sqrt()
    return GradNorm(total, of_each, list(own))


@dataclass
class _Step:
    """What is kept of a step until it is known whether its numbers were finite."""

    number: int
    loss: torch.Tensor
    norm: GradNorm
    recordings: list[list[list[str]]]
    flag: torch.Tensor  # on the CPU
    copied: torch.cuda.Event | None


class FiniteGuard:
    """Keeps gradients that are not finite away from the weights, and stops the run.

    On CUDA with a fused optimizer nothing waits for the GPU. Once a norm is not finite, the optimizer's kernel skips
    this update and all later ones (as torch.amp.GradScaler does). The CPU looks at each step's flag two steps later.
    Otherwise the CPU looks before the update. All ranks know the norm, so all stop at the same step.
    An optimizer that updates in the backward pass spoils the weights before that; what is saved stays good.

    Args:
        skip_in_kernel: whether the optimizer can skip by itself; by default where it is fused and on CUDA.
        group: in which the ranks tell each other what they found.
    """

    def __init__(
        self,
        optimizer: AnyOptimizer,
        device: torch.device,
        group: Any = None,
        skip_in_kernel: bool | None = None,
    ):
        fused = bool(optimizer.param_groups[0].get("fused"))
        on_gpu = all(p.device.type == "cuda" for g in optimizer.param_groups for p in g["params"])
        self.spoils = isinstance(optimizer, OptimizerInBackward)
        self.skip_in_kernel = fused and on_gpu and not self.spoils if skip_in_kernel is None else skip_in_kernel
        self.group, self.steps = group, deque[_Step]()
        self.bad = torch.zeros((), device=device)
        if self.skip_in_kernel:
            kernel: Any = optimizer
            kernel.grad_scale, kernel.found_inf = None, self.bad

    def check(self, step: int, loss: torch.Tensor, norm: GradNorm, recordings: list[list[list[str]]]) -> None:
        """Called between the gradients and the update of a step, by all ranks.

        Args:
            loss: this rank's part of it, on the device.
            recordings: names by microbatch and row.

        Raises:
            UserError: a norm was not finite, in this step or one of the two before.
        """
        self.bad.logical_or_(~norm.total.isfinite())
        copied = None
        if self.bad.device.type == "cuda":
            flag = torch.zeros((), pin_memory=True)
            flag.copy_(self.bad, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        else:
            flag = self.bad.clone()
        self.steps.append(_Step(step, loss, norm, recordings, flag, copied))
        self.settle(2 if self.skip_in_kernel or self.spoils else 0)

    def settle(self, leave: int = 0) -> None:
        """Look at all steps that are still unchecked, but for the last ``leave`` of them.

        Raises:
            UserError: as :meth:`check`.
        """
        while len(self.steps) > leave:
            step = self.steps.popleft()
            if step.copied is not None:
                step.copied.synchronize()
            if step.flag.item():
                raise UserError(self._describe(step))

    def _describe(self, step: _Step) -> str:
        finite = step.norm.of_each.isfinite().tolist()
        parameters = [name for name, ok in zip(step.norm.names, finite, strict=True) if not ok]
        here = {"loss": bool(step.loss.isfinite()), "recordings": step.recordings, "parameters": parameters}
        ranks = gather_objects(here, self.group)
        rest = "" if self.spoils else " before it changes the weights"
        said = [f"step {step.number}: the gradient is not finite, so training stops{rest}"]
        names = list(dict.fromkeys(name for found in ranks for name in found["parameters"]))
        if names:
            said.append(f"it is so in {len(names)} parameters ({_some(names)})")
        bad = [rank for rank, found in enumerate(ranks) if not found["loss"]]
        if bad:
            rows = [name for rank in bad for batch in ranks[rank]["recordings"] for row in batch for name in row]
            said.append(
                f"the loss is not finite on ranks {_some(bad)}, with the recordings {_some(list(dict.fromkeys(rows)))}"
            )
        else:
            said.append("the loss is finite on all ranks")
        return "; ".join(said) + ". A lower optimizer.lr or a longer warm-up may help."


def _some(names: list[Any], count: int = 8) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(str(name) for name in names[:count]) + more
