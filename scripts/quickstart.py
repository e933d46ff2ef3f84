"""The whole path in a few minutes, with no network and no GPU: ``uv run python scripts/quickstart.py``.

Runs the project's real commands one after the other, each shown as it runs, on the small codec, tokenizer and
synthesised speech that ship in assets/:

1. turn the speech into codes, once, so that training need not;
2. train a small Llama on them from random weights, on two ranks, cut the run off in the middle, and resume it;
3. convert its last checkpoint to Hugging Face format;
4. continue spoken prompts that were not trained on, into output.wav and, one for each of the six voices, samples/;
5. run the three evaluations on held-out pairs;
6. draw the loss curve.

The model hears 30 minutes of six synthetic voices for a minute and a half: expect it to go on in the prompt's voice and
to say numbers, many of them in order.
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

import torch

from torchtitan.tools.errors import UserError, run_command
from torchtitan.tools.plots import draw_losses, read_metrics

ROOT = Path(__file__).resolve().parent.parent
RUN = "quickstart"
# A file that marks a folder as one that a quickstart may remove.
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
    # Two ranks on two cores: one thread each; and parts this small gain nothing from more. Nothing needs the network.
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if 0 < (gpus := torch.cuda.device_count()) < options.ranks:
        print(f"{options.ranks} ranks would take a GPU each, and there are {gpus}: all runs on the CPU.")
        environment["CUDA_VISIBLE_DEVICES"] = ""

    codes = output / "codes"
    tokenize = ["python", "scripts/tokenize_dataset.py", "--dataset", "assets/speech/peoples_speech"]
    tokenize += ["--audio_tokenizer", "assets/mimi-small", "--output", str(codes)]
    run("1. Turn the speech into codes", tokenize, environment)

    interval = options.steps // 3
    train = [
        *("torchrun", f"--nproc_per_node={options.ranks}", "--local-ranks-filter", "0", "--role", "rank", "--tee", "3"),
        *("-m", "torchtitan.train", "--job.config_file", "config/debug.toml"),
        *("--job.dump_folder", str(output), "--job.wandb_run_name", RUN, "--training.dataset_path", str(codes)),
        *("--training.packing", "best_fit", "--training.local_batch_size", "3"),
        *("--training.steps", str(options.steps), "--checkpoint.interval", str(interval)),
        *("--validation.freq", str(interval)),
    ]
    run(
        f"2. Train on {options.ranks} ranks",
        train,
        environment,
        stop_after=f"checkpoint saved to .*step-{2 * interval}$",
    )
    run("2b. The same command again resumes the run that was cut off", train, environment)

    model = output / "hf" / RUN
    checkpoint = output / RUN / "checkpoint" / f"step-{options.steps}"
    convert = ["python", "scripts/convert_dcp_to_hf.py", "--checkpoint", str(checkpoint), "--output", str(model)]
    run("3. Convert to Hugging Face format", convert, environment)

    wav = output / "output.wav"
    speak = ["python", "inference.py", "--model_name", str(model), "--prompt", "assets/prompt.flac"]
    run("4. Continue a prompt", [*speak, "--output", str(wav), "--max_seconds", "8"], environment)
    samples = [*speak[:-1], "assets/prompts", "--output", f"{output / 'samples'}/", "--max_seconds", "8"]
    run("4b. Continue a prompt in each of the six voices", samples, environment)

    results = output / "results"
    for script in BENCHMARKS:
        data = "assets/speech/SALMon" if script == "salmon" else "assets/speech"
        evaluate = ["torchrun", f"--nproc_per_node={options.ranks}", f"eval/{script}.py", "--model_name", str(model)]
        run(f"5. Evaluate: {script}", [*evaluate, "--dataset", data, "--output_dir", str(results)], environment)

    curve = output / "loss.png"
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
    bar = re.search(r"(\d+)%\||\d+frame \[", line)  # the latter does not know how many there will be
    if sys.stdout.isatty():
        unfinished = bar is not None and bar.group(1) != "100"
        print(f"\r\x1b[K   {line.strip()}", end="" if unfinished else "\n", flush=True)
    elif bar is None or bar.group(1) == "100":
        print(f"   {line}", flush=True)


# What the model must have learned for a task, in plain words. The other tasks have too few pairs to say more than that
# they run.
MEANING = {
    "speaker_consistency": "goes on in the same voice, or in another one",
    "gender_consistency": "goes on in the same voice, or in one of the other gender",
    "sBLIMP": "counts in order, or the same numbers shuffled",
}


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
    print("held-out pairs     how often the model finds the right clip of two likelier (guessing: 50 %; ± one standard")
    print("                   error; more than two of them above 50 is more than luck):")
    tasks = {}
    for folder in BENCHMARKS.values():
        for file in sorted((results / folder).glob("**/results.json")):
            tasks |= json.loads(file.read_text())["tasks"]
    for task, meaning in MEANING.items():
        result = tasks.pop(task)
        accuracy, error = 100 * result["accuracy"], 100 * result["standard_error"]
        print(f"  {accuracy:3.0f} ± {error:.0f} %        {meaning} ({task}, {result['pairs']} pairs)")
    print("                   and on small sets, which mostly show that they run:")
    line = "                  "
    for task, result in tasks.items():
        entry = f" {task} {100 * result['accuracy']:.0f} ± {100 * result['standard_error']:.0f},"
        if len(line) + len(entry) > 116:
            print(line)
            line = "                  "
        line += entry
    print(line.rstrip(","))
    print(f"model              {model}  (Hugging Face format)")
    print(f"prompt + speech    {wav}, and {wav.with_name('samples')}")
    print(f"loss curve         {curve}")


def command() -> None:
    import tyro

    main(tyro.cli(Options, description=__doc__, use_underscores=True))


if __name__ == "__main__":
    run_command(command)
