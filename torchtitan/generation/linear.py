"""Linear layers for batches of few rows, in which reading the weights costs most of the time.

:func:`make_linear` picks one of three:

:class:`Dense`   ``F.linear``.
:class:`Packed`  on a CPU: weights in oneDNN's own block layout. A row's result is the same bits in a batch of any
                 size from two on (a single row takes another kernel), and bf16 is faster than ``F.linear``.
:class:`Int8`    weights in 8 bits with one scale an output: half the bytes of bf16. Activations stay as they are.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.tools.errors import first_line
from torchtitan.tools.logging import logger
from torchtitan.tools.torch_private import pack_for_cpu, packed_linear, torch_int8_product

# Smaller batches are padded to this on a CPU, see Packed.
MIN_ROWS = 2
# Rows up to which 8-bit weights are widened as they are read, on CUDA.
_FUSED_ROWS = 64


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
        self.weight = pack_for_cpu(weight)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., inputs] to [..., outputs]."""
        return packed_linear(x, self.weight, self.bias)


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
        self.product = int8_product(weight.device, weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., inputs] to [..., outputs]."""
        flat = x.reshape(-1, x.shape[-1])
        # With many rows the arithmetic costs most, and 16-bit matrix products are faster.
        product = widened if x.is_cuda and len(flat) > _FUSED_ROWS else self.product
        y = product(flat, self.weight, self.scale).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None = None, int8: bool = False, pack: bool = True
) -> nn.Module:
    """The layer for a weight [outputs, inputs] on its device and in its dtype.

    Args:
        pack: whether it may be :class:`Packed`, which torch.compile does not take.
    """
    if int8:
        return Int8(weight, bias)
    if pack and weight.device.type == "cpu" and _can_pack(weight.dtype):
        return Packed(weight, bias)
    return Dense(weight, bias)


def widened(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(x W^T) * scale with the weights converted to the dtype of x, which writes and reads them again."""
    return F.linear(x, weight.to(x.dtype)) * scale


@functools.cache
def int8_product(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """The function of x [n, inputs], int8 weights and their scales that reads the fewest bytes on a device: one that
    converts the weights as it reads them, if it exists and agrees with :func:`widened`."""
    fused = None
    if device.type == "cpu" and dtype == torch.bfloat16:
        fused = torch_int8_product()
    elif device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and find_spec("triton"):
        from torchtitan.generation.int8_kernel import int8_linear

        fused = int8_linear
    return fused if fused is not None and _agrees(fused, device, dtype) else widened


def _agrees(product: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of int8 weights works on a device, found by trying it."""
    weight = torch.arange(40 * 96, device=device).view(40, 96).mul(37).remainder(255).sub(127).to(torch.int8)
    x, scale = (torch.linspace(-1, 1, n, device=device, dtype=dtype) for n in (3 * 96, 40))
    arguments = (x.view(3, 96), weight, scale)
    exact = widened(arguments[0].float(), weight, scale.float())
    try:
        return bool((product(*arguments) - exact).norm() < 0.02 * exact.norm())
    except Exception as error:  # compilers raise errors of any kind
        logger.warning("fast products of 8-bit weights do not work here (%s); slower ones are used.", first_line(error))
        return False


@functools.cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies packed weights of this dtype here, found by trying it, as they are internal."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    weight, x = (torch.linspace(-1, 1, n * 32, dtype=dtype).view(n, 32) for n in (48, 3))
    bias = weight[:, 0].contiguous()
    try:
        packed = Packed(weight, bias)(x)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return torch.allclose(packed, F.linear(x, weight, bias), rtol=0.05, atol=0.05)
