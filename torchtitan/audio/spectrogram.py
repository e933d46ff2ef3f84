"""A picture of speech: waveform above, spectrogram below, with the end of the prompt marked."""

from pathlib import Path

import torch

from torchtitan.audio.waveform import SAMPLE_RATE

_WINDOW, _HOP = 1024, 256
_MAX_HZ = 8_000


def spectrogram(waveform: torch.Tensor) -> torch.Tensor:
    """Power in decibels below the loudest point, at least -80: a waveform [n] to [513, 1 + n // 256].

    Windows of 43 ms (Hann), every 11 ms, frequencies from 0 to 12 kHz.
    """
    window = torch.hann_window(_WINDOW)
    pad = max(0, _WINDOW - waveform.numel())
    spectrum = torch.stft(
        torch.nn.functional.pad(waveform, (0, pad)),
        _WINDOW,
        _HOP,
        window=window,
        pad_mode="constant",
        return_complex=True,
    )
    decibels = 20 * spectrum.abs().clamp(min=1e-8).log10()
    return (decibels - decibels.max()).clamp(min=-80)


def draw_spectrogram(
    path: Path,
    waveform: torch.Tensor,
    prompt_samples: int = 0,
    title: str | None = None,
    *,
    colormap: str = "magma",
    marker: str = "#cc5f20",
    dpi: float = 100,
) -> None:
    """Draw a waveform [n] at 24 kHz into a PNG file of 10 by 4.5 inches; a line marks where ``prompt_samples`` end.

    Args:
        colormap: matplotlib's name of the colours from -80 to 0 dB.
        marker: the colour of the line and of the words above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seconds = waveform.numel() / SAMPLE_RATE
    figure = Figure(figsize=(10, 4.5), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2.5])
    # An outline of at most 4,000 points draws as fast for ten minutes as for ten seconds.
    step = max(1, waveform.numel() // 4_000)
    parts = waveform[: waveform.numel() // step * step].view(-1, step)
    times = [i * step / SAMPLE_RATE for i in range(len(parts))]
    above.fill_between(times, parts.amin(dim=1), parts.amax(dim=1), linewidth=0.5, color="#3b6ea5")
    above.set_ylim(-1, 1)
    above.set_ylabel("amplitude")
    image = below.imshow(
        spectrogram(waveform).numpy(),
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, SAMPLE_RATE / 2),
        cmap=colormap,
        vmin=-80,
        vmax=0,
        interpolation="nearest",
    )
    below.set_ylim(0, _MAX_HZ)
    below.set_ylabel("frequency in Hz")
    below.set_xlabel("seconds")
    figure.colorbar(image, ax=below, label="dB", pad=0.01)
    if 0 < prompt_samples < waveform.numel():
        boundary = prompt_samples / SAMPLE_RATE
        for axes in (above, below):
            axes.axvline(boundary, color=marker, linewidth=1.5)
        above.text(boundary, 1.05, "prompt ◂ ▸ continuation", ha="center", va="bottom", color=marker)
    if title:
        figure.suptitle(title)
    figure.savefig(path)
