"""Checkpoints: folders of torch.distributed.checkpoint that say by themselves what they are.

    <run>/checkpoint/step-100/
        *.distcp, .metadata     tensors: "model.<name>" and "optimizer.<name>.<state>", sharded
        train_state.json        step, place in the data, config, sizes of the model, random state of every rank
        hf/                     config.json and tokenizer for the Hugging Face format

Nothing but tensors goes through torch.distributed.checkpoint; the rest is JSON. A checkpoint is written under another
name and renamed when it is complete, so a folder called step-N is whole.
"""

import base64
import json
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.components.optimizer import optimizer_tensors
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.weights import Weighted
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

STATE_FILE = "train_state.json"
HF_FOLDER = "hf"
FORMAT = 2


def find_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, in rising order."""
    steps = []
    for path in folder.glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / ".metadata").is_file() and (path / STATE_FILE).is_file():
            steps.append(int(match.group(1)))
    return sorted(steps)


def find_checkpoint(path: str | Path) -> Path:
    """The step folder that a path stands for: itself, or the latest step in it (or in its ``checkpoint`` folder).

    Raises:
        UserError: there is no complete checkpoint.
    """
    path = Path(path).expanduser()
    if (path / STATE_FILE).is_file() and (path / ".metadata").is_file():
        return path
    for folder in (path, path / "checkpoint"):
        if steps := find_steps(folder):
            return folder / f"step-{steps[-1]}"
    raise UserError(f"{path}: there is no complete checkpoint (a step-N folder with .metadata and {STATE_FILE}).")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The train_state.json of a step folder.

    Raises:
        UserError: it is damaged or of another format.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{checkpoint / STATE_FILE}: it cannot be read ({error}).") from None
    if state.get("format") != FORMAT:
        raise UserError(f"{checkpoint}: a checkpoint of format {state.get('format')}, this version reads {FORMAT}.")
    return state


def load_full_parameters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All parameters of a checkpoint, whole, in fp32, on the CPU; needs no process group."""
    try:
        metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{checkpoint}: the checkpoint's .metadata is damaged ({error}).") from None
    tensors = {
        name: torch.empty(entry.size)  # type: ignore[union-attr]
        for name, entry in metadata.items()
        if name.startswith("model.")
    }
    _load(tensors, checkpoint, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


class CheckpointManager:
    """Saves and loads the checkpoints of one run.

    Args:
        folder: where the step-N folders lie.
        keep_latest_k: older checkpoints are deleted once a new one is complete; 0 keeps all.
    """

    def __init__(self, folder: Path, keep_latest_k: int = 0):
        self.folder, self.keep_latest_k = folder, keep_latest_k

    def save(
        self,
        step: int,
        model: Weighted,
        optimizer: torch.optim.Optimizer | None,
        state: dict[str, Any],
        write_hf_files: Callable[[Path], None],
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """Save one step; called by all ranks.

        Args:
            optimizer: None saves the weights alone, in ``dtype``.
            state: JSON, the same on all ranks.
            write_hf_files: called on rank 0 with the folder for config.json and tokenizer.
        """
        target, partial = self.folder / f"step-{step}", self.folder / f".step-{step}.partial"
        rank = dist.get_rank()
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        tensors = {f"model.{name}": p.detach() for name, p in model.weights()}
        if optimizer is not None:
            tensors |= {f"optimizer.{name}": t for name, t in optimizer_tensors(model, optimizer).items()}
        else:
            tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        dcp.save(tensors, checkpoint_id=partial)
        ranks: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(ranks, {"random": _random_state()})
        if rank == 0:
            write_hf_files(partial / HF_FOLDER)
            whole = {"format": FORMAT, "step": step, "model_only": optimizer is None, **state, "ranks": ranks}
            (partial / STATE_FILE).write_text(json.dumps(whole, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            if self.keep_latest_k > 0:
                # Later steps are there when the run went back to an earlier one; the new one must outlive them.
                older = [old for old in find_steps(self.folder) if old < step]
                for old in older[: max(0, len(older) + 1 - self.keep_latest_k)]:
                    shutil.rmtree(self.folder / f"step-{old}", ignore_errors=True)
        dist.barrier()
        return target

    def latest(self, load_step: int = -1) -> Path | None:
        """The checkpoint to resume from: the latest complete one, or that of ``load_step``; None if there is none.

        Raises:
            UserError: ``load_step`` has no complete checkpoint.
        """
        steps = find_steps(self.folder)
        if load_step >= 0 and load_step not in steps:
            raise UserError(f"{self.folder}: no complete checkpoint of step {load_step} (complete: {steps or 'none'}).")
        if not steps:
            return None
        return self.folder / f"step-{load_step if load_step >= 0 else steps[-1]}"

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints after ``step``, so that a run that goes back is not overtaken by its old self."""
        for later in (later for later in find_steps(self.folder) if later > step):
            path = self.folder / f"step-{later}"
            path.rename(path.with_name(f"{path.name}.set-aside-{time.time_ns()}"))
            logger.warning("going back to step %d: %s is set aside", step, path)


def load_checkpoint(
    checkpoint: Path, model: Weighted, optimizer: torch.optim.Optimizer | None, args: Llama3Args
) -> dict[str, Any]:
    """Read a checkpoint into a model and, unless it is None, an optimizer, whatever their sharding.

    Returns its train_state.json.

    Raises:
        UserError: the checkpoint is of a model of other sizes, or holds only weights where more is needed.
    """
    state = read_state(checkpoint)
    if state["model_args"] != json.loads(json.dumps(args.to_dict())):
        differing = [k for k, v in args.to_dict().items() if state["model_args"].get(k) != v]
        raise UserError(f"{checkpoint}: the checkpoint's model differs from the configured one in {differing}.")
    if optimizer is not None and state["model_only"]:
        raise UserError(
            f"{checkpoint}: this checkpoint holds only weights, so a run cannot be resumed from it; "
            "start a new one from it with checkpoint.initial_load_path."
        )
    tensors: dict[str, torch.Tensor] = {f"model.{name}": p.detach() for name, p in model.weights()}
    if optimizer is not None:
        tensors |= {f"optimizer.{name}": t for name, t in optimizer_tensors(model, optimizer).items()}
    _load(tensors, checkpoint)
    return state


def _load(tensors: dict[str, torch.Tensor], checkpoint: Path, no_dist: bool = False) -> None:
    try:
        with warnings.catch_warnings():  # of loading without a process group, which is meant
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, checkpoint_id=checkpoint, no_dist=no_dist)
    except (Exception, CheckpointException) as error:  # the latter, with what any rank met, is no Exception
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(f"{checkpoint}: the checkpoint is damaged or incomplete ({reason}).") from error


def _random_state() -> dict[str, str]:
    state = {"cpu": _encode(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def restore_random_state(state: dict[str, str]) -> None:
    """Set this rank's random state as it was saved."""
    torch.set_rng_state(_decode(state["cpu"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
