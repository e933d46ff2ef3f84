"""Pipeline parallelism: the blocks of a Llama 3 dealt out to ranks, and the microbatches that flow through them.

The schedules are those of torch.distributed.pipelining. A tied embedding lies both on the first stage and, as the
head, on the last one; their gradients are summed, so that both copies get the same updates.
"""

import csv
import re
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
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


def _stages_in(actions: dict[int, list[Any]]) -> dict[int, int]:
    """The stages of a schedule, each with its rank."""
    single = [(rank, part) for rank, own in actions.items() for a in own if a for part in (a.sub_actions or (a,))]
    return {action.stage_index: rank for rank, action in single}


def check_schedule(config: Parallelism, batch_size: int, num_stages: int) -> None:
    """Whether a schedule can take batches of so many rows through so many stages.

    Raises:
        ConfigError: it cannot.
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
    kind = schedule_class(config)
    key = f'parallelism.pipeline_parallel_schedule = "{config.pipeline_parallel_schedule}"'
    if kind in (Schedule1F1B, ScheduleDualPipeV) and microbatches < num_stages:
        raise ConfigError(f"{key}: {what} are fewer than its {num_stages} stages.")
    rounds = max(1, microbatches // ranks)
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
    every = [part for own in read_schedule(config).values() for a in own if a for part in (a.sub_actions or (a,))]
    return any(action.computation_type in (BACKWARD_INPUT, BACKWARD_WEIGHT) for action in every)


def split_blocks(n_layers: int, config: Parallelism) -> list[range]:
    """The blocks of each stage, in order: by split points, by blocks a stage, or evenly.

    Evenly means one stage a rank, two with a schedule of several, in a schedule of one's own as many as it names; and
    embedding and head count like a block each.

    Raises:
        ConfigError: the stages do not fit the blocks, the ranks or the schedule.
    """
    ranks = config.pipeline_parallel_degree
    kind = schedule_class(config)
    points, size = config.pipeline_parallel_split_points, config.pipeline_parallel_layers_per_stage
    if points:
        found = [re.fullmatch(r"layers\.(\d+)", point) for point in points]
        begins = [int(match[1]) for match in found if match]
        if len(begins) < len(points) or begins != sorted(set(begins)) or not 0 < begins[0] <= begins[-1] < n_layers:
            raise ConfigError(
                f"parallelism.pipeline_parallel_split_points = {points}: they must be names of blocks in rising order, "
                f"from layers.1 to layers.{n_layers - 1}."
            )
        key = "parallelism.pipeline_parallel_split_points"
    elif size is not None:
        begins = list(range(size, n_layers, size))
        key = "parallelism.pipeline_parallel_layers_per_stage"
    else:
        stages = ranks * (2 if issubclass(kind, PipelineScheduleMulti) else 1)
        key = "parallelism.pipeline_parallel_degree"
        if config.pipeline_parallel_schedule_csv is not None:
            stages = max(1, len(_stages_in(read_schedule(config))))
            key = "parallelism.pipeline_parallel_schedule_csv"
        if stages > n_layers:
            raise ConfigError(f"{key} = {ranks}: {stages} stages are more than the model's {n_layers} blocks.")
        # Embedding and head are as much work as a block each, more or less.
        cuts = [round((n_layers + 2) * stage / stages) - 1 for stage in range(1, stages)]
        begins = [min(max(cut, stage), n_layers - stages + stage) for stage, cut in enumerate(cuts, start=1)]
    stages = len(begins) + 1
    if stages % ranks:
        raise ConfigError(f"{key}: that makes {stages} stages, which cannot be dealt out to {ranks} ranks.")
    if config.pipeline_parallel_schedule_csv is not None:
        if set(own := _stages_in(read_schedule(config))) != set(range(stages)):
            raise ConfigError(f"{key}: that makes {stages} stages, but the schedule names {sorted(own)}.")
        return [range(a, b) for a, b in zip([0, *begins], [*begins, n_layers], strict=True)]
    several = stages // ranks
    if issubclass(kind, PipelineScheduleSingle) and several != 1:
        raise ConfigError(f"{key}: {kind.__name__} takes one stage a rank, not {several}.")
    if issubclass(kind, PipelineScheduleMulti) and several == 1:
        raise ConfigError(f"{key}: {kind.__name__} takes several stages a rank, not one.")
    if kind in (ScheduleZBVZeroBubble, ScheduleDualPipeV) and several != 2:
        raise ConfigError(f"{key}: {kind.__name__} takes two stages a rank, not {several}.")
    return [range(a, b) for a, b in zip([0, *begins], [*begins, n_layers], strict=True)]


def own_stages(num_stages: int, rank: int, ranks: int, config: Parallelism) -> list[int]:
    """The stages of one rank: every ranks-th, in schedules shaped like a V one from each end, or as one's own says."""
    if config.pipeline_parallel_schedule_csv is not None:
        return sorted(stage for stage, owner in _stages_in(read_schedule(config)).items() if owner == rank)
    if schedule_class(config) in (ScheduleZBVZeroBubble, ScheduleDualPipeV):
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
        self.owner = [
            next(r for r in range(mesh.size()) if s in own_stages(num_stages, r, mesh.size(), part))
            for s in range(num_stages)
        ]
        self.divisor = 1.0
        # The ranks with the two ends, which share a tied embedding. Every rank takes part in making a group.
        pipelines = _all_pipelines(mesh)
        groups = [dist.new_group(sorted({ranks[self.owner[0]], ranks[self.owner[-1]]})) for ranks in pipelines]
        own = next(i for i, ranks in enumerate(pipelines) if dist.get_rank() in ranks)
        self.ends = cast(dist.ProcessGroup, groups[own])  # not for the ranks between
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
            documents = max(int((part == 0).sum()) for part in positions.split(self.rows))
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
        grads = [_local(copy.grad) for copy in copies if copy.grad is not None]
        if len(grads) == 2:  # Schedules shaped like a V have both ends on one rank.
            grads[0] += grads[1]
            grads[1].copy_(grads[0])
        elif grads:
            dist.all_reduce(grads[0], group=self.ends)

    @torch.no_grad()
    def losses(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of each target of rows [B, S'], on all ranks of the pipeline; no schedule, one batch at a time."""
        rank, hidden = dist.get_rank(self.group), tokens
        for number in range(self.num_stages):
            before, here = self.owner[number - 1] if number else None, self.owner[number]
            if before is not None and before != here:
                if rank == before:
                    dist.send(hidden.contiguous(), group=self.group, group_dst=here)
                elif rank == here:
                    shape = self._hidden_shape(*targets.shape)
                    hidden = torch.empty(shape, dtype=self.dtype, device=self.device)
                    dist.recv(hidden, group=self.group, group_src=before)
            if number in self.stages:
                hidden = self.stages[number](hidden, targets)
        if rank == self.owner[-1]:
            result = hidden.contiguous()
        else:
            result = torch.empty(len(targets), targets.shape[1] // self.dims.context, device=self.device)
        dist.broadcast(result, group=self.group, group_src=self.owner[-1])
        return result


def _all_pipelines(mesh: DeviceMesh) -> list[list[int]]:
    """The ranks of every pipeline of the run, from its first rank to its last: ranks at equal distances."""
    ranks = mesh.size()
    stride = dist.get_world_size() // ranks
    return [list(range(start, start + ranks * stride, stride)) for start in range(stride)]


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
