"""What a run will need before it is started: parameters, FLOPs, memory of a GPU, time, storage.

Arithmetic on the sizes of a model, a config, a number of GPUs and the data sheet of one; nothing is allocated, and no
GPU or process group is needed. docs/estimate.md says what each figure means and where its formula is from. Memory is
that of the rank that needs most; it is the largest of several moments of a step, since what is alive differs between
them.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from torchtitan.audio.codec import ACTIVATION_BYTES, BATCH_SECONDS
from torchtitan.config.job_config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims, accumulation_steps
from torchtitan.models.base import DEBUG_SIZES
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.parallel_model import check_split
from torchtitan.models.loss import CHUNK_TOKENS
from torchtitan.tools.errors import ConfigError, UserError
from torchtitan.tools.utils import peak_flops_of

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Assumptions that are no property of the model or the config.
CONTEXT_BYTES = int(1.5 * GIB)  # CUDA context, cuBLAS workspaces, NCCL buffers
FRAGMENTATION = 0.05  # of what is allocated: memory that the allocator holds and cannot use
CODEC_BYTES = 96_100_000 * 4  # kyutai/mimi in fp32, codebooks included
CODEC_CLIPS = 32  # recordings that a GPU is given at once, at least
AUDIO_BYTES_PER_HOUR = 64_000_000  # 16 kHz mono FLAC: LibriSpeech's 960 hours are 60 GB
FRAMES_PER_SECOND = 12.5
TOKENIZER_BYTES = 20_000_000  # of Llama 3 with the audio tokens


@dataclass(frozen=True)
class GPU:
    """Facts of a GPU from its data sheet, for the form factor with the fastest links.

    Attributes:
        memory: bytes that torch can use, a little less than the data sheet's.
        flops: dense bf16 peak in FLOP/s.
        bandwidth: of its memory, bytes/s.
        link: to the other GPUs of its node, bytes/s in one direction (half of what data sheets call NVLink or PCIe
            bandwidth).
        network: to other nodes, bytes/s in one direction: an assumption, no fact of the GPU.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float


def _gpu(name: str, gib: float, terabytes: float, link: float, network: float) -> GPU:
    flops = peak_flops_of(name)
    assert flops is not None
    return GPU(name, int(gib * GIB), flops, terabytes * 1e12, link * 1e9, network * 1e9)


GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        _gpu("B200", 178.3, 8.0, 900, 50),
        _gpu("H200", 139.8, 4.8, 450, 50),
        _gpu("H100", 79.1, 3.35, 450, 50),
        _gpu("H100 PCIe", 79.1, 2.0, 64, 25),
        _gpu("A100 80GB", 79.1, 2.039, 300, 25),
        _gpu("A100 40GB", 39.4, 1.555, 300, 25),
        _gpu("L40S", 44.4, 0.864, 32, 12.5),
        _gpu("RTX 4090", 23.5, 1.008, 32, 12.5),
    )
}
_ALIASES = {"H100 SXM": "H100", "A100": "A100 80GB", "A100 80": "A100 80GB", "A100 40": "A100 40GB", "4090": "RTX 4090"}


def find_gpu(name: str, key: str = "--gpu") -> GPU:
    """The facts of a GPU by its name, in any case, or as CUDA calls it; ``key`` is where the name is from.

    Raises:
        UserError: it is not known.
    """
    wanted = name.upper().replace("-", " ").replace("_", " ").replace("NVIDIA ", "").strip()
    for known in (*GPUS, *_ALIASES):
        if known.upper() == wanted:
            return GPUS[_ALIASES.get(known, known)]
    # "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB": whatever has most words in common.
    words = set(wanted.split())
    within = [known for known in GPUS if set(known.upper().split()) <= words and "NVL" not in words]
    if within:
        return GPUS[max(within, key=lambda known: len(known.split()))]
    raise UserError(f"{key} {name}: its data sheet is not known here; known are {', '.join(GPUS)}.")


_LLAMA31_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA3_VOCAB = 128_256
MODEL_SIZES: dict[str, Llama3Args] = {
    "1.3B": Llama3Args(
        _LLAMA3_VOCAB, 2048, 16, 32, 8, 64, 8192, rope_scaling={"factor": 32.0, **_LLAMA31_SCALING}, max_seq_len=131_072
    ),
    "8B": Llama3Args(
        *(_LLAMA3_VOCAB, 4096, 32, 32, 8, 128, 14_336),
        rope_scaling={"factor": 8.0, **_LLAMA31_SCALING},
        max_seq_len=131_072,
        tied=False,
    ),
}
# Hub names whose sizes are built in, so that they need not be downloaded.
_SIZE_OF = {"meta-llama/Llama-3.2-1B": "1.3B", "llm-jp/Llama-Mimi-1.3B": "1.3B", "meta-llama/Llama-3.1-8B": "8B"}


def built_in_size(name: str, num_quantizers: int) -> Llama3Args | None:
    """Sizes of a Llama 3 by "1.3B", "8B" or hub name, extended by the audio tokens; None if they are not built in."""
    args = MODEL_SIZES.get(_SIZE_OF.get(name, name))
    if args is None:
        return None
    return Llama3Args(**{**asdict(args), "vocab_size": args.vocab_size + 2048 * num_quantizers + 2})


def model_args(config: JobConfig, size: str | None = None) -> Llama3Args:
    """Sizes of the model that a config names, the audio tokens included.

    Raises:
        UserError: it can be found neither here nor among the built-in ones.
    """
    args = built_in_size(size or config.model.name, config.model.num_quantizers)
    if args is not None and config.model.flavor not in DEBUG_SIZES:
        return args
    if size is not None:
        raise UserError(f"--model_size {size}: there are only {', '.join(MODEL_SIZES)}.")
    if not Path(config.model.name).expanduser().is_dir():
        raise UserError(
            f"{config.model.name}: there is no such folder, and the sizes of this model are not built in; give "
            f"--model_size {' or '.join(MODEL_SIZES)}."
        )
    from torchtitan.models.base import BaseModel

    config.model.pretrained = False
    return BaseModel.load(config.model).args


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


def count_parameters(args: Llama3Args) -> dict[str, Any]:
    """Parameters of a model, by part; the alignment rows are trained along and counted apart."""
    vocabulary = args.vocab_size * args.dim
    padding = (args.padded_vocab_size - args.vocab_size) * args.dim * (1 if args.tied else 2)
    block = sum(math.prod(shape) for shape in _block_shapes(args, 1))
    return {
        "total": args.num_params,
        "embedding": vocabulary,
        "head": 0 if args.tied else vocabulary,
        "tied": args.tied,
        "block": block,
        "blocks": args.n_layers,
        "final_norm": args.dim,
        "alignment": padding,
        "trained": args.num_params + padding,
        "trained_bytes": 4 * (args.num_params + padding),
    }


def _block_shapes(args: Llama3Args, tensor: int) -> list[tuple[int, ...]]:
    """Shapes of a block's parameters on one of ``tensor`` ranks that share it: norms whole, projections split."""
    query, key = args.n_heads * args.head_dim // tensor, args.n_kv_heads * args.head_dim // tensor
    hidden = args.hidden_dim // tensor
    projections = [(query, args.dim), (key, args.dim), (key, args.dim), (args.dim, query)]
    return [(args.dim,), *projections, (args.dim,), (hidden, args.dim), (args.dim, hidden), (hidden, args.dim)]


def _end_shapes(args: Llama3Args, tensor: int, first: bool, last: bool) -> list[tuple[int, ...]]:
    """Shapes of the parameters before and after the blocks, on the first of ``tensor`` ranks that share them."""
    vocabulary = (-(-args.padded_vocab_size // tensor), args.dim)
    shapes: list[tuple[int, ...]] = [vocabulary] if first else []
    if last:
        shapes += [(args.dim,)] + ([] if args.tied and first else [vocabulary])
    return shapes


def _local(shape: tuple[int, ...], ranks: int) -> int:
    """Elements of a parameter on the first of ``ranks`` ranks over which its rows are sharded."""
    return -(-shape[0] // ranks) * math.prod(shape[1:])


@dataclass(frozen=True)
class RankParameters:
    """Numbers of parameters of one rank.

    Attributes:
        kept: what it keeps of all: weights, gradients and optimizer states have this size.
        tensors: number of its parameter tensors.
        block: of one block when it is gathered from the ranks over which it is sharded (layers that are split over
            tensor-parallel ranks are never gathered).
        blocks: number of its blocks.
        ends: of embedding, final norm and head, gathered.
        embedding: rows x columns of the vocabulary parameter it has at either end, 0 without.
    """

    kept: int
    tensors: int
    block: int
    blocks: int
    ends: int
    embedding: int

    @property
    def gathered(self) -> int:
        return self.blocks * self.block + self.ends


def rank_parameters(
    args: Llama3Args, blocks: int, first: bool = True, last: bool = True, tensor: int = 1, shard: int = 1
) -> RankParameters:
    """Parameters of a rank with so many blocks, their layers split over ``tensor`` ranks and sharded over ``shard``.

    Exact for the rank that has most (rows that cannot be dealt out evenly go to the first ranks).
    """
    block, ends = _block_shapes(args, tensor), _end_shapes(args, tensor, first, last)
    kept = blocks * sum(_local(shape, shard) for shape in block) + sum(_local(shape, shard) for shape in ends)
    gathered = [shard * sum(_local(shape, shard) for shape in shapes) for shapes in (block, ends)]
    embedding = -(-args.padded_vocab_size // tensor) * args.dim if first or last else 0
    return RankParameters(kept, blocks * len(block) + len(ends), gathered[0], blocks, gathered[1], embedding)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------------------------


def recomputed_blocks(config: JobConfig, n_layers: int) -> int:
    """Blocks of which activation checkpointing keeps only the input."""
    part = config.activation_checkpoint
    if part.mode == "full":
        return n_layers
    if part.mode == "selective" and part.selective_ac_option.isdigit():
        return n_layers // int(part.selective_ac_option)
    return 0


def _selects_operations(config: JobConfig) -> bool:
    part = config.activation_checkpoint
    return part.mode == "selective" and not part.selective_ac_option.isdigit()


def flops(args: Llama3Args, config: JobConfig) -> dict[str, float]:
    """Training FLOPs of a position of a full row.

    "model" is what the mathematics needs (:meth:`Llama3Args.flops_per_token`), "hardware" what is computed with what
    activation checkpointing computes again.
    """
    length = config.training.seq_len
    model = args.flops_per_token(length)
    if config.training.audio_head:
        audio = 2048 * config.model.num_quantizers + 2
        model -= 6 * (args.vocab_size - audio) * args.dim
    products = args.dim * args.head_dim * 2 * (args.n_heads + args.n_kv_heads) + 3 * args.dim * args.hidden_dim
    again = recomputed_blocks(config, args.n_layers) * (2 * products + 4 * args.n_heads * args.head_dim * length)
    if _selects_operations(config):  # the products with wk, wo and w3
        unkept = args.dim * (args.head_dim * (args.n_heads + args.n_kv_heads) + args.hidden_dim)
        again = 2 * args.n_layers * unkept
    return {"model": model, "hardware": model + again}


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """How a rank computes.

    Attributes:
        param: bytes of an element in forward and backward passes.
        reduce: bytes of an element of gradients on their way.
        cuda: the kernels are CUDA's: a fused RMSNorm, and flash attention for 16 bits only.
    """

    param: int = 2
    reduce: int = 4
    cuda: bool = True


def block_activations(
    args: Llama3Args,
    rows: int,
    length: int,
    precision: Precision,
    tensor: int = 1,
    context: int = 1,
    context_method: str = "allgather",
) -> dict[str, int]:
    """Bytes that one block keeps for its backward pass, for ``rows`` of ``length`` ids, on one rank.

    The tensors that autograd saves in TransformerBlock.forward, each storage once. Sequence parallelism splits the
    residual stream and the norms over the tensor-parallel ranks; what projections read is gathered.
    """
    tokens = rows * length // context
    part = tokens // tensor
    dim, size = args.dim, precision.param
    query, key = args.n_heads * args.head_dim // tensor, args.n_kv_heads * args.head_dim // tensor
    heads, hidden = args.n_heads // tensor, args.hidden_dim // tensor
    # The fused kernel keeps its input; the composite one an fp32 copy of it and what is normalized. Both the scale.
    norm = part * ((size * dim if precision.cuda else 8 * dim) + 4)
    inputs = tokens * dim * size * 2
    if precision.cuda and size == 4 and query != key:  # neither flash (16 bits) nor the efficient kernel (no groups)
        attention = tokens * 4 * (3 * query + heads * length)
    else:
        attention = tokens * (size * (query + 2 * key) + 4 * heads)
    output = tokens * query * size
    if context > 1:
        output *= 2  # before and after the parts are put together
        if context_method == "allgather":  # keys and values of whole rows, and which of them a query sees
            attention += tokens * size * 2 * key * (context - 1) + length * length // context
    return {
        "residual stream and norms": 2 * norm,
        "inputs of projections": inputs,
        "attention": attention + output,
        "feed-forward": 4 * tokens * hidden * size,
    }


def kept_activations(
    args: Llama3Args,
    config: JobConfig,
    rows: int,
    length: int,
    precision: Precision,
    blocks: int,
    tensor: int = 1,
    context: int = 1,
) -> tuple[int, int]:
    """Bytes that ``blocks`` blocks keep in the forward pass under the config's activation checkpointing, and those that
    one block's recomputation adds for the time of its backward pass."""
    method = config.parallelism.context_parallel_rotate_method
    whole = sum(block_activations(args, rows, length, precision, tensor, context, method).values())
    tokens = rows * length // context
    entry = tokens // tensor * args.dim * precision.param
    if _selects_operations(config):
        # Results of every second product (wq, wv, w1, w2) and of attention, as in TorchTitan.
        query, key = args.n_heads * args.head_dim // tensor, args.n_kv_heads * args.head_dim // tensor
        size = precision.param
        columns = size * (2 * query + key + args.hidden_dim // tensor + args.dim) + 4 * args.n_heads // tensor
        kept = entry + tokens * columns
        return blocks * kept, max(0, whole - kept)
    again = min(blocks, recomputed_blocks(config, args.n_layers) * blocks // args.n_layers)
    return (blocks - again) * whole + again * entry, whole if again else 0


def loss_bytes(rows: int, length: int, columns: int, dim: int, precision: Precision) -> tuple[int, int]:
    """Bytes of the chunked loss (components/loss.py): while it computes, and what it keeps for the backward pass.

    Args:
        columns: of the logits that are computed on this rank.
    """
    tokens, size = rows * length, precision.param
    chunk = min(tokens, CHUNK_TOKENS)
    # Logits, their exponentials and the gradient in param and fp32; of the chunk before, logits and gradient live on.
    logits = chunk * columns * (12 if tokens > chunk else 10) if size == 2 else chunk * columns * 12
    kept = tokens * dim * size + columns * dim * size
    return logits + tokens * dim * size * 2 + columns * dim * 4, kept


@dataclass(frozen=True)
class Stage:
    """A rank's part of a pipeline, or the whole model: its blocks, whether it begins and ends the model, and the number
    of microbatches whose activations it holds at once."""

    blocks: int
    first: bool
    last: bool
    in_flight: int


def _stages(args: Llama3Args, config: JobConfig, dims: ParallelDims) -> Iterator[Stage]:
    """What each rank of a pipeline has."""
    if dims.pipeline == 1:
        yield Stage(args.n_layers, True, True, 1)
        return
    from torchtitan.models.llama3.pipeline import own_stages, schedule_class, split_blocks

    part = config.parallelism
    blocks = split_blocks(args.n_layers, part)
    microbatches = config.training.local_batch_size // part.pipeline_parallel_microbatch_size
    kind = schedule_class(part).__name__
    for rank in range(dims.pipeline):
        own = own_stages(len(blocks), rank, dims.pipeline, part)
        held = microbatches
        if kind == "Schedule1F1B":
            held = min(microbatches, dims.pipeline - rank)
        yield Stage(sum(len(blocks[i]) for i in own), 0 in own, len(blocks) - 1 in own, held)


def memory(
    args: Llama3Args, config: JobConfig, num_gpus: int, tokenizes: bool = True, cuda: bool = True
) -> dict[str, Any]:
    """Peak memory of the GPU that needs most, by moment of a step and by component, in bytes.

    Args:
        tokenizes: recordings become codes during the run, by a codec on each GPU.
        cuda: the kernels are CUDA's; on a CPU RMSNorm keeps more.

    Returns:
        "moments": {moment: {component: bytes}}; "peak": the moment that needs most; "allocated": its sum; "total": with
        CUDA's context and fragmentation; "host": bytes a rank keeps in the CPU's memory when it is offloaded.

    Raises:
        ConfigError: the degrees of parallelism do not fit the number of GPUs or the model.
    """
    dims = ParallelDims.from_config(config, 0, num_gpus)
    check_split(config, args)
    ranks = [_rank_memory(args, config, num_gpus, dims, stage, cuda) for stage in _stages(args, config, dims)]
    codec = _codec_bytes(config) if tokenizes else 0
    worst = max(ranks, key=lambda moments: max(sum(parts.values()) for parts in moments.values()))
    for parts in worst.values():
        parts["codec"] = codec
    peak = max(worst, key=lambda moment: sum(worst[moment].values()))
    allocated = sum(worst[peak].values())
    kept = max(_of_stage(args, dims, stage).kept for stage in _stages(args, config, dims))
    return {
        "moments": worst,
        "peak": peak,
        "allocated": allocated,
        "total": int(allocated * (1 + FRAGMENTATION)) + CONTEXT_BYTES,
        "host": 16 * kept if config.training.enable_cpu_offload else 0,
    }


def _of_stage(args: Llama3Args, dims: ParallelDims, stage: Stage) -> RankParameters:
    return rank_parameters(args, stage.blocks, stage.first, stage.last, dims.tensor, dims.shard * dims.context)


def _codec_bytes(config: JobConfig) -> int:
    clips = max(config.training.local_batch_size, CODEC_CLIPS)
    return CODEC_BYTES + int(min(BATCH_SECONDS["cuda"], clips * config.training.max_seconds) * ACTIVATION_BYTES)


def _rank_memory(
    args: Llama3Args, config: JobConfig, num_gpus: int, dims: ParallelDims, stage: Stage, cuda: bool
) -> dict[str, dict[str, int]]:
    """{moment: {component: bytes}} of one rank."""
    training, parallelism = config.training, config.parallelism
    size, reduce = _BYTES[training.mixed_precision_param], _BYTES[training.mixed_precision_reduce]
    sharded = num_gpus > 1 or training.enable_cpu_offload or size < 4
    precision = Precision(size, reduce, cuda)
    own = _of_stage(args, dims, stage)
    pipelined = dims.pipeline > 1
    rows = parallelism.pipeline_parallel_microbatch_size if pipelined else training.local_batch_size
    length = training.seq_len
    accumulates = accumulation_steps(config, num_gpus) > 1 or (
        pipelined and training.local_batch_size > parallelism.pipeline_parallel_microbatch_size
    )

    # What is there all the time.
    kept = 0 if training.enable_cpu_offload else own.kept
    steps = 4 * own.tensors if kept and cuda and config.optimizer.implementation == "fused" else 0
    longest = max(length, config.validation.seq_len if config.validation.enabled else 0)
    always = {
        "weights (fp32)": 4 * kept,
        "optimizer states (fp32)": 8 * kept + steps,
        "rotary tables": 2 * longest * args.head_dim * 4,
    }
    gradients = 4 * kept

    # Parameters gathered, and cast, by FSDP.
    never = parallelism.fsdp_reshard_after_forward == "never" or (
        pipelined and parallelism.fsdp_reshard_after_forward == "default"
    )
    block, ends = own.block * size, own.ends * size
    weights_held = block * own.blocks if never else min(2, own.blocks) * block
    if not sharded:
        block = ends = weights_held = 0
    unsharded = 0
    if sharded and pipelined and accumulates:  # a pipeline reduces the gradients once, after its last microbatch
        unsharded = own.gathered * reduce

    # Activations.
    tokens = rows * length // (dims.context * dims.tensor)
    per_microbatch, again = kept_activations(
        args, config, rows, length, precision, own.blocks, dims.tensor, dims.context
    )
    final_norm = tokens * (args.dim * (size if cuda else 8) + 4) if stage.last else 0
    passed = tokens * args.dim * size * 2 if pipelined else 0  # hidden states received and sent
    held = stage.in_flight * (per_microbatch + passed) + final_norm
    hidden = args.hidden_dim // dims.tensor
    work = tokens * dims.tensor * size * 2 * hidden + tokens * args.dim * 2 * size

    # The loss.
    columns = -(-args.padded_vocab_size // dims.tensor)
    if training.audio_head:
        columns = min(columns, 2048 * config.model.num_quantizers + 2)
    computing = saved = head_gradient = vocabulary = 0
    if stage.last:
        computing, saved = loss_bytes(rows, length // dims.context, columns, args.dim, precision)
        if parallelism.disable_loss_parallel and dims.tensor > 1:
            computing += min(tokens * dims.tensor, CHUNK_TOKENS) * args.padded_vocab_size * 8
    if own.embedding:
        vocabulary = own.embedding * size
        # FSDP reduces the gradients of embedding, norm and head together, so the head's waits; without it, it stays.
        head_gradient = vocabulary if stage.last and (sharded or not args.tied or not accumulates) else 0

    before = gradients if accumulates else 0
    reducing = own.block * reduce if sharded else 0
    moments = {
        "loss": {
            "gradients (fp32)": before,
            "gathered weights": ends + (weights_held if never else 0),
            "unsharded gradients": unsharded,
            "activations": held,
            "loss": computing,
        },
        "backward of the head": {
            "gradients (fp32)": before,
            "gathered weights": ends + (weights_held if never else block),
            "unsharded gradients": unsharded,
            "activations": held,
            "loss": 2 * saved,
        },
        "backward of the last block": {
            "gradients (fp32)": before,
            "gathered weights": ends + weights_held,
            "unsharded gradients": unsharded + head_gradient + own.block * size + reducing,
            "activations": held + again + work,
        },
        "end of the backward": {
            "gradients (fp32)": gradients,
            "gathered weights": ends + (block * own.blocks if never else 0),
            "unsharded gradients": unsharded + (own.ends * (size + reduce) if sharded else vocabulary),
            "activations": tokens * args.dim * size,
        },
        "update": {
            "gradients (fp32)": gradients,
            "temporary": {"fused": 0, "foreach": gradients, "for-loop": 2 * vocabulary}[config.optimizer.implementation]
            if kept
            else 0,
        },
    }
    return {moment: {**always, **parts} for moment, parts in moments.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Time and storage
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Bounds of the speed, in tokens a second of one GPU, and the seconds of a step behind them.

    Attributes:
        compute: if the GPU reaches the assumed share of its peak.
        communication: if nothing but FSDP's, data-parallel and tensor-parallel traffic took time.
        bound: the lower of both: as if all communication were hidden behind computation.
        bottleneck: "compute" or "communication".
        step_seconds: of a step at that bound.
    """

    compute: float
    communication: float
    bound: float
    bottleneck: str
    step_seconds: float


def traffic(args: Llama3Args, config: JobConfig, num_gpus: int) -> dict[str, float]:
    """Bytes that one GPU receives in a step, by kind, as ring algorithms need at least."""
    dims, part = ParallelDims.from_config(config, 0, num_gpus), config.parallelism
    accumulation = accumulation_steps(config, num_gpus)
    size, reduce = _BYTES[config.training.mixed_precision_param], _BYTES[config.training.mixed_precision_reduce]
    worst = max((_of_stage(args, dims, stage) for stage in _stages(args, config, dims)), key=lambda own: own.gathered)
    ranks = dims.shard * dims.context
    share = (ranks - 1) / ranks
    again = part.fsdp_reshard_after_forward == "always" or (
        part.fsdp_reshard_after_forward == "default" and dims.pipeline == 1
    )
    gathers = accumulation * (2 if again else 1)
    found = {
        "weights gathered": worst.gathered * size * share * gathers,
        "gradients reduced": worst.gathered * reduce * share * accumulation,
        "gradients of copies": 2 * worst.kept * reduce * (dims.replicate - 1) / dims.replicate * accumulation,
    }
    tokens = config.training.local_batch_size * config.training.seq_len // dims.context * accumulation
    if dims.tensor > 1:
        # Each half of a block gathers its input and scatters its output, and both again in the backward pass.
        crossing = 8 * tokens * args.dim * size * (dims.tensor - 1) / dims.tensor
        found["activations of split layers"] = crossing * args.n_layers / dims.pipeline
    if dims.context > 1:
        key = 2 * args.n_kv_heads * args.head_dim // dims.tensor
        found["keys and values of split rows"] = (
            2 * tokens * (dims.context - 1) * key * size * args.n_layers / dims.pipeline
        )
    return {kind: value for kind, value in found.items() if value}


def speed(args: Llama3Args, config: JobConfig, num_gpus: int, gpu: GPU, mfu: float) -> Speed:
    """Bounds of the speed with full rows.

    Args:
        mfu: share of the GPU's peak that the model's FLOPs reach, an assumption.
    """
    tokens = tokens_per_step(config, num_gpus) / num_gpus
    compute = gpu.flops * mfu / flops(args, config)["model"]
    link = gpu.link if num_gpus <= 8 else gpu.network
    received = sum(traffic(args, config, num_gpus).values())
    communication = tokens * link / received if received else math.inf
    bound = min(compute, communication)
    return Speed(
        compute, communication, bound, "compute" if compute <= communication else "communication", tokens / bound
    )


def tokens_per_step(config: JobConfig, num_gpus: int) -> int:
    """Positions of a step, over all ranks, with full rows."""
    degree = ParallelDims.from_config(config, 0, num_gpus).data_degree
    rows = config.training.local_batch_size * accumulation_steps(config, num_gpus) * degree
    return rows * config.training.seq_len


def checkpoint_bytes(args: Llama3Args, weights_only: bool = False, size: int = 4) -> int:
    """Size of a checkpoint: weights and, unless it has only these, two states of the optimizer; fp32."""
    trained = count_parameters(args)["trained"]
    return trained * size if weights_only else 12 * trained


def storage(args: Llama3Args, config: JobConfig, hours: float | None) -> dict[str, int]:
    """Bytes on disk, by what they are for.

    Args:
        hours: of speech in the data, if known.
    """
    saving, found = config.checkpoint, {}
    if saving.enable_checkpoint:
        saved = math.ceil(config.training.steps / saving.interval)
        kept = min(saved, saving.keep_latest_k) if saving.keep_latest_k else saved
        # The new one is written before the oldest is deleted.
        found["one checkpoint"] = checkpoint_bytes(args)
        found[f"checkpoints ({kept} kept, one being written)"] = (kept + 1) * checkpoint_bytes(args)
        found["model in Hugging Face format"] = args.num_params * _BYTES[saving.export_dtype] + TOKENIZER_BYTES
    if hours is not None:
        found["recordings (16 kHz FLAC)"] = int(hours * AUDIO_BYTES_PER_HOUR)
        found["the same as stored codes"] = int(hours * 3600 * FRAMES_PER_SECOND * config.model.num_quantizers * 2)
    return found


def estimate(
    args: Llama3Args,
    config: JobConfig,
    num_gpus: int,
    gpu: GPU,
    mfu: float = 0.4,
    padding: float = 0.0,
    hours: float | None = None,
    tokenizes: bool = True,
) -> dict[str, Any]:
    """All figures of a run, ready for JSON.

    Args:
        padding: share of positions that hold no token.

    Raises:
        ConfigError: the degrees of parallelism do not fit the number of GPUs or the model.
    """
    found = memory(args, config, num_gpus, tokenizes)
    fast = speed(args, config, num_gpus, gpu, mfu)
    steps, positions = config.training.steps, tokens_per_step(config, num_gpus)
    seconds = steps * fast.step_seconds
    tokens = steps * positions * (1 - padding)
    frames = tokens / config.model.num_quantizers
    return {
        "gpus": num_gpus,
        "gpu": asdict(gpu),
        "parameters": count_parameters(args),
        "flops_per_token": flops(args, config),
        "memory": {**found, "available": gpu.memory, "fits": found["total"] <= gpu.memory},
        "advice": [] if found["total"] <= gpu.memory else advice(args, config, num_gpus, gpu, tokenizes),
        "traffic": traffic(args, config, num_gpus),
        "speed": {**asdict(fast), "assumed_mfu": mfu, "total": fast.bound * num_gpus},
        "run": {
            "steps": steps,
            "positions_per_step": positions,
            "tokens": tokens,
            "hours_of_speech": frames / FRAMES_PER_SECOND / 3600,
            "days": seconds / 86_400,
            "gpu_hours": seconds / 3600 * num_gpus,
        },
        "storage": storage(args, config, hours),
    }


def advice(args: Llama3Args, config: JobConfig, num_gpus: int, gpu: GPU, tokenizes: bool) -> list[str]:
    """Single changes with which a run that does not fit would."""
    found = []

    def fits(key: str = "", value: Any = None, gpus: int = num_gpus, tokenizes: bool = tokenizes) -> bool:
        changed = copy.deepcopy(config)
        if key:
            section, name = key.split(".")
            setattr(getattr(changed, section), name, value)
        try:
            return memory(args, changed, gpus, tokenizes)["total"] <= gpu.memory
        except ConfigError:  # such a batch cannot be dealt out to so many
            return False

    if config.activation_checkpoint.mode != "full" and fits("activation_checkpoint.mode", "full"):
        found.append('activation_checkpoint.mode = "full"')
    rows = config.training.local_batch_size
    microbatch = (
        config.parallelism.pipeline_parallel_microbatch_size if config.parallelism.pipeline_parallel_degree > 1 else 1
    )
    while rows % 2 == 0 and (rows := rows // 2) % microbatch == 0:
        if fits("training.local_batch_size", rows):
            found.append(f"training.local_batch_size = {rows} (the same global_batch_size is reached by accumulation)")
            break
    if not config.training.enable_cpu_offload and fits("training.enable_cpu_offload", True):
        found.append("training.enable_cpu_offload = true (slow)")
    if tokenizes and fits(tokenizes=False):
        found.append("codes stored beforehand by scripts/tokenize_dataset.py, so that no codec is needed")
    for more in (2, 4, 8):
        if config.parallelism.data_parallel_shard_degree == -1 and fits(gpus=num_gpus * more):
            found.append(f"{num_gpus * more} GPUs, over which the weights are sharded")
            break
    return found


def table(found: dict[str, Any]) -> str:
    """The figures of :func:`estimate` as text."""
    parameters, memory, speed, run = (found[key] for key in ("parameters", "memory", "speed", "run"))
    tied = "tied to the head" if parameters["tied"] else "and as much again in the head"
    lines = [
        f"Parameters      {parameters['total']:,}  ({parameters['embedding']:,} embedding, {tied}; "
        f"{parameters['blocks']} blocks of {parameters['block']:,})",
        f"FLOPs a token   {found['flops_per_token']['model']:.4g}  (with what is computed again: "
        f"{found['flops_per_token']['hardware']:.4g})",
        "",
        f"Memory of the fullest GPU, at its highest: {memory['peak']}",
    ]
    parts = memory["moments"][memory["peak"]]
    lines += [f"  {name:30s} {size / GIB:8.2f} GiB" for name, size in parts.items() if size]
    lines.append(f"  {'context, fragmentation':30s} {(memory['total'] - memory['allocated']) / GIB:8.2f} GiB")
    verdict = "it fits" if memory["fits"] else "it does NOT fit"
    lines.append(f"  {'in all':30s} {memory['total'] / GIB:8.2f} GiB of {memory['available'] / GIB:.1f} GiB: {verdict}")
    if memory["host"]:
        lines.append(f"  {'in the memory of the CPU':30s} {memory['host'] / GIB:8.2f} GiB a rank")
    if not memory["fits"]:
        lines += [f"  It would with {change}" for change in found["advice"] or ["no single change that is tried here."]]
    lines += [
        "",
        f"Speed, at most, a GPU: {speed['bound']:,.0f} tokens/s (all: {speed['total']:,.0f}), "
        f"bound by {speed['bottleneck']}",
        f"  compute at {speed['assumed_mfu']:.0%} of the peak   {speed['compute']:,.0f} tokens/s",
    ]
    if found["traffic"]:
        lines.append(f"  communication alone         {speed['communication']:,.0f} tokens/s")
        lines += [f"    {name:30s} {size / GIB:8.2f} GiB a step" for name, size in found["traffic"].items()]
    lines += [
        "",
        f"Run: {run['steps']:,} steps of {run['positions_per_step']:,} positions, {run['tokens']:.3g} tokens, "
        f"{run['hours_of_speech']:,.0f} hours of speech",
        f"  at least {run['days']:.2f} days, {run['gpu_hours']:,.0f} GPU hours",
    ]
    if found["storage"]:
        lines += ["", "Storage", *(f"  {name:42s} {size / GIB:8.1f} GiB" for name, size in found["storage"].items())]
    return "\n".join(lines)


def estimate_here(config: JobConfig, ranks: int) -> str:
    """What memory_estimation.enabled prints: the figures of a run on so many ranks, as text.

    Raises:
        UserError: the sizes of the model or the facts of the GPU are not known.
    """
    name = config.memory_estimation.gpu
    if not name:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "H100"
    gpu = find_gpu(name, "memory_estimation.gpu =")
    return f"{ranks} x {gpu.name}\n\n" + table(estimate(model_args(config), config, ranks, gpu))
