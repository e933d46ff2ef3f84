"""Measures of waveforms: levels, intelligibility, pitch, and classifiers of words and voices."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchaudio

from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.codec_training.spectra import HIGH_HZ, LOW_HZ, mel_spectrum
from torchtitan.eval.statistics import standard_error, wilson_interval
from torchtitan.tools.errors import UserError

STOI_RATE = 10_000  # samples a second
MEL_WINDOW, MEL_SIZE, MEL_HOP, MEL_BANDS = 600, 1024, 240, 40
"""Log-mel spectra, in samples: windows of 25 ms, and a column each 10 ms."""
FLOOR_DB = 60.0  # below a clip's loudest value; differences further down do not count
SILENT_SECONDS, SILENT_DB = 0.2, 30.0
"""A continuation with less speech is silent; speech is at most this far below the prompt's loudest column."""
PITCH_WINDOW = 1440  # samples: 60 ms
LOWEST_HZ, HIGHEST_HZ = 60, 400  # bounds of the pitch
OCTAVE_COST = 0.02  # by how much more periodic a pitch must be than one an octave higher
WORD_COLUMNS = 32  # columns that a word's spectrum is stretched to
LOUD_DB = 26.0  # speech is at most this far below a clip's loudest column
VOICED = 0.6  # least periodicity of a voiced column
PITCH_WEIGHT = 2  # a semitone weighs as much as two decibels: a voice has two features of pitch and eighty of levels


def mel_levels(waveform: torch.Tensor, floor: float | None = None) -> torch.Tensor:
    """Levels in mel bands from 60 Hz to 7.6 kHz, one column each 10 ms: [n] at 24 kHz to [40, 1 + n // 240], in dB.

    Args:
        floor: to which lower values are raised; 60 dB below the highest one by default.
    """
    how: dict[str, Any] = {"hop": MEL_HOP, "size": MEL_SIZE, "low": LOW_HZ, "high": HIGH_HZ, "pad_mode": "constant"}
    levels = 20 * torch.log10(mel_spectrum(waveform, MEL_WINDOW, MEL_BANDS, **how) + 1e-7)
    return levels.clamp(min=float(levels.max()) - FLOOR_DB if floor is None else floor)


def log_mel_distance(made: torch.Tensor, true: torch.Tensor) -> float:
    """Mean absolute difference in dB of two clips' levels in mel bands, down to 60 dB below the true clip's loudest.

    Args:
        made, true: [n] at 24 kHz.
    """
    levels = mel_levels(true)
    return float((mel_levels(made, float(levels.max()) - FLOOR_DB) - levels).abs().mean())


def loudness(levels: torch.Tensor) -> torch.Tensor:
    """Level of all bands together: [bands, columns] to [columns], in dB."""
    return 10 * torch.log10((10 ** (levels / 10)).sum(0))


def speaks(waveform: torch.Tensor, prompt: torch.Tensor) -> bool:
    """Whether a continuation [n] has speech: 0.2 s of it less than 30 dB below the prompt's loudest 25 ms."""
    if not len(waveform):
        return False
    loud = loudness(mel_levels(waveform)) > loudness(mel_levels(prompt)).max() - SILENT_DB
    return int(loud.sum()) * MEL_HOP >= SILENT_SECONDS * SAMPLE_RATE


def intelligibility(made: torch.Tensor, true: torch.Tensor) -> float | None:
    """Short-time objective intelligibility of a clip, given the clean one: 1 for the same clip, 0.4 for white noise.

    By Taal and others (IEEE Transactions on Audio, Speech and Language Processing, 2011), at 10 kHz. None for a clip
    with less than 0.4 s of speech, for which it is not defined.

    Args:
        made, true: [n] at 24 kHz.

    Raises:
        UserError: pystoi is not installed.
    """
    stoi = load_pystoi()
    pair = [torchaudio.functional.resample(w.double(), SAMPLE_RATE, STOI_RATE).numpy() for w in (true, made)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = float(stoi(*pair, STOI_RATE, extended=False))
    return None if any("Not enough STFT frames" in str(warning.message) for warning in caught) else value


def load_pystoi() -> Any:
    """pystoi's function.

    Raises:
        UserError: it is not installed.
    """
    try:
        from pystoi import stoi
    except ImportError:
        raise UserError("STOI is computed by pystoi, which is not installed; `uv sync` brings it.") from None
    return stoi


def pitch_track(waveform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pitch in semitones above 100 Hz, and how periodic the sound is (0 to 1), one value each 10 ms.

    The highest peak between 60 and 400 Hz of the windows' autocorrelation, divided by that of the window alone, with a
    small preference for higher pitches (after Boersma, IFA Proceedings 17, 1993).

    Args:
        waveform: [n] at 24 kHz.

    Returns:
        two tensors [1 + n // 240].
    """
    length = PITCH_WINDOW
    shortest, longest = SAMPLE_RATE // HIGHEST_HZ, SAMPLE_RATE // LOWEST_HZ
    window = torch.hann_window(length)
    pieces = F.pad(waveform, (length // 2, length)).unfold(0, length, MEL_HOP)[: 1 + len(waveform) // MEL_HOP]
    pieces = (pieces - pieces.mean(1, keepdim=True)) * window
    size = 2 * length
    correlation = torch.fft.irfft(torch.fft.rfft(pieces, size).abs().square(), size)
    own = torch.fft.irfft(torch.fft.rfft(window, size).abs().square(), size)
    normal = correlation / (correlation[:, :1] + 1e-6) / (own / own[0])
    lags = torch.arange(shortest, longest)
    scores = normal[:, shortest:longest] - OCTAVE_COST * torch.log2(lags / shortest)
    best = scores.argmax(1)
    periodic = normal[:, shortest:longest].gather(1, best[:, None])[:, 0].clamp(0, 1)
    return 12 * torch.log2(SAMPLE_RATE / lags[best] / 100), periodic


class Classifier:
    """Multinomial logistic regression with an L2 penalty, fitted by L-BFGS in double precision.

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
    """Average features of a voice: [n] at 24 kHz to [82].

    They are the mean (less the mean of all bands, which is the level) and deviation of the levels in each mel band over
    the loud columns, in dB, and the mean and deviation of the pitch over the voiced ones among them, in semitones.
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


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error, minimum and number of values; None where there are too few."""
    mean, minimum = (sum(values) / len(values), min(values)) if values else (None, None)
    return {"mean": mean, "standard_error": standard_error(values), "minimum": minimum, "clips": len(values)}


def score(right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy with its standard error, 95 % interval (Wilson) and number of trials; None without any."""
    accuracy = sum(right) / len(right) if right else None
    interval = None if accuracy is None else list(wilson_interval(accuracy, len(right)))
    return {"accuracy": accuracy, "standard_error": standard_error(right), "interval": interval, "clips": len(right)}
