"""Cross-entropy over a large vocabulary without ever holding the logits whole.

136,450 columns in fp32 are 0.5 MB a token: the logits of one microbatch of 32 x 1,024 tokens would take 18 GB. Here
the rows are taken :data:`CHUNK_TOKENS` at a time, and in training each chunk's gradient is formed right away, while
its logits are at hand, so that they are computed once and nothing of their size is kept for the backward pass.

With tensor parallelism each rank has some of the columns (:class:`Columns`); the ranks exchange two numbers a token,
the logarithm of their part of the softmax's sum and the target's logit.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from torchtitan.distributed.collectives import all_gather

IGNORE_INDEX = -100
CHUNK_TOKENS = 1024


class Columns(NamedTuple):
    """Which columns of the logits the rows of a head's weight are.

    Attributes:
        first: the id of the first one.
        group: ranks that have the other columns; None if all are here.
        gather: if not 0, the ranks of the group, each with at most so many columns, gather the logits themselves, and
            not only their sums.
    """

    first: int = 0
    group: dist.ProcessGroup | None = None
    gather: int = 0


ALL_COLUMNS = Columns()


def chunked_nll_sum(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, columns: Columns = ALL_COLUMNS
) -> torch.Tensor:
    """Sum of the negative log-likelihoods of the targets, in nats, as an fp32 scalar with gradients.

    The gradient of ``hidden`` is that by the columns at hand: with a group it has to be summed over its ranks.

    Args:
        hidden: final hidden states [..., D].
        weight: the head's rows [V, D].
        targets: ids [...], IGNORE_INDEX where there is none.
        columns: which ids the rows are.
    """
    hidden, weight, targets = _flatten(hidden, weight, targets)
    if hidden.device.type == "cpu":  # Choosing rows needs their number, which would make a GPU wait.
        real = targets != IGNORE_INDEX
        hidden, targets = hidden[real], targets[real]
    return _ChunkedNLLSum.apply(hidden, weight, targets, columns)  # type: ignore[return-value]


@torch.no_grad()
def chunked_nll(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, columns: Columns = ALL_COLUMNS
) -> torch.Tensor:
    """The negative log-likelihood of each target [...], in nats, fp32, without gradients; 0 where there is none."""
    shape = targets.shape
    hidden, weight, targets = _flatten(hidden, weight, targets)
    losses = []
    with torch.autocast(hidden.device.type, enabled=False):
        for h, t in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
            norm, picked = _norm_and_target(F.linear(h, weight).float(), t, columns)
            losses.append((norm - picked) * (t != IGNORE_INDEX))
    return torch.cat(losses).view(shape)


def _flatten(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [N, D] and targets [N], in the dtype that autocast asks for."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1)


def _own(targets: torch.Tensor, columns: Columns, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target's column [N, 1] among the ``size`` at hand, and whether it is one of them [N]."""
    column = targets - columns.first
    return column.clamp(0, max(size - 1, 0))[:, None], (column >= 0) & (column < size)


def _norm_and_target(
    logits: torch.Tensor, targets: torch.Tensor, columns: Columns
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logarithm of the softmax's denominator and the target's logit, [N] each, over the columns of all ranks."""
    norm = logits.logsumexp(dim=1)
    picked = torch.zeros_like(norm)
    if logits.shape[1]:
        index, own = _own(targets, columns, logits.shape[1])
        picked = torch.where(own, logits.gather(1, index)[:, 0], 0.0)
    if columns.group is None:
        return norm, picked
    parts = all_gather(torch.stack((norm, picked))[None], 0, columns.group)
    if columns.gather:
        padded = F.pad(logits, (0, columns.gather - logits.shape[1]), value=float("-inf"))
        norm = all_gather(padded, 1, columns.group).logsumexp(dim=1)
    else:
        norm = parts[:, 0].logsumexp(dim=0)
    return norm, parts[:, 1].sum(dim=0)


class _ChunkedNLLSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, columns: Columns
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], CHUNK_TOKENS):
                rows = slice(start, start + CHUNK_TOKENS)
                h, t = hidden[rows], targets[rows]
                real = t != IGNORE_INDEX
                logits = F.linear(h, weight).float()
                norm, picked = _norm_and_target(logits, t, columns)
                total += ((norm - picked) * real).sum()
                if grad_hidden is None and grad_weight is None:
                    continue
                # d nll / d logits = softmax - one-hot of the target, for real targets.
                grad = logits.sub_(norm[:, None]).exp_()
                if grad.shape[1]:
                    index, own = _own(t, columns, grad.shape[1])
                    grad.scatter_add_(1, index, -own[:, None].to(grad.dtype))
                grad = (grad * real[:, None]).to(h.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad @ weight
                if grad_weight is not None:
                    grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * scale.to(grad_weight.dtype),
            None,
            None,
        )
