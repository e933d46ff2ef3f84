"""Checkpoints: folders of torch.distributed.checkpoint that need no further information.

    <run>/checkpoint/step-100/
        *.distcp, .metadata     tensors: "model.<name>" and "optimizer.<name>.<state>", sharded
        train_state.json        step, place in the data, config, sizes of the model, random state of every rank, and
                                size and checksum of each .distcp file
        hf/                     config.json and tokenizer for the Hugging Face format

Only tensors go through torch.distributed.checkpoint; the rest is JSON. A checkpoint is written under another name, and
renamed when it is complete. So a folder called step-N is complete.
"""

import base64
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from torchtitan.checkpoint.reader import checksum, find_damage, read_metadata, read_tensors
from torchtitan.components.optimizer import AnyOptimizer, optimizer_tensors
from torchtitan.config.job_config import JobConfig
from torchtitan.config.keys import DEFAULTS, Refuse, value_of
from torchtitan.distributed.utils import broadcast_object, gather_objects
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.weights import Weighted
from torchtitan.tools.errors import UserError, first_line, last_line
from torchtitan.tools.logging import logger
from torchtitan.tools.signals import shielded
from torchtitan.tools.torch_private import end_saving_process, serves_once

STATE_FILE = "train_state.json"
HF_FOLDER = "hf"
FORMAT = 2
# What other code needs of a train_state.json.
STATE_TYPES: dict[str, Any] = {
    "step": int,
    "model_only": bool,
    "model_args": dict,
    "tokens_seen": int | float,
    "config": dict,
    "data": dict,
    "ranks": list,
    "files": dict,
}
# How long a rank waits for the others to write their files, and for rank 0 to delete older checkpoints.
SAVE_TIMEOUT = timedelta(hours=1)
# Parts of a checkpoint that checkpoint.exclude_from_loading can name.
EXCLUDABLE = ("optimizer", "lr_scheduler", "dataloader", "random")


class FormatError(UserError):
    """A checkpoint of a format that this version does not read."""


def check_saving(config: JobConfig, refuse: Refuse) -> None:
    """Refuse settings of loading and saving that would have no effect."""
    part = config.checkpoint
    if part.export_dtype != "float32" and not (part.last_save_model_only or part.last_save_in_hf):
        refuse(
            "checkpoint.export_dtype",
            "it applies only with checkpoint.last_save_model_only = true or checkpoint.last_save_in_hf = true",
        )
    needs = {
        "loaded": ("initial_load_path", "load_step", "exclude_from_loading"),
        "saved": ("create_seed_checkpoint", "last_save_in_hf"),
    }
    for what, names in needs.items():
        for key in (f"checkpoint.{name}" for name in names):
            if not part.enable_checkpoint and value_of(config, key) != DEFAULTS[key]:
                refuse(key, f"nothing is {what} unless checkpoint.enable_checkpoint = true")
    if set(part.exclude_from_loading) - set(EXCLUDABLE):
        refuse("checkpoint.exclude_from_loading", f"the parts are {', '.join(EXCLUDABLE)}")


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder by its name; None for any other name."""
    found = re.fullmatch(r"step-(0|[1-9][0-9]{0,17})", name)
    return int(found[1]) if found else None


def find_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, in rising order."""
    found = [step_of(path.name) for path in folder.glob("step-*") if _is_complete(path)]
    return sorted(step for step in found if step is not None)


def _is_complete(checkpoint: Path) -> bool:
    return (checkpoint / ".metadata").is_file() and (checkpoint / STATE_FILE).is_file()


def find_checkpoint(path: str | Path) -> Path:
    """The step folder of a path: itself, or the latest step in it (or in its ``checkpoint`` folder).

    Raises:
        UserError: there is no complete checkpoint.
    """
    path = Path(path).expanduser()
    if _is_complete(path):
        return path
    for folder in (path, path / "checkpoint"):
        if steps := find_steps(folder):
            return folder / f"step-{steps[-1]}"
    raise UserError(f"{path}: there is no complete checkpoint (a step-N folder with .metadata and {STATE_FILE}).")


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder is a model in Hugging Face format."""
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def find_start(name: str, weights_only: bool) -> Path:
    """The folder of checkpoint.initial_load_path: a checkpoint, or a model in Hugging Face format.

    Raises:
        UserError: there is neither, or more than the weights of a model is wanted.
    """
    path = Path(name).expanduser()
    if not is_hf_folder(path):
        return find_checkpoint(path)
    if not weights_only:
        raise UserError(
            f"{path}: a model in Hugging Face format has no optimizer state, so checkpoint.initial_load_model_only "
            "must be true."
        )
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of the train_state.json of a step folder.

    Raises:
        FormatError: it is of another format.
        UserError: it is damaged, or of another step than the folder's name says.
    """
    path = checkpoint / STATE_FILE
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: it cannot be read ({first_line(error)}).") from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise UserError(f"{path}: it does not hold the state of a training.")
    if state["format"] != FORMAT:
        raise FormatError(f"{checkpoint}: a checkpoint of format {state['format']}, this version reads {FORMAT}.")
    wrong = [key for key, kind in STATE_TYPES.items() if not isinstance(state.get(key), kind)]
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)} is missing or of another type.")
    if step_of(checkpoint.name) not in (None, state["step"]):
        raise UserError(f"{checkpoint}: the folder is called {checkpoint.name}, but it holds step {state['step']}.")
    return state


def damage_of(checkpoint: Path, share: tuple[int, int] = (0, 1), quick: bool = False) -> str | None:
    """What is wrong with a checkpoint, if anything is; ``share`` as in find_damage, ``quick``: only by files' sizes.

    Raises:
        FormatError: it is of another format, which is no damage.
    """
    try:
        state = read_state(checkpoint)
    except FormatError:
        raise
    except UserError as error:
        return str(error)
    return find_damage(checkpoint, {} if quick else state.get("files", {}), share)


def load_full_parameters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All parameters of a checkpoint, unsharded, in fp32, on the CPU. It needs no process group.

    Raises:
        UserError: the checkpoint is damaged or not to be trusted.
    """
    metadata = read_metadata(checkpoint / ".metadata").state_dict_metadata
    tensors = {
        name: torch.empty(cast(TensorStorageMetadata, entry).size)
        for name, entry in metadata.items()
        if name.startswith("model.")
    }
    read_tensors(tensors, checkpoint, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it, or whatever else has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def wait_for_compute() -> None:
    """Return when the GPU has made the last update, since tensors are copied on a CUDA stream of their own."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def named_tensors(model: Weighted, optimizer: AnyOptimizer | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, and the state of the optimizer if there is one, under their names in checkpoints.

    A name can occur twice: a V-shaped pipeline schedule has both ends, and so both uses of a tied weight, on one rank.
    """
    for name, parameter in model.weights():
        yield f"model.{name}", parameter.detach()
    if optimizer is not None:
        for name, tensor in optimizer_tensors(model, optimizer):
            yield f"optimizer.{name}", tensor


class CheckpointManager:
    """Saves and loads the checkpoints of one run.

    Args:
        folder: folder of the step-N folders.
        keep_latest_k: number of checkpoints to keep when a new one is complete; 0 keeps all.
        async_mode: save while training goes on. "async" copies the tensors, and a thread writes them.
            "async_with_pinned_mem" copies them to pinned memory while the next step computes its gradients, and a
            separate process writes them.
    """

    def __init__(
        self,
        folder: Path,
        keep_latest_k: int = 0,
        async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled",
    ):
        self.folder, self.keep_latest_k, self.async_mode = folder, keep_latest_k, async_mode
        # For saves alone: their collectives must not mix with those of training, nor have their short timeout.
        self._group: Any = None
        self._stager: Any = None
        self._staging: Future[Any] | None = None
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    def save(
        self,
        step: int,
        model: Weighted,
        optimizer: AnyOptimizer | None,
        state: dict[str, Any],
        write_hf_files: Callable[[Path], None],
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """Save one step. All ranks call it. With ``async_mode`` it returns early, and :meth:`wait` waits for the save.

        Args:
            optimizer: None saves only the weights, in ``dtype``.
            state: JSON, equal on all ranks.
            write_hf_files: writes config.json and tokenizer into a folder; called on rank 0.

        Raises:
            UserError: the save before this one failed.
        """
        self.wait()
        if self._group is None:
            self._group = cast(Any, dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT))
        target, partial = self.folder / f"step-{step}", self.folder / f".step-{step}.partial"
        rank = dist.get_rank()
        if rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._clean()
                partial.mkdir()
            except OSError as error:
                raise self._failed(error) from error
        dist.barrier(group=self._group)
        wait_for_compute()
        tensors = dict(named_tensors(model, optimizer))
        if optimizer is None:
            tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        ranks = gather_objects({"random": _random_state()}, self._group)
        whole = {"format": FORMAT, "step": step, "model_only": optimizer is None, **state, "ranks": ranks}
        if rank == 0:
            write_hf_files(partial / HF_FOLDER)
        if self.async_mode == "disabled":
            try:
                dcp.save(tensors, checkpoint_id=partial, process_group=self._group)
                self._complete(partial, target, whole)
            except (Exception, CheckpointException) as error:
                raise self._failed(error) from error
            dist.barrier(group=self._group)
            return target
        written = self._write_in_background(tensors, partial)
        self._pending = self._thread.submit(self._complete, partial, target, whole, written)
        return target

    def _write_in_background(self, tensors: dict[str, torch.Tensor], partial: Path) -> "Future[Any]":
        """Start writing. The tensors may change when :meth:`wait_for_staging` has returned."""
        settings: dict[str, Any] = {"checkpoint_id": partial, "process_group": self._group}
        if self.async_mode == "async":
            return cast("Future[Any]", dcp.async_save(tensors, **settings))
        if self._stager is not None and serves_once(self._stager):
            self._stager.close()
            self._stager = None
        if self._stager is None:
            cuda = torch.cuda.is_available()
            options = StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=True, use_async_staging=cuda, use_non_blocking_copy=cuda
            )
            self._stager = DefaultStager(options)
        kind = AsyncCheckpointerType.PROCESS
        with shielded():  # The first save starts the process.
            response = dcp.async_save(tensors, async_checkpointer_type=kind, async_stager=self._stager, **settings)
        if isinstance(response, Future):  # staged already
            return response
        self._staging = response.staging_completion
        return response.upload_completion

    def _complete(
        self, partial: Path, target: Path, whole: dict[str, Any], written: "Future[Any] | None" = None
    ) -> None:
        """Once all ranks have written their files: checksums, train_state.json, the name, and older steps deleted."""
        if written is not None:
            written.result()
        rank = dist.get_rank()
        own = {path.name: [path.stat().st_size, checksum(path)] for path in partial.glob(f"__{rank}_*.distcp")}
        gathered = gather_objects(own, self._group)
        if rank != 0:
            return
        whole["files"] = {name: facts for files in gathered for name, facts in files.items()}
        with (partial / STATE_FILE).open("w") as file:
            file.write(json.dumps(whole, indent=1))
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            target.rename(target.with_name(f".{target.name}.replaced"))
        partial.rename(target)
        _remove(target.with_name(f".{target.name}.replaced"))
        if self.keep_latest_k <= 0:
            return
        if (damage := find_damage(target, {})) is not None:
            logger.warning("%s No older checkpoint is deleted.", damage)
            return
        # Only older steps are deleted. Later ones exist if the run went back to an earlier step.
        older = [old for old in find_steps(self.folder) if old < whole["step"]]
        for old in older[: max(0, len(older) + 1 - self.keep_latest_k)]:
            shutil.rmtree(self.folder / f"step-{old}", ignore_errors=True)

    def wait_for_staging(self) -> None:
        """Wait until a background save has copied the tensors, so that they may change."""
        if self._staging is not None:
            self._staging.result()
            self._staging = None

    def wait(self) -> None:
        """Wait until no save is running.

        Raises:
            UserError: the save failed.
        """
        self.wait_for_staging()
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (Exception, CheckpointException) as error:
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> UserError:
        return UserError(f"{self.folder}: the checkpoint could not be saved ({last_line(error)}).")

    def _clean(self) -> None:
        """Remove the leftovers of interrupted saves."""
        for leftover in self.folder.glob(".step-*"):
            step = self.folder / leftover.name[1:].removesuffix(".replaced")
            if leftover.name.endswith(".replaced") and not step.exists():
                leftover.rename(step)
            else:
                _remove(leftover)

    def close(self) -> None:
        """Wait for a running save, and end the threads and processes of background saves.

        Raises:
            UserError: the save failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._stager is not None:
                self._stager.close()
                self._stager = None
                end_saving_process()

    def newest_intact(self, group: Any = None) -> Path | None:
        """The newest complete checkpoint without damage.

        All ranks call it and share the work. Damaged checkpoints are renamed, and a warning names them.
        """
        rank = dist.get_rank()
        while True:
            steps = find_steps(self.folder) if rank == 0 else []
            path = broadcast_object(self.folder / f"step-{steps[-1]}" if steps else None, group)
            if path is None or (damage := self.damage(path, group)) is None:
                return path
            if rank == 0:
                aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
                path.rename(aside)
                logger.warning("%s It is set aside as %s.", damage, aside.name)
            dist.barrier(group=group)

    @staticmethod
    def damage(checkpoint: Path, group: Any = None) -> str | None:
        """What any rank finds wrong with a checkpoint; called by all, which share the work."""
        share = (dist.get_rank(), dist.get_world_size())
        return next((reason for reason in gather_objects(damage_of(checkpoint, share), group) if reason), None)

    def latest(self, load_step: int = -1) -> Path | None:
        """The checkpoint to resume from: the latest one with whole files, or that of ``load_step``; None without one.

        Raises:
            UserError: ``load_step`` has no complete checkpoint.
        """
        steps = find_steps(self.folder)
        if load_step >= 0 and load_step not in steps:
            raise UserError(f"{self.folder}: no complete checkpoint of step {load_step} (complete: {steps or 'none'}).")
        candidates = [self.folder / f"step-{step}" for step in ([load_step] if load_step >= 0 else reversed(steps))]
        return next((path for path in candidates if load_step >= 0 or damage_of(path, quick=True) is None), None)

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints after ``step``, so that a run that went back does not resume from them."""
        for later in (later for later in find_steps(self.folder) if later > step):
            path = self.folder / f"step-{later}"
            path.rename(path.with_name(f"{path.name}.set-aside-{time.time_ns()}"))
            logger.warning("going back to step %d: %s is set aside", step, path)


def load_checkpoint(
    checkpoint: Path,
    model: Weighted,
    optimizer: AnyOptimizer | None,
    args: Llama3Args,
) -> dict[str, Any]:
    """Read a checkpoint into a model and an optimizer (unless that is None), whatever their sharding.

    Returns the train_state.json.

    Raises:
        UserError: the model has other sizes than that of the checkpoint, or the checkpoint has no optimizer state.
    """
    state = read_state(checkpoint)
    if state["model_args"] != json.loads(json.dumps(args.to_dict())):
        differing = [k for k, v in args.to_dict().items() if state["model_args"].get(k) != v]
        raise UserError(f"{checkpoint}: the checkpoint's model differs from the configured one in {differing}.")
    if optimizer is not None and state["model_only"]:
        raise UserError(
            f"{checkpoint}: this checkpoint has only weights, so a run cannot resume from it; "
            "start a new run from it with checkpoint.initial_load_path."
        )
    named = list(named_tensors(model, optimizer))
    tensors = dict(named)
    read_tensors(tensors, checkpoint)
    for name, tensor in named:
        if tensors[name] is not tensor:
            tensor.copy_(tensors[name])
    return state


def _random_state() -> dict[str, str]:
    """This rank's random state by device, in base64."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def restore_random_state(saved: dict[str, str]) -> None:
    """Set this rank's random state as it was saved."""
    states = {
        device: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for device, text in saved.items()
    }
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
