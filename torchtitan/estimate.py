"""What a run needs, before it is started: parameters, FLOPs, memory of a GPU, time, storage.

Arithmetic on the sizes of a model, a config, a number of GPUs and the data sheet of one; nothing is allocated, and no
GPU or process group is needed. docs/estimate.md explains each figure. Memory is that of the rank that needs most, at
the moment of a step at which it needs most.
"""

import copy
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchtitan.audio.codec import ACTIVATION_BYTES, BATCH_SECONDS
from torchtitan.config.job_config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims, accumulation_steps
from torchtitan.models.base import DEBUG_SIZES, BaseModel
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.models.llama3.parallel_model import check_split
from torchtitan.models.loss import CHUNK_TOKENS
from torchtitan.tools.errors import ConfigError, UserError
from torchtitan.tools.utils import DTYPES, peak_flops_of

GIB = 2**30
ONE_RANK = ParallelDims()

# Assumptions that are no property of the model or the config.
CONTEXT_BYTES = int(1.5 * GIB)  # CUDA context, cuBLAS workspaces, NCCL buffers
FRAGMENTATION = 0.05  # of what is allocated: memory that the allocator holds and cannot use
CODEC_BYTES = 96_100_000 * 4  # kyutai/mimi in fp32, codebooks included
CODEC_CLIPS = 32  # minimum number of clips in a GPU batch
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


GPUS = {
    name: GPU(name, int(gib * GIB), peak_flops_of(name) or 0.0, terabytes * 1e12, link * 1e9, network * 1e9)
    for name, gib, terabytes, link, network in (
        ("B200", 178.3, 8.0, 900, 50),
        ("H200", 139.8, 4.8, 450, 50),
        ("H100", 79.1, 3.35, 450, 50),
        ("H100 PCIe", 79.1, 2.0, 64, 25),
        ("A100 80GB", 79.1, 2.039, 300, 25),
        ("A100 40GB", 39.4, 1.555, 300, 25),
        ("L40S", 44.4, 0.864, 32, 12.5),
        ("RTX 4090", 23.5, 1.008, 32, 12.5),
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


def _llama31(*sizes: int, factor: float, tied: bool) -> Llama3Args:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    return Llama3Args(128_256, *sizes, rope_scaling=scaling, max_seq_len=131_072, tied=tied)


MODEL_SIZES = {
    "1.3B": _llama31(2048, 16, 32, 8, 64, 8192, factor=32.0, tied=True),
    "8B": _llama31(4096, 32, 32, 8, 128, 14_336, factor=8.0, tied=False),
}
# Hub names whose sizes are built in, so that they need not be downloaded.
_SIZE_OF = {"meta-llama/Llama-3.2-1B": "1.3B", "llm-jp/Llama-Mimi-1.3B": "1.3B", "meta-llama/Llama-3.1-8B": "8B"}


def built_in_size(name: str, num_quantizers: int) -> Llama3Args | None:
    """Sizes of a Llama 3 by "1.3B", "8B" or hub name, extended by the audio tokens; None if they are not built in."""
    args = MODEL_SIZES.get(_SIZE_OF.get(name, name))
    return args and replace(args, vocab_size=args.vocab_size + 2048 * num_quantizers + 2)


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
    config.model.pretrained = False
    return BaseModel.load(config.model).args


# --- parameters


def count_parameters(args: Llama3Args) -> dict[str, Any]:
    """Parameters of a model, by part; the alignment rows are trained along and counted apart."""
    vocabulary = args.vocab_size * args.dim
    padding = (args.padded_vocab_size - args.vocab_size) * args.dim * (1 if args.tied else 2)
    block = sum(math.prod(shape) for shape in _block_shapes(args))
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


def _tensor_part(args: Llama3Args, tensor: int) -> Llama3Args:
    """Sizes of the blocks on one of ``tensor`` ranks that split their layers."""
    heads, kv_heads, hidden = (n // tensor for n in (args.n_heads, args.n_kv_heads, args.hidden_dim))
    return replace(args, n_heads=heads, n_kv_heads=kv_heads, hidden_dim=hidden)


def _block_shapes(args: Llama3Args) -> list[tuple[int, ...]]:
    """Shapes of a block's parameters."""
    query, key = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    attention = [(query, args.dim), (key, args.dim), (key, args.dim), (args.dim, query)]
    feed_forward = [(args.hidden_dim, args.dim), (args.dim, args.hidden_dim), (args.hidden_dim, args.dim)]
    return [*attention, *feed_forward, (args.dim,), (args.dim,)]


def _local(shape: tuple[int, ...], ranks: int) -> int:
    """Elements of a parameter on the first of ``ranks`` ranks over which its rows are sharded."""
    return -(-shape[0] // ranks) * math.prod(shape[1:])


@dataclass(frozen=True)
class RankParameters:
    """A rank's part of the model, in numbers of parameters.

    Attributes:
        kept: what it keeps of all: weights, gradients and optimizer states have this size.
        tensors: number of its parameter tensors.
        block: of one block, gathered from the ranks over which it is sharded. Tensor-parallel parts are not gathered.
        blocks: number of its blocks.
        ends: of embedding, final norm and head, gathered.
        embedding: rows x columns of the vocabulary parameter it has at either end, 0 without.
        last: whether it has the head.
        in_flight: microbatches whose activations it holds at once.
    """

    kept: int
    tensors: int
    block: int
    blocks: int
    ends: int
    embedding: int
    last: bool
    in_flight: int

    @property
    def gathered(self) -> int:
        return self.blocks * self.block + self.ends


def rank_parameters(
    args: Llama3Args,
    blocks: int,
    first: bool = True,
    last: bool = True,
    dims: ParallelDims = ONE_RANK,
    in_flight: int = 1,
) -> RankParameters:
    """The part of a rank with so many blocks, the beginning and the end of the model.

    Exact for the rank that has most (rows that cannot be dealt out evenly go to the first ranks).
    """
    shard = dims.shard * dims.context
    vocabulary = (-(-args.padded_vocab_size // dims.tensor), args.dim)
    block = _block_shapes(_tensor_part(args, dims.tensor))
    embeddings = first + (last and not (args.tied and first))
    own_block = sum(_local(shape, shard) for shape in block)
    own_ends = embeddings * _local(vocabulary, shard) + last * _local((args.dim,), shard)
    return RankParameters(
        kept=blocks * own_block + own_ends,
        tensors=blocks * len(block) + embeddings + last,
        block=shard * own_block,
        blocks=blocks,
        ends=shard * own_ends,
        embedding=math.prod(vocabulary) if first or last else 0,
        last=last,
        in_flight=in_flight,
    )


def _parts(args: Llama3Args, config: JobConfig, dims: ParallelDims) -> list[RankParameters]:
    """What each rank of a pipeline has; without one the only part is the whole model."""
    if dims.pipeline == 1:
        return [rank_parameters(args, args.n_layers, dims=dims)]
    from torchtitan.models.llama3.pipeline import own_stages, schedule_class, split_blocks

    part = config.parallelism
    blocks = split_blocks(args.n_layers, part)
    microbatches = config.training.local_batch_size // part.pipeline_parallel_microbatch_size
    found = []
    for rank in range(dims.pipeline):
        own = own_stages(len(blocks), rank, dims.pipeline, part)
        in_flight = microbatches
        if schedule_class(part).__name__ == "Schedule1F1B":
            in_flight = min(microbatches, dims.pipeline - rank)
        count = sum(len(blocks[i]) for i in own)
        found.append(rank_parameters(args, count, 0 in own, len(blocks) - 1 in own, dims, in_flight))
    return found


# --- FLOPs


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


# --- memory


def block_activations(
    args: Llama3Args,
    rows: int,
    length: int,
    size: int,
    dims: ParallelDims = ONE_RANK,
    context_method: str = "allgather",
    cuda: bool = True,
) -> int:
    """Bytes that one block keeps for its backward pass, for ``rows`` of ``length`` ids, on one rank.

    The tensors that autograd saves in TransformerBlock.forward, each storage once. Sequence parallelism splits the
    residual stream and the norms over the tensor-parallel ranks; what projections read is gathered.

    Args:
        size: bytes of an element in forward and backward passes.
        cuda: the kernels are CUDA's: a fused RMSNorm, and flash attention for 16 bits only.
    """
    tokens, own = rows * length // dims.context, _tensor_part(args, dims.tensor)
    query, key = own.n_heads * own.head_dim, own.n_kv_heads * own.head_dim
    # The fused kernel keeps its input; the composite one an fp32 copy of it and the result. Both keep the scale.
    norm = tokens // dims.tensor * ((size if cuda else 8) * args.dim + 4)
    if cuda and size == 4 and query != key:  # neither flash (16 bits) nor the efficient kernel (no groups)
        attention = tokens * 4 * (3 * query + own.n_heads * length)
    else:
        attention = tokens * (size * (query + 2 * key) + 4 * own.n_heads)
    output = tokens * query * size
    if dims.context > 1:
        output *= 2  # before and after the parts are put together
        if context_method == "allgather":  # keys and values of whole rows, and which of them a query sees
            attention += tokens * size * 2 * key * (dims.context - 1) + length * length // dims.context
    inputs, feed_forward = 2 * tokens * args.dim * size, 4 * tokens * own.hidden_dim * size
    return 2 * norm + inputs + attention + output + feed_forward


def kept_activations(
    args: Llama3Args,
    config: JobConfig,
    rows: int,
    length: int,
    size: int,
    blocks: int,
    dims: ParallelDims = ONE_RANK,
    cuda: bool = True,
) -> tuple[int, int]:
    """Bytes that ``blocks`` blocks keep in the forward pass under the config's activation checkpointing, and those that
    one block's recomputation adds for the time of its backward pass."""
    method = config.parallelism.context_parallel_rotate_method
    whole = block_activations(args, rows, length, size, dims, method, cuda)
    tokens = rows * length // dims.context
    entry = tokens // dims.tensor * args.dim * size
    if _selects_operations(config):
        # Results of every second product (wq, wv, w1, w2) and of attention, as in TorchTitan.
        own = _tensor_part(args, dims.tensor)
        columns = (2 * own.n_heads + own.n_kv_heads) * own.head_dim + own.hidden_dim + own.dim
        kept = entry + tokens * (size * columns + 4 * own.n_heads)
        return blocks * kept, max(0, whole - kept)
    again = min(blocks, recomputed_blocks(config, args.n_layers) * blocks // args.n_layers)
    return (blocks - again) * whole + again * entry, whole if again else 0


def loss_bytes(rows: int, length: int, columns: int, dim: int, size: int) -> tuple[int, int]:
    """Bytes of the chunked loss (models/loss.py): while it computes, and what it keeps for the backward pass.

    Args:
        columns: of the logits that are computed on this rank.
        size: bytes of an element.
    """
    tokens = rows * length
    chunk = min(tokens, CHUNK_TOKENS)
    # Logits, their exponentials and the gradient in param and fp32; of the chunk before, logits and gradient live on.
    logits = chunk * columns * (10 if size == 2 and tokens <= chunk else 12)
    return logits + tokens * dim * size * 2 + columns * dim * 4, (tokens + columns) * dim * size


def memory(args: Llama3Args, config: JobConfig, num_gpus: int, tokenizes: bool = True) -> dict[str, Any]:
    """Peak memory of the GPU that needs most, by moment of a step and by component, in bytes.

    Args:
        tokenizes: recordings become codes during the run, by a codec on each GPU.

    Returns:
        "moments": {moment: {component: bytes}}; "peak": the moment that needs most; "allocated": its sum; "total": with
        CUDA's context and fragmentation; "host": bytes a rank keeps in the CPU's memory when it is offloaded.

    Raises:
        ConfigError: the degrees of parallelism do not fit the number of GPUs or the model.
    """
    training, dims = config.training, ParallelDims.from_config(config, 0, num_gpus)
    check_split(config, args)
    parts = _parts(args, config, dims)
    moments = max(
        (_moments(args, config, num_gpus, dims, own) for own in parts),
        key=lambda moments: max(sum(components.values()) for components in moments.values()),
    )
    seconds = min(BATCH_SECONDS["cuda"], max(training.local_batch_size, CODEC_CLIPS) * training.max_seconds)
    for components in moments.values():
        components["codec"] = CODEC_BYTES + int(seconds * ACTIVATION_BYTES) if tokenizes else 0
    peak = max(moments, key=lambda moment: sum(moments[moment].values()))
    allocated = sum(moments[peak].values())
    return {
        "moments": moments,
        "peak": peak,
        "allocated": allocated,
        "total": int(allocated * (1 + FRAGMENTATION)) + CONTEXT_BYTES,
        "host": 16 * max(own.kept for own in parts) if training.enable_cpu_offload else 0,
    }


def _moments(
    args: Llama3Args, config: JobConfig, num_gpus: int, dims: ParallelDims, own: RankParameters
) -> dict[str, dict[str, int]]:
    """{moment: {component: bytes}} of one rank, without the codec."""
    training, parallelism, length = config.training, config.parallelism, config.training.seq_len
    size, reduce = DTYPES[training.mixed_precision_param].itemsize, DTYPES[training.mixed_precision_reduce].itemsize
    sharded = num_gpus > 1 or training.enable_cpu_offload or size < 4
    pipelined = dims.pipeline > 1
    rows = parallelism.pipeline_parallel_microbatch_size if pipelined else training.local_batch_size
    accumulates = accumulation_steps(config, num_gpus) > 1 or training.local_batch_size > rows

    # What is there all the time.
    kept = 0 if training.enable_cpu_offload else own.kept
    steps = 4 * own.tensors if kept and config.optimizer.implementation == "fused" else 0
    longest = max(length, config.validation.seq_len if config.validation.enabled else 0)
    always = {
        "weights (fp32)": 4 * kept,
        "optimizer states (fp32)": 8 * kept + steps,
        "rotary tables": 2 * longest * args.head_dim * 4,
    }
    gradients = 4 * kept
    before = gradients if accumulates else 0

    # Parameters gathered, and cast, by FSDP.
    reshard = parallelism.fsdp_reshard_after_forward
    never = reshard == "never" or (reshard == "default" and pipelined)
    block, ends = (own.block * size, own.ends * size) if sharded else (0, 0)
    all_blocks = block * own.blocks
    # A pipeline reduces the gradients once, after its last microbatch.
    unsharded = own.gathered * reduce if sharded and pipelined and accumulates else 0

    # Activations.
    tokens = rows * length // (dims.context * dims.tensor)
    per_microbatch, again = kept_activations(args, config, rows, length, size, own.blocks, dims)
    final_norm = tokens * (args.dim * size + 4) if own.last else 0
    passed = tokens * args.dim * size * 2 if pipelined else 0  # hidden states received and sent
    held = own.in_flight * (per_microbatch + passed) + final_norm
    work = 2 * tokens * size * (args.hidden_dim // dims.tensor * dims.tensor + args.dim)

    # The loss.
    vocabulary = own.embedding * size
    computing = saved = head_gradient = 0
    if own.last:
        columns = -(-args.padded_vocab_size // dims.tensor)
        if training.audio_head:
            columns = min(columns, 2048 * config.model.num_quantizers + 2)
        computing, saved = loss_bytes(rows, length // dims.context, columns, args.dim, size)
        if parallelism.disable_loss_parallel and dims.tensor > 1:
            computing += min(tokens * dims.tensor, CHUNK_TOKENS) * args.padded_vocab_size * 8
        # FSDP reduces the gradients of embedding, norm and head together, so the head's waits; without it, it stays.
        head_gradient = vocabulary if sharded or not args.tied or not accumulates else 0

    last_block = unsharded + head_gradient + own.block * (size + (reduce if sharded else 0))
    ended = unsharded + (own.ends * (size + reduce) if sharded else vocabulary)
    components = ("gradients (fp32)", "gathered weights", "unsharded gradients", "activations", "loss")
    moments = {
        "loss": (before, ends + (all_blocks if never else 0), unsharded, held, computing),
        "backward of the head": (before, ends + (all_blocks if never else block), unsharded, held, 2 * saved),
        "backward of the last block": (
            *(before, ends + (all_blocks if never else min(2, own.blocks) * block)),
            *(last_block, held + again + work),
        ),
        "end of the backward": (gradients, ends + (all_blocks if never else 0), ended, tokens * args.dim * size),
    }
    found = {moment: {**always, **dict(zip(components, sizes, strict=False))} for moment, sizes in moments.items()}
    temporary = {"fused": 0, "foreach": gradients, "for-loop": 2 * vocabulary}[config.optimizer.implementation]
    found["update"] = {**always, "gradients (fp32)": gradients, "temporary": temporary if kept else 0}
    return found


# --- time and storage


def traffic(args: Llama3Args, config: JobConfig, num_gpus: int) -> dict[str, float]:
    """Bytes that one GPU receives in a step, by kind, as ring algorithms need at least."""
    dims, accumulation = ParallelDims.from_config(config, 0, num_gpus), accumulation_steps(config, num_gpus)
    training = config.training
    size, reduce = DTYPES[training.mixed_precision_param].itemsize, DTYPES[training.mixed_precision_reduce].itemsize
    own = max(_parts(args, config, dims), key=lambda part: part.gathered)
    ranks, reshard = dims.shard * dims.context, config.parallelism.fsdp_reshard_after_forward
    share = (ranks - 1) / ranks
    gathers = accumulation * (2 if reshard == "always" or (reshard == "default" and dims.pipeline == 1) else 1)
    tokens = training.local_batch_size * training.seq_len // dims.context * accumulation
    # Each half of a block gathers its input and scatters its output, and both again in the backward pass.
    crossing = 8 * tokens * args.dim * size * (dims.tensor - 1) / dims.tensor
    keys = 2 * args.n_kv_heads * args.head_dim // dims.tensor
    found = {
        "weights gathered": own.gathered * size * share * gathers,
        "gradients reduced": own.gathered * reduce * share * accumulation,
        "gradients of copies": 2 * own.kept * reduce * (dims.replicate - 1) / dims.replicate * accumulation,
        "activations of split layers": crossing * args.n_layers / dims.pipeline,
        "keys and values of split rows": 2 * tokens * (dims.context - 1) * keys * size * args.n_layers / dims.pipeline,
    }
    return {kind: value for kind, value in found.items() if value}


def speed(args: Llama3Args, config: JobConfig, num_gpus: int, gpu: GPU, mfu: float) -> dict[str, Any]:
    """Bounds of the speed with full rows, in tokens a second of one GPU.

    Args:
        mfu: share of the GPU's peak that the model's FLOPs reach, an assumption.

    Returns:
        "compute": at that share of the peak; "communication": if nothing but traffic took time; "bound": the lower of
        both, as if one were hidden behind the other; "bottleneck": which one that is; "step_seconds": of a step.
    """
    tokens = tokens_per_step(config, num_gpus) / num_gpus
    compute = gpu.flops * mfu / flops(args, config)["model"]
    received = sum(traffic(args, config, num_gpus).values())
    communication = tokens * (gpu.link if num_gpus <= 8 else gpu.network) / received if received else math.inf
    bound = min(compute, communication)
    return {
        "compute": compute,
        "communication": communication,
        "bound": bound,
        "bottleneck": "compute" if compute <= communication else "communication",
        "step_seconds": tokens / bound,
    }


def tokens_per_step(config: JobConfig, num_gpus: int) -> int:
    """Positions of a step, over all ranks, with full rows."""
    degree = ParallelDims.from_config(config, 0, num_gpus).data_degree
    rows = config.training.local_batch_size * accumulation_steps(config, num_gpus) * degree
    return rows * config.training.seq_len


def checkpoint_bytes(args: Llama3Args) -> int:
    """Size of a checkpoint: weights and two states of the optimizer, fp32."""
    return 12 * count_parameters(args)["trained"]


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
        exported = args.num_params * DTYPES[saving.export_dtype].itemsize
        found["model in Hugging Face format"] = exported + TOKENIZER_BYTES
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
    hours_needed = steps * fast["step_seconds"] / 3600
    tokens = steps * positions * (1 - padding)
    return {
        "gpus": num_gpus,
        "gpu": asdict(gpu),
        "parameters": count_parameters(args),
        "flops_per_token": flops(args, config),
        "memory": {**found, "available": gpu.memory, "fits": found["total"] <= gpu.memory},
        "advice": [] if found["total"] <= gpu.memory else advice(args, config, num_gpus, gpu, tokenizes),
        "traffic": traffic(args, config, num_gpus),
        "speed": {**fast, "assumed_mfu": mfu, "total": fast["bound"] * num_gpus},
        "run": {
            "steps": steps,
            "positions_per_step": positions,
            "tokens": tokens,
            "hours_of_speech": tokens / config.model.num_quantizers / FRAMES_PER_SECOND / 3600,
            "days": hours_needed / 24,
            "gpu_hours": hours_needed * num_gpus,
        },
        "storage": storage(args, config, hours),
    }


def advice(args: Llama3Args, config: JobConfig, num_gpus: int, gpu: GPU, tokenizes: bool) -> list[str]:
    """Single changes with which a run that does not fit would."""

    def fits(key: str = "", value: Any = None, gpus: int = num_gpus, tokenizes: bool = tokenizes) -> bool:
        changed = copy.deepcopy(config)
        if key:
            section, name = key.split(".")
            setattr(getattr(changed, section), name, value)
        try:
            return memory(args, changed, gpus, tokenizes)["total"] <= gpu.memory
        except ConfigError:  # such a batch cannot be dealt out to so many
            return False

    part, rows = config.parallelism, config.training.local_batch_size
    multiple = part.pipeline_parallel_microbatch_size if part.pipeline_parallel_degree > 1 else 1
    halves = [rows >> n for n in range(1, rows.bit_length()) if rows % (multiple << n) == 0]
    found = []
    if fits("activation_checkpoint.mode", "full"):
        found.append('activation_checkpoint.mode = "full"')
    if fewer := next((rows for rows in halves if fits("training.local_batch_size", rows)), None):
        found.append(f"training.local_batch_size = {fewer} (the same global_batch_size is reached by accumulation)")
    if fits("training.enable_cpu_offload", True):
        found.append("training.enable_cpu_offload = true (slow)")
    if fits(tokenizes=False):
        found.append("codes stored beforehand by scripts/tokenize_dataset.py, so that no codec is needed")
    if more := next((num_gpus * n for n in (2, 4, 8) if fits(gpus=num_gpus * n)), None):
        found.append(f"{more} GPUs, over which the weights are sharded")
    return found


def table(found: dict[str, Any]) -> str:
    """The figures of :func:`estimate` as text."""
    parameters, memory, speed, run = (found[key] for key in ("parameters", "memory", "speed", "run"))
    tied = "tied to the head" if parameters["tied"] else "and as much again in the head"
    parts = {name: size for name, size in memory["moments"][memory["peak"]].items() if size}
    parts["context, fragmentation"] = memory["total"] - memory["allocated"]
    verdict = "it fits" if memory["fits"] else "it does NOT fit"
    lines = [
        f"Parameters      {parameters['total']:,}  ({parameters['embedding']:,} embedding, {tied}; "
        f"{parameters['blocks']} blocks of {parameters['block']:,})",
        f"FLOPs a token   {found['flops_per_token']['model']:.4g}  (with what is computed again: "
        f"{found['flops_per_token']['hardware']:.4g})",
        "",
        f"Memory of the fullest GPU, at its highest: {memory['peak']}",
        *(f"  {name:30s} {size / GIB:8.2f} GiB" for name, size in parts.items()),
        f"  {'in all':30s} {memory['total'] / GIB:8.2f} GiB of {memory['available'] / GIB:.1f} GiB: {verdict}",
    ]
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
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "H100"
    gpu = find_gpu(config.memory_estimation.gpu or here, "memory_estimation.gpu =")
    return f"{ranks} x {gpu.name}\n\n" + table(estimate(model_args(config), config, ranks, gpu))
