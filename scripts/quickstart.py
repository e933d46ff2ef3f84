"""The whole path in a few minutes, with no network and no GPU: ``uv run python scripts/quickstart.py``.

Runs the project's real commands one after the other, each shown as it runs, on the small codec, tokenizer and
synthesised speech that ship in assets/:

1. train a small Llama from random weights on two ranks, cut the run off in the middle, and resume it;
2. convert its last checkpoint to Hugging Face format;
3. continue a spoken prompt that was not trained on, into output.wav;
4. run the three evaluations on held-out pairs;
5. draw the loss curve.

The model hears half an hour of five synthetic voices for two minutes: expect it to have caught the voices' sounds and
some of the counting, not to talk.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from torchtitan.tools.errors import UserError, run_command
from torchtitan.tools.plots import draw_losses, read_metrics

ROOT = Path(__file__).resolve().parent.parent
RUN = "quickstart"
BENCHMARKS = {"salmon": "SALMON", "sLM21": "sLM21", "sStoryCloze": "sStoryCloze"}


@dataclass
class Options:
    """Where to write, and how long to train."""

    output: Path = Path("outputs/quickstart")
    """Folder for everything that is written. An earlier quickstart in it is removed."""
    steps: int = 150
    """Training steps (of 16 clips); the run is cut off at two thirds of them and resumed."""
    ranks: int = 2
    """Training processes."""


def main(options: Options) -> None:
    """Run the commands, then say what came out.

    Raises:
        UserError: the output folder is not a quickstart's, or a command failed.
    """
    started = time.time()
    output = options.output.resolve()
    if output.exists() and any(output.iterdir()) and not (output / RUN).is_dir():
        raise UserError(f"{output}: the folder holds something else; give another --output.")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    # Two ranks on two cores: one thread each; and parts this small gain nothing from more. Nothing needs the network.
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

    interval = max(1, options.steps // 3)
    train = [
        *("torchrun", f"--nproc_per_node={options.ranks}", "--local-ranks-filter", "0", "--role", "rank", "--tee", "3"),
        *("-m", "torchtitan.train", "--job.config_file", "config/debug.toml"),
        *("--job.dump_folder", str(output), "--job.wandb_run_name", RUN),
        *("--training.steps", str(options.steps), "--checkpoint.interval", str(interval)),
        *("--validation.freq", str(interval)),
    ]
    run(
        f"1. Train on {options.ranks} ranks",
        train,
        environment,
        stop_after=f"checkpoint saved to .*step-{2 * interval}$",
    )
    run("1b. The same command again resumes the run that was cut off", train, environment)

    model = output / "hf" / RUN
    checkpoint = output / RUN / "checkpoint" / f"step-{options.steps}"
    convert = ["python", "scripts/convert_dcp_to_hf.py", "--checkpoint", str(checkpoint), "--output", str(model)]
    run("2. Convert to Hugging Face format", convert, environment)

    wav = output / "output.wav"
    speak = ["python", "inference.py", "--model_name", str(model), "--prompt", "assets/prompt.flac"]
    run("3. Continue a prompt", [*speak, "--output", str(wav), "--max_seconds", "8"], environment)

    results = output / "results"
    for script in BENCHMARKS:
        data = "assets/speech/SALMon" if script == "salmon" else "assets/speech"
        evaluate = ["python", f"eval/{script}.py", "--model_name", str(model), "--dataset", data]
        run(f"4. Evaluate: {script}", [*evaluate, "--output_dir", str(results)], environment)

    curve = output / "loss.png"
    heading("5. Draw the loss curve")
    figures = read_metrics(output / RUN / "metrics.jsonl")
    draw_losses(figures, curve)
    print(f"   {curve}")
    summarize(figures, results, model, wav, curve, time.time() - started)


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(title: str, command: list[str], environment: dict[str, str], stop_after: str | None = None) -> None:
    """Show a command and its output while it runs.

    Args:
        stop_after: end the command when a line of its output ends like this pattern, as a crash would.

    Raises:
        UserError: it failed.
    """
    heading(title)
    print(f"$ {' '.join(command)}", flush=True)
    # The names a user types, resolved to this interpreter's own.
    launch = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[command[0]]
    process = subprocess.Popen(
        [*launch, *command[1:]],
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    stopped = False
    try:
        for line in process.stdout:
            line = line.rstrip()
            if stopped or not line:
                continue
            show(line)
            if stop_after and re.search(stop_after, line):
                stopped = True
                print("   ... and here the run is cut off.", flush=True)
                # A little later, so that it happens between two checkpoints. torchrun takes its ranks with it.
                threading.Timer(2.0, process.terminate).start()
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code != 0 and not stopped:
        raise UserError(f"the command above failed with exit code {code}.")
    if stop_after and not stopped:
        raise UserError(f"the command above ended without a line like {stop_after!r}.")


def show(line: str) -> None:
    """Print a line of a command; the states of a progress bar replace each other, in a file only the last one stays."""
    bar = re.search(r"(\d+)%\|", line)
    if not bar:
        print(f"   {line}", flush=True)
    elif sys.stdout.isatty():
        print(f"\r   {line}", end="\n" if bar.group(1) == "100" else "", flush=True)
    elif bar.group(1) == "100":
        print(f"   {line}", flush=True)


def summarize(
    figures: dict[str, dict[int, float]], results: Path, model: Path, wav: Path, curve: Path, seconds: float
) -> None:
    """Print what came out, and what it means."""
    heading(f"Done in {seconds / 60:.1f} minutes")
    first, last = (list(figures["loss"].items())[i] for i in (0, -1))
    validation = list(figures["validation/loss"].values())[-1]
    entropy = list(figures["validation/code_entropy"].values())[-1]
    print(f"training loss      {first[1]:.2f} nats a token at step {first[0]}, {last[1]:.2f} at step {last[0]}")
    print(f"validation loss    {validation:.2f} on clips that were not trained on; who only knows how often each code")
    print(f"                   occurs in them reaches {entropy:.2f}, so the context gives away the rest")
    for script, folder in BENCHMARKS.items():
        for file in sorted((results / folder).glob("**/results.json")):
            for task, result in json.loads(file.read_text())["tasks"].items():
                accuracy, error = 100 * result["accuracy"], 100 * result["standard_error"]
                print(
                    f"{script:<19}{task}: {accuracy:.0f} ± {error:.0f} % of {result['pairs']} pairs right (chance: 50)"
                )
    print(f"model              {model}  (Hugging Face format)")
    print(f"prompt + speech    {wav}")
    print(f"loss curve         {curve}")


def command() -> None:
    import tyro

    main(tyro.cli(Options, description=__doc__, use_underscores=True))


if __name__ == "__main__":
    run_command(command)
