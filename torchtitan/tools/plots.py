"""Pictures for light and dark pages, and the metrics of a run for them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.tools.errors import UserError


@dataclass(frozen=True)
class Shades:
    """One colour in three shades: for lines and bars, for areas behind text, and for this text."""

    line: str
    fill: str
    text: str


@dataclass(frozen=True)
class Theme:
    """The colours of a picture, as #rrggbb. Its background is transparent.

    Attributes:
        colormap: name of a colormap of matplotlib whose lowest value looks like the page.
    """

    text: str
    muted: str
    grid: str
    block: Shades
    semantic: Shades
    acoustic: Shades
    new: Shades
    colormap: str


THEMES = {
    "light": Theme(
        text="#1f2328",
        muted="#59636e",
        grid="#d1d9e0",
        block=Shades("#818b98", "#f6f8fa", "#1f2328"),
        semantic=Shades("#bc4c00", "#fff1e5", "#953800"),
        acoustic=Shades("#0969da", "#ddf4ff", "#0550ae"),
        new=Shades("#1a7f37", "#dafbe1", "#116329"),
        colormap="BuPu",
    ),
    "dark": Theme(
        text="#f0f6fc",
        muted="#9198a1",
        grid="#3d444d",
        block=Shades("#656c76", "#161b22", "#f0f6fc"),
        semantic=Shades("#db6d28", "#341a0c", "#ffa657"),
        acoustic=Shades("#388bfd", "#0c2547", "#79c0ff"),
        new=Shades("#3fb950", "#0f2a17", "#7ee787"),
        colormap="magma",
    ),
}


@contextmanager
def drawn_for(theme: Theme, font_size: float = 10) -> Iterator[None]:
    """In this context, matplotlib draws in the colours of the theme, and equal input gives equal bytes.

    Args:
        font_size: in points.
    """
    import matplotlib

    lines = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), theme.muted)
    words = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), theme.text)
    empty = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none")
    rest: dict[str, Any] = {
        "grid.color": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "image.cmap": theme.colormap,
        "font.family": "DejaVu Sans",  # part of matplotlib, so text has the same size on every machine
        "font.size": font_size,
        "svg.fonttype": "none",
        "svg.hashsalt": "plots",
    }
    with matplotlib.rc_context({**lines, **words, **empty, **rest}):
        yield


def read_metrics(path: Path) -> dict[str, dict[int, float]]:
    """Figures by name and step from a run's metrics.jsonl. If a step was run twice, the later figure counts.

    Raises:
        UserError: there is no such file, or a line of it is damaged.
    """
    figures: dict[str, dict[int, float]] = {}
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
            step = entry.pop("step")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{path}: line {number} does not contain the figures of a step.") from None
        for name, value in entry.items():
            figures.setdefault(name, {})[step] = value
    return {name: dict(sorted(values.items())) for name, values in figures.items()}


def draw_losses(figures: dict[str, dict[int, float]], path: Path) -> None:
    """Plot training and validation loss over steps, and the entropy of the validation codes as a baseline.

    Args:
        figures: figures from :func:`read_metrics`; those of validation may be missing.
        path: a .png or .svg file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*figures["loss"].items(), strict=True), label="training", color="#3b7dd8")
    if "validation/loss" in figures:
        axes.plot(*zip(*figures["validation/loss"].items(), strict=True), "o-", label="validation", color="#d8703b")
    if "validation/code_entropy" in figures:
        entropy = list(figures["validation/code_entropy"].values())[-1]
        axes.axhline(entropy, linestyle="--", color="#888888", label="entropy of the validation codes")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
