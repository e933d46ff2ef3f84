"""bfloat16 where it is right, and what float16 holds."""

from typing import Any

import torch
import torch.nn.functional as F


def keep_in_float32(model: torch.nn.Module) -> list[str]:
    """Run those convolutions in float32 under autocast whose bfloat16 is wrong on this CPU; returns their names.

    With fewer than 32 channels and a large stride, oneDNN gets some of them wrong (torch 2.14 on a CPU with AMX:
    the output of Conv1d(24, 48, 16, 8), the input's gradient of ConvTranspose1d(48, 24, 16, 8)). Training would go on
    with losses that look well, and the codec, which is run in float32, would be another function. So each is tried.
    """
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
            continue
        length = 8 * module.kernel_size[0] if isinstance(module, torch.nn.Conv1d) else 64
        hidden = torch.randn(4, module.in_channels, length, generator=generator)
        results: list[list[torch.Tensor]] = []
        weights = None
        for enabled in (False, True):
            given = hidden.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                made = module(given).float()
            weights = torch.randn(made.shape, generator=generator) if weights is None else weights
            gradients = torch.autograd.grad((made * weights).sum(), [given, module.weight])
            results.append([made.detach(), *gradients])
        likeness = [F.cosine_similarity(a.flatten(), b.flatten(), 0) for a, b in zip(*results, strict=True)]
        if min(likeness) < 0.99:
            wrong.append(name)
            forward = module.forward

            def exact(hidden: torch.Tensor, forward: Any = forward) -> torch.Tensor:
                with torch.autocast(hidden.device.type, enabled=False):
                    return forward(hidden.float())

            vars(module)["forward"] = exact
    return wrong


@torch.no_grad()
def round_to_half(parameters: list[torch.nn.Parameter]) -> None:
    """Give every weight a value that float16 holds, since that is how the codec is stored."""
    for parameter in parameters:
        parameter.copy_(parameter.half().float())
