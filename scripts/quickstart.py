"""The whole path in a few minutes, with no network and no GPU: ``uv run python scripts/quickstart.py``.

Runs the project's real commands one after the other, each shown as it runs, on the small codec, tokenizer and
synthesised speech that ship in assets/:

1. turn the speech into codes, once, before training;
2. train a small Llama on them from random weights, on two ranks; cut the run off in the middle, and resume it;
3. convert the last checkpoint to Hugging Face format;
4. continue held-out spoken prompts: one into output.wav, and one in each of the six voices into samples/;
5. run the three evaluations on held-out pairs;
6. draw the loss curve.

The model trains for a minute and a half on 30 minutes of six synthetic voices. Expect it to go on in the prompt's voice
and to say numbers, many of them in order.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from torchtitan.tools.errors import UserError, run_command
from torchtitan.tools.plots import draw_losses, read_metrics

ROOT = Path(__file__).resolve().parent.parent
RUN = "quickstart"
# This file marks a folder that a quickstart may remove.
MARK = ".quickstart"
BENCHMARKS = {"salmon": "SALMON", "sLM21": "sLM21", "sStoryCloze": "sStoryCloze"}


@dataclass
class Options:
    """Where to write, and how long to train."""

    output: Path = Path("outputs/quickstart")
    """Folder for everything that is written. An earlier quickstart in it is removed."""
    steps: int = 180
    """Training steps (of about 14 clips); the run is cut off at two thirds of them and resumed."""
    ranks: int = 2
    """Training processes."""


def main(options: Options) -> None:
    """Run the commands, then say what came out.

    Raises:
        UserError: the output folder is not a quickstart's, an option does not fit, or a command failed.
    """
    started = time.time()
    output = options.output.resolve()
    for name, least in (("steps", 3), ("ranks", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} must be at least {least}.")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: this is a file; give a folder as --output.")
    if output.exists() and any(output.iterdir()) and not (output / MARK).exists():
        raise UserError(f"{output}: the folder holds something else; give another --output.")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / MARK).touch()
    # One thread a rank: a small machine has two cores, and a small model gains nothing from more threads.
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if 0 < (gpus := torch.cuda.device_count()) < options.ranks:
        print(f"{options.ranks} ranks would take a GPU each, and there are {gpus}: all runs on the CPU.")
        environment["CUDA_VISIBLE_DEVICES"] = ""

    codes, model, results = output / "codes", output / "hf" / RUN, output / "results"
    wav, curve = output / "output.wav", output / "loss.png"
    interval = options.steps // 3
    torchrun = f"torchrun --nproc_per_node={options.ranks}"

    def step(title: str, command: str, *paths: Path | str, stop_after: str | None = None) -> None:
        """Run a command, with paths in place of each {}."""
        words = command.split()
        places = iter(paths)
        run(title, [str(next(places)) if word == "{}" else word for word in words], environment, stop_after=stop_after)

    step(
        "1. Turn the speech into codes",
        "python scripts/tokenize_dataset.py --dataset assets/speech/peoples_speech "
        "--audio_tokenizer assets/mimi-small --output {}",
        codes,
    )
    train = (
        f"{torchrun} --local-ranks-filter 0 --role rank --tee 3 -m torchtitan.train "
        f"--job.config_file config/debug.toml --job.dump_folder {{}} --job.wandb_run_name {RUN} "
        "--training.dataset_path {} --training.packing best_fit --training.local_batch_size 3 "
        f"--training.steps {options.steps} --checkpoint.interval {interval} --validation.freq {interval}"
    )
    saved = f"checkpoint saved to .*step-{2 * interval}$"
    step(f"2. Train on {options.ranks} ranks", train, output, codes, stop_after=saved)
    step("2b. The same command again resumes the run that was cut off", train, output, codes)
    checkpoint = output / RUN / "checkpoint" / f"step-{options.steps}"
    convert = "python scripts/convert_dcp_to_hf.py --checkpoint {} --output {}"
    step("3. Convert to Hugging Face format", convert, checkpoint, model)
    speak = "python inference.py --model_name {} --prompt {} --output {} --max_seconds 8"
    step("4. Continue a prompt", speak, model, "assets/prompt.flac", wav)
    step("4b. Continue a prompt in each of the six voices", speak, model, "assets/prompts", f"{output / 'samples'}/")
    for script in BENCHMARKS:
        data = "assets/speech/SALMon" if script == "salmon" else "assets/speech"
        evaluate = f"{torchrun} eval/{script}.py --model_name {{}} --dataset {data} --output_dir {{}}"
        step(f"5. Evaluate: {script}", evaluate, model, results)

    heading("6. Draw the loss curve")
    figures = read_metrics(output / RUN / "metrics.jsonl")
    draw_losses(figures, curve)
    print(f"   {curve}")
    summarize(figures, results, model, wav, curve, time.time() - started)


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(title: str, command: list[str], environment: dict[str, str], stop_after: str | None = None) -> None:
    """Show a command and its output while it runs.

    Args:
        stop_after: end the command after a line of its output that matches this pattern, as a crash would.

    Raises:
        UserError: it failed.
    """
    heading(title)
    print(f"$ {' '.join(command)}", flush=True)
    # Both commands run in this interpreter.
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
                # A little later, so that the end falls between two checkpoints. torchrun ends its ranks.
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
    """Print a line of a command; states of a progress bar replace each other, and in a file only the last one stays."""
    bar = re.search(r"(\d+)%\||\d+frame \[", line)  # the second kind has no total
    if sys.stdout.isatty():
        unfinished = bar is not None and bar.group(1) != "100"
        print(f"\r\x1b[K   {line.strip()}", end="" if unfinished else "\n", flush=True)
    elif bar is None or bar.group(1) == "100":
        print(f"   {line}", flush=True)


# What the model must have learned for a task. The other tasks have too few pairs to tell more than that they run.
MEANING = {
    "speaker_consistency": "goes on in the same voice, or in another one",
    "gender_consistency": "goes on in the same voice, or in one of the other gender",
    "sBLIMP": "counts in order, or the same numbers shuffled",
}


def summarize(
    figures: dict[str, dict[int, float]], results: Path, model: Path, wav: Path, curve: Path, seconds: float
) -> None:
    """Print the figures and their meaning."""
    heading(f"Done in {seconds / 60:.1f} minutes")
    first, last = (list(figures["loss"].items())[i] for i in (0, -1))
    validation = list(figures["validation/loss"].values())[-1]
    entropy = list(figures["validation/code_entropy"].values())[-1]
    print(f"training loss      {first[1]:.2f} nats a token at step {first[0]}, {last[1]:.2f} at step {last[0]}")
    print(f"validation loss    {validation:.2f} on held-out clips; a unigram baseline reaches {entropy:.2f}")
    print(
        "held-out pairs     how often the model finds the right clip of two likelier, ± one standard error (guessing:"
    )
    print("                   50 %; a result more than two standard errors above it is hardly luck):")
    tasks = {}
    for folder in BENCHMARKS.values():
        for file in sorted((results / folder).glob("**/results.json")):
            tasks |= json.loads(file.read_text())["tasks"]
    for task, meaning in MEANING.items():
        result = tasks.pop(task)
        accuracy, error = 100 * result["accuracy"], 100 * result["standard_error"]
        print(f"  {accuracy:3.0f} ± {error:.0f} %        {meaning} ({task}, {result['pairs']} pairs)")
    print("                   and on small sets, which mostly show that they run:")
    entries = [f"{t} {100 * r['accuracy']:.0f} ± {100 * r['standard_error']:.0f}" for t, r in tasks.items()]
    unbroken = ", ".join(entry.replace(" ", "\0") for entry in entries)
    lines = textwrap.fill(unbroken, 116, initial_indent=19 * " ", subsequent_indent=19 * " ")
    print(lines.replace("\0", " "))
    print(f"model              {model}  (Hugging Face format)")
    print(f"prompt + speech    {wav}, and {wav.with_name('samples')}")
    print(f"loss curve         {curve}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options, description=__doc__, use_underscores=True)))
