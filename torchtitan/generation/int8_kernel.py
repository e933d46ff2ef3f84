"""Products with 8-bit weights on CUDA, in Triton, which comes with torch's CUDA builds.

``F.linear`` needs the weights in 16 bits. Converting them at every call costs five bytes of traffic a weight. This
kernel reads one byte a weight and converts it in registers. (torch's own ``_weight_int8pack_mm`` reads one byte too,
but its CUDA kernel uses one thread an output, in fp32; benchmarks/gpu.py times all three.)

Block sizes are fixed, so that a row's sum is formed in the same order in a batch of any size.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# Rows, outputs and inputs that one program takes at a time. Tensor cores take no fewer rows than 16.
BLOCK_ROWS, BLOCK_OUTPUTS, BLOCK_INPUTS = 16, 32, 128


@triton.jit
def _kernel(
    x,
    weight,
    scale,
    out,
    rows,
    outputs,
    inputs: tl.constexpr,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
):
    n = tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)
    m = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    k = tl.arange(0, block_inputs)
    total = tl.zeros((block_rows, block_outputs), dtype=tl.float32)
    for start in range(0, inputs, block_inputs):
        inside = start + k < inputs
        a = tl.load(x + m[:, None] * inputs + (start + k)[None, :], (m < rows)[:, None] & inside[None, :], 0.0)
        b = tl.load(weight + n[None, :] * inputs + (start + k)[:, None], (n < outputs)[None, :] & inside[:, None], 0)
        total = tl.dot(a, b.to(a.dtype), total)
    total *= tl.load(scale + n, n < outputs, 0.0).to(tl.float32)[None, :]
    place = out + m[:, None] * outputs + n[None, :]
    tl.store(place, total.to(out.dtype.element_ty), (m < rows)[:, None] & (n < outputs)[None, :])


def multiply(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(x W^T) * scale [n, outputs] of x [n, inputs] in 16 bits, weight int8 [outputs, inputs] and scale [outputs]."""
    x = x.contiguous()
    (rows, inputs), outputs = x.shape, weight.shape[0]
    out = x.new_empty(rows, outputs)
    grid = (triton.cdiv(outputs, BLOCK_OUTPUTS), triton.cdiv(rows, BLOCK_ROWS))
    launch: Any = _kernel[grid]
    launch(x, weight, scale, out, rows, outputs, inputs, BLOCK_ROWS, BLOCK_OUTPUTS, BLOCK_INPUTS, num_warps=4)
    return out


# A registered operator, so that torch.compile and tensors without values know it.
@torch.library.custom_op("torchtitan::int8_linear", mutates_args=(), device_types="cuda")
def int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """:func:`multiply` on the GPU where the tensors are."""
    with torch.cuda.device(x.device):
        return multiply(x, weight, scale)


@int8_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
