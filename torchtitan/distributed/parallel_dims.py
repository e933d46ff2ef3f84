"""How the ranks of a run share the work: the degree of each parallelism, and the device mesh they span.

Ranks are laid out with the pipeline outermost and tensor parallelism innermost, so that what talks most sits within
a node: rank = (((pipeline * replicate + r) * shard + s) * context + c) * tensor + t.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from math import lcm

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan.config.job_config import JobConfig
from torchtitan.config.keys import Refuse, row_lengths, said
from torchtitan.tools.errors import ConfigError


@dataclass(frozen=True)
class ParallelDims:
    """The degrees, and this rank's place in them.

    Attributes:
        replicate: copies of the (sharded) model that see other data.
        shard: ranks over which one copy is sharded, each of which sees other data.
        context: ranks over which each row is split.
        tensor: ranks over which each layer is split.
        pipeline: ranks over which the sequence of blocks is split.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    rank: int = 0

    @staticmethod
    def from_config(config: JobConfig, rank: int, world_size: int) -> "ParallelDims":
        """The degrees that a config asks for.

        Raises:
            ConfigError: they do not multiply to the number of ranks.
        """
        part = config.parallelism
        data = data_parallel_degree(config, world_size)
        return ParallelDims(
            replicate=part.data_parallel_replicate_degree,
            shard=data // part.data_parallel_replicate_degree,
            context=part.context_parallel_degree,
            tensor=part.tensor_parallel_degree,
            pipeline=part.pipeline_parallel_degree,
            rank=rank,
        )

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data_degree * self.context * self.tensor

    @property
    def data_degree(self) -> int:
        """Ranks that see different rows."""
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        """Which of these this rank is."""
        return self.rank // (self.context * self.tensor) % self.data_degree

    @property
    def pipeline_rank(self) -> int:
        return self.rank // (self.data_degree * self.context * self.tensor)

    @property
    def counts_rows(self) -> bool:
        """Whether this rank counts rows: the first of those that work on the same rows does."""
        return self.pipeline_rank == 0 and self.rank % (self.context * self.tensor) == 0

    @property
    def counts_loss(self) -> bool:
        """Whether this rank counts the loss: the first of its tensor-parallel ranks does, which all know the same."""
        return self.rank % self.tensor == 0

    @property
    def row_multiple(self) -> int:
        """What the length of a row must be a multiple of: two parts for each context rank, split over tensor ranks."""
        return self.tensor * (2 * self.context if self.context > 1 else 1)

    def padded_multiple(self, multiple: int) -> int:
        """The least common multiple of a length and :attr:`row_multiple`."""
        return lcm(multiple, self.row_multiple)

    @cached_property
    def _meshes(self) -> dict[tuple[str, ...], DeviceMesh]:
        return {}

    def _mesh(self, device_type: str, **sizes: int) -> DeviceMesh:
        key = (device_type, *sizes)
        if key not in self._meshes:
            self._meshes[key] = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        return self._meshes[key]

    def mesh(self, device_type: str) -> DeviceMesh:
        """All ranks, with dimensions pp, dp_replicate, dp_shard and tp. Made once; called by all.

        The ranks that share a row hold one copy of the model together, so they are in dp_shard: their gradients are
        summed like those of different rows.
        """
        shard = self.shard * self.context
        return self._mesh(device_type, pp=self.pipeline, dp_replicate=self.replicate, dp_shard=shard, tp=self.tensor)

    def context_mesh(self, device_type: str) -> DeviceMesh:
        """The ranks with which this one shares rows. Made once; called by all."""
        rows = self.world_size // (self.context * self.tensor)
        return self._mesh(device_type, rows=rows, cp=self.context, tp=self.tensor)["cp"]

    def fsdp_mesh(self, device_type: str) -> DeviceMesh:
        """What parameters are sharded over (the last dimension) and replicated over (the first, if there are two)."""
        mesh = self.mesh(device_type)
        return mesh["dp_shard"] if self.replicate == 1 else mesh["dp_replicate", "dp_shard"]

    def groups(self, device_type: str) -> list[ProcessGroup]:
        """The process groups of this rank."""
        groups = self.mesh(device_type).get_all_groups()
        return [*groups, self.context_mesh(device_type).get_group()] if self.context > 1 else groups


def data_parallel_degree(config: JobConfig, world_size: int) -> int:
    """Number of ranks that see different data.

    Raises:
        ConfigError: the degrees do not multiply to the number of ranks.
    """
    par = config.parallelism
    model = par.tensor_parallel_degree * par.pipeline_parallel_degree * par.context_parallel_degree
    others = model * par.data_parallel_replicate_degree
    shard = par.data_parallel_shard_degree
    if shard == -1:
        shard = max(world_size // others, 1)
    if shard * others != world_size:
        rest = f" and the other degrees multiply to {others}" if others > 1 else ""
        raise ConfigError(
            f"{said('parallelism.data_parallel_shard_degree', par.data_parallel_shard_degree)}: "
            f"there are {world_size} ranks{rest}, and all degrees together must multiply to the number of ranks "
            "(-1 takes what is left)."
        )
    return par.data_parallel_replicate_degree * shard


def accumulation_steps(config: JobConfig, world_size: int) -> int:
    """Forward passes of each rank in one step.

    Raises:
        ConfigError: the global batch size is no whole number of them.
    """
    local, rows = config.training.local_batch_size, config.training.global_batch_size
    degree = data_parallel_degree(config, world_size)
    at_once = local * degree
    if rows == -1:
        return 1
    if rows % at_once:
        low = rows // at_once * at_once
        near = f"{low} or {low + at_once}" if low else f"{at_once}"
        raise ConfigError(
            f"{said('training.global_batch_size', rows)}: it must be a multiple of training.local_batch_size "
            f"({local}) times the data-parallel degree ({degree}), such as {near}."
        )
    return rows // at_once


def check_parallelism(config: JobConfig, refuse: Refuse) -> None:
    """Refuse degrees that do not fit the rows and batches, and settings of a parallelism that is not used."""
    part = config.parallelism
    tensor, pipeline = part.tensor_parallel_degree, part.pipeline_parallel_degree
    multiple = ParallelDims(context=part.context_parallel_degree, tensor=tensor).row_multiple
    for key, length in row_lengths(config).items():
        if key != "evaluation.seq_len" and length % multiple:  # evaluations pad their rows
            refuse(key, f"with these degrees of parallelism it must be a multiple of {multiple}")
    for key, value, degree in (
        ("disable_loss_parallel", part.disable_loss_parallel, tensor),
        ("enable_async_tensor_parallel", part.enable_async_tensor_parallel, tensor),
        ("pipeline_parallel_split_points", part.pipeline_parallel_split_points, pipeline),
        ("pipeline_parallel_layers_per_stage", part.pipeline_parallel_layers_per_stage, pipeline),
        ("pipeline_parallel_schedule_csv", part.pipeline_parallel_schedule_csv, pipeline),
    ):
        if value and degree == 1:
            refuse(f"parallelism.{key}", "there is no such parallelism in this run, its degree is 1")
    if part.enable_async_tensor_parallel and not config.training.compile:
        refuse("parallelism.enable_async_tensor_parallel", "it needs training.compile = true")
    if part.pipeline_parallel_split_points and part.pipeline_parallel_layers_per_stage is not None:
        refuse(
            "parallelism.pipeline_parallel_split_points", "pipeline_parallel_layers_per_stage says the same otherwise"
        )
    if pipeline > 1 and config.training.local_batch_size % part.pipeline_parallel_microbatch_size:
        refuse(
            "training.local_batch_size",
            f"it must be a multiple of parallelism.pipeline_parallel_microbatch_size = "
            f"{part.pipeline_parallel_microbatch_size}",
        )
    csv = part.pipeline_parallel_schedule_csv
    if csv is not None and not os.path.isfile(csv):
        refuse("parallelism.pipeline_parallel_schedule_csv", "there is no such file")
