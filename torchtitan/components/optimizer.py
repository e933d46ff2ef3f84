"""The optimizer, and its state as plain tensors under the names of their parameters."""

import torch

from torchtitan.config_manager import Optimizer
from torchtitan.models.llama3.weights import Weighted

_STATES = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: Weighted, config: Optimizer) -> torch.optim.Optimizer:
    """AdamW (or Adam) over all parameters of the model."""
    kind = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}[config.name]
    return kind(
        [parameter for _, parameter in model.weights()],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )


def optimizer_tensors(model: Weighted, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as ``<parameter>.<state>`` tensors, sharded as the parameters are.

    State that does not exist before the first step is made here, as zeros, so that a checkpoint can be read into it.
    """
    tensors = {}
    for name, parameter in model.weights():
        state = optimizer.state[parameter]
        if not state:
            fused = optimizer.param_groups[0]["fused"]
            device = parameter.device if fused else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for key in _STATES:
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        for key in ("step", *_STATES):
            tensors[f"{name}.{key}"] = state[key]
    return tensors
