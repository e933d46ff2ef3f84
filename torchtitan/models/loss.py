"""Cross-entropy over a large vocabulary without ever holding the logits whole.

136,450 columns in fp32 are 0.5 MB a token: the logits of one microbatch of 32 x 1,024 tokens would take 18 GB. So the
loss takes :data:`CHUNK_TOKENS` rows at a time. In training it forms each chunk's gradient at once: logits are computed
only once, and nothing of their size is kept for the backward pass.

With tensor parallelism each rank has some of the columns (:class:`Columns`). The ranks exchange two numbers a token:
the logarithm of their part of the softmax's sum, and the target's logit.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from torchtitan.distributed.collectives import all_gather

IGNORE_INDEX = -100
CHUNK_TOKENS = 1024


class Columns(NamedTuple):
    """The columns of the logits that the rows of a head's weight compute.

    Attributes:
        first: the id of the first one.
        count: how many rows have an id; None: all. The others, at the end, align the matrix products (a width of
            136,450 is slow on a GPU). They are computed, but are not in the softmax.
        group: ranks that have the other columns; None if all are here.
        gather: if not 0, the ranks of the group gather the logits, not only their sums. Each has at most this many.
    """

    first: int = 0
    count: int | None = None
    group: dist.ProcessGroup | None = None
    gather: int = 0


ALL_COLUMNS = Columns()


def chunked_nll_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    columns: Columns = ALL_COLUMNS,
    compiled: bool = False,
) -> torch.Tensor:
    """Sum of the negative log-likelihoods of the targets, in nats, as an fp32 scalar with gradients.

    The gradient of ``hidden`` covers the columns at hand: with a group it has to be summed over its ranks.

    Args:
        hidden: final hidden states [..., D].
        weight: the head's rows [V, D].
        targets: ids [...], IGNORE_INDEX where there is none.
        columns: which ids the rows are.
        compiled: compute each chunk with torch.compile, in fewer passes over its logits.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if hidden.device.type == "cpu":  # Choosing rows needs their number, which would make a GPU wait.
        real = targets != IGNORE_INDEX
        hidden, targets = hidden[real], targets[real]
    return _ChunkedNLLSum.apply(hidden, weight, targets, columns, compiled)  # type: ignore[return-value]


@torch.no_grad()
def chunked_nll(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, columns: Columns = ALL_COLUMNS
) -> torch.Tensor:
    """The negative log-likelihood of each target [...], in nats, fp32, without gradients; 0 where there is none."""
    shape = targets.shape
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    losses, count = [], weight.shape[0] if columns.count is None else columns.count
    for h, t in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        logits, norm, picked = _norm_and_target(h, weight, t, columns.first, count)
        norm, picked = _of_all_columns(logits, norm, picked, columns)
        losses.append((norm - picked) * (t != IGNORE_INDEX))
    return torch.cat(losses).view(shape)


def _own(targets: torch.Tensor, first: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target's column [N, 1] among the ``size`` at hand, and whether it is one of them [N]."""
    column = targets - first
    return column.clamp(0, max(size - 1, 0))[:, None], (column >= 0) & (column < size)


def _norm_and_target(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, first: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [N, V], and in fp32 the logarithm of the softmax's denominator and the target's logit, [N] each."""
    logits = F.linear(hidden, weight)
    norm = logits[:, :count].float().logsumexp(dim=1)
    picked = torch.zeros_like(norm)
    if count:
        index, own = _own(targets, first, count)
        picked = torch.where(own, logits.gather(1, index)[:, 0].float(), 0.0)
    return logits, norm, picked


def _of_all_columns(
    logits: torch.Tensor, norm: torch.Tensor, picked: torch.Tensor, columns: Columns
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two last of :func:`_norm_and_target` over the columns of all ranks, from each rank's own."""
    if columns.group is None:
        return norm, picked
    parts = all_gather(torch.stack((norm, picked))[None], 0, columns.group)
    if columns.gather:
        own = logits[:, : columns.count].float()
        padded = F.pad(own, (0, columns.gather - own.shape[1]), value=float("-inf"))
        norm = all_gather(padded, 1, columns.group).logsumexp(dim=1)
    else:
        norm = parts[:, 0].logsumexp(dim=0)
    return norm, parts[:, 1].sum(dim=0)


def _grad_of_logits(
    logits: torch.Tensor, norm: torch.Tensor, targets: torch.Tensor, first: int, count: int
) -> torch.Tensor:
    """The gradient of the sum of losses, softmax minus one-hot of the target, in the dtype of ``logits`` [N, V].

    Outside of a compiled graph it takes the place of fp32 logits.
    """
    norm = norm.masked_fill(targets == IGNORE_INDEX, math.inf)[:, None]  # so that their rows become 0
    in_place = logits.dtype == norm.dtype and not torch.compiler.is_compiling()
    grad = (logits.sub_(norm) if in_place else logits - norm).exp_()  # in fp32, as norm is
    grad[:, count:] = 0
    if count:
        index, own = _own(targets, first, count)
        grad.scatter_add_(1, index, -own[:, None].to(grad.dtype))
    return grad.to(logits.dtype)


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    return torch.compile(_norm_and_target, fullgraph=True), torch.compile(_grad_of_logits, fullgraph=True)


class _ChunkedNLLSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, columns: Columns, compiled: bool
    ) -> torch.Tensor:
        norm_and_target, grad_of_logits = _compiled() if compiled else (_norm_and_target, _grad_of_logits)
        count = weight.shape[0] if columns.count is None else columns.count
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: torch.Tensor | None = None
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            h, t = hidden[rows], targets[rows]
            logits, norm, picked = norm_and_target(h, weight, t, columns.first, count)
            norm, picked = _of_all_columns(logits, norm, picked, columns)
            total += ((norm - picked) * (t != IGNORE_INDEX)).sum()
            if not (need_hidden or need_weight):
                continue
            grad = grad_of_logits(logits, norm, t, columns.first, count)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None and grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.T, h)  # without another tensor of this size
            elif grad_weight is not None:
                grad_weight += grad.T @ h
            elif need_weight:
                grad_weight = (grad.T @ h).float()
            del logits, grad  # before the next chunk's are made
        if need_weight and grad_weight is None:  # no rows
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
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
            None,
        )
