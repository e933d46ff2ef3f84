"""Sizes, fonts and the SVG drawing of the figures."""

from html import escape
from pathlib import Path
from typing import Literal

from torchtitan.tools.plots import Shades, Theme

SANS = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, 'Liberation Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', monospace"
WIDTH = 840
"""Width of the drawings in pixels: the widest that GitHub shows at full size."""
LEFT = 24
"""Margin to the left and to the right, in pixels."""


class Drawing:
    """An SVG, :data:`WIDTH` pixels wide, of shapes in the colours of a theme. Positions are in pixels."""

    def __init__(self, theme: Theme, height: float, title: str):
        self.theme = theme
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {number(height)}" width="{WIDTH}" '
            f'height="{number(height)}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>text{{font-family:{SANS}}} .mono{{font-family:{MONO}}} .bold{{font-weight:600}}</style>",
        ]

    def add(self, tag: str, content: str | None = None, **attributes: float | str) -> None:
        """An element; ``stroke_width`` is written as stroke-width, numbers to a tenth of a pixel."""
        written = "".join(
            f' {name.replace("_", "-")}="{value if isinstance(value, str) else number(value)}"'
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
        """Words with their ``anchor`` at ``x`` and half of their height at ``y``."""
        place: dict[str, float | str] = {"x": x, "y": y + 0.35 * size, "text_anchor": anchor, "font_size": size}
        self.add("text", content, **place, fill=color or self.theme.text, **{"class": style})

    def box(
        self, x: float, y: float, width: float, height: float, shades: Shades, radius: float = 6, dash: str = ""
    ) -> None:
        """A rounded rectangle; one with a dashed outline has no fill."""
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
        self.line(svg_path(start, end) + svg_path(left, end, right), color)

    def write(self, path: Path) -> None:
        path.write_text("\n".join([*self.parts, "</svg>", ""]), encoding="utf-8")


def number(value: float) -> str:
    return f"{round(value, 1):g}"


def svg_path(*points: tuple[float, float]) -> str:
    """The SVG path of straight lines from point to point."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)
