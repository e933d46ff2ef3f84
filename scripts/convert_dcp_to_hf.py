"""Convert a training checkpoint to Hugging Face format.

    python scripts/convert_dcp_to_hf.py --checkpoint outputs/RUN/checkpoint/step-5000 [--output DIR]

The checkpoint describes itself: neither base model nor network is needed. A run's folder may be given instead of a
step's; its latest step is taken then. The result is a folder that ``AutoModelForCausalLM`` and
``AutoTokenizer`` load, in transformers 4.53 and later: safetensors, config.json (with the codec and its conventions),
generation_config.json, the tokenizer and a model card. The whole model passes through memory once, in fp32. Without
``--checkpoint`` it is the last step of config/llama3_2_1b_peoples_speech.toml, written below models/.
"""

from pathlib import Path
from typing import Literal

import torch
import tyro

from torchtitan.checkpoint.hf_export import export_checkpoint
from torchtitan.checkpoint.manager import find_checkpoint
from torchtitan.tools.errors import run_command

# The run of config/llama3_2_1b_peoples_speech.toml.
RECIPE = "Llama-3.2-1B_peoples_speech-q4-s1024"


def main(
    checkpoint: str | None = None,
    output: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Convert a training checkpoint to Hugging Face format.

    Args:
        checkpoint: a step-N folder, or a folder that holds some (its latest is taken); by default step 5000 of the run
            of config/llama3_2_1b_peoples_speech.toml.
        output: folder to write; by default <run>/hf/step-N beside the checkpoints, without --checkpoint models/<run>.
        dtype: number format of the written weights.
    """
    if checkpoint is None:
        checkpoint, output = f"outputs/{RECIPE}/checkpoint/step-5000", output or f"models/{RECIPE}"
    step = find_checkpoint(checkpoint)
    folder = Path(output).expanduser() if output else step.parent.parent / "hf" / step.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{export_checkpoint(step, folder, getattr(torch, dtype))}")


def command() -> None:
    tyro.cli(main, description=__doc__, use_underscores=True)


if __name__ == "__main__":
    run_command(command)
