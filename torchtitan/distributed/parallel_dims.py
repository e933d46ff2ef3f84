"""How the ranks of a run share the work: the degree of each parallelism, and the device mesh they span.

Ranks are laid out with the pipeline outermost and tensor parallelism innermost, so that what talks most sits within
a node: rank = (((pipeline * replicate + r) * shard + s) * context + c) * tensor + t.
"""

from dataclasses import dataclass
from functools import cached_property
from math import lcm

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan.config_manager import JobConfig, data_parallel_degree


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
        """Of the ranks that work on the same rows one counts them: the first."""
        return self.pipeline_rank == 0 and self.rank % (self.context * self.tensor) == 0

    @property
    def counts_loss(self) -> bool:
        """Of the ranks that know the same loss one counts it; with context parallelism each has its own part."""
        return self.rank % self.tensor == 0

    @property
    def row_multiple(self) -> int:
        """What the length of a row must be a multiple of: two parts for each context rank, split over tensor ranks."""
        return self.tensor * (2 * self.context if self.context > 1 else 1)

    def padded_multiple(self, multiple: int) -> int:
        """The least common multiple of a length and :attr:`row_multiple`."""
        return lcm(multiple, self.row_multiple)

    @cached_property
    def _mesh(self) -> dict[str, DeviceMesh]:
        return {}

    def mesh(self, device_type: str) -> DeviceMesh:
        """The mesh of all ranks, with dimensions pp, dp_replicate, dp_shard, cp and tp. Made once; called by all."""
        if device_type not in self._mesh:
            sizes = {
                "pp": self.pipeline,
                "dp_replicate": self.replicate,
                "dp_shard": self.shard,
                "cp": self.context,
                "tp": self.tensor,
            }
            self._mesh[device_type] = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        return self._mesh[device_type]

    def groups(self, device_type: str) -> list[ProcessGroup]:
        """The process groups that the mesh of this rank consists of."""
        meshes = (self.mesh(device_type), self.fsdp_mesh(device_type))
        return list({id(group): group for mesh in meshes for group in mesh.get_all_groups()}.values())

    def fsdp_mesh(self, device_type: str) -> DeviceMesh:
        """What parameters are sharded over (the last dimension) and replicated over (the first, if there are two).

        The ranks of one row's parts hold one copy together: their gradients are summed like those of different rows.
        """
        mesh = self.mesh(device_type)
        shard = mesh["dp_shard"]
        if self.context > 1:
            shard = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
        if self.replicate == 1:
            return shard
        return mesh["dp_replicate", "dp_shard_cp" if self.context > 1 else "dp_shard"]
