"""The norm of all gradients, wherever they lie, and clipping by it."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from torchtitan.models.llama3.parallel_model import ParallelModel


@torch.no_grad()
def clip_grad_norm(model: ParallelModel, max_norm: float) -> torch.Tensor:
    """Finish the gradients of a step, and scale them so that their norm over all ranks is at most ``max_norm``.

    Returns the norm before.
    """
    if model.pipeline is not None:
        model.pipeline.sum_tied_gradients()
    # The head of a pipeline's last stage, if tied, is the first stage's embedding over again.
    gradients = [p.grad for part in model.parts for n, p in part.named_parameters() if not part.is_copy(n)]
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None], foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if model.pipeline is not None:
        squared = norm**2
        dist.all_reduce(squared, group=model.pipeline.group)
        norm = squared.sqrt()
    torch.nn.utils.clip_grads_with_norm_([p for _, p in model.weights()], max_norm, norm, foreach=True)
    return norm
