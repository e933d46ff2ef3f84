"""The training curve: the losses of a run, from its metrics.jsonl."""

from pathlib import Path

from scripts.figures.style import SANS
from torchtitan.tools.errors import UserError
from torchtitan.tools.plots import Theme, draw_losses, drawn_for, read_metrics


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
    # The words are text; they get the font of the other figures.
    content = path.read_text(encoding="utf-8").replace("'DejaVu Sans'", SANS)
    path.write_text(content, encoding="utf-8")
