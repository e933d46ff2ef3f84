"""The quickstart's training fed in three ways, side by side: ``uv run python benchmarks/small_run.py``.

Plain: config/debug.toml as it is, which turns recordings into codes while it trains, one sample a row. Then the same
from codes that scripts/tokenize_dataset.py stored, and from those with several samples in a row, as
scripts/quickstart.py does. All are the real command on the shipped speech, run in turn; real tokens a second, over all
ranks, are read from the run's metrics.jsonl after the first steps. The time for storing the codes is given apart.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPEECH = "assets/speech/peoples_speech"
FIRST_STEPS = 10


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help=f"of a run; the first {FIRST_STEPS} are not counted")
    parser.add_argument("--turns", type=int, default=2, help="how often the ways are run in turn")
    parser.add_argument("--ranks", type=int, default=2)
    return parser.parse_args()


def call(*command: str) -> None:
    """One of the repository's commands, with one thread a rank; its output is shown only if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def speed(folder: Path, ranks: int, steps: int, *changes: str) -> float:
    """Real tokens a second over all ranks: the median of the logged steps after the first ones."""
    call(
        *("-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "-m", "torchtitan.train"),
        *("--job.config_file", "config/debug.toml", "--job.dump_folder", str(folder), "--job.wandb_run_name", "run"),
        *("--training.steps", str(steps), "--metrics.log_freq", "5", "--validation.no-enabled"),
        *("--checkpoint.no-enable_checkpoint", *changes),
    )
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [line["tokens_per_second_per_device"] for line in lines if line["step"] > FIRST_STEPS]
    return ranks * statistics.median(measured)


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codes = folder / "codes"
        started = time.perf_counter()
        call(
            *("scripts/tokenize_dataset.py", "--dataset", SPEECH, "--audio_tokenizer", "assets/mimi-small"),
            *("--output", str(codes)),
        )
        print(f"storing the codes: {time.perf_counter() - started:.1f} s")
        stored = ["--training.dataset_path", str(codes)]
        packed = [*stored, "--training.packing", "best_fit", "--training.local_batch_size", "3"]
        ways = {"recordings": [], "stored codes": stored, "stored codes, packed": packed}
        found: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(args.turns):
            for number, (way, changes) in enumerate(ways.items()):
                found[way].append(speed(folder / f"{turn}-{number}", args.ranks, args.steps, *changes))
        plain = statistics.median(found["recordings"])
        print("| way | real tokens/s | ratio | turns |\n| --- | --- | --- | --- |")
        for way, speeds in found.items():
            middle = statistics.median(speeds)
            print(f"| {way} | {middle:,.0f} | {middle / plain:.2f} | {', '.join(f'{s:,.0f}' for s in speeds)} |")


if __name__ == "__main__":
    main()
