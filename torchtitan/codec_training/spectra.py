"""Mel spectra, and the losses of a decoder: the spectral loss and the discriminators'."""

import itertools
from functools import cache

import torch
import torch.nn.functional as F
import torchaudio

from torchtitan.audio.waveform import SAMPLE_RATE

LOW_HZ, HIGH_HZ = 60.0, 7_600.0
"""Bounds of the mel bands of teacher and measures: where stored clips, at 16 kHz, have speech."""
RESOLUTIONS = ((2048, 96), (1024, 80), (512, 64), (256, 40), (128, 20))
"""Samples of a window and mel bands, for each resolution of the spectral loss."""
FLOOR = 1e-4  # amplitude below which differences do not count
DISCRIMINATOR_WINDOWS = (1024, 512, 256)  # samples of a window, for each discriminator
DISCRIMINATOR_TOP_HZ = 8_000  # above it the discriminators see nothing
CHANNELS = 8  # of a discriminator's first two convolutions; the others have twice as many


@cache
def mel_filters(
    window: int, bands: int, device: torch.device, low: float = 0.0, high: float = SAMPLE_RATE / 2
) -> torch.Tensor:
    """Triangular mel filters [bands, window // 2 + 1]."""
    filters = torchaudio.functional.melscale_fbanks(window // 2 + 1, low, high, bands, SAMPLE_RATE)
    return filters.T.contiguous().to(device)


def mel_spectrum(
    waveform: torch.Tensor,
    window: int,
    bands: int,
    *,
    hop: int | None = None,
    size: int | None = None,
    low: float = 0.0,
    high: float = SAMPLE_RATE / 2,
    pad_mode: str = "reflect",
) -> torch.Tensor:
    """Amplitudes in mel bands: 1 for a full-scale sine in the band's middle.

    Args:
        waveform: [..., samples] at 24 kHz.
        window, hop, size: samples of a Hann window, between windows (a quarter of one by default), and of the transform
            (a window by default).
        bands: how many, from `low` to `high` in Hz.
        pad_mode: what lies before and after the waveform, as torch.stft names it.

    Returns:
        [..., bands, 1 + samples // hop].
    """
    hann = torch.hann_window(window, device=waveform.device)
    size = size or window
    spectrum = torch.stft(waveform, size, hop or window // 4, window, hann, pad_mode=pad_mode, return_complex=True)
    return mel_filters(size, bands, waveform.device, low, high) @ spectrum.abs() * (2 / hann.sum())


def spectral_loss(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Mean distance of log-mel spectra, plus that of the amplitudes relative to their mean, over all resolutions.

    The floor below the logarithm is low on purpose: at 1e-2, quiet bands and fricatives do not count, and speech
    comes out unintelligible.

    Args:
        made, true: [B, samples].
    """
    losses = []
    for window, bands in RESOLUTIONS:
        a, b = mel_spectrum(made, window, bands), mel_spectrum(true, window, bands)
        losses.append((torch.log(a + FLOOR) - torch.log(b + FLOOR)).abs().mean())
        losses.append((a - b).abs().mean() / b.mean().clamp(min=FLOOR))
    return torch.stack(losses).sum() / len(RESOLUTIONS)


class SpectralDiscriminator(torch.nn.Module):
    """Judges complex spectra at one resolution, as in EnCodec (arXiv 2210.13438), with few channels.

    Amplitudes are compressed (to the power of 0.3), phases kept.
    """

    def __init__(self, window: int):
        super().__init__()
        self.window = window
        self.bins = DISCRIMINATOR_TOP_HZ * window // SAMPLE_RATE + 1
        widths = [2, CHANNELS, CHANNELS, 2 * CHANNELS]
        self.convolutions = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, (9, 3), stride=(2, 1), padding=(4, 1)) for a, b in itertools.pairwise(widths)
        )
        self.convolutions.append(torch.nn.Conv2d(2 * CHANNELS, 2 * CHANNELS, 3, padding=1))
        self.verdict = torch.nn.Conv2d(2 * CHANNELS, 1, 3, padding=1)

    def forward(self, waveform: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """[B, samples] to verdicts (1 for real) at many places, and the features on the way to them."""
        hann = torch.hann_window(self.window, device=waveform.device)
        spectrum = torch.stft(waveform.float(), self.window, self.window // 4, window=hann, return_complex=True)
        spectrum = spectrum[:, : self.bins] * (2 / hann.sum())
        spectrum = 2 * spectrum * (spectrum.abs() + 1e-5) ** -0.7
        hidden = torch.stack([spectrum.real, spectrum.imag], 1)
        features = []
        for convolution in self.convolutions:
            hidden = F.leaky_relu(convolution(hidden), 0.2)
            features.append(hidden)
        return self.verdict(hidden), features


class Discriminators(torch.nn.Module):
    """One discriminator for each resolution; least-squares losses and feature matching."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(SpectralDiscriminator(window) for window in DISCRIMINATOR_WINDOWS)

    def loss(self, made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        """The discriminators' loss: 1 is real, 0 is made."""
        verdicts = [(part(true)[0].float(), part(made)[0].float()) for part in self.parts]
        losses = [(real - 1).square().mean() + fake.square().mean() for real, fake in verdicts]
        return torch.stack(losses).mean()

    def judge(self, made: torch.Tensor, true: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The decoder's losses: to be taken for real, and to have the features of the real."""
        fooled, matched = [], []
        for part in self.parts:
            with torch.no_grad():
                _, real = part(true)
            verdict, features = part(made)
            fooled.append((verdict.float() - 1).square().mean())
            for a, b in zip(features, real, strict=True):
                matched.append((a.float() - b.float()).abs().mean() / b.float().abs().mean().clamp(min=1e-5))
        return torch.stack(fooled).mean(), torch.stack(matched).mean()
