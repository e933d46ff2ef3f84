"""The process group of a run, on GPUs (nccl) or CPUs (gloo), with or without torchrun."""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.config.job_config import Comm
from torchtitan.tools.errors import UserError
from torchtitan.tools.torch_private import set_timeout


def world_size() -> int:
    """Ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def init_distributed(comm: Comm, folder: Path | None = None) -> torch.device:
    """Open the process group and return this rank's device.

    Args:
        folder: of the run, in which NCCL's flight recorder writes after a timeout.

    Raises:
        UserError: a node has more ranks than GPUs.
    """
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"{os.environ.get('LOCAL_WORLD_SIZE', local + 1)} ranks were started on a node of "
                f"{torch.cuda.device_count()} GPUs; give torchrun --nproc_per_node={torch.cuda.device_count()}."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
        if comm.trace_buf_size > 0:
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(comm.trace_buf_size))
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
            if folder is not None:
                traces = folder / "flight_recorder"
                traces.mkdir(parents=True, exist_ok=True)
                # The newer and the older name of the same variable.
                for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
                    os.environ.setdefault(name, str(traces / "rank_"))
    else:
        device, backend = torch.device("cpu"), "gloo"
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        # torch's process that saves in the background looks here for this one; the machine's name may lead nowhere.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def shorten_timeout(comm: Comm, device: torch.device, groups: Sequence[Any] = ()) -> None:
    """Notice a collective that hangs sooner. Called after the first step, in which models load and kernels compile.

    Args:
        groups: process groups besides the one of all ranks.
    """
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for group in (None, *groups):
        set_timeout(timedelta(seconds=comm.train_timeout_seconds), group)


def sum_over_ranks(values: list[float], group: Any = None) -> list[float]:
    """Sum numbers over all ranks, exactly for integers below 2^53."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, group=group)
    return tensor.tolist()


def max_over_ranks(value: float, group: Any = None) -> float:
    """The largest of all ranks' numbers."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return tensor.item()


def broadcast_object(value: Any, group: Any = None) -> Any:
    """Rank 0's value, on all ranks."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """The values of all ranks, on all ranks."""
    box = [None] * dist.get_world_size()
    dist.all_gather_object(box, value, group=group)
    return box
