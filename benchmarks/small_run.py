"""The quickstart's training fed in three ways, side by side: ``uv run python benchmarks/small_run.py``.

Plain: config/debug.toml as it is, which turns recordings into codes while it trains, one sample a row. Then the same
from codes that scripts/tokenize_dataset.py stored, and from those with several samples in a row, as
scripts/quickstart.py does. All are the real command on the shipped speech, run in turn; real tokens a second, over all
ranks, are read from the run's metrics.jsonl after the first 10 steps. The time for storing the codes is given apart.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import harness

SPEECH = "assets/speech/peoples_speech"
FIRST_STEPS = 10


@dataclass
class Options:
    """Length of the runs."""

    steps: int = 40
    """Steps of a run; the first 10 are not counted."""
    turns: int = 2
    """Times that the ways run in turn."""
    ranks: int = 2
    """Processes of a run."""


def call(*command: str) -> None:
    """One of the repository's commands, with one thread a rank; its output is shown only if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=harness.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def speed(options: Options, *changes: str) -> float:
    """Real tokens a second over all ranks: the median of the logged steps after the first ones."""
    with tempfile.TemporaryDirectory() as folder:
        call(
            *("-m", "torch.distributed.run", f"--nproc_per_node={options.ranks}", "-m", "torchtitan.train"),
            *("--job.config_file", "config/debug.toml", "--job.dump_folder", folder, "--job.wandb_run_name", "run"),
            *("--training.steps", str(options.steps), "--metrics.log_freq", "5", "--validation.no-enabled"),
            *("--checkpoint.no-enable_checkpoint", *changes),
        )
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    measured = [line["tokens_per_second_per_device"] for line in lines if line["step"] > FIRST_STEPS]
    return options.ranks * statistics.median(measured)


def main(options: Options) -> None:
    """Run the ways in turn and print a table."""
    with tempfile.TemporaryDirectory() as codes:
        tokenize = ("scripts/tokenize_dataset.py", "--dataset", SPEECH, "--audio_tokenizer", "assets/mimi-small")
        stored_in = harness.seconds_of(lambda: call(*tokenize, "--output", codes), harness.find_device("cpu"))
        print(f"storing the codes: {stored_in:.1f} s")
        stored = ["--training.dataset_path", codes]
        packed = [*stored, "--training.packing", "best_fit", "--training.local_batch_size", "3"]
        changes = {"recordings": [], "stored codes": stored, "stored codes, packed": packed}
        ways = {way: lambda more=more: speed(options, *more) for way, more in changes.items()}
        found = harness.in_turns(ways, options.turns)
    medians = harness.medians(found)
    print("| way | real tokens/s | ratio | turns |\n| --- | --- | --- | --- |")
    for way, middle in medians.items():
        turns = ", ".join(f"{speed:,.0f}" for speed in found[way])
        print(f"| {way} | {middle:,.0f} | {middle / medians['recordings']:.2f} | {turns} |")


if __name__ == "__main__":
    harness.run(main, Options, __doc__)
