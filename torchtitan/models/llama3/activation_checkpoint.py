"""Activation checkpointing: compute again what the backward pass needs, instead of keeping it (arXiv 1604.06174).

Whole blocks, every n-th block, or within each block only what is cheap to compute again ("op").
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchtitan.config.job_config import ActivationCheckpoint, JobConfig
from torchtitan.config.keys import Refuse
from torchtitan.models.llama3.model import Llama3
from torchtitan.tools.torch_private import costly_operators

_MATRIX_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default}


def check_mode(config: JobConfig, refuse: Refuse) -> None:
    """Refuse a selective_ac_option that is neither "op" nor a number of blocks."""
    option = config.activation_checkpoint.selective_ac_option
    if option != "op" and not re.fullmatch(r"[1-9]\d*", option):
        refuse("activation_checkpoint.selective_ac_option", 'it must be "op" or a whole number from 1 on')


def checkpoint_activations(model: Llama3, config: ActivationCheckpoint) -> None:
    """Apply a mode to the blocks of a model; names of modules and parameters stay as they are."""
    if config.mode == "none":
        return
    every = 1
    contexts: Callable[..., Any] | None = None
    if config.mode == "selective" and config.selective_ac_option != "op":
        every = int(config.selective_ac_option)
    elif config.mode == "selective":
        contexts = partial(_op_contexts, costly_operators())
    for number, block in model.layers.items():
        if contexts is not None:
            shapes = _recomputed_shapes(block, f"layers.{number}", config)
            block.forward = _checkpointed(block.forward, partial(contexts, shapes))
        elif int(number) % every == 0:
            block.forward = _checkpointed(block.forward, None)


def _checkpointed(
    forward: Callable[..., torch.Tensor], contexts: Callable[[], Any] | None
) -> Callable[..., torch.Tensor]:
    more: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}

    # A function, not a functools.partial: torch.compile of torch 2.14 finds no code in a partial.
    def run(*inputs: Any) -> torch.Tensor:
        return cast(torch.Tensor, checkpoint(forward, *inputs, use_reentrant=False, **more))

    return run


def _recomputed_shapes(block: nn.Module, prefix: str, config: ActivationCheckpoint) -> set[tuple[int, int]]:
    """Shapes (in, out) of the layers whose matrix products are always computed again."""
    names = config.per_op_sac_force_recompute_mm_shapes_by_fqns
    return {
        (module.in_features, module.out_features)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and any(part in f"{prefix}.{name}" for part in names)
    }


def _op_contexts(kept: set[Any], recomputed: set[tuple[int, int]]) -> Any:
    """The two contexts of a block's forward pass and of its repetition, with a count of matrix products in each.

    Besides the operators of ``kept``, every second matrix product keeps its result.
    """
    counts = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in kept:
            return CheckpointPolicy.MUST_SAVE
        if operation in _MATRIX_PRODUCTS:
            weight = args[2] if operation is torch.ops.aten.addmm.default else args[1]
            shape = weight.shape if operation is not torch.ops.aten.linear.default else weight.shape[::-1]
            if tuple(shape) in recomputed:
                return CheckpointPolicy.PREFER_RECOMPUTE
            counts[context.is_recompute] += 1
            return CheckpointPolicy.MUST_SAVE if counts[context.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
