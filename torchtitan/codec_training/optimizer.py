"""The steps and learning rates of the stages, and the optimizers of codec and discriminators."""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from torchtitan.codec_training.autoencoder import Autoencoder
from torchtitan.codec_training.options import Options
from torchtitan.codec_training.spectra import Discriminators
from torchtitan.tools.errors import UserError

WARM_UP_STEPS = 50
DECAY = 0.95  # share of the peak learning rate that is lost by the end
DECODER_SHARE = 0.5  # peak learning rate of stage 3, as a share of that of stages 1 and 2
VECTORS_SHARE = 0.15  # the vectors' learning rate (AdamW), as a share of the matrices' (Muon)
JUDGE_RATE = 5e-4  # the discriminators' learning rate
LARGEST_NORM = 1.0  # of a gradient; longer ones are clipped


class Schedule:
    """The first steps of stage 2 (`quantized`) and of stage 3 (`decoder`), and the number of steps (`end`)."""

    def __init__(self, options: Options):
        before = [0, 0] if options.start_from else [options.continuous_steps, options.quantized_steps]
        self.quantized, self.decoder, self.end = itertools.accumulate([*before, options.decoder_steps])

    def learning_rate(self, step: int) -> float:
        """A share of the peak: linear warm-up and linear decay, over stages 1 and 2 and again over stage 3."""
        start, end, peak = 0, self.decoder, 1.0
        if step >= self.decoder:
            start, end, peak = self.decoder, self.end, DECODER_SHARE
        warm_up = min((step - start + 1) / WARM_UP_STEPS, 1.0)
        return peak * warm_up * (1 - DECAY * ((step - start) / (end - start)))


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates (K. Jordan and others, 2024); a convolution's weight is flattened to a matrix.

    It brings this codec further in 400 steps than AdamW in 600. torch.optim.Muon takes matrices only.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float = 0.02):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 0.05)
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
        parameters: of the codec.
        judge_parameters: of the discriminators.
    """

    def __init__(self, autoencoder: Autoencoder, discriminators: Discriminators, learning_rate: float):
        self.parameters = [*autoencoder.encoder_parameters(), *autoencoder.decoder_parameters()]
        self.judge_parameters = list(discriminators.parameters())
        matrices, vectors = ([p for p in self.parameters if (p.ndim > 1) == matrix] for matrix in (True, False))
        self._codec = (Muon(matrices), torch.optim.AdamW(vectors, betas=(0.9, 0.98)))
        self._judge = torch.optim.AdamW(self.judge_parameters, JUDGE_RATE, (0.8, 0.98))
        self._learning_rate = learning_rate

    def set_learning_rate(self, factor: float) -> None:
        """The codec's learning rate of a step, as a share of the peak; the discriminators' stays."""
        for optimizer, part in zip(self._codec, (1.0, VECTORS_SHARE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate * part * factor

    def descend(self, loss: torch.Tensor, parameters: list[torch.nn.Parameter], step: int) -> None:
        """One step of these parameters: of the discriminators, or some of the codec.

        Raises:
            UserError: the loss is not finite.
        """
        if not loss.isfinite():
            raise UserError(f"training diverged at step {step}: lower --learning_rate or use float32.")
        for parameter in (*self.parameters, *self.judge_parameters):
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
        for optimizer in (self._judge,) if parameters is self.judge_parameters else self._codec:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        states = [optimizer.state_dict() for optimizer in self._codec]
        return {"optimizers": states, "judge": self._judge.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, stored in zip(self._codec, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self._judge.load_state_dict(state["judge"])
