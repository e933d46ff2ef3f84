"""Matrix products of the blocks in MXFP8, by torchao (an optional dependency: ``uv sync --extra float8``).

8-bit floats with one scale, a power of two, for every 32 values along the dimension that is summed over (OCP
Microscaling Formats, arXiv 2310.10537). Weights stay fp32 parameters under their names, so checkpoints do not change.
"""

from typing import Any, cast

import torch
from torch import nn

from torchtitan.config.job_config import MX, JobConfig
from torchtitan.tools.errors import ConfigError

MX_BLOCK = 32


def check_mx(config: JobConfig) -> None:
    """Refuse MX formats where they cannot be had.

    Raises:
        ConfigError: torchao is missing or too old, or the hardware has no products in MX formats.
    """
    if "mx" not in config.model.converters:
        return
    try:
        from torchao.prototype.moe_training import mxfp8_linear  # noqa: F401 - only whether it is there
    except ImportError:
        raise ConfigError(
            'model.converters = ["mx"]: the package torchao is missing or older than 0.18; install it with '
            "`uv sync --extra float8`."
        ) from None
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0)
    if not capable and not config.mx.emulate:
        raise ConfigError(
            'model.converters = ["mx"]: it needs GPUs with products in MX formats (compute capability 10.0: B200 and '
            "later); mx.emulate = true computes the same slowly anywhere."
        )


class MXLinear(nn.Linear):
    """A linear layer without bias whose three products are computed from numbers in MXFP8."""

    def __init__(self, layer: nn.Linear, config: MX):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = layer.weight
        self.emulate, self.casts_by_triton = config.emulate, config.use_fp8_dim1_cast_triton_kernel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        from torchao.prototype.moe_training.mxfp8_linear import mx_mm
        from torchao.prototype.mx_formats import config as formats
        from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

        rows, columns = formats.MXFP8Dim0CastKernelChoice, formats.MXFP8Dim1CastKernelChoice
        by_triton = self.casts_by_triton and not self.emulate
        settings: tuple[Any, ...] = (
            *(torch.float8_e4m3fn,) * 3,  # of the input, the weight and the gradient
            MX_BLOCK,
            KernelPreference.EMULATED if self.emulate else KernelPreference.AUTO,
            rows.TRITON if by_triton else rows.TORCH,
            columns.TRITON if by_triton else columns.TORCH,
            formats.ScaleCalculationMode.RCEIL,
            False,  # the gradient of the weight is computed in MXFP8 too
        )
        return cast(torch.Tensor, mx_mm.apply(input.contiguous(), cast(torch.Tensor, self.weight), *settings))


def convert_to_mx(model: nn.Module, config: JobConfig) -> None:
    """Let the linear layers of the blocks multiply in MXFP8, those of which each rank has multiples of 32."""
    multiple = MX_BLOCK * config.parallelism.tensor_parallel_degree
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or any(part in name for part in config.mx.filter_fqns):
            continue
        if module.in_features % multiple == 0 and module.out_features % multiple == 0:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, MXLinear(module, config.mx))
