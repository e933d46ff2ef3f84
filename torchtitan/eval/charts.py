"""A bar chart of accuracies with their 95 % intervals and published reference points. Needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen
from matplotlib import pyplot

from torchtitan.eval.benchmark import SALMON
from torchtitan.eval.metrics import TaskResult

# Percent, in the order of the tasks, from the leaderboard of the benchmark's repository (paper: arXiv 2409.07437).
SALMON_SOURCE = "leaderboard of slp-rl/salmon"
SALMON_REFERENCES: dict[str, tuple[float, ...]] = {
    "humans": (97.2, 91.2, 98.6, 83.1, 88.7, 94.4, 93.3, 95.7),
    "TWIST 7B": (61.5, 71.0, 70.0, 55.0, 60.5, 62.0, 51.5, 54.0),
    "pGSLM": (40.5, 82.5, 88.5, 57.5, 66.0, 53.5, 55.5, 53.0),
    "LAST 1.3B": (65.0, 64.6, 68.5, 56.0, 61.0, 62.5, 53.5, 52.5),
}
_BESIDE = 0.44  # where the published points of a task are, right of its bars
_MARKERS = ("*", "v", "s", "D")
# Okabe and Ito's colours, which can be told apart by readers who do not see all colours.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def references(benchmark: str) -> tuple[str, dict[str, dict[str, float]]]:
    """Published accuracies in percent, by system and task, and where they are from; none for most benchmarks."""
    if benchmark != SALMON.name:
        return "", {}
    return SALMON_SOURCE, {
        system: dict(zip(SALMON.tasks, figures, strict=True)) for system, figures in SALMON_REFERENCES.items()
    }


def draw(path: Path, benchmark: str, models: Mapping[str, Mapping[str, TaskResult]]) -> None:
    """Draw the accuracy of each task, a bar a model, and write it as a PNG.

    Args:
        models: results of each task by the model's name.
    """
    tasks = list(dict.fromkeys(task for results in models.values() for task in results))
    source, published = references(benchmark)
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.5 * len(tasks) + 2.5), 4.8), layout="constrained")
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
        axes.bar(places, heights, 0.92 * width, color=color, label=name)
        axes.errorbar(places, heights, (below, above), fmt="none", ecolor="black", capsize=3, linewidth=1)
    for marker, (system, figures) in zip(_MARKERS, published.items(), strict=False):
        there = [(place + _BESIDE, figures[task]) for place, task in enumerate(tasks) if task in figures]
        if there:
            axes.plot(*zip(*there, strict=True), marker, color="black", markerfacecolor="white", label=system)
    axes.axhline(50, color="gray", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(tasks)), [task.replace("_", "\n") for task in tasks])
    axes.set_ylim(0, 105)
    axes.set_ylabel("pairs right, % (bars: 95 % interval of Wilson)")
    axes.set_title(benchmark + (f" (points: {source})" if published else ""))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120, facecolor="white")
    pyplot.close(figure)
