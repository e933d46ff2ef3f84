"""The loss on held-out speech: the same rows each time, averaged over tokens."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.audio.token_stream import CODEBOOK_SIZE, TokenStream
from torchtitan.components.dataloader import SpeechDataLoader
from torchtitan.distributed.utils import max_over_ranks
from torchtitan.models.loss import IGNORE_INDEX
from torchtitan.tools.errors import UserError

# (tokens, targets) [B, S] to the negative log-likelihood of each target [B, S].
Losses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ValidationResult:
    """Mean negative log-likelihoods in nats, over all ranks.

    Attributes:
        loss: over all targets (units, marks, and text in task ``tts``).
        quantizers: over the units of each quantizer, Q numbers.
        entropies: of the codes of each quantizer in these clips, Q numbers in nats: the losses of a unigram baseline.
        num_targets: how many targets there were.
    """

    loss: float
    quantizers: list[float]
    entropies: list[float]
    num_targets: int

    @property
    def entropy(self) -> float:
        """Mean of the entropies over the quantizers."""
        return sum(self.entropies) / len(self.entropies)


class Validator:
    """Runs a finite loader from its start.

    Args:
        steps: batches of each rank; -1 for the whole data set.
        group: in which ranks wait for each other's data.
        counts: of the ranks that work on the same rows, this is the one that counts them.
    """

    def __init__(
        self, loader: SpeechDataLoader, stream: TokenStream, steps: int, group: Any = None, counts: bool = True
    ):
        self.loader, self.stream, self.steps, self.group, self.counts = loader, stream, steps, group, counts

    def run(self, losses_of: Losses) -> ValidationResult:
        """Called by all ranks.

        Args:
            losses_of: what gives the negative log-likelihood of each target, see ParallelModel.losses.

        Raises:
            UserError: no row could be used.
        """
        # Sums and counts: all targets, then each quantizer's.
        sums = torch.zeros(2, 1 + self.stream.num_quantizers, dtype=torch.float64)
        counts = torch.zeros(self.stream.num_quantizers, CODEBOOK_SIZE, dtype=torch.float64)
        self.loader.load_state_dict(self.loader.start_state())
        with closing(iter(self.loader)) as loaded:
            batches = islice(loaded, self.steps if self.steps >= 0 else None)
            while True:
                batch = next(batches, None)
                # A sharded model is run by all ranks together: those without rows left run an empty one.
                if not max_over_ranks(float(batch is not None), self.group):
                    break
                if batch is None:
                    tokens, targets = torch.zeros(1, 32, dtype=torch.int64), torch.full((1, 32), IGNORE_INDEX)
                else:
                    tokens, targets = batch.tokens, batch.targets
                losses = losses_of(tokens, targets).double().cpu()
                if not self.counts:
                    continue
                quantizer = self.stream.quantizer_of(targets)
                masks = [targets != IGNORE_INDEX, *(quantizer == q for q in range(self.stream.num_quantizers))]
                sums += torch.stack([torch.stack((losses[mask].sum(), mask.sum())) for mask in masks], dim=1)
                for q in range(self.stream.num_quantizers):
                    codes = (targets[quantizer == q] - self.stream.base_size) // self.stream.num_quantizers
                    counts[q] += torch.bincount(codes, minlength=CODEBOOK_SIZE)
        dist.all_reduce(sums)
        dist.all_reduce(counts)
        if sums[1, 0] == 0:
            raise UserError("no recording of the validation data set could be used; the log names the reasons.")
        means = (sums[0] / sums[1]).tolist()
        shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        entropies = -(shares * shares.clamp(min=1e-300).log()).sum(dim=1)
        return ValidationResult(means[0], means[1:], entropies.tolist(), int(sums[1, 0]))
