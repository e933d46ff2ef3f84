"""A training step here, side by side with the plain way: ``uv run python benchmarks/training_step.py``.

Plain: transformers' LlamaForCausalLM under FSDP2 with one unit a layer and one for the rest, every sample in a row of
its own, padded to the row length, labels = input ids (padding among them), logits whole, AdamW fused.
Ours: the trainer's own step (torchtitan.train.train_step), under the same FSDP2 with the same precision: rows cut to
the longest or, with ``--packing``, of several samples; padding is no target; the loss in chunks.

Both compute ``--batch`` rows a step, of random ids, with samples as long as clips of 3 to 20 s. With ``--packing``, as
many samples are drawn as fit into that many rows. The two run in turn, in processes of their own, so that each has its
own peak memory; batches are made beforehand. On one H200, for the 1.3B:

    python benchmarks/training_step.py --size 1.3B --batch 32 --dtype bfloat16 --compile --packing --steps 10
"""

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import harness
import torch
import torch.distributed as dist
from models import AUDIO_IDS, VOCABULARY, Rows, fill_rows, llama_args, num_ids

from torchtitan.components.dataloader import LENGTH_MULTIPLE, Batch
from torchtitan.datasets.packing import best_fit_decreasing
from torchtitan.models.llama3.args import Llama3Args
from torchtitan.tools.utils import peak_flops


@dataclass
class Options:
    """Sizes of the model and of a step."""

    size: Literal["tiny", "mid", "1.3B", "8B"] = "mid"
    """Size of the model: 768 x 12 layers, or that of Llama-Mimi-1.3B or -8B."""
    layers: int | None = None
    """Number of blocks, if not that of the size."""
    vocabulary: int = VOCABULARY
    """Number of ids; the last 8,194 are those of audio."""
    ranks: int = 1
    """Processes (GPUs, if there are any) that share the work."""
    batch: int = 2
    """Rows of each rank in a step."""
    seq_len: int = 1024
    """Length of the longest row in ids."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of forward and backward passes."""
    packing: bool = False
    """Ours: pack samples into rows."""
    compile: bool = False
    """Compile the blocks, on both sides."""
    activation_checkpoint: Literal["none", "full"] = "none"
    """Activation checkpointing, on both sides."""
    audio_head: bool = False
    """Ours: logits of audio ids alone (training.audio_head). The samples then hold only these."""
    step_in_backward: bool = False
    """Ours: update each weight as soon as its gradient is there (optimizer.early_step_in_backward)."""
    steps: int = 3
    """Measured steps of each turn, after at least two that are not measured."""
    turns: int = 2
    """Times that the two run in turn."""
    ways: list[str] = field(default_factory=lambda: ["plain", "ours"])
    """The ways to run."""
    profile: bool = False
    """Also trace two more steps on a GPU, and report the time of each kind of kernel."""

    def args(self) -> Llama3Args:
        """The sizes of the model."""
        args = llama_args(self.size, self.vocabulary)
        return replace(args, n_layers=self.layers or args.n_layers)


class Way(NamedTuple):
    """One way to do a step: what makes a batch of this rank from the rows of all, and what computes it."""

    batch: Callable[[Rows], Any]
    step: Callable[[Any], None]


class Figures(NamedTuple):
    """What was measured of one way, over all ranks but for the memory.

    Attributes:
        mfu: FLOPs of the samples, and of all computed positions, as a share of the GPUs' peak; None where the peak is
            not known.
        graphs: number of graphs compiled before the timed steps, and during them.
        kernels: see :func:`profile`.
    """

    real_tokens_per_second: float
    positions_per_second: float
    seconds_per_step: float
    mfu_real: float | None
    mfu_positions: float | None
    peak_gib: float
    graphs: tuple[int, int]
    kernels: dict[str, Any] | None = None


def make_rows(options: Options, seed: int, packed: bool) -> Rows:
    """The samples of a step's rows, of all ranks: 3 to 20 s at 50 ids a second, cut to the row length.

    Packed, samples are drawn until they no longer go into so many rows.
    """
    generator = torch.Generator().manual_seed(seed)
    count, lengths = options.batch * options.ranks, []
    rows: list[list[int]] = []
    while len(rows) < count or packed:
        drawn = int(torch.randint(150, 1003, (), generator=generator).clamp(max=options.seq_len))
        found = [[i] for i in range(len(lengths) + 1)]
        if packed:
            found = best_fit_decreasing([*lengths, drawn], options.seq_len)
        if len(found) > count:
            break
        lengths.append(drawn)
        rows = found
    first = options.vocabulary - AUDIO_IDS
    return [[torch.randint(first, options.vocabulary, (lengths[i],), generator=generator) for i in row] for row in rows]


def plain(options: Options, rank: int, device: torch.device) -> Way:
    """transformers' way."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    with device:
        model = LlamaForCausalLM(LlamaConfig(**{**options.args().to_hf(), "use_cache": False})).train()
    if options.activation_checkpoint == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (options.ranks,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, options.dtype), reduce_dtype=torch.float32),
    }
    for layer in model.model.layers:
        if options.compile:
            layer.compile()
        fully_shard(layer, **policy)
    fully_shard([model.model.embed_tokens, model.model.norm, model.lm_head], **policy, reshard_after_forward=False)
    fully_shard(model, **policy)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def batch(rows: Rows) -> torch.Tensor:
        own = rows[rank :: options.ranks]
        ids = torch.zeros(len(own), options.seq_len, dtype=torch.int64, pin_memory=device.type == "cuda")
        for row, (sample,) in zip(ids, own, strict=True):
            row[: sample.numel()] = sample
        return ids

    def step(ids: torch.Tensor) -> None:
        ids = ids.to(device, non_blocking=True)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Way(batch, step)


def make_batch(rows: Rows, options: Options) -> Batch:
    """Rows of samples, as the trainer's loader makes them."""
    longest = max(1, *(sum(sample.numel() for sample in row) for row in rows))
    length = options.seq_len if options.compile else -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    tensors = fill_rows(rows, length)
    if torch.cuda.is_available():
        tensors = tuple(tensor.pin_memory() for tensor in tensors)
    tokens, targets, positions = tensors
    return Batch(tokens, targets, num_ids(rows), {}, positions=positions if options.packing else None)


def make_run(options: Options, rank: int, device: torch.device, folder: Path) -> Any:
    """What torchtitan.train.train_step needs of a Trainer, with random weights."""
    from torchtitan.checkpoint.manager import CheckpointManager
    from torchtitan.components.gradients import FiniteGuard
    from torchtitan.components.optimizer import build_optimizer
    from torchtitan.config.job_config import JobConfig
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.models.llama3.parallel_model import ParallelModel
    from torchtitan.models.llama3.weights import init_random
    from torchtitan.tools.signals import StopRequest

    config = JobConfig()
    training = config.training
    training.seq_len, training.local_batch_size = options.seq_len, options.batch
    training.mixed_precision_param, training.compile = options.dtype, options.compile
    config.activation_checkpoint.mode = options.activation_checkpoint
    config.optimizer.early_step_in_backward = options.step_in_backward
    dims = ParallelDims(shard=options.ranks, rank=rank)
    first_id = options.vocabulary - AUDIO_IDS if options.audio_head else 0
    model = ParallelModel(config, options.args(), dims, device, first_id)
    init_random(model, 0)
    optimizer = build_optimizer(model, config.optimizer)
    group = dist.new_group(backend="gloo")
    return SimpleNamespace(
        inputs=SimpleNamespace(config=config, checkpoints=CheckpointManager(folder)),
        dims=dims,
        device=device,
        data_group=group,
        model=model,
        optimizer=optimizer,
        guard=FiniteGuard(optimizer, device, group),
        stop=StopRequest(),
        schedule_start=0,
        step=0,
        tokens_seen=0,
    )


def ours(options: Options, rank: int, device: torch.device) -> Way:
    """torchtitan.train's way."""
    from torchtitan import train

    run = make_run(options, rank, device, Path("unused"))

    def step(batch: Any) -> None:
        run.step += 1
        train.train_step(run, [batch])

    return Way(lambda rows: make_batch(rows[rank :: options.ranks], options), step)


def measure(name: str, options: Options, rank: int, folder: str) -> Figures:
    """Time the steps of one way on one rank, as one of the processes that work together."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=f"file://{folder}/store-{name}",
        rank=rank,
        world_size=options.ranks,
    )
    try:
        return time_steps(name, options, rank, device)
    finally:
        dist.destroy_process_group()


def time_steps(name: str, options: Options, rank: int, device: torch.device) -> Figures:
    """The figures of one way, once the ranks are connected."""
    from torchtitan.tools.torch_private import compile_counters

    way = {"plain": plain, "ours": ours}[name](options, rank, device)
    packed = name == "ours" and options.packing
    rows = [make_rows(options, seed, packed) for seed in range(options.steps + 2)]
    batches = [way.batch(each) for each in rows]

    def finish() -> None:
        harness.synchronize(device)
        dist.barrier()

    # Compilers and libraries prepare for each shape, so all are met before the clock runs: the length of rows and, if
    # they are packed, the number of their documents, which is rounded up to a power of two.
    shapes: dict[Any, Any] = {0: batches[0], 1: batches[1]}
    if name == "ours":
        shapes |= {(batch.tokens.shape, _num_offsets(batch) if packed else 0): batch for batch in batches}
    for batch in shapes.values():
        way.step(batch)
    finish()
    compiled, begin = compile_counters()["stats"]["unique_graphs"], time.perf_counter()
    for batch in batches[2:]:
        way.step(batch)
    finish()
    seconds = time.perf_counter() - begin
    compiled_later = compile_counters()["stats"]["unique_graphs"] - compiled
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    lengths = [sample.numel() for each in rows[2:] for row in each for sample in row]
    spans = [span for batch in batches[2:] for span in _spans(batch)]
    return Figures(
        real_tokens_per_second=sum(lengths) / seconds,
        positions_per_second=sum(spans) * options.ranks / seconds,
        seconds_per_step=seconds / options.steps,
        mfu_real=mfu(options, lengths, seconds, options.ranks),
        mfu_positions=mfu(options, spans, seconds, 1),
        peak_gib=peak,
        graphs=(compiled, compiled_later),
        kernels=profile(way.step, batches[:2]) if options.profile and device.type == "cuda" else None,
    )


def _num_offsets(batch: Any) -> int:
    """The number of documents of a packed batch, rounded as torchtitan.models.llama3.attention does; at least 2."""
    return max(2, 1 << (int((batch.positions == 0).sum()) - 1).bit_length())


def _spans(batch: Any) -> list[int]:
    """The lengths that attention spans in a batch of either way: of rows or, packed, of documents, with padding."""
    ids = batch if isinstance(batch, torch.Tensor) else batch.tokens
    if ids is batch or batch.positions is None:
        return [ids.shape[1]] * ids.shape[0]
    starts = (batch.positions == 0).flatten().nonzero()[:, 0]
    return starts.diff(append=starts.new_tensor([ids.numel()])).tolist()


# Kinds of kernels, and the parts of names that tell them; the first kind that fits counts.
KINDS = {
    "fused by the compiler": ("triton",),  # whose names tell what was fused
    "attention": ("flash", "fmha", "attention"),
    "communication": ("nccl",),
    "optimizer": ("adam",),
    "matrix products": ("gemm", "cutlass", "cublas", "nvjet", "xmma", "matmul"),
    "copies": ("memcpy", "memset", "copy"),
    "elementwise and reductions": ("elementwise", "reduce", "softmax", "index", "scatter", "gather", "norm"),
}


def kind_of(kernel: str) -> str:
    """The kind of a kernel with this name."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profile(step: Callable[[Any], None], batches: list[Any]) -> dict[str, Any]:
    """Seconds a step by kind of kernel, seconds in which the GPU was idle, and the ten kernels that took longest."""
    from torch.profiler import ProfilerActivity

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        begin = time.perf_counter()
        for batch in batches:
            step(batch)
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    taken: dict[str, float] = {}
    for event in profiler.key_averages():
        # Ranges named by FSDP and the optimizers are not kernels.
        named = getattr(event, "is_user_annotation", False)
        if event.device_type != torch.autograd.DeviceType.CPU and not named and event.self_device_time_total:
            taken[event.key] = taken.get(event.key, 0.0) + event.self_device_time_total / 1e6 / len(batches)
    kinds: dict[str, float] = {}
    for kernel, seconds in taken.items():
        kinds[kind_of(kernel)] = kinds.get(kind_of(kernel), 0.0) + seconds
    longest = sorted(taken, key=lambda kernel: -taken[kernel])[:10]
    return {
        "seconds_by_kind": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "seconds_idle": max(0.0, wall / len(batches) - sum(kinds.values())),
        "longest": {kernel[:100]: taken[kernel] for kernel in longest},
    }


def mfu(options: Options, spans: list[int], seconds: float, gpus: int) -> float | None:
    """FLOPs of training on documents of these lengths, as a share of the GPUs' peak: 6 N + 12 L H T a token (PaLM,
    arXiv 2204.02311, appendix B)."""
    if not torch.cuda.is_available() or (peak := peak_flops(torch.device("cuda", 0))) is None:
        return None
    args = options.args()
    flops = sum(span * args.flops_per_token(span) for span in spans)
    return flops / (seconds * peak * gpus)


def measure_alone(name: str, options: Options, rank: int, folder: str) -> Figures:
    """:func:`measure` in a process of its own, with this rank's share of the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.ranks))
    return measure(name, options, rank, folder)


def run_once(name: str, options: Options) -> Figures:
    """One turn of one way; the figures of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        calls = [(name, options, rank, folder) for rank in range(options.ranks)]
        return harness.in_processes(measure_alone, *calls)[0]


def main(options: Options) -> None:
    """Run both ways in turn and print the medians and their ratio as JSON."""

    def progress(figures: Figures) -> str:
        return f"{figures.real_tokens_per_second:.1f} real tokens/s, peak {figures.peak_gib:.2f} GiB a rank"

    ways = {name: partial(run_once, name, options) for name in options.ways}
    measured = harness.in_turns(ways, options.turns, progress)
    report: dict[str, Any] = {
        name: sorted(turns, key=lambda turn: turn.seconds_per_step)[len(turns) // 2]._asdict()
        for name, turns in measured.items()
    }
    if len(measured) == 2:
        speed = {name: statistics.median(turn.real_tokens_per_second for turn in measured[name]) for name in measured}
        report["speed_ratio"] = speed["ours"] / speed["plain"]
        report["memory_ratio"] = report["ours"]["peak_gib"] / report["plain"]["peak_gib"]
    harness.report(report, options)


if __name__ == "__main__":
    harness.run(main, Options, __doc__)
