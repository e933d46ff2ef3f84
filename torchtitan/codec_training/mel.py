"""The mel spectrum that losses, teacher and measures share."""

from functools import cache

import torch
import torchaudio

from torchtitan.audio.waveform import SAMPLE_RATE

LOW_HZ, HIGH_HZ = 60.0, 7_600.0
"""Where stored clips, at 16 kHz, have speech: bounds of the bands of teacher and measures."""


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
