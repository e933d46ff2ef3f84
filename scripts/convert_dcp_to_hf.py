"""Convert a training checkpoint to Hugging Face format.

    python scripts/convert_dcp_to_hf.py --checkpoint outputs/RUN/checkpoint/step-5000 [--output DIR]

The checkpoint says by itself what it is, so nothing else is needed: no base model, no network. A run's folder may be
given instead of one step; its latest step is taken then. The result is a folder that ``AutoModelForCausalLM`` and
``AutoTokenizer`` load, in transformers 4.53 and later: safetensors, config.json (with the codec and its conventions),
generation_config.json, the tokenizer and a model card. The whole model passes through memory once, in fp32.
"""

import shutil
from pathlib import Path
from typing import Literal

import torch

from torchtitan.components.checkpoint import HF_FOLDER, find_checkpoint, load_full_parameters, read_state
from torchtitan.components.hf_export import write_model_card, write_weights
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.tools.errors import UserError, run_command


def convert(checkpoint: Path, output: Path, dtype: torch.dtype) -> Path:
    """Write a checkpoint in Hugging Face format; the output folder appears when it is complete.

    Raises:
        UserError: the checkpoint is incomplete or damaged, or the output folder holds something already.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: there is something already; give another --output or remove it.")
    step = find_checkpoint(checkpoint)
    state = read_state(step)
    if not (step / HF_FOLDER).is_dir():
        raise UserError(f"{step}: its folder {HF_FOLDER}/ with config.json and tokenizer is missing.")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(step / HF_FOLDER, partial)
    write_weights(partial, Llama3Args(**state["model_args"]), load_full_parameters(step), dtype)
    write_model_card(partial, state, output.name)
    if output.exists():
        output.rmdir()
    partial.rename(output)
    return output


def main(
    checkpoint: str,
    output: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Convert a training checkpoint to Hugging Face format.

    Args:
        checkpoint: a step-N folder, or a folder that holds some (its latest is taken).
        output: folder to write; by default <run>/hf/step-N beside the checkpoints.
        dtype: number format of the written weights.
    """
    step = find_checkpoint(checkpoint)
    folder = Path(output).expanduser() if output else step.parent.parent / "hf" / step.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{convert(step, folder, getattr(torch, dtype))}")


def command() -> None:
    import tyro

    tyro.cli(main, description=__doc__, use_underscores=True)


if __name__ == "__main__":
    run_command(command)
