"""What a run will need, before anyone pays for it: memory of a GPU, speed, days and storage.

    python scripts/estimate.py config/llama3_2_1b_peoples_speech.toml --gpus 8 --gpu H200 [--section.key value ...]

No GPU and no data are needed, only the config and the sizes of its model; those of Llama-3.2-1B, Llama-3.1-8B and
Llama-Mimi are built in. docs/estimate.md explains each line. Speeds are bounds, not promises.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from torchtitan.config_manager import ConfigManager, JobConfig
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.tools.errors import UserError, run_command
from torchtitan.tools.estimate import GIB, GPUS, MODEL_SIZES, built_in_size, estimate, find_gpu


def model_args(config: JobConfig, size: str | None) -> Llama3Args:
    """Sizes of the model that a config names, the audio tokens included.

    Raises:
        UserError: it can be found neither here nor among the built-in ones.
    """
    args = built_in_size(size or config.model.name, config.model.num_quantizers)
    if args is not None and config.model.flavor != "debug":
        return args
    if size is not None:
        raise UserError(f"--model_size {size}: there are only {', '.join(MODEL_SIZES)}.")
    if not Path(config.model.name).expanduser().is_dir():
        raise UserError(
            f"{config.model.name}: there is no such folder, and the sizes of this model are not built in; give "
            f"--model_size {' or '.join(MODEL_SIZES)}."
        )
    from torchtitan.models.base import BaseModel

    config.model.pretrained = False
    return BaseModel.load(config.model).args


def table(found: dict[str, Any]) -> str:
    """The figures as text."""
    parameters, memory, speed, run = (found[key] for key in ("parameters", "memory", "speed", "run"))
    tied = "tied to the head" if parameters["tied"] else "and as much again in the head"
    lines = [
        f"Parameters      {parameters['total']:,}  ({parameters['embedding']:,} embedding, {tied}; "
        f"{parameters['blocks']} blocks of {parameters['block']:,})",
        f"FLOPs a token   {found['flops_per_token']['model']:.4g}  (with what is computed again: "
        f"{found['flops_per_token']['hardware']:.4g})",
        "",
        f"Memory of the fullest GPU, at its highest: {memory['peak']}",
    ]
    parts = memory["moments"][memory["peak"]]
    lines += [f"  {name:30s} {size / GIB:8.2f} GiB" for name, size in parts.items() if size]
    lines.append(f"  {'context, fragmentation':30s} {(memory['total'] - memory['allocated']) / GIB:8.2f} GiB")
    verdict = "it fits" if memory["fits"] else "it does NOT fit"
    lines.append(f"  {'in all':30s} {memory['total'] / GIB:8.2f} GiB of {memory['available'] / GIB:.1f} GiB: {verdict}")
    if memory["host"]:
        lines.append(f"  {'in the memory of the CPU':30s} {memory['host'] / GIB:8.2f} GiB a rank")
    if not memory["fits"]:
        lines += [f"  It would with {change}" for change in found["advice"] or ["no single change that is tried here."]]
    lines += [
        "",
        f"Speed, at most, a GPU: {speed['bound']:,.0f} tokens/s (all: {speed['total']:,.0f}), "
        f"bound by {speed['bottleneck']}",
        f"  compute at {speed['assumed_mfu']:.0%} of the peak   {speed['compute']:,.0f} tokens/s",
    ]
    if found["traffic"]:
        lines.append(f"  communication alone         {speed['communication']:,.0f} tokens/s")
        lines += [f"    {name:30s} {size / GIB:8.2f} GiB a step" for name, size in found["traffic"].items()]
    lines += [
        "",
        f"Run: {run['steps']:,} steps of {run['positions_per_step']:,} positions, {run['tokens']:.3g} tokens, "
        f"{run['hours_of_speech']:,.0f} hours of speech",
        f"  at least {run['days']:.2f} days, {run['gpu_hours']:,.0f} GPU hours",
    ]
    if found["storage"]:
        lines += ["", "Storage", *(f"  {name:42s} {size / GIB:8.1f} GiB" for name, size in found["storage"].items())]
    return "\n".join(lines)


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
