"""Estimate what a run will need: memory of a GPU, speed, days and storage.

    python scripts/estimate.py config/llama3_2_1b_peoples_speech.toml --gpus 8 --gpu H200 [--section.key value ...]

No GPU and no data are needed, only the config and the sizes of its model; those of Llama-3.2-1B, Llama-3.1-8B and
Llama-Mimi are built in. docs/estimate.md explains each line. Speeds are bounds, not promises.
"""

import argparse
import json
from pathlib import Path

from torchtitan.config_manager import ConfigManager
from torchtitan.estimate import GPUS, MODEL_SIZES, estimate, find_gpu, model_args, table
from torchtitan.tools.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="TOML file of the run")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default 8)")
    parser.add_argument("--gpu", default="H100", help=f"one of {', '.join(GPUS)} (default H100)")
    parser.add_argument("--model_size", help=f"sizes instead of model.name's: {' or '.join(MODEL_SIZES)}")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's peak that is reached (default 0.4)")
    parser.add_argument("--padding", type=float, default=0.0, help="share of positions that hold no token (default 0)")
    parser.add_argument("--hours", type=float, help="hours of speech in the data, for its storage")
    parser.add_argument("--stored_codes", action="store_true", help="the data are codes already: no codec on the GPUs")
    parser.add_argument("--json", help="file to write the figures to")
    options, rest = parser.parse_known_args()
    if options.gpus < 1 or not 0 < options.mfu <= 1 or not 0 <= options.padding < 1:
        raise UserError("--gpus must be at least 1, --mfu above 0 and at most 1, --padding at least 0 and below 1.")
    config = ConfigManager().parse_args(["--job.config_file", options.config, *rest])
    args = model_args(config, options.model_size)
    found = estimate(
        args,
        config,
        options.gpus,
        find_gpu(options.gpu),
        options.mfu,
        options.padding,
        options.hours,
        not options.stored_codes,
    )
    print(table(found))
    if options.json:
        try:
            Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {options.json}: it cannot be written ({error.strerror}).") from None


if __name__ == "__main__":
    run_command(main)
