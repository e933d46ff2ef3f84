"""Benchmarks: how many times as fast as the plain way, from files of results."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scripts.figures.style import LEFT, WIDTH, Drawing, svg_path
from torchtitan.tools.errors import UserError
from torchtitan.tools.plots import Theme


class Bar(NamedTuple):
    """What was measured, and how many times as fast as the plain way it is."""

    group: str
    label: str
    ratio: float


class Results(NamedTuple):
    """Ratios, the machine they were measured on, and a note for the reader."""

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
    figures = {name: case["figures"] for name, case in cases.items() if "figures" in case}
    for name in ("ours", "ours packed", "ours compiled", "ours packed compiled"):
        plain = figures.get(f"training/plain{' compiled' if 'compiled' in name else ''}")
        if (ours := figures.get(f"training/{name}")) and plain:
            speed = ours["real_tokens_per_second"]
            mfu = "" if ours["mfu_positions"] is None else f", {100 * ours['mfu_positions']:.0f} % MFU"
            how = name.removeprefix("ours").strip() or "as it is"
            yield Bar("Training", f"{how}: {speed:,.0f} tokens/s{mfu}", speed / plain["real_tokens_per_second"])
    for name in ("1 row", "1 row compiled", "8 rows", "64 rows"):
        if ours := figures.get(f"generation/{name}"):
            label = f"{name}: {ours['ids_per_second']:,.0f} ids/s, {100 * ours['share']:.0f} % of the bound"
            yield Bar("Generation", label, ours["ratio"])
    if case := cases.get("codec/encoding"):
        speed = case["audio_seconds_per_second"]
        most = max((name for name in speed if name.endswith("clips")), key=lambda name: int(name.split()[0]))
        yield Bar("Tokenization", f"{most} at once: {speed[most]:,.0f} s of audio a second", speed["ratio"])
    if ours := figures.get("evaluation/pairs"):
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

    # The scale begins below 1 only as far as the bars need.
    low, high = min(0.9, *(0.95 * bar.ratio for bar in bars)), max(2.0, *(bar.ratio for bar in bars))
    # A letter of a label takes about 6.4 pixels.
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

    drawing.line(svg_path((begin, bottom), (end, bottom)), theme.grid, 1)
    for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1):
        x = place(2.0**power)
        drawing.line(svg_path((x, bottom), (x, bottom + 4)), theme.muted, 1)
        drawing.text(x, bottom + 15, f"{2.0**power:g}", theme.muted, size=12)
    drawing.line(svg_path((place(1), top - 4), (place(1), bottom)), theme.text)
    drawing.text(place(1), top - 14, "the plain way", theme.muted, size=12)
    drawing.text(LEFT, bottom + 43, results.note, theme.muted, anchor="start", size=12)
    drawing.write(path)
