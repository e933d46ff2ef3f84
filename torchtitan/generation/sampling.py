"""How the next unit is drawn: which candidates there are, and which of them is taken.

Candidates are limited as transformers' logits processors and warpers do it: repetition penalty, then top-k, then top-p.
One of them is drawn by the Gumbel-max trick: to every candidate's logit goes temperature times its own standard Gumbel
noise, and the largest sum wins, which is a draw from the softmax of logits / temperature (Gumbel 1954; Maddison et al.,
arXiv 1411.0030).

The noise is computed, not stored: a hash of the request's seed, the sample's number, the position of the unit and the
candidate's code. So it does not depend on what else is in the batch or on the device, any position can be drawn first,
and a rounding error in the logits changes a draw only where two sums are within that error of each other.

All parameters are tensors with one value a row, so that every row of a batch may have its own.
"""

import hashlib
import math
from dataclasses import dataclass

import torch

from torchtitan.tools.errors import UserError

# Frames that the repetition penalty can look back on.
MAX_WINDOW = 256

_WORD = 0xFFFF_FFFF


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the units of a continuation are drawn.

    Attributes:
        temperature: the logits are divided by it; 0 takes the most likely unit each time.
        top_k: draw from the k most likely units only; None from all.
        top_p: draw from the most likely units that together reach this probability, after ``top_k``; 1 is no limit.
        seed: with the sample's number, the only source of randomness.
        repetition_penalty: a unit that its quantizer had in the last ``repetition_window`` frames has its logit divided
            by this if positive, multiplied if negative (Keskar et al., arXiv 1909.05858); 1 is no penalty.
        repetition_window: frames, prompt included, that are looked back on.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.8
    top_k: int | None = 30
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    repetition_window: int = 64

    def __post_init__(self):
        if not 0 <= self.temperature <= 1e30:  # within float32
            raise UserError(
                f"temperature must be 0 (the most likely unit) or more, at most 1e30, not {self.temperature}."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be 1 or more, not {self.top_k}; leave it at None to draw from all units.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be over 0 and at most 1, not {self.top_p}.")
        if not 1e-30 <= self.repetition_penalty <= 1e30:
            raise UserError(
                f"repetition_penalty must be over 0 (1 is no penalty) and at most 1e30, not {self.repetition_penalty}."
            )
        if not 1 <= self.repetition_window <= MAX_WINDOW:
            raise UserError(f"repetition_window must be 1 to {MAX_WINDOW} frames, not {self.repetition_window}.")


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Logits [B, K] with those of the candidates ``seen`` (bool [B, K]) made less likely by ``penalty`` [B]."""
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def candidates(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    most: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates that top-k and top-p leave.

    Args:
        logits: float32 [B, K].
        temperature: float32 [B], which top-p depends on.
        top_k: int64 [B], K or more for a row without limit; None if no row has one.
        top_p: float32 [B]; None if no row has a limit.
        most: the largest of ``top_k``, so that the device need not be asked.

    Returns:
        logits [B, C], -inf for what is left out, and which of the K they are, int64 [B, C].
    """
    size = logits.shape[1]
    if top_k is None and top_p is None:
        return logits, torch.arange(size, device=logits.device).expand_as(logits)
    values, indices = _break_ties(logits).topk(size if most is None else min(most, size), dim=1)
    values = logits.gather(1, indices)
    if top_k is not None:
        rank = torch.arange(values.shape[1], device=logits.device)
        values = values.masked_fill(rank >= top_k[:, None], -math.inf)
    if top_p is not None:
        # With the maximum at 0 no temperature, however small, can overflow.
        scaled = (values - values[:, :1]) / temperature.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        probabilities = scaled.softmax(dim=1)
        before = probabilities.cumsum(dim=1) - probabilities  # 0 for the most likely one, which stays
        values = values.masked_fill(before >= top_p[:, None], -math.inf)
    return values, indices


def draw(
    values: torch.Tensor, indices: torch.Tensor, temperature: torch.Tensor, words: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Take one candidate of each row.

    Args:
        values, indices: of :func:`candidates`, [B, C].
        temperature: float32 [B]; at 0 the largest value is taken.
        words: of :func:`position_words`, [B].
        noise: of :func:`candidate_words`, [K].

    Returns:
        which of the K candidates, int64 [B].
    """
    scores = values + temperature[:, None] * gumbel(_mix(words[:, None] ^ noise[indices]))
    return indices.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]


def sample_key(seed: int, sample: int) -> tuple[int, int]:
    """Two words of 32 bits that stand for a seed and a sample's number."""
    digest = hashlib.sha256(f"{seed}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def position_words(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A word of 32 bits for each key and position: keys int64 [B, 2] and positions [B, n] to int64 [B, n]."""
    return _mix(_mix(positions * 0x9E37_79B9 & _WORD ^ keys[:, :1]) ^ keys[:, 1:])


def candidate_words(size: int, device: torch.device) -> torch.Tensor:
    """A word of 32 bits for each of ``size`` candidates, int64 [size]."""
    return _mix(torch.arange(1, size + 1, device=device))


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Words of 32 bits, uniformly distributed, to float32 standard Gumbel noise."""
    uniform = (words.float() + 0.5) * 2.0**-32
    # -log1p(-u) is exponentially distributed and exact where it is small, which is where a draw is decided.
    return -(-torch.log1p(-uniform)).clamp(max=40.0).log()


def _break_ties(logits: torch.Tensor) -> torch.Tensor:
    """Logits [B, K] that came from 16 bits, where many are equal, with the candidate's number in bits that are zero.

    Which of several equal ones are among the k largest would otherwise depend on how many are asked for.
    """
    if logits.shape[1] > 1 << 13:
        return logits
    bits = logits.view(torch.int32)
    number = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    return torch.where(bits & 0x1FFF == 0, bits | number, bits).view(torch.float32)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """A bijection on words of 32 bits of which each bit of the result depends on every bit of the word.

    Shifts and products with the constants that a search found to do so best (lowbias32, Wellons 2018). int64, of which
    a product may overflow: the lower 32 bits are right all the same.
    """
    words = ((words ^ (words >> 16)) * 0x7FEB_352D) & _WORD
    words = ((words ^ (words >> 15)) * 0x846C_A68B) & _WORD
    return words ^ (words >> 16)
