"""How far what a decoder makes is from what it should make: by spectra, and as discriminators see it."""

import itertools

import torch
import torch.nn.functional as F

from torchtitan.audio.waveform import SAMPLE_RATE
from torchtitan.codec_training.mel import mel_spectrum

RESOLUTIONS = ((2048, 96), (1024, 80), (512, 64), (256, 40), (128, 20))
"""Samples of a window and mel bands, for each resolution of the spectral loss."""
FLOOR = 1e-4
"""Amplitude below which differences stop to count."""
DISCRIMINATOR_WINDOWS = (1024, 512, 256)
"""Samples of a window, for each discriminator."""
DISCRIMINATOR_TOP_HZ = 8_000
"""The discriminators see what lies below."""
CHANNELS = 8
"""Of a discriminator's first two convolutions; the others have twice as many."""


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
        """What the discriminators are trained with: 1 is real, 0 is made."""
        losses = []
        for part in self.parts:
            losses.append((part(true)[0].float() - 1).square().mean() + part(made)[0].float().square().mean())
        return torch.stack(losses).mean()

    def judge(self, made: torch.Tensor, true: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the decoder is trained with: to be taken for real, and to have the features of the real."""
        fooled, matched = [], []
        for part in self.parts:
            with torch.no_grad():
                _, real_features = part(true)
            verdict, features = part(made)
            fooled.append((verdict.float() - 1).square().mean())
            for a, b in zip(features, real_features, strict=True):
                matched.append((a.float() - b.float()).abs().mean() / b.float().abs().mean().clamp(min=1e-5))
        return torch.stack(fooled).mean(), torch.stack(matched).mean()
