"""Matrix products of the blocks in 8-bit floats, by torchao (an optional dependency: ``uv sync --extra float8``).

Weights stay fp32 parameters under their names, so checkpoints do not change.
"""

import importlib.util
from typing import Any

import torch
from torch import nn

from torchtitan.config.job_config import JobConfig
from torchtitan.tools.errors import ConfigError


def check_float8(config: JobConfig) -> None:
    """Refuse float8 where it cannot be had.

    Raises:
        ConfigError: torchao is missing, or the hardware has no 8-bit matrix products.
    """
    if "float8" not in config.model.converters:
        return
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            'model.converters = ["float8"]: the package torchao is missing; install it with `uv sync --extra float8`.'
        )
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    if not capable and not config.float8.emulate:
        raise ConfigError(
            'model.converters = ["float8"]: it needs GPUs with 8-bit matrix products (compute capability 8.9: L40, '
            "H100 and later); float8.emulate = true computes the same slowly anywhere."
        )


def convert_to_float8(model: nn.Module, config: JobConfig) -> None:
    """Let the linear layers of the blocks multiply in float8, those of which each rank has multiples of 16."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    part, multiple = config.float8, 16 * config.parallelism.tensor_parallel_degree
    if part.recipe_name not in (None, "tensorwise"):
        settings: Any = Float8LinearConfig.from_recipe_name(part.recipe_name)
        if part.emulate:
            object.__setattr__(settings, "emulate", True)
    else:
        settings = Float8LinearConfig(
            enable_fsdp_float8_all_gather=part.enable_fsdp_float8_all_gather, emulate=part.emulate
        )

    def chosen(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or any(part in name for part in config.float8.filter_fqns):
            return False
        return module.in_features % multiple == 0 and module.out_features % multiple == 0

    convert_to_float8_training(model, config=settings, module_filter_fn=chosen)


def precompute_scales(model: nn.Module) -> None:
    """After an update: the scales of all weights that are gathered in float8, in one collective."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)
