"""A bar chart of accuracies with 95 % intervals and published results. It needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen
from matplotlib import pyplot

from torchtitan.eval.metrics import TaskResult
from torchtitan.eval.results import Replacing
from torchtitan.eval.suites import SALMON

# Percent, in the order of the tasks, from the leaderboard of the benchmark's repository (paper: arXiv 2409.07437).
SALMON_SOURCE = "leaderboard of slp-rl/salmon, 2025"
SALMON_REFERENCES: dict[str, tuple[float, ...]] = {
    "humans": (97.2, 91.2, 98.6, 83.1, 88.7, 94.4, 93.3, 95.7),
    "TWIST 7B": (61.5, 71.0, 70.0, 55.0, 60.5, 62.0, 51.5, 54.5),
    "pGSLM": (40.5, 83.0, 88.5, 57.0, 66.0, 53.5, 55.5, 53.5),
    "LAST 1.3B": (65.0, 64.5, 68.5, 56.0, 61.0, 62.5, 53.5, 53.0),
    "SpiritLM 7B": (54.5, 69.5, 67.0, 53.5, 55.5, 54.5, 48.0, 51.5),
    "SpiritLM 7B (expressive)": (73.5, 81.0, 85.0, 55.0, 64.0, 55.5, 52.0, 59.5),
}
_BESIDE = (0.41, 0.59)  # range of the published points of a task, between its bars and the next ones
_MAX_NAME = 56  # maximum length of a model's name in the chart; the end says most
_MARKERS = ("*", "v", "s", "D", "o", "^")
# Okabe and Ito's colours, which colour-blind readers can distinguish.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def references(benchmark: str) -> tuple[str, dict[str, dict[str, float]]]:
    """Source of published accuracies, and the accuracies in percent by system and task. Most benchmarks have none."""
    if benchmark != SALMON.name:
        return "", {}
    return SALMON_SOURCE, {
        system: dict(zip(SALMON.tasks, figures, strict=True)) for system, figures in SALMON_REFERENCES.items()
    }


def draw(path: Path, benchmark: str, models: Mapping[str, Mapping[str, TaskResult]]) -> None:
    """Draw the accuracy of each task, with a bar per model, and write it as a PNG.

    Args:
        models: results of each task, by the name of the model.
    """
    tasks = list(dict.fromkeys(task for results in models.values() for task in results))
    source, published = references(benchmark)
    inches = max(6.0, 1.5 * len(tasks) + 2.5)
    figure, axes = pyplot.subplots(figsize=(inches, 4.8), layout="constrained")
    width = 0.72 / max(1, len(models))
    for number, (name, results) in enumerate(models.items()):
        left = (number - (len(models) - 1) / 2) * width
        places, heights, below, above = [], [], [], []
        for place, task in enumerate(tasks):
            result = results.get(task)
            if result is None or result.accuracy is None or result.interval is None:
                continue
            places.append(place + left)
            heights.append(100 * result.accuracy)
            below.append(100 * (result.accuracy - result.interval[0]))
            above.append(100 * (result.interval[1] - result.accuracy))
        color = _COLORS[number % len(_COLORS)]
        label = name if len(name) <= _MAX_NAME else f"…{name[-_MAX_NAME:]}"
        axes.bar(places, heights, 0.92 * width, color=color, label=label)
        # The dot makes an accuracy of 0 visible.
        axes.errorbar(places, heights, (below, above), fmt=".", color="black", capsize=3, linewidth=1)
    for number, (marker, (system, figures)) in enumerate(zip(_MARKERS, published.items(), strict=False)):
        beside = _BESIDE[0] + (_BESIDE[1] - _BESIDE[0]) * number / (len(published) - 1)
        there = [(place + beside, figures[task]) for place, task in enumerate(tasks) if task in figures]
        if there:
            style: dict[str, Any] = {"color": "black", "markerfacecolor": "white", "markersize": 5}
            axes.plot(*zip(*there, strict=True), marker, label=system, **style)
    axes.axhline(50, color="gray", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(tasks)), [task.replace("_", "\n") for task in tasks])
    axes.set_ylim(0, 105)
    axes.set_ylabel("pairs right, %")
    axes.set_title(f"{benchmark}, 95 % intervals" + (f" (points: {source})" if published else ""))
    labels = axes.get_legend_handles_labels()[1]
    columns = int(inches / (0.09 * max(map(len, labels)) + 0.7))
    figure.legend(loc="outside lower center", ncols=max(1, min(4, columns)), frameon=False)
    with Replacing(path) as partial:
        figure.savefig(partial, dpi=120, facecolor="white", format="png")
    pyplot.close(figure)
