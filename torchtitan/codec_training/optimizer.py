"""The optimizers of codec and discriminators."""

from collections.abc import Callable
from typing import Any

import torch

from torchtitan.codec_training.autoencoder import Autoencoder
from torchtitan.codec_training.losses import Discriminators
from torchtitan.tools.errors import UserError

VECTORS_SHARE = 0.15
"""The vectors' learning rate (AdamW), as a share of the matrices' (Muon)."""
JUDGE_RATE = 5e-4
"""The discriminators' learning rate."""
LARGEST_NORM = 1.0
"""What a longer gradient is clipped to."""


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal (K. Jordan and others, 2024), a convolution taken as a matrix.

    On two CPU cores it brings this codec in 400 steps further than AdamW in 600. torch.optim.Muon takes matrices only.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float = 0.02):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 0.05)
                update = orthogonal(parameter.grad.lerp(momentum, 0.95).flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                parameter.mul_(1 - 0.02 * group["lr"]).add_(update.view_as(parameter), alpha=-scale * group["lr"])


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values brought near 1, by five Newton-Schulz steps in bfloat16."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-12)).bfloat16()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class Optimizers:
    """Muon for the codec's matrices, AdamW for its vectors and for the discriminators.

    Attributes:
        codec: the codec's optimizers, each with its share of the learning rate.
        judge: the discriminators' optimizer.
        parameters: all that the codec's optimizers hold.
    """

    def __init__(self, autoencoder: Autoencoder, discriminators: Discriminators, learning_rate: float):
        self.parameters = [*autoencoder.encoder_parameters(), *autoencoder.decoder_parameters()]
        matrices = [parameter for parameter in self.parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in self.parameters if parameter.ndim == 1]
        self.codec = [(Muon(matrices), 1.0), (torch.optim.AdamW(vectors, betas=(0.9, 0.98)), VECTORS_SHARE)]
        self.judged_by = list(discriminators.parameters())
        self.judge = torch.optim.AdamW(self.judged_by, JUDGE_RATE, (0.8, 0.98))
        self.learning_rate = learning_rate

    def set_learning_rate(self, factor: float) -> None:
        """The codec's learning rate of a step, as a share of the peak; the discriminators' stays."""
        for optimizer, part in self.codec:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * part * factor

    def improve_codec(self, loss: torch.Tensor, parameters: list[torch.nn.Parameter], step: int) -> None:
        """One step of the codec's optimizers, for these of its parameters; raises as :meth:`_descend`."""
        self._descend(loss, [optimizer for optimizer, _ in self.codec], parameters, step)

    def improve_judge(self, loss: torch.Tensor, step: int) -> None:
        """One step of the discriminators; raises as :meth:`_descend`."""
        self._descend(loss, [self.judge], self.judged_by, step)

    def _descend(
        self, loss: torch.Tensor, optimizers: list[Any], parameters: list[torch.nn.Parameter], step: int
    ) -> None:
        """One step of these optimizers, for these parameters.

        Raises:
            UserError: the loss is not finite.
        """
        if not loss.isfinite():
            raise UserError(f"training diverged at step {step}: lower --learning_rate or use float32.")
        for parameter in (*self.parameters, *self.judged_by):
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
        for optimizer in optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.codec],
            "judge": self.judge.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for (optimizer, _), stored in zip(self.codec, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.judge.load_state_dict(state["judge"])
