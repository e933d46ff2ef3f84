"""The optimizer, and its state as plain tensors under the names of their parameters."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchtitan.config.job_config import JobConfig, Optimizer
from torchtitan.config.keys import Refuse, show, value_of
from torchtitan.models.llama3.weights import Weighted

_STATES = ("exp_avg", "exp_avg_sq")


def check_updates(config: JobConfig, refuse: Refuse) -> None:
    """Refuse what does not go with updates in the backward pass, and a clipping norm of 0 without them."""
    early = config.optimizer.early_step_in_backward
    if config.training.max_norm == 0 and not early:
        refuse("training.max_norm", "it must be above 0 but with optimizer.early_step_in_backward")
    needed = {
        "training.max_norm": 0,
        "parallelism.pipeline_parallel_degree": 1,
        "training.enable_cpu_offload": False,
    }
    for key, value in needed.items():
        if early and value_of(config, key) != value:
            refuse(key, f"with optimizer.early_step_in_backward = true it must be {show(value)}")


def build_optimizer(model: Weighted, config: Optimizer) -> "AnyOptimizer":
    """AdamW (or Adam) over all parameters of the model."""
    if config.early_step_in_backward:
        return OptimizerInBackward(model, config)
    return _build([parameter for _, parameter in model.weights()], config)


def _build(parameters: list[nn.Parameter], config: Optimizer) -> torch.optim.Optimizer:
    kind = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}[config.name]
    return kind(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )


class OptimizerInBackward:
    """An optimizer that updates each parameter during the backward pass, as soon as its gradient is complete.

    The gradient is freed at once, so that those of all parameters never lie in memory together.

    Attributes:
        state, param_groups: as of a torch.optim.Optimizer; each parameter has a group of its own.
        norms: of the gradients of the last update by name, on this rank's device (of a DTensor not yet summed over
            ranks).
    """

    def __init__(self, model: Weighted, config: Optimizer):
        self.state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        self.param_groups: list[dict[str, Any]] = []
        self.norms: dict[str, torch.Tensor] = {}
        self._updates = False
        for name, parameter in model.weights():
            optimizer = _build([parameter], config)
            optimizer.state = self.state
            self.param_groups += optimizer.param_groups
            parameter.register_post_accumulate_grad_hook(self._hook(name, optimizer))

    def _hook(self, name: str, optimizer: torch.optim.Optimizer) -> Any:
        def update(parameter: torch.Tensor) -> None:
            if self._updates and parameter.grad is not None:
                self.norms[name] = torch.linalg.vector_norm(parameter.grad)
                optimizer.step()
                parameter.grad = None

        return update

    @contextmanager
    def updates(self) -> Iterator[None]:
        """Within this context a backward pass updates: that of the last microbatch of a step, after which the sum over
        all microbatches is complete."""
        self._updates = True
        self.norms.clear()
        try:
            yield
        finally:
            self._updates = False

    def step(self) -> None:
        """Nothing: all is updated already."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: no gradient is left."""


AnyOptimizer = torch.optim.Optimizer | OptimizerInBackward


def optimizer_tensors(model: Weighted, optimizer: AnyOptimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """The optimizer's state as ``<parameter>.<state>`` tensors, sharded as the parameters are.

    State that does not exist before the first step is made here, as zeros, so that a checkpoint can be read into it.
    """
    for name, parameter in model.weights():
        state = optimizer.state[parameter]
        if not state:
            fused = optimizer.param_groups[0]["fused"]
            device = parameter.device if fused else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for key in _STATES:
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        for key in ("step", *_STATES):
            yield f"{name}.{key}", state[key]
