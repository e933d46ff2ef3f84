"""The continuation: waveform and spectrogram of a prompt and what a model made follow it."""

import math
from pathlib import Path
from typing import Any

from torchtitan.audio.codec import FRAME_SIZE
from torchtitan.audio.spectrogram import draw_spectrogram
from torchtitan.audio.waveform import SAMPLE_RATE, load_audio
from torchtitan.tools.errors import UserError
from torchtitan.tools.plots import Theme, drawn_for

PNG_COLORS = 256


def draw_continuation(continuation: Path, prompt: Path, theme: Theme, path: Path) -> None:
    """Draw waveform and spectrogram of speech, and where the prompt that it begins with ends.

    Raises:
        UserError: a file is missing or no audio, or there is nothing after the prompt.
    """
    from PIL import Image

    if not continuation.is_file():
        raise UserError(
            f"{continuation}: there is no such file; scripts/quickstart.py makes one, and inference.py from any model."
        )
    waveform, length = load_audio(continuation), load_audio(prompt).numel()
    # The continuation begins after the prompt's last frame, which may be an incomplete one.
    end = math.ceil(length / FRAME_SIZE) * FRAME_SIZE
    if waveform.numel() <= end:
        raise UserError(f"{continuation}: nothing follows the {end / SAMPLE_RATE:.2f} s of the prompt {prompt}.")
    colors: dict[str, Any] = {"colormap": theme.colormap, "marker": theme.new.line}
    with drawn_for(theme, font_size=12):
        draw_spectrogram(path, waveform, end, dpi=160, **colors)
    with Image.open(path) as image:
        few = image.quantize(PNG_COLORS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
