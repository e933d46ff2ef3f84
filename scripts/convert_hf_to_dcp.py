"""Convert a model in Hugging Face format to a training checkpoint, the way back of convert_dcp_to_hf.py.

    python scripts/convert_hf_to_dcp.py --model llm-jp/Llama-Mimi-1.3B --output outputs/llama-mimi-1.3b

The result, ``<output>/step-0``, holds weights only, and a run starts from it with
``--checkpoint.initial_load_path <output>``. A model without audio tokens gets them, as at the start of a training.
(A run can also start from the Hugging Face model itself, with ``--model.name``.) The whole model passes through memory
once, in fp32.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from torchtitan.audio.conventions import conventions_of
from torchtitan.checkpoint.hf_export import write_hf_files
from torchtitan.checkpoint.manager import CheckpointManager, find_steps
from torchtitan.config.job_config import Comm, JobConfig
from torchtitan.config_manager import to_dict
from torchtitan.distributed.utils import init_distributed
from torchtitan.models.base import BaseModel
from torchtitan.models.llama3.model import Llama3
from torchtitan.models.llama3.weights import load_hf, materialize
from torchtitan.tools.errors import UserError, run_command


def convert(model_name: str, output: Path, num_quantizers: int | None = None) -> Path:
    """Write ``output/step-0`` from a model by hub name or folder, and return it.

    Args:
        num_quantizers: Q, 4 if None; a model that has audio tokens must have them for this Q.

    Raises:
        UserError: the model cannot be read, has another Q, or the output folder holds checkpoints already.
    """
    if find_steps(output):
        raise UserError(f"{output}: there are checkpoints already; give another --output.")
    config = JobConfig()
    config.model.name = model_name
    if num_quantizers is not None:
        config.model.num_quantizers = num_quantizers
    base = BaseModel.load(config.model)
    if base.is_speech_model:
        for key, value in conventions_of(base.hf_config).items():
            setattr(config.model, key, value)
    with torch.device("meta"):
        model = Llama3(base.args)
    materialize(model, torch.device("cpu"), 1)
    load_hf(model, base.folder, base.known_vocab_size)
    state = {"model_args": base.args.to_dict(), "tokens_seen": 0, "config": to_dict(config), "data": {}}
    init_distributed(Comm())
    try:
        return CheckpointManager(output).save(
            0,
            model,
            None,
            state,
            lambda folder: write_hf_files(folder, base.args, base.tokenizer, base.stream, config.model),
        )
    finally:
        dist.destroy_process_group()


def main(model: str, output: str, num_quantizers: int | None = None) -> None:
    """Convert a model in Hugging Face format to a training checkpoint.

    Args:
        model: hub name or folder.
        output: folder in which step-0 is written.
        num_quantizers: Q, 4 by default; a model that has audio tokens must have them for this Q.
    """
    print(convert(model, Path(output).expanduser(), num_quantizers))


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__, use_underscores=True))
