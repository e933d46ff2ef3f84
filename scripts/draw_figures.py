"""Draw the figures that the README shows: ``uv run python scripts/draw_figures.py``, from the repository's root.

Each is drawn twice, ``NAME-light`` and ``NAME-dark``, for light and dark pages:

- ``architecture`` (SVG): from a waveform to codes, to one stream of tokens, to Llama 3, and back. The waveform is the
  prompt, whose second half stands for the continuation; the codes are examples.
- ``training-curve`` (SVG): the losses of a run, from its metrics.jsonl.
- ``continuation`` (PNG): waveform and spectrogram of a prompt and its continuation by a model.
- ``benchmarks`` (SVG): how many times as fast as the plain way, from benchmarks/results.json.
- ``gpu`` (SVG, only when asked for): the same on a GPU, from the results of benchmarks/gpu.py.

The same input gives the same bytes. If the input of a figure is missing, the script names it, draws the others and
exits with code 2.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from scripts.figures.architecture import draw_architecture
from scripts.figures.benchmarks import draw_benchmarks, read_gpu_results, read_results
from scripts.figures.continuation import draw_continuation
from scripts.figures.training_curve import draw_training_curve
from torchtitan.audio.waveform import load_audio
from torchtitan.tools.errors import UserError, run_command
from torchtitan.tools.plots import THEMES, Theme

Name = Literal["architecture", "training-curve", "continuation", "benchmarks", "gpu"]


@dataclass
class Options:
    """The figures to draw, and their inputs."""

    output: Path = Path("assets/figures")
    """Folder for the figures."""
    only: tuple[Name, ...] = ("architecture", "training-curve", "continuation", "benchmarks")
    """The figures to draw."""
    run: Path = Path("outputs/quickstart/quickstart")
    """Folder of a training run, with its metrics.jsonl."""
    continuation: Path = Path("outputs/quickstart/output.wav")
    """Audio file that begins with the prompt, as inference.py writes it."""
    prompt: Path = Path("assets/prompt.flac")
    """Audio file of the prompt: the waveform of the first figure, and the length of the prompt in the continuation."""
    results: Path = Path("benchmarks/results.json")
    """Ratios measured by benchmarks/*.py."""
    gpu: Path = Path("benchmarks/gpu")
    """Folder of the results of benchmarks/gpu.py."""


def main(options: Options) -> int:
    """Draw all figures whose input is there, and name the others; returns the exit code.

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
