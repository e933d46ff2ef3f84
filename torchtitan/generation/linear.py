"""Linear layers for decoding, where a batch has few rows and reading the weights is what costs.

:func:`make_linear` picks one of three for the place at hand:

:class:`Dense`   ``F.linear``.
:class:`Packed`  on a CPU: weights in oneDNN's own block layout. A row's result is the same bits in a batch of any
                 size from two on (a single row takes another kernel), and bf16 is faster than ``F.linear``.
:class:`Int8`    weights in 8 bits with one scale an output, activations as they are: half the bytes of bf16.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

# Batches are filled up to this, see Packed.
MIN_ROWS = 2


class Dense(nn.Module):
    """y = x W^T + b."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., inputs] to [..., outputs]."""
        return F.linear(x, self.weight, self.bias)


class Packed(nn.Module):
    """:class:`Dense` with weights that are packed once, for the CPU."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        # The number is the batch size to expect: 1 gives the layout whose kernels add up in one order for all sizes.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., inputs] to [..., outputs]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8(nn.Module):
    """y = (x Q^T) * scale + b with Q in int8, rounded to nearest, and scale = max |row of W| / 127."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        scale = (weight.float().abs().amax(dim=1) / 127).clamp(min=1e-12)
        self.register_buffer("weight", (weight.float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(weight.dtype))
        self.register_buffer("bias", bias)
        self.fused = weight.device.type == "cpu" and weight.dtype == torch.bfloat16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., inputs] to [..., outputs]."""
        if self.fused:
            flat = x.reshape(-1, x.shape[-1])
            y = torch._weight_int8pack_mm(flat, self.weight, self.scale).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None = None, int8: bool = False, pack: bool = True
) -> nn.Module:
    """The layer of a weight [outputs, inputs] for the device and dtype that it has.

    Args:
        pack: whether it may be :class:`Packed`, which torch.compile does not take.
    """
    if int8:
        return Int8(weight, bias)
    if pack and weight.device.type == "cpu" and _can_pack(weight.dtype):
        return Packed(weight, bias)
    return Dense(weight, bias)


@functools.cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies packed weights of this type here, seen by trying, as torch's operators are internal."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    weight, x = (torch.linspace(-1, 1, n * 32, dtype=dtype).view(n, 32) for n in (48, 3))
    bias = weight[:, 0].contiguous()
    try:
        packed = Packed(weight, bias)(x)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return torch.allclose(packed, F.linear(x, weight, bias), rtol=0.05, atol=0.05)
