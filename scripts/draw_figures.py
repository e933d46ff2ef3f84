"""Draw the figures that the README shows: ``uv run python scripts/draw_figures.py``, from the repository's root.

Each is drawn twice, ``NAME-light`` and ``NAME-dark``, for the two kinds of page:

- ``architecture`` (SVG): from a waveform to codes, to one stream of tokens, to Llama 3, and back. The waveform is the
  prompt, its second half stands for what follows; the codes are examples.
- ``training-curve`` (SVG): the losses of a run, from its metrics.jsonl.
- ``continuation`` (PNG): waveform and spectrogram of a prompt and what a model made follow it.
- ``benchmarks`` (SVG): how many times as fast as the plain way, from benchmarks/results.json.
- ``gpu`` (SVG, only when asked for): the same on a GPU, from what benchmarks/gpu.py wrote.

The same input gives the same bytes. A figure whose input is missing is named, the others are drawn all the same, and
the exit code is 2.
"""

import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from torchtitan.audio.codec import FRAME_SIZE
from torchtitan.audio.spectrogram import draw_spectrogram
from torchtitan.audio.waveform import SAMPLE_RATE, load_audio
from torchtitan.tools.errors import UserError, run_command
from torchtitan.tools.plots import THEMES, Shades, Theme, draw_losses, drawn_for, read_metrics

Name = Literal["architecture", "training-curve", "continuation", "benchmarks", "gpu"]
SANS = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, 'Liberation Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', monospace"
WIDTH = 840
"""Of the drawings, in pixels: what a page of GitHub shows without making it smaller."""
PNG_COLORS = 256


@dataclass
class Options:
    """What to draw, and from what."""

    output: Path = Path("assets/figures")
    """Folder for the figures."""
    only: tuple[Name, ...] = ("architecture", "training-curve", "continuation", "benchmarks")
    """The figures to draw."""
    run: Path = Path("outputs/quickstart/quickstart")
    """Folder of a training run, with its metrics.jsonl."""
    continuation: Path = Path("outputs/quickstart/output.wav")
    """Audio file that begins with the prompt, as inference.py writes it."""
    prompt: Path = Path("assets/prompt.flac")
    """Audio file of the prompt: the waveform of the first figure, and how long the prompt is in the continuation."""
    results: Path = Path("benchmarks/results.json")
    """Ratios that were measured by benchmarks/*.py."""
    gpu: Path = Path("benchmarks/gpu")
    """Folder of the results of benchmarks/gpu.py."""


# --------------------------------------------------------------------------------------------------------------------
# Drawings


class Drawing:
    """An SVG of :data:`WIDTH` pixels, put together from shapes in the colours of a theme. Positions are in pixels."""

    def __init__(self, theme: Theme, height: float, title: str):
        self.theme = theme
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {_number(height)}" width="{WIDTH}" '
            f'height="{_number(height)}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>text{{font-family:{SANS}}} .mono{{font-family:{MONO}}} .bold{{font-weight:600}}</style>",
        ]

    def add(self, tag: str, content: str | None = None, **attributes: float | str) -> None:
        """An element; ``stroke_width`` is written as stroke-width, numbers to a tenth of a pixel."""
        written = "".join(
            f' {name.replace("_", "-")}="{value if isinstance(value, str) else _number(value)}"'
            for name, value in attributes.items()
            if value != ""
        )
        self.parts.append(f"<{tag}{written}/>" if content is None else f"<{tag}{written}>{escape(content)}</{tag}>")

    def text(
        self,
        x: float,
        y: float,
        content: str,
        color: str = "",
        *,
        anchor: Literal["start", "middle", "end"] = "middle",
        size: float = 13,
        style: Literal["", "bold", "mono"] = "",
    ) -> None:
        """Words of which ``anchor`` is at ``x``, and half of the height at ``y``."""
        place: dict[str, float | str] = {"x": x, "y": y + 0.35 * size, "text_anchor": anchor, "font_size": size}
        self.add("text", content, **place, fill=color or self.theme.text, **{"class": style})

    def box(
        self, x: float, y: float, width: float, height: float, shades: Shades, radius: float = 6, dash: str = ""
    ) -> None:
        """A rounded rectangle; one with a dashed outline is empty."""
        shape = {"x": x, "y": y, "width": width, "height": height, "rx": radius}
        self.add("rect", **shape, fill="none" if dash else shades.fill, stroke=shades.line, stroke_dasharray=dash)

    def line(self, path: str, color: str, width: float = 1.5) -> None:
        """A line along an SVG path."""
        ends = {"stroke_linecap": "round", "stroke_linejoin": "round"}
        self.add("path", d=path, fill="none", stroke=color, stroke_width=width, **ends)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
        """A horizontal or vertical arrow."""
        (x, y), (to_x, to_y) = start, end
        dx, dy = 5 * ((to_x > x) - (to_x < x)), 5 * ((to_y > y) - (to_y < y))
        left, right = (to_x - dx - 0.8 * dy, to_y - dy - 0.8 * dx), (to_x - dx + 0.8 * dy, to_y - dy + 0.8 * dx)
        self.line(_path(start, end) + _path(left, end, right), color)

    def write(self, path: Path) -> None:
        path.write_text("\n".join([*self.parts, "</svg>", ""]), encoding="utf-8")


def _number(value: float) -> str:
    return f"{round(value, 1):g}"


def _path(*points: tuple[float, float]) -> str:
    """The SVG path of straight lines from point to point."""
    return "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points)


# --------------------------------------------------------------------------------------------------------------------
# The architecture

UNITS = 4
"""Codes a frame in the drawing: one semantic, three acoustic."""
HEARD = ((12, 907, 3, 1999), (12, 41, 77, 820), (305, 41, 19, 1204), (305, 907, 260, 66), (88, 41, 3, 1433))
"""Codes of the first frames, as an example."""
MADE = ((88, 310, 27, 1404), (1720, 310, 54, 9), (1720, 12, 27, 611), (461, 310, 8, 1999), (12, 41, 140, 702))
"""Codes of the first frames that the model makes."""
FRAMES, BARS = 8, 5
"""Frames that each of the two waveforms shows, and bars a frame."""
LEFT, MIDDLE, RIGHT = 24, 324, 512
"""Where sound, codec and codes begin."""
FRAME_WIDTH, CODEC_WIDTH, CELL, ROW = 32, 140, 46, 27


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
    drawing.line(_path((LEFT, end), (LEFT, end + 5), (right, end + 5), (right, end)), theme.muted)
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
    for number in range(FRAMES + 1):
        x = LEFT + number * FRAME_WIDTH
        drawing.line(_path((x, top), (x, top + height)), theme.grid, 1)
    bars = []
    for number, level in enumerate(levels):
        x, reach = LEFT + (number + 0.5) * width, max(0.8, 0.5 * height * level)
        bars.append(_path((x, middle - reach), (x, middle + reach)))
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
    """The tokens: those of the first frame and of the one that is being made, of which the model predicts the third.

    Args:
        codes_end: where the frames of codes end, above.
        model: where the model begins, below.
    """
    theme, height = drawing.theme, 28
    gap = 5
    pitch = (WIDTH - 2 * LEFT + gap) / (3 + 2 * UNITS)
    names = ["BOS", "<audio>", *_names(HEARD[0]), "…", *_names(MADE[0])]
    for place, name in enumerate(names):
        unit = place - 2 if place < 2 + UNITS else place - 3 - UNITS
        shades = theme.block if place < 2 else theme.acoustic if unit else theme.semantic
        x = LEFT + place * pitch
        middle = x + (pitch - gap) / 2
        made = place - 3 - UNITS
        if name == "…":
            drawing.text(middle, top + height / 2, name, theme.muted)
        else:
            drawing.box(x, top, pitch - gap, height, shades, 6, "4 3" if made >= 2 else "")
        if name != "…" and made <= 2:
            drawing.text(middle, top + height / 2, name, shades.text, size=12, style="mono")
        if made < 2:
            drawing.arrow((middle, top + height + 6), (middle, model - 6), theme.muted)
        elif made == 2:
            drawing.arrow((middle, model - 6), (middle, top + height + 6), theme.new.line)
    drawing.text(LEFT, top - 16, "One stream of tokens", anchor="start", style="bold")
    # Brackets over the two frames; the first one comes from its column of codes.
    for start, label, color in ((2, "frame 1", theme.muted), (3 + UNITS, f"frame {FRAMES + 1}", theme.new.text)):
        left, right = LEFT + start * pitch, LEFT + (start + UNITS) * pitch - gap
        drawing.line(_path((left, top - 5), (left, top - 10), (right, top - 10), (right, top - 5)), color)
        drawing.text(right, top - 21, label, color, anchor="end", size=12)
    x, y, to_x, to_y = RIGHT + CELL / 2, codes_end + 6, LEFT + (2 + UNITS / 2) * pitch - gap / 2, top - 14
    half = (y + to_y) / 2
    curve = f"M{_number(x)} {_number(y)}C{_number(x)} {_number(half)} {_number(to_x)} {_number(half)} "
    drawing.line(f"{curve}{_number(to_x)} {_number(to_y - 3)}", theme.muted)
    drawing.arrow((to_x, to_y - 3), (to_x, to_y), theme.muted)


def _names(codes: tuple[int, ...]) -> list[str]:
    return [f"<{code}_{quantizer}>" for quantizer, code in enumerate(codes)]


# --------------------------------------------------------------------------------------------------------------------
# Benchmarks


@dataclass(frozen=True)
class Bar:
    """What was measured, and how many times as fast as the plain way it is."""

    group: str
    label: str
    ratio: float


@dataclass(frozen=True)
class Results:
    """Ratios, what they were measured on, and what helps to read them."""

    machine: str
    note: str
    bars: list[Bar]


def read_results(path: Path) -> Results:
    """The content of a file like benchmarks/results.json.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; benchmarks/results.json is one.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        bars = [Bar(str(entry["group"]), str(entry["label"]), float(entry["ratio"])) for entry in content["results"]]
        results = Results(f"{content['machine']}, {content['software']}", str(content["note"]), bars)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of results ({type(error).__name__}: {error}).") from None
    if not bars or not all(0 < bar.ratio < math.inf for bar in bars):
        raise UserError(f"{path}: results are needed, each with a ratio above 0.")
    return results


def read_gpu_results(folder: Path) -> Results:
    """Ratios from the JSON files that benchmarks/gpu.py wrote, with the card, the versions and the date.

    Raises:
        UserError: there are none, or they are of several cards or versions.
    """
    cases: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            cases |= {f"{found['part']}/{name}": case for name, case in found["cases"].items() if case.get("ok")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: not a file of benchmarks/gpu.py ({type(error).__name__}: {error}).") from None
    try:
        bars = list(_gpu_bars(cases))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{folder}: the results lack something ({type(error).__name__}: {error}).") from None
    if not bars:
        raise UserError(f"{folder}: it holds no results that can be compared; benchmarks/gpu.py writes some.")
    facts = ("device", "torch", "transformers", "smoke")
    made = {tuple(case["on"][key] for key in facts): case["on"]["date"][:10] for case in cases.values()}
    if len(made) > 1:
        raise UserError(f"{folder}: its results are of several machines or versions: {', '.join(map(str, made))}.")
    ((device, torch_version, transformers_version, smoke), date) = made.popitem()
    machine = f"{device}, torch {torch_version}, transformers {transformers_version}, {date}"
    note = "1.3B in bfloat16, codec in float32; the bound is what memory can read"
    trained = {name.split("/")[1]: case["figures"]["rows"] for name, case in cases.items() if "training/" in name}
    if len(set(trained.values())) > 1:  # one of them needs more memory
        note += "; rows a step: " + ", ".join(f"{name} {rows}" for name, rows in trained.items())
    note = "small sizes, which only show that the suite works" if smoke else note
    return Results(machine, note, bars)


def _gpu_bars(cases: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    for name in ("ours", "ours packed", "ours compiled", "ours packed compiled"):
        plain = cases.get(f"training/plain{' compiled' if 'compiled' in name else ''}")
        if (case := cases.get(f"training/{name}")) and plain:
            ours, theirs = case["figures"], plain["figures"]
            speed = ours["real_tokens_per_second"]
            mfu = "" if ours["mfu_positions"] is None else f", {100 * ours['mfu_positions']:.0f} % MFU"
            how = name.removeprefix("ours").strip() or "as it is"
            yield Bar("Training", f"{how}: {speed:,.0f} tokens/s{mfu}", speed / theirs["real_tokens_per_second"])
    for name in ("1 row", "1 row compiled", "8 rows", "64 rows"):
        if case := cases.get(f"generation/{name}"):
            ours = case["figures"]
            label = f"{name}: {ours['ids_per_second']:,.0f} ids/s, {100 * ours['share']:.0f} % of the bound"
            yield Bar("Generation", label, ours["ratio"])
    if case := cases.get("codec/encoding"):
        speed = case["audio_seconds_per_second"]
        most = max((name for name in speed if name.endswith("clips")), key=lambda name: int(name.split()[0]))
        yield Bar("Tokenization", f"{most} at once: {speed[most]:,.0f} s of audio a second", speed["ratio"])
    if case := cases.get("evaluation/pairs"):
        ours = case["figures"]
        for name, label in (("ours", "pairs of clips"), ("ours, codes kept", "codes kept")):
            speed = ours[f"pairs_per_second, {name}"]
            yield Bar("Evaluation", f"{label}: {speed:,.1f} a second", ours[f"ratio, {name}"])


def draw_benchmarks(results: Results, theme: Theme, path: Path) -> None:
    """Draw ratios as bars from 1 on a logarithmic scale, neighbours of the same group together.

    Args:
        path: the .svg file.
    """
    bars, top, row, gap = results.bars, 82, 25, 12
    groups = [list(group) for _, group in itertools.groupby(bars, lambda bar: bar.group)]
    bottom = top + len(bars) * row + (len(groups) - 1) * gap + 6
    drawing = Drawing(theme, bottom + 58, "Times as fast as the plain way of doing the same, on the same machine")
    drawing.text(LEFT, 20, "Times as fast as the plain way of doing the same", anchor="start", size=16, style="bold")
    about = f"{results.machine}; both ways in one run; logarithmic scale"
    drawing.text(LEFT, 43, about, theme.muted, anchor="start")

    # Below 1 there is only as much room as the bars need.
    low, high = min(0.9, *(0.95 * bar.ratio for bar in bars)), max(2.0, *(bar.ratio for bar in bars))
    # Labels are about so many pixels a letter.
    begin = max(404, LEFT + 134 + round(6.4 * max(len(bar.label) for bar in bars)))
    end = WIDTH - LEFT - 44

    def place(ratio: float) -> float:
        return begin + (end - begin) * math.log(ratio / low) / math.log(high / low)

    y = float(top)
    for group in groups:
        drawing.text(LEFT, y + row / 2, group[0].group, anchor="start", style="bold")
        for bar in group:
            left, right = sorted((place(1), place(bar.ratio)))
            shades = theme.acoustic if bar.ratio >= 1 else theme.semantic
            shape = {"x": left, "y": y + 4, "width": max(1.0, right - left), "height": row - 8, "rx": 2}
            drawing.add("rect", **shape, fill=shades.line, **{"class": "bar"})
            drawing.text(LEFT + 122, y + row / 2, bar.label, anchor="start")
            drawing.text(right + 7, y + row / 2, f"{bar.ratio:.3g}×", anchor="start", style="bold")
            y += row
        y += gap

    drawing.line(_path((begin, bottom), (end, bottom)), theme.grid, 1)
    for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1):
        x = place(2.0**power)
        drawing.line(_path((x, bottom), (x, bottom + 4)), theme.muted, 1)
        drawing.text(x, bottom + 15, f"{2.0**power:g}", theme.muted, size=12)
    drawing.line(_path((place(1), top - 4), (place(1), bottom)), theme.text)
    drawing.text(place(1), top - 14, "the plain way", theme.muted, size=12)
    drawing.text(LEFT, bottom + 43, results.note, theme.muted, anchor="start", size=12)
    drawing.write(path)


# --------------------------------------------------------------------------------------------------------------------
# A run and what it makes


def draw_training_curve(run: Path, theme: Theme, path: Path) -> None:
    """Draw the losses of the run in a folder.

    Raises:
        UserError: it has no metrics.jsonl, or none with a loss.
    """
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{metrics}: there is no such file; scripts/quickstart.py makes one, --run names another run.")
    figures = read_metrics(metrics)
    if "loss" not in figures:
        raise UserError(f"{metrics}: it holds no loss.")
    with drawn_for(theme):
        draw_losses(figures, path)
    # Words are text: let each reader's system draw them as it draws the other figures'.
    content = path.read_text(encoding="utf-8").replace("'DejaVu Sans'", SANS)
    path.write_text(content, encoding="utf-8")


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


# --------------------------------------------------------------------------------------------------------------------


def main(options: Options) -> int:
    """Draw what can be drawn, and say what cannot and why; returns the exit code.

    Raises:
        UserError: the folder for the figures cannot be made.
    """
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{options.output}: the folder could not be made ({error.strerror}).") from None
    failed = 0
    for name in dict.fromkeys(options.only):
        suffix = "png" if name == "continuation" else "svg"
        try:
            for page, theme in THEMES.items():
                path = options.output / f"{name}-{page}.{suffix}"
                draw(name, options, theme, path)
                print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)
        except UserError as error:
            print(f"error: {name} was not drawn: {error}", file=sys.stderr)
            failed += 1
    return 2 if failed else 0


def draw(name: Name, options: Options, theme: Theme, path: Path) -> None:
    """Draw one figure for one kind of page."""
    if name == "architecture":
        draw_architecture(load_audio(options.prompt), theme, path)
    elif name == "training-curve":
        draw_training_curve(options.run, theme, path)
    elif name == "continuation":
        draw_continuation(options.continuation, options.prompt, theme, path)
    else:
        results = read_gpu_results(options.gpu) if name == "gpu" else read_results(options.results)
        draw_benchmarks(results, theme, path)


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options, description=__doc__, use_underscores=True)))
