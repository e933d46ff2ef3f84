"""Collectives that gradients flow through."""

from typing import Any

import torch
import torch.distributed as dist


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return reduce_scatter(grads[0], ctx.dim, ctx.group), None, None


def gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Join the parts of all ranks along ``dim``; the gradients of all ranks are summed and dealt out again."""
    return _Gather.apply(x, dim, group)  # type: ignore[return-value]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, split: int, join: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.split, ctx.join, ctx.group = split, join, group
        return all_to_all(x, split, join, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return all_to_all(grads[0], ctx.join, ctx.split, ctx.group), None, None, None


def exchange(x: torch.Tensor, split: int, join: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Split along one dimension, send each rank its part, and join what arrives along another; gradients go back."""
    return _Exchange.apply(x, split, join, group)  # type: ignore[return-value]


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        pending: Any = x
        return pending.wait() if hasattr(x, "wait") else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def wait(x: torch.Tensor) -> torch.Tensor:
    """The plain tensor of one that DTensor.to_local may give while its collective is still under way; gradients flow.

    A compiled module takes such an AsyncCollectiveTensor too, but sends no gradient back to it (torch 2.14).
    """
    return _Wait.apply(x)  # type: ignore[return-value]


def all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The parts of all ranks joined along ``dim``, without gradients."""
    size = dist.get_world_size(group)
    parts = x.new_empty((size * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(parts, x.contiguous(), group=group)
    return parts if dim == 0 else torch.cat(parts.chunk(size), dim=dim)


def reduce_scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part along ``dim`` of the sum over all ranks."""
    parts = x.chunk(dist.get_world_size(group), dim=dim)
    own = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    dist.reduce_scatter_tensor(own, torch.cat(parts), group=group)
    return own


def all_to_all(x: torch.Tensor, split: int, join: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Part r along ``split`` goes to rank r; what all ranks sent is joined along ``join``."""
    size = dist.get_world_size(group)
    parts = torch.cat(x.chunk(size, dim=split))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return torch.cat(received.chunk(size), dim=join)
