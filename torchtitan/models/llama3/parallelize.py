"""Llama 3 on several devices: activation checkpointing, compile and FSDP2, applied from outside."""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from torchtitan.models.llama3.model import Llama3


def checkpoint_activations(model: Llama3) -> None:
    """Keep only each block's input in the forward pass; the block is computed again in the backward pass."""

    def checkpointed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        # A function, not a functools.partial: torch.compile of torch 2.14 finds no code in a partial.
        def run(*inputs: Any) -> torch.Tensor:
            return cast(torch.Tensor, checkpoint(forward, *inputs, use_reentrant=False))

        return run

    for block in model.layers.values():
        block.forward = checkpointed(block.forward)


def compile_blocks(model: Llama3) -> None:
    """Compile every block by itself: one graph serves all of them."""
    for block in model.layers.values():
        block.compile(fullgraph=True, dynamic=False)
    model.compiled = True  # Packed rows then come to the blocks as tensors of few shapes, not as Python numbers.


def shard(
    model: Llama3,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard: Literal["default", "always", "never"] = "default",
) -> None:
    """FSDP2 with one unit a block, and one for embedding, final norm and head (a tied weight must not be split).

    ``reshard`` says whether parameters are freed between forward and backward pass: always, never, or (default) those
    of the blocks but not those of the last unit, which the backward pass needs at once.

    The loss is divided by the targets of all ranks before the backward pass, so gradients are summed, not averaged.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for block in model.layers.values():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard != "never")
    ends: list[nn.Module] = [model.tok_embeddings, model.norm, model.output]
    fully_shard(ends, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard == "always")
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard != "never")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
