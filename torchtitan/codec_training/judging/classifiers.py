"""What hears words and voices, and how often it is right."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from torchtitan.codec_training.judging.waveforms import loudness, mel_levels, pitch_track
from torchtitan.eval.statistics import standard_error, wilson_interval

WORD_COLUMNS = 32
"""That a word's spectrum is stretched to."""
LOUD_DB = 26.0
"""How far below a clip's loudest column columns stop to be speech."""
VOICED = 0.6
"""How periodic a voiced column is at least."""
PITCH_WEIGHT = 2
"""A semitone weighs as much as two decibels: there are two figures of pitch and eighty of levels."""


class Classifier:
    """Multinomial logistic regression with an L2 penalty, fitted to its one optimum by L-BFGS in double precision.

    Features are centred and divided by one common deviation, so they should be of one kind or one size.

    Args:
        features: float [N, D].
        labels: int64 [N], from 0 to classes - 1.
        penalty: of the squared weights, beside the mean cross-entropy.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float = 1e-3):
        points = features.double()
        self.centre, self.scale = points.mean(0), points.std(0, correction=0).square().mean().sqrt().clamp(min=1e-9)
        points = (points - self.centre) / self.scale
        self.weight = torch.zeros(classes, points.shape[1], dtype=torch.float64, requires_grad=True)
        self.bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(points @ self.weight.T + self.bias, labels)
            value = value + penalty * self.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """float [N, D] to the likeliest classes, int64 [N]."""
        return ((features.double() - self.centre) / self.scale @ self.weight.T + self.bias).argmax(1)


def word_features(waveform: torch.Tensor) -> torch.Tensor:
    """A word's levels in mel bands, stretched to 32 columns and freed of their mean: [n] to [40 * 32], in dB."""
    levels = F.interpolate(mel_levels(waveform)[None], WORD_COLUMNS, mode="linear", align_corners=True)[0]
    return (levels - levels.mean()).flatten()


def voice_features(waveform: torch.Tensor) -> torch.Tensor:
    """What a voice is like on average: [n] at 24 kHz to [82].

    Mean (less the mean of all bands, which is the level) and deviation of the levels in each mel band over the loud
    columns, in dB, and mean and deviation of the pitch over the periodic ones among them, in semitones.
    """
    levels = mel_levels(waveform)
    loud = loudness(levels) >= loudness(levels).max() - LOUD_DB
    pitch, periodic = pitch_track(waveform)
    voiced = loud & (periodic > VOICED)
    if not voiced.any():
        voiced = loud
    mean, deviation = levels[:, loud].mean(1), levels[:, loud].std(1, correction=0)
    pitches = PITCH_WEIGHT * torch.stack([pitch[voiced].mean(), pitch[voiced].std(correction=0)])
    return torch.cat([mean - mean.mean(), deviation, pitches])


def score(right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy with its standard error, 95 % interval (Wilson) and number of trials; None for both without any."""
    if not len(right):
        return {"accuracy": None, "standard_error": None, "interval": None, "clips": 0}
    points = [float(value) for value in right]
    accuracy = sum(points) / len(points)
    interval = wilson_interval(accuracy, len(points))
    return {
        "accuracy": accuracy,
        "standard_error": standard_error(points),
        "interval": list(interval),
        "clips": len(points),
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error, minimum and number of values."""
    if not len(values):
        return {"mean": None, "standard_error": None, "minimum": None, "clips": 0}
    return {
        "mean": sum(values) / len(values),
        "standard_error": standard_error(values),
        "minimum": min(values),
        "clips": len(values),
    }
