"""Traces of time and memory, from torch.profiler and the CUDA allocator."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torchtitan.config.job_config import Profiling
from torchtitan.tools.logging import logger
from torchtitan.tools.torch_private import dump_memory_snapshot, record_memory_history

_WARMUP_STEPS = 1


@contextmanager
def profile(config: Profiling, folder: Path, rank: int, done: int = 0) -> Iterator[Any]:
    """A context whose value's ``.step()`` is called once a step, or None; traces open in chrome://tracing or Perfetto.

    It traces every step of the run that ``profile_freq`` divides.

    Args:
        done: steps of the run before this process.
    """
    if not config.enable_profiling:
        yield None
        return

    def save(profiler: Any) -> None:
        step = done + profiler.step_num
        if step % config.profile_freq:
            return  # the run ended before the step to trace
        path = folder / config.save_traces_folder / f"step-{step}" / f"rank{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        logger.info("trace written to %s", path)

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    warmup = min(_WARMUP_STEPS, config.profile_freq - 1)
    cycle = torch.profiler.schedule(wait=config.profile_freq - warmup - 1, warmup=warmup, active=1)
    with torch.profiler.profile(
        activities=activities, schedule=lambda step: cycle(done + step), on_trace_ready=save
    ) as profiler:
        yield profiler


@contextmanager
def memory_snapshots(config: Profiling, folder: Path, rank: int) -> Iterator[Any]:
    """A context whose value is called with the step to write a CUDA memory snapshot every ``profile_freq`` steps.

    Running out of memory writes one too.
    """
    if not config.enable_memory_snapshot:
        yield lambda step: None
        return
    record_memory_history(max_entries=100_000)

    def save(name: str) -> None:
        path = folder / config.save_memory_snapshot_folder / name / f"rank{rank}.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        dump_memory_snapshot(path)
        logger.info("memory snapshot written to %s", path)

    try:
        yield lambda step: save(f"step-{step}") if step % config.profile_freq == 0 else None
    except torch.OutOfMemoryError:
        save("out-of-memory")
        raise
