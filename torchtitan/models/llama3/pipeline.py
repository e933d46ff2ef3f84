"""Pipeline parallelism: the blocks of a Llama 3 dealt out to ranks, and the microbatches that flow through them.

The schedules are those of torch.distributed.pipelining. A tied embedding lies both on the first stage and, as the
head, on the last one; their gradients are summed, so that both copies get the same updates.
"""

import csv
import re
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
    get_schedule_class,
)
from torch.distributed.tensor import DTensor

from torchtitan.config.job_config import JobConfig, Parallelism
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.llama3.model import Llama3
from torchtitan.tools.errors import ConfigError
from torchtitan.tools.torch_private import free_schedule, load_actions, parse_action, validate_schedule

V_SHAPED = (ScheduleZBVZeroBubble, ScheduleDualPipeV)
SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def schedule_class(config: Parallelism) -> type[Any]:
    """The schedule of torch.distributed.pipelining that a config names.

    Raises:
        ConfigError: there is none of this name.
    """
    if config.pipeline_parallel_schedule_csv is not None:
        return free_schedule()
    name = config.pipeline_parallel_schedule
    if name.lower() not in [known.lower() for known in SCHEDULES]:  # torch's lookup also finds abstract classes
        raise ConfigError(
            f'parallelism.pipeline_parallel_schedule = "{name}": there is no such schedule; there are '
            f"{', '.join(SCHEDULES)}."
        )
    return get_schedule_class(name)


def read_schedule(config: Parallelism) -> dict[int, list[Any]]:
    """The actions of each rank in parallelism.pipeline_parallel_schedule_csv: a line a rank, such as 0F0,0F1,0B0,0B1.

    Raises:
        ConfigError: it cannot be read, or there is something else in it.
    """
    path = config.pipeline_parallel_schedule_csv
    assert path is not None
    key = f'parallelism.pipeline_parallel_schedule_csv = "{path}"'
    try:
        with open(path, newline="") as file:
            lines = [line for line in csv.reader(file) if line]
        actions = {rank: [parse_action(cell) for cell in line] for rank, line in enumerate(lines)}
    except (OSError, ValueError, csv.Error, RuntimeError) as error:
        raise ConfigError(f"{key}: it cannot be read ({error}).") from None
    for rank, own in actions.items():
        if strange := [action for action in own if action is not None and not action.is_compute_op]:
            raise ConfigError(f"{key}: {strange[0]} of rank {rank} is none of F, B, I and W, and only these are read.")
    return actions


def _computations(config: Parallelism) -> list[tuple[int, Any]]:
    """The F, B, I and W of the config's schedule, each with its rank."""
    every = [(rank, action) for rank, own in read_schedule(config).items() for action in own if action]
    return [(rank, part) for rank, action in every for part in (action.sub_actions or (action,))]


def _owners(config: Parallelism) -> dict[int, int]:
    """The stages that the config's schedule names, each with its rank."""
    return {action.stage_index: rank for rank, action in _computations(config)}


def check_schedule(config: Parallelism, batch_size: int, num_stages: int) -> None:
    """Refuse a schedule that cannot take batches of so many rows through so many stages.

    Raises:
        ConfigError: why it cannot.
    """
    ranks, microbatches = config.pipeline_parallel_degree, batch_size // config.pipeline_parallel_microbatch_size
    what = f"{microbatches} microbatches (training.local_batch_size / pipeline_parallel_microbatch_size)"
    if config.pipeline_parallel_schedule_csv is not None:
        try:
            validate_schedule(read_schedule(config), ranks, num_stages, microbatches)
        except (AssertionError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ConfigError(
                f'parallelism.pipeline_parallel_schedule_csv = "{config.pipeline_parallel_schedule_csv}": it does not '
                f"take {what} through {num_stages} stages on {ranks} ranks ({reason})."
            ) from None
        return
    kind, rounds = schedule_class(config), max(1, microbatches // ranks)
    key = f'parallelism.pipeline_parallel_schedule = "{config.pipeline_parallel_schedule}"'
    if kind in (Schedule1F1B, ScheduleDualPipeV) and microbatches < num_stages:
        raise ConfigError(f"{key}: {what} are fewer than its {num_stages} stages.")
    if kind in (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble) and microbatches % rounds:
        raise ConfigError(f"{key}: {what} cannot be dealt out to {rounds} rounds of {ranks} ranks.")


# Schedules that compute the gradients of inputs first and those of weights later.
SPLIT_BACKWARD = ("interleavedzerobubble", "zbvzerobubble", "dualpipev")


def splits_backward(config: Parallelism) -> bool:
    """Whether the schedule computes the gradients of inputs first and those of weights later."""
    if config.pipeline_parallel_degree == 1:
        return False
    if config.pipeline_parallel_schedule_csv is None:
        return config.pipeline_parallel_schedule.lower() in SPLIT_BACKWARD
    return any(action.computation_type in (BACKWARD_INPUT, BACKWARD_WEIGHT) for _, action in _computations(config))


def split_blocks(n_layers: int, config: Parallelism) -> list[range]:
    """The blocks of each stage, in order: by split points, by blocks a stage, or evenly.

    Evenly means one stage a rank, or two with a schedule of several, or as many as a file names. Embedding and head
    count like a block each.

    Raises:
        ConfigError: the stages do not fit the blocks, the ranks or the schedule.
    """
    ranks, kind = config.pipeline_parallel_degree, schedule_class(config)
    named = None if config.pipeline_parallel_schedule_csv is None else sorted(_owners(config))
    points, size = config.pipeline_parallel_split_points, config.pipeline_parallel_layers_per_stage
    if points:
        key = "parallelism.pipeline_parallel_split_points"
        found = [re.fullmatch(r"layers\.(\d+)", point) for point in points]
        begins = [int(match[1]) for match in found if match]
        if len(begins) < len(points) or begins != sorted(set(begins)) or not 0 < begins[0] <= begins[-1] < n_layers:
            raise ConfigError(
                f"{key} = {points}: they must be names of blocks in rising order, from layers.1 to "
                f"layers.{n_layers - 1}."
            )
    elif size is not None:
        key = "parallelism.pipeline_parallel_layers_per_stage"
        begins = list(range(size, n_layers, size))
    else:
        key = f"parallelism.pipeline_parallel_{'degree' if named is None else 'schedule_csv'}"
        stages = ranks * (2 if issubclass(kind, PipelineScheduleMulti) else 1) if named is None else max(1, len(named))
        if stages > n_layers:
            raise ConfigError(f"{key} = {ranks}: {stages} stages are more than the model's {n_layers} blocks.")
        # Embedding and head are as much work as a block each, more or less.
        cuts = [round((n_layers + 2) * stage / stages) - 1 for stage in range(1, stages)]
        begins = [min(max(cut, stage), n_layers - stages + stage) for stage, cut in enumerate(cuts, start=1)]
    stages = len(begins) + 1
    several = stages // ranks
    if stages % ranks:
        raise ConfigError(f"{key}: that makes {stages} stages, which cannot be dealt out to {ranks} ranks.")
    if named is not None:
        if named != list(range(stages)):
            raise ConfigError(f"{key}: that makes {stages} stages, but the schedule names {named}.")
    elif issubclass(kind, PipelineScheduleSingle) and several != 1:
        raise ConfigError(f"{key}: {kind.__name__} takes one stage a rank, not {several}.")
    elif issubclass(kind, PipelineScheduleMulti) and several == 1:
        raise ConfigError(f"{key}: {kind.__name__} takes several stages a rank, not one.")
    elif kind in V_SHAPED and several != 2:
        raise ConfigError(f"{key}: {kind.__name__} takes two stages a rank, not {several}.")
    return [range(a, b) for a, b in pairwise([0, *begins, n_layers])]


def own_stages(num_stages: int, rank: int, ranks: int, config: Parallelism) -> list[int]:
    """The stages of one rank: every ranks-th, or one from each end in V-shaped schedules, or as a file says."""
    if config.pipeline_parallel_schedule_csv is not None:
        return sorted(stage for stage, owner in _owners(config).items() if owner == rank)
    if schedule_class(config) in V_SHAPED:
        return [rank, num_stages - 1 - rank]
    return list(range(rank, num_stages, ranks))


class Pipeline:
    """The stages of this rank, and their schedule.

    Args:
        stages: this rank's, by number, on their device.
        num_stages: of the whole pipeline.
        dtype: of the hidden states that travel between stages.
    """

    def __init__(
        self,
        stages: dict[int, Llama3],
        num_stages: int,
        config: JobConfig,
        dims: ParallelDims,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.stages, self.num_stages, self.dims, self.device, self.dtype = stages, num_stages, dims, device, dtype
        part, mesh = config.parallelism, dims.mesh(device.type)["pp"]
        self.group, self.rows = mesh.get_group(), part.pipeline_parallel_microbatch_size
        owner = {s: r for r in range(mesh.size()) for s in own_stages(num_stages, r, mesh.size(), part)}
        self.owner = [owner[stage] for stage in range(num_stages)]
        self.divisor = 1.0
        # The ranks with the two ends, which share a tied embedding; the ranks between have no use for their group. All
        # ranks take part in making the groups of all pipelines, whose ranks lie at equal distances.
        stride = dist.get_world_size() // mesh.size()
        ends = [[first + stride * self.owner[end] for end in (0, -1)] for first in range(stride)]
        groups = [dist.new_group(sorted(set(ranks))) for ranks in ends]
        self.ends = cast(dist.ProcessGroup, groups[dist.get_rank() % stride])
        made = []
        for number, model in stages.items():
            hidden = torch.empty(self._hidden_shape(self.rows, config.training.seq_len), dtype=dtype, device="meta")
            ids = torch.empty(self.rows, 1, dtype=torch.int64, device="meta")
            given = ids if model.first else hidden.requires_grad_()
            result = torch.empty((), device="meta") if model.last else torch.empty_like(hidden)
            shapes = {"input_args": given, "output_args": result.requires_grad_()}
            made.append(PipelineStage(model, number, num_stages, device, group=self.group, **shapes))
        kind = schedule_class(part)
        given = made[0] if issubclass(kind, PipelineScheduleSingle) else made
        microbatches = config.training.local_batch_size // self.rows
        self.schedule: Any = kind(given, microbatches, loss_fn=self._loss, scale_grads=False)
        if part.pipeline_parallel_schedule_csv is not None:
            load_actions(self.schedule, part.pipeline_parallel_schedule_csv)

    def _hidden_shape(self, rows: int, length: int) -> tuple[int, int, int]:
        """Shape of this rank's hidden states of some rows between two stages: [rows, positions, dim]."""
        (model, *_) = self.stages.values()
        return rows, length // (self.dims.context * self.dims.tensor), model.args.dim

    def _loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.sum() / self.divisor

    def backward(
        self, tokens: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None, divisor: float
    ) -> torch.Tensor:
        """Forward and backward passes of a batch [B, S]; the loss, divided, or 0 without the last stage.

        ``positions`` are on the CPU, where the documents of each microbatch are counted without waiting for a GPU.
        """
        self.divisor = divisor
        packed: dict[str, Any] = {}
        if positions is not None:
            # Microbatches with fewer documents are filled up with empty ones.
            documents = max(int((rows == 0).sum()) for rows in positions.split(self.rows))
            packed = {"positions": positions.to(self.device, non_blocking=True), "num_documents": documents}
        losses: list[torch.Tensor] = []
        self.schedule.step(
            *([tokens] if 0 in self.stages else []),
            target=targets if self.num_stages - 1 in self.stages else None,
            losses=losses,
            return_outputs=False,
            targets=targets,
            **packed,
        )
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)

    def sum_tied_gradients(self) -> None:
        """Add the gradients of a tied embedding on the first stage and of the head on the last one."""
        ends = [part for part in self.stages.values() if part.args.tied and (part.first or part.last)]
        copies = [part.tok_embeddings.weight if part.first else part.output.weight for part in ends]
        grads = [copy.grad for copy in copies if copy.grad is not None]
        grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        if len(grads) == 2:  # Schedules shaped like a V have both ends on one rank.
            grads[0] += grads[1]
            grads[1].copy_(grads[0])
        elif grads:
            dist.all_reduce(grads[0], group=self.ends)

    @torch.no_grad()
    def losses(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of each target of rows [B, S'], on all ranks of the pipeline; no schedule, one batch at a time."""
        rank, hidden = dist.get_rank(self.group), tokens
        for number, (before, here) in enumerate(pairwise((self.owner[0], *self.owner))):
            if before != here and rank == before:
                dist.send(hidden.contiguous(), group=self.group, group_dst=here)
            elif before != here and rank == here:
                hidden = torch.empty(self._hidden_shape(*targets.shape), dtype=self.dtype, device=self.device)
                dist.recv(hidden, group=self.group, group_src=before)
            if number in self.stages:
                hidden = self.stages[number](hidden, targets)
        if rank == self.owner[-1]:
            result = hidden.contiguous()
        else:
            result = torch.empty(len(targets), targets.shape[1] // self.dims.context, device=self.device)
        dist.broadcast(result, group=self.group, group_src=self.owner[-1])
        return result
