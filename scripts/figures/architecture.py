"""The architecture: from a waveform to codes, to one stream of tokens, to Llama 3, and back."""

from pathlib import Path
from typing import Literal

import torch

from scripts.figures.style import LEFT, WIDTH, Drawing, number, svg_path
from torchtitan.audio.codec import FRAME_SIZE
from torchtitan.tools.errors import UserError
from torchtitan.tools.plots import Theme

UNITS = 4
"""Codes of a frame: one semantic, three acoustic."""
HEARD = ((12, 907, 3, 1999), (12, 41, 77, 820), (305, 41, 19, 1204), (305, 907, 260, 66), (88, 41, 3, 1433))
"""Codes of the first frames, as an example."""
MADE = ((88, 310, 27, 1404), (1720, 310, 54, 9), (1720, 12, 27, 611), (461, 310, 8, 1999), (12, 41, 140, 702))
"""Codes of the first frames that the model makes."""
FRAMES, BARS = 8, 5
"""Frames that each of the two waveforms shows, and bars a frame."""
MIDDLE, RIGHT = 324, 512
"""Where codec and codes begin, in pixels; sound begins at the margin."""
FRAME_WIDTH, CODEC_WIDTH, CELL, ROW = 32, 140, 46, 27
"""Width of a frame of sound, of the codec and of a column of codes, and height of a row of codes, in pixels."""


def draw_architecture(waveform: torch.Tensor, theme: Theme, path: Path) -> None:
    """Draw the way from a waveform to codes, tokens, the language model and back.

    Args:
        waveform: [n] at 24 kHz; half of its first 16 frames (1.28 s) is drawn as the prompt, half as what follows.
        path: the .svg file.
    """
    title = (
        "A waveform becomes frames of four Mimi codes, these one stream of tokens, of which Llama 3 predicts the next; "
        "Mimi makes a waveform of the new frames"
    )
    drawing = Drawing(theme, 536, title)
    levels = frame_levels(waveform)
    top, tokens, model, bottom = 40, 230, 298, 412

    draw_sound(drawing, top, levels[: FRAMES * BARS], theme.muted, "Prompt")
    end, right = top + UNITS * ROW + 6, LEFT + FRAME_WIDTH
    drawing.line(svg_path((LEFT, end), (LEFT, end + 5), (right, end + 5), (right, end)), theme.muted)
    drawing.text(LEFT, end + 17, "a frame: 80 ms", theme.muted, anchor="start", size=12)
    draw_codec(drawing, top, "Mimi encoder", "12.5 frames a second", theme.muted, 1)
    draw_codes(drawing, top, HEARD, 1)

    draw_stream(drawing, tokens, top + UNITS * ROW, model)
    drawing.box(LEFT, model, WIDTH - 2 * LEFT, 46, theme.block)
    drawing.text(LEFT + 20, model + 23, "Llama 3", anchor="start", size=16, style="bold")
    words = "predicts the next token, among the codes of the quantizer whose turn it is"
    drawing.text(LEFT + 100, model + 23, words, theme.muted, anchor="start")

    middle = RIGHT + len(MADE) * CELL / 2
    drawing.arrow((middle, model + 54), (middle, bottom - 26), theme.new.line)
    drawing.text(middle + 12, model + 68, "whole new frames", theme.new.text, anchor="start")
    draw_codes(drawing, bottom, MADE, FRAMES + 1)
    draw_codec(drawing, bottom, "Mimi decoder", "as the frames arrive", theme.new.line, -1)
    draw_sound(drawing, bottom, levels[FRAMES * BARS :], theme.new.line, "Continuation")
    drawing.write(path)


def frame_levels(waveform: torch.Tensor) -> list[float]:
    """Peaks of the first 16 frames of a waveform [n], :data:`BARS` a frame, as shares of the loudest.

    Raises:
        UserError: it is silent.
    """
    wanted = 2 * FRAMES * FRAME_SIZE
    padded = torch.nn.functional.pad(waveform[:wanted], (0, max(0, wanted - waveform.numel())))
    peaks = padded.abs().view(2 * FRAMES * BARS, -1).amax(dim=1)
    if not peaks.max() > 0:
        raise UserError("the prompt is silent in its first 1.28 s; there is no waveform to draw.")
    return (peaks / peaks.max()).tolist()


def draw_sound(drawing: Drawing, top: float, levels: list[float], color: str, name: str) -> None:
    """A waveform of eight frames with lines between them."""
    theme, height = drawing.theme, UNITS * ROW
    middle, width = top + height / 2, FRAME_WIDTH / BARS
    drawing.text(LEFT, top - 18, name, anchor="start", style="bold")
    drawing.text(LEFT + FRAMES * FRAME_WIDTH, top - 18, "waveform at 24 kHz", theme.muted, anchor="end")
    for frame in range(FRAMES + 1):
        x = LEFT + frame * FRAME_WIDTH
        drawing.line(svg_path((x, top), (x, top + height)), theme.grid, 1)
    bars = []
    for place, level in enumerate(levels):
        x, reach = LEFT + (place + 0.5) * width, max(0.8, 0.5 * height * level)
        bars.append(svg_path((x, middle - reach), (x, middle + reach)))
    drawing.line("".join(bars), color, 3)


def draw_codec(drawing: Drawing, top: float, name: str, about: str, color: str, direction: Literal[1, -1]) -> None:
    """A half of Mimi between waveform and codes, with arrows to the right (1) or to the left (-1)."""
    y = top + UNITS * ROW / 2
    drawing.box(MIDDLE, y - 30, CODEC_WIDTH, 60, drawing.theme.block)
    drawing.text(MIDDLE + CODEC_WIDTH / 2, y - 10, name, size=15, style="bold")
    drawing.text(MIDDLE + CODEC_WIDTH / 2, y + 12, about, drawing.theme.muted, size=12)
    gaps = ((LEFT + FRAMES * FRAME_WIDTH + 12, MIDDLE - 8), (MIDDLE + CODEC_WIDTH + 8, RIGHT - 12))
    for left, right in gaps:
        start, end = (left, right)[::direction]
        drawing.arrow((start, y), (end, y), color)


def draw_codes(drawing: Drawing, top: float, frames: tuple[tuple[int, ...], ...], first: int) -> None:
    """Frames as columns of codes, the semantic one on top; ``first`` is the number of the first frame."""
    theme, right = drawing.theme, RIGHT + len(frames) * CELL
    drawing.text(RIGHT - 4, top - 12, "frame", theme.muted, anchor="end", size=12)
    for column, codes in enumerate(frames):
        x = RIGHT + column * CELL
        drawing.text(x + CELL / 2, top - 12, str(first + column), theme.muted, size=12)
        for row, code in enumerate(codes):
            shades = theme.acoustic if row else theme.semantic
            drawing.box(x + 1, top + row * ROW + 1, CELL - 2, ROW - 2, shades, 4)
            drawing.text(x + CELL / 2, top + (row + 0.5) * ROW, str(code), shades.text, size=12, style="mono")
    for row in range(UNITS):
        drawing.text(right + 10, top + (row + 0.5) * ROW, "…", theme.muted)
    drawing.text(right + 26, top + 0.5 * ROW, "semantic", theme.semantic.text, anchor="start", size=12)
    drawing.text(right + 26, top + 2.5 * ROW, "acoustic", theme.acoustic.text, anchor="start", size=12)


def draw_stream(drawing: Drawing, top: float, codes_end: float, model: float) -> None:
    """The tokens of the first frame and of the new frame, of which the model predicts the third.

    Args:
        codes_end: where the frames of codes end, above.
        model: where the model begins, below.
    """
    theme, height, gap = drawing.theme, 28, 5
    pitch = (WIDTH - 2 * LEFT + gap) / (3 + 2 * UNITS)
    heard, new = ([f"<{code}_{q}>" for q, code in enumerate(codes)] for codes in (HEARD[0], MADE[0]))
    names = ["BOS", "<audio>", *heard, "…", *new]
    for place, name in enumerate(names):
        first = name in (heard[0], new[0])
        shades = theme.block if place < 2 else theme.semantic if first else theme.acoustic
        x = LEFT + place * pitch
        middle = x + (pitch - gap) / 2
        made = place - 3 - UNITS  # the place in the new frame
        if name == "…":
            drawing.text(middle, top + height / 2, name, theme.muted)
        else:
            drawing.box(x, top, pitch - gap, height, shades, 6, "4 3" if made >= 2 else "")
            if made <= 2:
                drawing.text(middle, top + height / 2, name, shades.text, size=12, style="mono")
        if made < 2:
            drawing.arrow((middle, top + height + 6), (middle, model - 6), theme.muted)
        elif made == 2:
            drawing.arrow((middle, model - 6), (middle, top + height + 6), theme.new.line)
    drawing.text(LEFT, top - 16, "One stream of tokens", anchor="start", style="bold")
    # Brackets over the two frames; the first one comes from its column of codes.
    for start, label, color in ((2, "frame 1", theme.muted), (3 + UNITS, f"frame {FRAMES + 1}", theme.new.text)):
        left, right = LEFT + start * pitch, LEFT + (start + UNITS) * pitch - gap
        drawing.line(svg_path((left, top - 5), (left, top - 10), (right, top - 10), (right, top - 5)), color)
        drawing.text(right, top - 21, label, color, anchor="end", size=12)
    x, y, to_x, to_y = RIGHT + CELL / 2, codes_end + 6, LEFT + (2 + UNITS / 2) * pitch - gap / 2, top - 14
    half = (y + to_y) / 2
    curve = f"M{number(x)} {number(y)}C{number(x)} {number(half)} {number(to_x)} {number(half)} "
    drawing.line(f"{curve}{number(to_x)} {number(to_y - 3)}", theme.muted)
    drawing.arrow((to_x, to_y - 3), (to_x, to_y), theme.muted)
