"""All that this project uses of torch's private API, which may change from one version to the next.

tests/test_private.py keeps it in this file. Each function says why no public API does the same. Imports stand inside
the functions, since some of them take seconds. Checked with torch 2.11 and 2.14.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def set_timeout(timeout: timedelta, group: dist.ProcessGroup | None) -> None:
    """Change the timeout of a process group. The public name came with torch 2.14."""
    change = getattr(dist.distributed_c10d, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    change(timeout, group)


def local_region(parameter: Any) -> tuple[slice, ...]:
    """Which part of the whole DTensor this rank holds.

    Its placements are public, but not how to read them: FSDP has one of its own for rows that tensor parallelism has
    split before.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def norms(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The norm of each tensor, in a few kernels for all. The public get_total_norm gives one number for all of them."""
    return torch._foreach_norm(tensors)


# --- memory


def record_memory_history(max_entries: int) -> None:
    """Have the CUDA allocator record what it does. torch documents this function, which has no public name."""
    torch.cuda.memory._record_memory_history(max_entries=max_entries)


def dump_memory_snapshot(path: Path) -> None:
    """Write what the CUDA allocator has recorded. torch documents this function, which has no public name."""
    torch.cuda.memory._dump_snapshot(str(path))


# --- saving in the background


def serves_once(stager: Any) -> bool:
    """Whether a DefaultStager cannot stage again. That of torch 2.11 cannot, which no public attribute says."""
    return not getattr(stager._state_dict_stager, "_deepcopy_dispatch", True)


def end_saving_process() -> None:
    """End the process that torch keeps for saves, for which there is no public function.

    At exit Python would send it a SIGTERM, which it never receives, and wait.
    """
    from torch.distributed.checkpoint import _async_process_executor

    saver, _async_process_executor._CHECKPOINT_PROCESS = _async_process_executor._CHECKPOINT_PROCESS, None
    if saver is not None:
        saver._save_process.kill()
        saver._save_process.join()


# --- the compiler


def keep_saved_memory() -> None:
    """Have compiled backward passes leave alone what was saved for them, so that a graph can be gone through twice.

    There is no public setting for it.
    """
    from torch._functorch import config

    config.donated_buffer = False


def overlap_tensor_parallelism(group: dist.ProcessGroup) -> None:
    """Async tensor parallelism: compiled code overlaps matrix products with the collectives of a group beside them.

    See "Introducing Async Tensor Parallelism in PyTorch" (PyTorch forum, 2024). It needs GPUs with symmetric memory.
    There is no public setting for it.
    """
    from torch._inductor import config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    config._micro_pipeline_tp = True
    enable_symm_mem_for_group(group.group_name)


def compiled_autograd() -> AbstractContextManager[Any]:
    """A context in which the backward pass is compiled too. There is no public switch for it."""
    from torch._dynamo.utils import maybe_enable_compiled_autograd

    return maybe_enable_compiled_autograd(True)


def compile_counters() -> Any:
    """What torch.compile has counted, by kind: graphs, graph breaks. Its logs are public, its counters are not."""
    from torch._dynamo.utils import counters

    return counters


# --- schedules of pipelines


def parse_action(text: str) -> Any:
    """An action of a pipeline's schedule, such as 0F1; None for an empty text. The class has no public name."""
    from torch.distributed.pipelining.schedules import _Action

    return _Action.from_str(text)


def free_schedule() -> type[Any]:
    """The schedule that takes its actions from a file. It has no public name."""
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    return _PipelineScheduleRuntime


def load_actions(schedule: Any, path: str) -> None:
    """Give a :func:`free_schedule` its actions from a CSV file. torch has not made this method public yet."""
    schedule._load_csv(path)


def validate_schedule(actions: dict[int, list[Any]], ranks: int, stages: int, microbatches: int) -> None:
    """Check that actions take each microbatch through each stage once. No public function does.

    Raises:
        AssertionError, KeyError, ValueError: they do not.
    """
    from torch.distributed.pipelining.schedules import _validate_schedule

    _validate_schedule(actions, ranks, stages, microbatches)


# --- operators


def costly_operators() -> set[Any]:
    """Attention, and the collectives that send gradients: operators whose results selective checkpointing keeps.

    Its policy sees the operators behind public functions, which have only internal names.
    """
    if torch.cuda.is_available():
        import_module("torch.nn.attention.varlen")  # makes its operator known
    names = (
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "aten._scaled_dot_product_fused_attention_overrideable",
        "torch_attn._varlen_attn",
        "_c10d_functional.reduce_scatter_tensor",
        "_c10d_functional.all_to_all_single",
    )
    found = (getattr(getattr(torch.ops, space), name, None) for space, name in (full.split(".") for full in names))
    return {operator.default for operator in found if operator is not None}


def pack_for_cpu(weight: torch.Tensor) -> torch.Tensor:
    """A weight in oneDNN's block layout. Public functions pack weights only for frozen, compiled models.

    The 1 is the batch size to expect. It gives the layout whose kernels add up in one order for batches of all sizes.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)


def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear with a weight of :func:`pack_for_cpu`, which no public function takes."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def torch_int8_product() -> Callable[..., torch.Tensor]:
    """torch's (x W^T) * scale of int8 weights, which it widens as it reads them. It has no public name."""
    return torch._weight_int8pack_mm


def quiet_pytree() -> None:
    """Turn off the warnings that torchao causes when it is imported. The logger has no public name."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
