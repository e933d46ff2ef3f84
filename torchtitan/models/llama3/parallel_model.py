"""The model as the trainer sees it: whole rows in, losses out, whatever is split underneath."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.torch_version import TorchVersion

from torchtitan.config.job_config import JobConfig
from torchtitan.config.keys import Refuse, row_lengths
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.float8 import convert_to_float8, precompute_scales
from torchtitan.models.llama3.activation_checkpoint import checkpoint_activations
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.context_parallel import ContextParallel
from torchtitan.models.llama3.model import Llama3
from torchtitan.models.llama3.parallelize import (
    compile_blocks,
    shard,
    split_layers,
    split_rows,
)
from torchtitan.models.llama3.weights import materialize
from torchtitan.models.loss import IGNORE_INDEX
from torchtitan.models.mx import convert_to_mx
from torchtitan.tools.errors import ConfigError
from torchtitan.tools.logging import logger
from torchtitan.tools.torch_private import compiled_autograd, overlap_tensor_parallelism
from torchtitan.tools.utils import DTYPES

# Converters of the model. Each needs rows whose length is a multiple of this.
CONVERTERS = {"float8": 16, "mx": 32}


def check_compile(config: JobConfig, refuse: Refuse) -> None:
    """Refuse what cannot be compiled."""
    components, compiles = config.compile.components, config.training.compile
    if set(components) - {"model", "loss"}:
        refuse("compile.components", "there are model and loss")
    if compiles and not components:
        refuse("compile.components", "with training.compile = true it must name something")
    if config.parallelism.enable_compiled_autograd and not (compiles and "model" in components):
        refuse("parallelism.enable_compiled_autograd", "it needs training.compile = true")


def check_converters(config: JobConfig, refuse: Refuse) -> None:
    """Refuse unknown converters, and settings of converters that contradict each other."""
    names, float8 = config.model.converters, config.float8
    if set(names) - set(CONVERTERS) or len(names) > 1:
        refuse("model.converters", 'there are "float8" and "mx", of which one can be chosen')
    for name in names:
        if config.training.seq_len % (CONVERTERS[name] * config.parallelism.context_parallel_degree):
            refuse(
                "training.seq_len",
                f'with model.converters = ["{name}"] each rank needs a multiple of {CONVERTERS[name]} ids',
            )
    for key in ("enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp"):
        if getattr(float8, key) and float8.recipe_name not in (None, "tensorwise"):
            refuse(f"float8.{key}", 'it needs float8.recipe_name = "tensorwise"')
    if float8.precompute_float8_dynamic_scale_for_fsdp and not float8.enable_fsdp_float8_all_gather:
        refuse(
            "float8.precompute_float8_dynamic_scale_for_fsdp", "it needs float8.enable_fsdp_float8_all_gather = true"
        )


def check_split(config: JobConfig, args: Llama3Args) -> None:
    """Refuse to split a model in a way that its sizes, this torch or this machine do not allow.

    Raises:
        ConfigError: why not.
    """
    part = config.parallelism
    tensor, context = part.tensor_parallel_degree, part.context_parallel_degree
    for count, what in (
        (args.n_heads, "heads"),
        (args.n_kv_heads, "key and value heads"),
        (args.hidden_dim, "columns"),
    ):
        if count % tensor:
            raise ConfigError(
                f"parallelism.tensor_parallel_degree = {tensor}: the model's {count} {what} cannot be dealt out evenly."
            )
    heads = args.n_kv_heads // tensor
    if part.context_parallel_rotate_method == "alltoall" and heads % context:
        raise ConfigError(
            f"parallelism.context_parallel_degree = {context}: the {heads} key and value heads of each tensor-parallel "
            'rank cannot be dealt out evenly; context_parallel_rotate_method = "allgather" does not need that.'
        )
    if part.pipeline_parallel_degree > 1:
        # Imported here, since this brings torch's compiler, which takes seconds.
        from torchtitan.models.llama3.pipeline import check_schedule, split_blocks, splits_backward

        stages = split_blocks(args.n_layers, part)
        check_schedule(part, config.training.local_batch_size, len(stages))
        if splits_backward(part) and TorchVersion(torch.__version__) < "2.14":
            raise ConfigError(
                f"parallelism.pipeline_parallel_schedule{'_csv' if part.pipeline_parallel_schedule_csv else ''}: it "
                f"computes gradients of inputs and of weights apart, which torch {torch.__version__} cannot through "
                "the loss; 2.14 can."
            )
        saving = config.activation_checkpoint
        if splits_backward(part) and saving.mode == "selective" and saving.selective_ac_option == "op":
            raise ConfigError(
                'activation_checkpoint.selective_ac_option = "op": the pipeline\'s schedule computes gradients of '
                'inputs and of weights apart, and torch goes back only once through what "op" keeps; a number, or mode '
                '"full", works.'
            )
    if part.enable_async_tensor_parallel and not torch.cuda.is_available():
        raise ConfigError(
            "parallelism.enable_async_tensor_parallel = true: it needs GPUs with symmetric memory (NVLink)."
        )


def make_stage(args: Llama3Args, blocks: range, first: bool, last: bool) -> Llama3:
    """A model of some of the blocks, under their names in the whole one. Construct under the meta device."""
    model = Llama3(args)
    model.first, model.last = first, last
    for i in set(range(args.n_layers)) - set(blocks):
        del model.layers[str(i)]
    if not last:
        del model.norm, model.output
    elif not first:  # The head then needs a weight of its own.
        model.output.weight = nn.Parameter(model.output.weight.detach().clone())
    if not first:
        del model.tok_embeddings
    return model


class ParallelModel:
    """This rank's part of a model, parallelised as a config asks for, on its device, with undefined values.

    Every rank of a run makes one, and all call the same methods in the same order.

    Args:
        first_id: ids below are left out of the softmax.

    Attributes:
        parts: the model; with pipeline parallelism the stages of this rank.

    Raises:
        ConfigError: the degrees do not fit the model.
    """

    def __init__(
        self, config: JobConfig, args: Llama3Args, dims: ParallelDims, device: torch.device, first_id: int = 0
    ):
        self.args, self.dims, self.device, self.first_id = args, dims, device, first_id
        self.pipeline: Any = None  # a Pipeline, where there is one
        self.context: ContextParallel | None = None
        if dims.context > 1:
            group = dims.context_mesh(device.type).get_group()
            self.context = ContextParallel(group, config.parallelism.context_parallel_rotate_method)
        self.precomputes_scales = config.float8.precompute_float8_dynamic_scale_for_fsdp
        self.compiles_backward = config.parallelism.enable_compiled_autograd
        training, parallelism = config.training, config.parallelism
        # FSDP2 is also what casts parameters, so that one rank computes with the same precision as many.
        self.sharded = dims.world_size > 1 or training.enable_cpu_offload or training.mixed_precision_param != "float32"
        blocks, own = [range(args.n_layers)], [0]
        if dims.pipeline > 1:
            from torchtitan.models.llama3.pipeline import own_stages, split_blocks

            blocks = split_blocks(args.n_layers, parallelism)
            own = own_stages(len(blocks), dims.pipeline_rank, dims.pipeline, parallelism)
        longest = max(row_lengths(config).values())
        longest += -longest % dims.row_multiple
        self.parts = [self._part(config, blocks[i], i == 0, i == len(blocks) - 1) for i in own]
        for part in self.parts:
            materialize(part, torch.device("cpu") if training.enable_cpu_offload else device, longest, device)
            part.train()
        if dims.pipeline > 1:
            from torchtitan.models.llama3.pipeline import Pipeline

            stages, dtype = dict(zip(own, self.parts, strict=True)), DTYPES[training.mixed_precision_param]
            self.pipeline = Pipeline(stages, len(blocks), config, dims, device, dtype)

    def _part(self, config: JobConfig, blocks: range, first: bool, last: bool) -> Llama3:
        """One stage, or the whole model, on the meta device."""
        dims, training, parallelism = self.dims, config.training, config.parallelism
        with torch.device("meta"):
            model = make_stage(self.args, blocks, first, last)
        if last:
            model.output.first_id = self.first_id
        if "float8" in config.model.converters:
            convert_to_float8(model, config)
        if "mx" in config.model.converters:
            convert_to_mx(model, config)
        if config.model.print_after_conversion:
            logger.info("%s", model)
        if dims.tensor > 1:
            mesh = dims.mesh(self.device.type)["tp"]
            split_layers(model, mesh, parallelism.disable_loss_parallel)
            if parallelism.enable_async_tensor_parallel:
                overlap_tensor_parallelism(mesh.get_group())
        if self.context is not None:
            split_rows(model, self.context)
        checkpoint_activations(model, config.activation_checkpoint)
        if training.compile and "model" in config.compile.components:
            from torchtitan.models.llama3.pipeline import splits_backward

            compile_blocks(model, splits_backward(parallelism))
        if last:
            model.output.compiled = training.compile and "loss" in config.compile.components
        if self.sharded:
            shard(
                model,
                dims.fsdp_mesh(self.device.type),
                DTYPES[training.mixed_precision_param],
                DTYPES[training.mixed_precision_reduce],
                parallelism.fsdp_reshard_after_forward,
                training.enable_cpu_offload,
                dims.pipeline > 1,
            )
        return model

    def weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of this rank under their names in the whole model."""
        for part in self.parts:
            yield from part.weights()

    def after_update(self) -> None:
        """Called after each update of the weights."""
        if self.precomputes_scales:
            for part in self.parts:
                precompute_scales(part)

    def backward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor | None,
        divisor: float,
    ) -> torch.Tensor:
        """Forward and backward pass of one microbatch.

        Args:
            tokens, targets, positions: of a batch [B, S], on the CPU.
            divisor: the targets of the whole step, on all ranks.

        Returns:
            This rank's part of the loss: the sum over its targets, divided. 0 where the head is on another rank.
        """
        tokens, targets = (ids.to(self.device, non_blocking=True) for ids in (tokens, targets))
        with compiled_autograd() if self.compiles_backward else nullcontext():
            if self.pipeline is not None:
                return self.pipeline.backward(tokens, targets, positions, divisor)
            documents = None
            if positions is not None:
                # Counted here, so that the model need not wait for the GPU to count.
                documents = int((positions == 0).sum())
                positions = positions.to(self.device, non_blocking=True)
            loss = self.parts[0](tokens, targets, positions, documents) / divisor
            loss.backward()
        return loss.detach()

    @torch.no_grad()
    def losses(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The negative log-likelihood of each target [B, S], 0 where there is none, on this rank's device.

        The same on all ranks that work on these rows.
        """
        length = targets.shape[1]
        missing = -length % self.dims.row_multiple
        tokens = nn.functional.pad(tokens, (0, missing)).to(self.device)
        targets = nn.functional.pad(targets, (0, missing), value=IGNORE_INDEX).to(self.device)
        for part in self.parts:
            part.eval()
        try:
            result = self.pipeline.losses(tokens, targets) if self.pipeline else self.parts[0](tokens, targets)
            if self.context is not None:
                result = self.context.unshard(result)
        finally:
            for part in self.parts:
                part.train()
        return result[:, :length]
