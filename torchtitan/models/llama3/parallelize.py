"""Llama 3 on several devices, applied to the model from outside, in the order in which the functions stand here.

Tensor parallelism, context parallelism, (activation_checkpoint.py,) compile, and FSDP2 around it all. The stages of a
pipeline are such models, see pipeline.py.
"""

from typing import Any, Literal, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torchtitan.distributed.collectives import gather, wait
from torchtitan.models.llama3.context_parallel import ContextParallel
from torchtitan.models.llama3.model import Llama3, OutputHead, TransformerBlock, rotate_both, swiglu
from torchtitan.models.loss import Columns
from torchtitan.tools.torch_private import keep_saved_memory


def split_layers(model: Llama3, mesh: DeviceMesh, gather_logits: bool = False) -> None:
    """Tensor parallelism (arXiv 1909.08053) with sequence parallelism (arXiv 2205.05198) over a 1-D mesh.

    The heads of attention, the columns of the feed-forward layers and the rows of the vocabulary are split; between
    these layers, and in the norms, each rank has its part of the positions. A row's length must be a multiple of the
    number of ranks.

    Args:
        gather_logits: gather the logits for the loss, instead of exchanging only what the softmax needs of them.
    """
    by_position = Shard(1)
    whole = {"input_layouts": (by_position, None, None, None), "desired_input_layouts": (Replicate(), None, None, None)}
    for block in model.layers.values():
        plan: dict[str, ParallelStyle] = {
            "attention_norm": SequenceParallel(),
            "attention": PrepareModuleInput(**whole),
            **{f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")},
            "attention.wo": RowwiseParallel(output_layouts=by_position),
            "ffn_norm": SequenceParallel(),
            "feed_forward": PrepareModuleInput(input_layouts=by_position, desired_input_layouts=Replicate()),
            **{f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")},
            "feed_forward.w2": RowwiseParallel(output_layouts=by_position),
        }
        parallelize_module(block, mesh, plan)
    if model.first:
        rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=by_position)
        parallelize_module(model.tok_embeddings, mesh, rows)
        model.tok_embeddings.register_forward_hook(lambda module, inputs, output: wait(output))
    if model.last:
        parallelize_module(model.norm, mesh, SequenceParallel(use_local_output=True))
        model.output = SplitHead(model.output, mesh, gather_logits)
    model.tie()  # Distributing a parameter makes a new one of it.


class SplitHead(OutputHead):
    """An output head whose rows are split over the ranks of a mesh, each with its part of the positions.

    Args:
        gather_logits: the ranks gather the logits before the softmax, instead of only its sums.
    """

    def __init__(self, head: OutputHead, mesh: DeviceMesh, gather_logits: bool):
        super().__init__(nn.Parameter(distribute_tensor(head.weight, mesh, [Shard(0)])), head.vocab_size)
        self.first_id = head.first_id
        self.group, self.gather_logits = mesh.get_group(), gather_logits
        self.rows = -(-head.weight.shape[0] // mesh.size())
        self.start = self.rows * mesh.get_local_rank()

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """The losses of ``targets`` [B, S], which have to be there, from hidden states [B, S / ranks, dim]."""
        assert targets is not None
        weight = cast(DTensor, self.weight).to_local()
        low = max(self.start, self.first_id)
        high = max(low, min(self.start + weight.shape[0], self.vocab_size))
        columns = Columns(low, high - low, self.group, self.rows if self.gather_logits else 0)
        if low > self.start:
            weight = weight[min(low - self.start, weight.shape[0]) :]
        return self.nll(gather(hidden, 1, self.group), weight, targets, columns)


def split_rows(model: Llama3, context: ContextParallel) -> None:
    """Context parallelism: the ranks of a group share each row, see models/llama3/context_parallel.py.

    Ids, targets and positions come as whole rows; hidden states and losses are of this rank's part.
    """

    def own_tables(module: nn.Module, inputs: Any, tables: Any) -> tuple[torch.Tensor, ...]:
        return tuple(context.shard(table, dim=-2) for table in tables)

    for block in model.layers.values():
        cast(TransformerBlock, block).attention.attend = context.attend
    model.rotary.register_forward_hook(own_tables)
    if context.method == "allgather":
        model.find_documents = context.documents
    if model.first:  # before tensor parallelism makes a DTensor of the ids
        model.tok_embeddings.register_forward_pre_hook(lambda _, inputs: context.shard(inputs[0]), prepend=True)
    if model.last:
        model.output.register_forward_pre_hook(lambda _, inputs: (inputs[0], context.shard(inputs[1])))


def compile_blocks(model: Llama3, splits_backward: bool = False) -> None:
    """Compile every block by itself: one graph serves all of them.

    Args:
        splits_backward: gradients of inputs and of weights are computed apart. A compiled block computes both together,
            so it would do all of it twice. Only what lies between the matrix products is compiled then.
    """
    if splits_backward:
        # The graph is kept between the two, so a compiled function must not reuse the memory of what it has saved.
        keep_saved_memory()
        rotate = torch.compile(rotate_both, fullgraph=True, dynamic=False)
        gate = torch.compile(swiglu, fullgraph=True, dynamic=False)
        for layer in model.layers.values():
            block = cast(TransformerBlock, layer)
            block.attention.rotate, block.feed_forward.gate = rotate, gate
        return
    for block in model.layers.values():
        block.compile(fullgraph=True, dynamic=False)
    model.compiled = True  # Packed rows then come to the blocks as tensors of few shapes, not as Python numbers.


def shard(
    model: Llama3,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard: Literal["default", "always", "never"] = "default",
    offload: bool = False,
    pipelined: bool = False,
) -> None:
    """FSDP2 with one unit a block, and one for embedding, final norm and head (a tied weight must not be split).

    With a mesh of two dimensions the parameters are replicated over the first and sharded over the second (HSDP; with
    a second one of size 1: data parallelism without sharding, DDP).

    The loss is divided by the targets of all ranks before the backward pass, so gradients are summed, not averaged.

    Args:
        reshard: whether parameters are freed between forward and backward pass: always, never, or (default) those of
            the blocks but not those of the last unit, which the backward pass needs at once.
        offload: keep parameters, gradients and optimizer states in the memory of the CPU.
        pipelined: this is a stage of a pipeline, where "default" means never: parameters would be gathered again for
            each microbatch.
    """
    policy: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
    }
    blocks_reshard = reshard == "always" or (reshard == "default" and not pipelined)
    for block in model.layers.values():
        fully_shard(block, **policy, reshard_after_forward=blocks_reshard)
    ends: list[nn.Module] = [model.tok_embeddings] if model.first else []
    ends += [model.norm, model.output] if model.last else []
    if ends:
        fully_shard(ends, **policy, reshard_after_forward=reshard == "always")
    fully_shard(model, **policy, reshard_after_forward=blocks_reshard)
    for module in model.modules():
        if isinstance(module, FSDPModule) and mesh.size() > 1:  # one rank divides by 1, which would be another pass
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
